"""Tensor by tensor, with state on the host and updates in the backward pass, the numbers are those of the optimizer
itself; and each goes on from its checkpoint exactly."""

import pytest
import torch

from finetrainers.engines.single import SingleEngine
from finetrainers.optimizers import host_states
from finetrainers.optimizers.kinds import KINDS
from tests.optimizers.tensors import differing, make_optimizer, make_tensors, take_steps

ALONE = [name for name, kind in KINDS.items() if kind.alone]
WAYS = [{"offload": True}, {"in_backward": True}, {"offload": True, "in_backward": True}]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def options_for(name, way):
    """A paged state moves by itself."""
    return {key: value for key, value in way.items() if key != "offload" or not KINDS[name].pages}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALONE)
def test_every_way_gives_the_same_numbers(all_moved, name, dtype, device):
    plain = make_tensors(dtype, device)
    take_steps(make_optimizer(name, plain), plain, range(5))
    assert differing(plain, make_tensors(dtype, device)) == list(plain)
    for way in WAYS:
        tensors = make_tensors(dtype, device)
        take_steps(make_optimizer(name, tensors, **options_for(name, way)), tensors, range(5))
        assert differing(plain, tensors) == [], way


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [{}, *WAYS], ids=["plain", "offload", "in_backward", "both"])
@pytest.mark.parametrize("name", KINDS)
def test_each_goes_on_from_its_checkpoint_and_in_another_way(tmp_path, all_moved, name, way, device):
    """Through the files of a real checkpoint; the other way is the plain one, and from there offloading."""
    if way and name not in ALONE:
        pytest.skip("its tensors depend on each other")
    engine = SingleEngine()
    whole = make_tensors(device=device)
    optimizer = make_optimizer(name, whole, **options_for(name, way))
    take_steps(optimizer, whole, range(3))
    engine.save(whole, optimizer, tmp_path)()
    take_steps(optimizer, whole, range(3, 6))
    others = [{}, {"offload": True}] if name in ALONE else [{}]
    for other in [way, *others]:
        tensors = make_tensors(device=device)
        resumed = make_optimizer(name, tensors, **options_for(name, other))
        engine.load(tensors, resumed, tmp_path)
        take_steps(resumed, tensors, range(3, 6))
        assert differing(whole, tensors) == [], other


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_weights_in_bf16_go_on_exactly(tmp_path, name):
    engine, whole = SingleEngine(), make_tensors(torch.bfloat16)
    optimizer = make_optimizer(name, whole)
    take_steps(optimizer, whole, range(3))
    engine.save(whole, optimizer, tmp_path)()
    take_steps(optimizer, whole, range(3, 6))
    tensors = make_tensors(torch.bfloat16)
    resumed = make_optimizer(name, tensors)
    engine.load(tensors, resumed, tmp_path)
    assert resumed.param_groups[0]["rounded_steps"] == 3
    take_steps(resumed, tensors, range(3, 6))
    assert differing(whole, tensors) == []


def test_large_states_lie_on_the_host_and_small_ones_do_not():
    tensors = make_tensors()
    optimizer = make_optimizer("adamw", tensors, offload=True)
    take_steps(optimizer, tensors, range(3))
    slots = {slot.buffer.untyped_storage().data_ptr() for slot in optimizer._host._slots}
    slabs = {slab.untyped_storage().data_ptr() for slab, _ in optimizer._host._slabs._open}
    for state in optimizer.state.values():
        for name, value in state.items():
            place = value.untyped_storage().data_ptr()
            assert (place in slabs) == (value.nbytes >= host_states.SMALLEST_MOVED), name
            assert place not in slots


@pytest.mark.gpu
def test_host_memory_is_pinned_and_the_state_leaves_the_device(all_moved):
    tensors = make_tensors(device="cuda")
    before = torch.cuda.memory_allocated()
    optimizer = make_optimizer("adamw", tensors, offload=True)
    take_steps(optimizer, tensors, range(3))
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert all(moment.device.type == "cpu" and moment.is_pinned() for moment in moments)
    # Two slots of the largest.
    assert torch.cuda.memory_allocated() - before <= 2 * 8 * 256 * 512 + 2**16


def test_a_gradient_goes_as_soon_as_it_is_applied():
    """When the backward pass comes to a tensor, those that it came to before have none."""
    tensors = make_tensors()
    make_optimizer("adamw", tensors, in_backward=True)
    alive = []
    for tensor in tensors.values():
        tensor.register_hook(lambda _: alive.append(sum(each.grad is not None for each in tensors.values())))
    torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().backward()
    assert alive == [0] * len(tensors)
    assert all(tensor.grad is None for tensor in tensors.values())


def test_the_norms_are_those_of_the_step():
    """Of a tensor without a gradient in it there is none left from the step before."""
    tensors = make_tensors()
    optimizer = make_optimizer("adamw", tensors, in_backward=True)
    for step, count in ((0, len(tensors)), (1, len(tensors) - 1)):
        take_steps(optimizer, tensors, [step])
        generator = torch.Generator().manual_seed(step + 10)
        factors = [torch.randn(tensor.shape, generator=generator) / 100 for tensor in tensors.values()]
        expected = [factor.norm() for number, factor in enumerate(factors) if number != 1 or step % 2 == 0]
        norms = optimizer.take_norms()
        assert len(norms) == count
        torch.testing.assert_close(torch.stack(norms), torch.stack(expected))


def test_slabs_are_filled_and_never_overlap():
    slabs = host_states.Slabs(pinned=False)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 100_000, (200,), generator=generator).tolist()
    taken = [slabs.take(size).fill_(number) for number, size in enumerate(sizes)]
    assert [(len(each), each.unique().tolist()) for each in taken] == [(n, [i]) for i, n in enumerate(sizes)]
    assert all(each.data_ptr() % 64 == 0 for each in taken)
    assert slabs._total < 2.5 * sum(sizes)
