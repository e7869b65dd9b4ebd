"""Activations on the host: the same numbers, and what is sent, when, how often, and where it lies. On a GPU too, where
copies run beside the computing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetrainers.memory import offload
from finetrainers.memory.offload import ActivationOffloader, HostMemory
from finetrainers.memory.simulation import HOST, LiveBytes, peak_bytes, simulation

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDTH, ROWS = 64, 512
UNIT = 4 * ROWS * WIDTH
"""Bytes of hidden states: twice the smallest that is sent."""


class Block(nn.Module):
    """Saves its input and what GELU is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, shared: Tensor) -> Tensor:
        return hidden + nn.functional.gelu(self.inner(hidden)) * shared


class Counting(HostMemory):
    """Keeps a record of what is asked for."""

    def __init__(self, said: list[Any], host: torch.device | None = None) -> None:
        super().__init__(host)
        self.said = said

    def copying(self, device: torch.device) -> Any:
        self.said.append("copies")
        return super().copying(device)

    def take(self, num_bytes: int) -> Tensor:
        buffer = super().take(num_bytes)
        self.said.append((num_bytes, buffer.data_ptr()))
        return buffer


def make(num_blocks: int, device: str = "cpu") -> list[Block]:
    torch.manual_seed(0)
    with torch.device(device):
        return [Block() for _ in range(num_blocks)]


def given(device: str, rows: int = ROWS, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, shared = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
    return hidden.to(device), shared.to(device)


def passed(blocks: list[Any], offloader: ActivationOffloader | None, hidden: Tensor, shared: Tensor) -> Tensor:
    """A forward pass over all blocks."""
    for index, block in enumerate(blocks):
        hidden = block(hidden, shared) if offloader is None else offloader.run(index, block, hidden, shared)
    return hidden.square().mean()


def gradients(blocks: list[Block]) -> list[Tensor]:
    found = [parameter.grad.clone() for block in blocks for parameter in block.parameters()]
    for block in blocks:
        block.zero_grad()
    return found


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_over_steps_of_changing_sizes(device):
    blocks = make(5, device)
    offloader = ActivationOffloader(5, HostMemory())
    for step, rows in enumerate((ROWS, 3 * ROWS, ROWS, 2 * ROWS)):
        inputs = given(device, rows, seed=step)
        passed(blocks, None, *inputs).backward()
        plain = gradients(blocks)
        passed(blocks, offloader, *inputs).backward()
        assert_equal(gradients(blocks), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_two_forward_passes_before_their_backward_passes(device):
    blocks, offloader = make(3, device), ActivationOffloader(3, HostMemory())
    for add in (False, True):
        losses = [passed(blocks, offloader if add else None, *given(device, seed=seed)) for seed in (1, 2)]
        losses[0].backward()
        losses[1].backward()
        if not add:
            plain = gradients(blocks)
    assert_equal(gradients(blocks), plain)


def test_a_graph_that_is_kept_gives_its_gradient_again():
    blocks, offloader = make(3), ActivationOffloader(3, HostMemory())
    loss = passed(blocks, offloader, *given("cpu"))
    loss.backward(retain_graph=True)
    first = gradients(blocks)
    loss.backward()
    assert_equal(gradients(blocks), first)


def test_each_storage_is_sent_once():
    """Of a block its input and what GELU is given; and what all share once, a factor of each block's product."""
    said: list[Any] = []
    passed(make(4), ActivationOffloader(4, Counting(said)), *given("cpu"))
    sizes = [entry[0] for entry in said if entry != "copies"]
    assert sizes == [UNIT] * (3 * 2 + 1)


@pytest.mark.parametrize("device", DEVICES)
def test_buffers_are_used_again_and_do_not_add_up(device):
    blocks, said = make(4, device), []
    memory = Counting(said)
    offloader = ActivationOffloader(4, memory)

    def step(rows: int) -> set[int]:
        said.clear()
        passed(blocks, offloader, *given(device, rows)).backward()
        gc.collect()
        return {entry[1] for entry in said if entry != "copies"}

    first = step(ROWS)
    assert len(first) == 7 and step(ROWS) == first
    step(2 * ROWS)
    assert len(memory._free) == 7, "small buffers made room for larger ones"
    assert step(ROWS) == step(2 * ROWS)


def test_a_graph_that_is_dropped_gives_its_buffers_back():
    memory = HostMemory()
    loss = passed(make(3), ActivationOffloader(3, memory), *given("cpu"))
    assert not memory._free
    del loss
    gc.collect()
    assert len(memory._free) == 5


def test_the_block_before_is_fetched_while_a_block_is_in_its_backward_pass():
    said: list[Any] = []

    class Speaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, name: str) -> Tensor:
            ctx.name = name
            return hidden.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            said.append(ctx.name)
            return gradient, None

    def speaking(block: Block, name: str) -> Callable[..., Tensor]:
        return lambda hidden, shared: Speaks.apply(block(hidden, shared), name)

    blocks = [speaking(block, f"block {index}") for index, block in enumerate(make(4))]
    loss = passed(blocks, ActivationOffloader(4, Counting(said)), *given("cpu"))
    assert said.count("copies") == 4, "one for what each block saved, though the last one saved nothing"
    said.clear()
    loss.backward()
    assert said == ["copies", "block 3", "copies", "block 2", "copies", "block 1", "block 0"]


def test_the_device_holds_two_blocks_at_most():
    """What one saved is on its way while the next one computes, in both directions; the last one's stays."""
    held = {}
    for num_blocks in (4, 8):
        with simulation():
            blocks, inputs = make(num_blocks), given("cpu")
            offloader = ActivationOffloader(num_blocks, HostMemory(HOST))
            host = LiveBytes(HOST)
            with host.counted():
                held[num_blocks] = peak_bytes(lambda: passed(blocks, offloader, *inputs))  # noqa: B023
            assert host.peak == UNIT * (2 * (num_blocks - 1) + 1)
    assert held[4].after_forward == held[8].after_forward < 5 * UNIT
    grown = held[8].peak - held[4].peak
    assert grown == 4 * 4 * (WIDTH * WIDTH + WIDTH), "by the gradients of four more blocks alone"


@pytest.mark.gpu
def test_memory_of_a_gpu_is_let_go():
    blocks, offloader = make(16, "cuda"), ActivationOffloader(16, HostMemory())
    inputs = given("cuda", 256 * ROWS)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = passed(blocks, offloader, *inputs)
        assert torch.cuda.memory_allocated() - before < 6 * 256 * UNIT
        assert torch.cuda.max_memory_allocated() - before < 12 * 256 * UNIT
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before < 16 * 256 * UNIT


def test_weights_and_small_tensors_are_not_sent():
    said: list[Any] = []
    passed(make(2), ActivationOffloader(2, Counting(said)), *given("cpu", rows=ROWS // 4))
    assert [entry for entry in said if entry != "copies"] == []
    wide = [nn.Linear(WIDTH, 4096) for _ in range(2)]
    hidden = torch.randn(8, WIDTH, requires_grad=True)
    ActivationOffloader(2, Counting(said)).run(0, wide[0], hidden)
    assert [entry for entry in said if entry != "copies"] == [], "its weights are a MiB"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [8, ROWS], ids=["kept", "sent"])
@pytest.mark.parametrize("place", [0, 1], ids=["first block", "last block"])
def test_what_was_saved_must_not_be_written_to(rows, place, device):
    """As without offloading: autograd's check must not be lost."""

    def careless(hidden: Tensor, shared: Tensor) -> Tensor:
        inner = hidden * 2
        answer = inner * shared * hidden.sin()
        with torch.no_grad():
            inner.mul_(3)
        return answer

    blocks = [careless if index == place else block for index, block in enumerate(make(2, device))]
    shared, hidden = (tensor.requires_grad_() for tensor in given(device, rows))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        passed(blocks, ActivationOffloader(2, HostMemory()), hidden, shared).backward()


def test_a_storage_that_is_written_to_between_two_saves_is_two():
    """The first save is for a product that nobody asks the gradient of; the second one's numbers are other ones."""

    def block(hidden: Tensor, shared: Tensor) -> Tensor:
        factor = shared.detach().clone()
        aside.append(hidden * factor)
        factor.mul_(2)
        return hidden * factor

    for offloader in (None, ActivationOffloader(3, HostMemory())):
        aside: list[Tensor] = []
        hidden, shared = given("cpu")
        hidden.requires_grad_()
        passed([block] * 3, offloader, hidden, shared).backward()
        if offloader is None:
            plain = hidden.grad
    assert_equal([hidden.grad], [plain])


def test_one_storage_in_several_shapes_and_types():
    def block(hidden: Tensor, shared: Tensor) -> Tensor:
        numbers = torch.view_as_complex(torch.stack([hidden, shared.sin()], dim=-1))
        return torch.view_as_real(numbers * numbers).sum(-1) * hidden.t().reshape(hidden.shape) * shared[:1]

    for offloader in (None, ActivationOffloader(3, HostMemory())):
        hidden, shared = (tensor.requires_grad_() for tensor in given("cpu"))
        passed([block] * 3, offloader, hidden, shared).backward()
        found = [hidden.grad, shared.grad]
        if offloader is None:
            plain = found
    assert_equal(found, plain)


def test_nothing_is_kept_without_gradients():
    said: list[Any] = []
    with torch.no_grad():
        passed(make(3), ActivationOffloader(3, Counting(said)), *given("cpu"))
    assert [entry for entry in said if entry != "copies"] == []


def test_the_smallest_that_is_sent_is_below_what_these_tests_send():
    assert UNIT // 4 < offload.SMALLEST <= UNIT
