"""Blocks come to the device when they run, ahead of it, and only then; nothing goes back but gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetrainers.engines.base import replace_tensors
from finetrainers.memory import streaming
from finetrainers.memory.lane import Lane
from finetrainers.memory.layout import Footprint, footprint, lay_out, spread
from finetrainers.memory.streaming import BlockStream, is_parked
from tests.memory.stack import WIDTH, Stack, make_stack

CPU, META = torch.device("cpu"), torch.device("meta")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = {"adapters": True, "whole": False}


def streamed(model: Stack, device: torch.device, *, count: int = 6, **settings: Any) -> BlockStream:
    """Park so many of a model's blocks, bring the rest to the device, and start."""
    stream = BlockStream(spread(list(model.blocks), count), device=device, **settings)
    for block in stream.blocks:
        stream.park(block)
    replace_tensors(model, lambda tensor: tensor.to(device, copy=True))
    stream.start()
    return stream


def inputs(device: torch.device, passes: int, *, size: int = 4, width: int = WIDTH) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    for number in range(passes):
        yield torch.randn(size + number % 2, width, generator=generator).to(device)


def train(
    model: nn.Module,
    device: torch.device,
    *,
    steps: int = 3,
    accumulation: int = 2,
    settle: Callable[[], None] = lambda: None,
    **sizes: int,
) -> list[Any]:
    """A few optimizer steps; every loss, and every gradient before its step, on the host. `settle` waits until all
    gradients have arrived."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=1e-2, fused=True)
    seen: list[Any] = []
    for number, x in enumerate(inputs(device, steps * accumulation, **sizes)):
        loss = model(x).square().mean()
        loss.backward()
        seen.append(loss.detach())
        if number % accumulation == accumulation - 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            settle()
            seen.extend(each.grad.clone() for each in moving)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return [each.cpu() for each in seen]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "ring"), [(6, 2), (3, 2), (6, 1), (6, 3), (5, 3), (1, 2)])
def test_streamed_stack_is_the_plain_one(kind, device, count, ring):
    device, adapted = torch.device(device), KINDS[kind]
    plain, model = make_stack(adapted=adapted).to(device), make_stack(adapted=adapted)
    stream = streamed(model, device, count=count, ring=ring, trained_too=not adapted)
    if adapted or device.type == "cpu":
        assert_equal(train(model, device), train(plain, device))
        assert state(model).keys() == state(plain).keys()
        assert_equal(list(state(model).values()), list(state(plain).values()))
    else:  # The optimizer's arithmetic on the host is not that of the device.
        for ours, theirs in zip(train(model, device), train(plain, device), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert stream.returns == 0 if adapted else stream.returns > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "ring"), [(6, 2), (4, 2), (6, 3), (6, 1), (2, 2)])
def test_each_block_is_loaded_once_forward_and_once_backward_less_what_is_there(device, count, ring):
    model = make_stack(adapted=True)
    stream = streamed(model, torch.device(device), count=count, ring=ring)
    counts = []
    for x in inputs(torch.device(device), 3):
        before = stream.loads
        model(x).mean().backward()
        counts.append(stream.loads - before)
    assert counts == [2 * count - ring, 2 * (count - ring), 2 * (count - ring)]
    assert stream.returns == 0


class LateLane(Lane):
    """A lane as slow as can be: a copy is made when somebody waits for it, reads what is there by then, and drags along
    those before it."""

    def __init__(self, device: torch.device, *, is_late: bool) -> None:
        super().__init__(device)
        self.is_late = is_late
        self.queue: list[Callable[[], None]] = []
        self.done = 0

    def copy(self, target: Tensor, source: Tensor, *, after: Any = None) -> Any:
        def run() -> None:
            if after is not None:
                after()
            target.copy_(source)

        self.count += 1
        self.queue.append(run)
        if not self.is_late:
            self.run_to(len(self.queue))
        return partial(self.run_to, len(self.queue))

    def run_to(self, number: int) -> None:
        while self.done < number:
            self.done += 1
            self.queue[self.done - 1]()

    def wait(self, arrival: Any) -> None:
        if arrival is not None:
            arrival()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(("count", "ring"), [(6, 2), (3, 2), (6, 1), (6, 3)])
def test_late_copies_are_waited_for(monkeypatch, kind, late, count, ring):
    """To the device, to the host, or both ways."""
    adapted, lanes = KINDS[kind], []

    def make_lane(device: torch.device) -> Lane:
        lanes.append(LateLane(device, is_late=late[len(lanes)]))
        return lanes[-1]

    monkeypatch.setattr(streaming, "Lane", make_lane)
    model = make_stack(adapted=adapted)
    streamed(model, CPU, count=count, ring=ring, trained_too=not adapted)
    ours = train(model, CPU, settle=lambda: [lane.run_to(len(lane.queue)) for lane in lanes])
    assert len(lanes) == 2 and all(lane.queue or adapted for lane in lanes)
    assert_equal(ours, train(make_stack(adapted=adapted), CPU))


def test_trained_blocks_are_loaded_anew_each_pass_and_each_gradient_goes_home_once():
    model = make_stack(adapted=False)
    stream = streamed(model, CPU, trained_too=True)
    num_tensors = sum(1 for _ in model.blocks.parameters())
    first, second = inputs(CPU, 2)
    model(first).mean().backward()
    assert (stream.loads, stream.returns) == (6 + 4, num_tensors)
    model(second).mean().backward()
    assert (stream.loads, stream.returns) == (2 * (6 + 4) + 6, 2 * num_tensors), "gradients are fetched to be added to"


def test_the_next_block_is_on_its_way_before_a_block_runs():
    model = make_stack(adapted=True)
    stream = streamed(model, CPU)
    seen: list[set[int | None]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(set(stream.on_device)))
    model(next(inputs(CPU, 1))).mean().backward()
    forward = [{number, number + 1} for number in range(5)] + [{4, 5}]
    assert seen == forward + [{4, 5}] + [{number - 1, number} for number in range(4, 0, -1)] + [{0, 1}]
    seen.clear()
    with torch.no_grad():
        model(next(inputs(CPU, 1)))
    assert seen == [*forward[:-1], {0, 5}], "sampling goes on with the first"


@pytest.mark.parametrize("kind", KINDS)
def test_without_checkpointing_torch_refuses(kind):
    model = make_stack(adapted=KINDS[kind])
    model.checkpointing = False
    streamed(model, CPU, trained_too=not KINDS[kind])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(next(inputs(CPU, 1))).square().mean().backward()


@pytest.mark.parametrize("count", [6, 3])
def test_no_weight_of_a_block_is_used_from_the_host(count):
    """The meta device is not the host's, and torch refuses to mix them."""
    model = make_stack(adapted=True)
    streamed(model, META, count=count)
    for _ in range(2):
        loss = model(torch.empty(4, WIDTH, device=META)).mean()
        loss.backward()
        assert loss.device == META
    with torch.no_grad():
        assert model(torch.empty(4, WIDTH, device=META)).device == META
    adapters = [each.adapter.weight for each in model.blocks]
    assert all(each.device == META and each.grad.device == META for each in adapters)


def weights_on(model: nn.Module, device: torch.device) -> int:
    """Bytes of the storages that a model's weights hold on a device."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors if each.device == device}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("count", [6, 4])
def test_the_device_never_holds_more_than_ring_and_residents(count):
    model = make_stack(adapted=True)
    chosen = spread(list(model.blocks), count)
    expected = footprint(model, chosen)
    stream = streamed(model, META, count=count)
    held = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: held.append(weights_on(model, META)))
    model(torch.empty(4, WIDTH, device=META)).mean().backward()
    assert len(held) == 12
    assert max(held) <= expected.ring + expected.resident
    assert stream.nbytes == (expected.host, expected.ring)
    model.state_dict()
    assert weights_on(model, META) == expected.resident, "all rest on the host"
    assert weights_on(model, CPU) == expected.host


@pytest.mark.parametrize("kind", KINDS)
def test_the_footprint_is_known_beforehand_without_weights(kind):
    adapted = KINDS[kind]
    with META:
        blueprint = Stack(6, adapted=adapted)
    chosen = spread(list(blueprint.blocks), 4)
    known = footprint(blueprint, chosen, trained_too=not adapted)
    model = make_stack(adapted=adapted)
    stream = streamed(model, CPU, count=4, trained_too=not adapted)
    train(model, CPU, steps=1)
    streams = {id(tensor) for block in stream.blocks for tensor in (*block.parameters(), *block.buffers())}
    gone = {id(piece.get()) for block in stream.blocks for piece in lay_out(block, trained_too=not adapted).pieces}
    assert gone <= streams
    resident = sum(each.nbytes for each in (*model.parameters(), *model.buffers()) if id(each) not in gone)
    assert known == Footprint(*stream.nbytes, resident)


def test_ring_buffers_take_the_largest_block_that_comes_there():
    model = make_stack(adapted=False)
    sizes = [lay_out(block, trained_too=True).nbytes for block in model.blocks]
    assert sizes[0] < sizes[1], "the stack has blocks of two sizes"
    assert footprint(model, list(model.blocks), trained_too=True).ring == 2 * (sizes[0] + sizes[1])
    assert footprint(model, list(model.blocks), trained_too=True, ring=3).ring == 2 * 3 * sizes[1]


def test_blocks_are_spread_evenly_and_end_with_the_last():
    chosen = {count: [int(each[0]) for each in spread([[n] for n in range(8)], count)] for count in (1, 2, 4, 8)}
    assert chosen == {1: [7], 2: [3, 7], 4: [1, 3, 5, 7], 8: list(range(8))}


def test_masters_lie_on_the_host_in_one_buffer_a_block_each_tensor_aligned():
    model = make_stack(adapted=True)
    stream = streamed(model, CPU)
    model(next(inputs(CPU, 1)))
    model.state_dict()
    for block in stream.blocks:
        parked = [each for each in (*block.parameters(), *block.buffers()) if is_parked(each)]
        assert len({each.untyped_storage().data_ptr() for each in parked}) == 1
        assert all(each.storage_offset() * each.element_size() % 256 == 0 for each in parked)
        assert is_parked(block.quantized.codes), "a parameter or a large buffer"
        assert is_parked(block.quantized.scale) == isinstance(block.quantized.scale, nn.Parameter)
        assert not is_parked(block.adapter.weight) and not is_parked(block.positions)


def test_a_stream_leaves_with_its_model():
    gc.collect()
    model = make_stack(adapted=True)
    stream = streamed(model, CPU)
    model(next(inputs(CPU, 1)))
    gone: list[str] = []
    import weakref

    weakref.finalize(stream, partial(gone.append, "stream"))
    del model, stream
    gc.collect()
    assert gone == ["stream"]


def test_a_simulation_runs_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for adapted in (True, False):
        with FakeTensorMode():
            model = Stack(6, adapted=adapted)
            stream = streamed(model, CPU, host=CPU, trained_too=not adapted)
            loads = []
            for _ in range(2):
                before = stream.loads
                model(torch.empty(4, WIDTH)).mean().backward()
                loads.append(stream.loads - before)
        assert loads == ([10, 8] if adapted else [10, 16])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "size"), [(2048, 8), (256, 65536)], ids=["copies slow", "compute slow"])
def test_events_hold_whichever_is_slower(kind, width, size):
    """Weights of 50 MB a block with little to compute, and the other way round."""
    device, adapted = torch.device("cuda"), KINDS[kind]
    plain, model = (make_stack(adapted=adapted, width=width) for _ in range(2))
    streamed(model, device, trained_too=not adapted)
    ours, theirs = (train(each, device, steps=4, width=width, size=size) for each in (model, plain.to(device)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_on_the_device_there_is_what_was_foreseen_and_masters_are_pinned():
    device = torch.device("cuda")
    model = make_stack(adapted=True, width=1024)
    expected = footprint(model, list(model.blocks))
    before = torch.cuda.memory_allocated()
    stream = streamed(model, device)
    held = torch.cuda.memory_allocated() - before
    assert expected.ring + expected.resident <= held < 1.05 * (expected.ring + expected.resident)
    assert all(each.is_pinned() for block in stream.blocks for each in block.parameters() if is_parked(each))


@pytest.mark.gpu
def test_a_pass_never_waits_for_the_device():
    device = torch.device("cuda")
    model = make_stack(adapted=True, width=1024)
    streamed(model, device)
    x = next(inputs(device, 1, width=1024, size=4096))
    model(x).mean().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
