"""What is predicted of an optimizer's state is what it holds after its first step, to the byte."""

import pytest
import torch

from finetrainers.optimizers.kinds import KINDS
from finetrainers.optimizers.size import SMALLEST_MOVED, state_bytes
from tests.families.tiny import TINY
from tests.optimizers.tensors import SHAPES, make_optimizer, make_tensors, take_steps
from tests.training.tiny_run import full, lora, make_batch, make_trainer


def held(optimizer):
    """Bytes of each tensor that the state holds, once."""
    return {id(value): value for state in optimizer.state.values() for value in tensors_in(state)}.values()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value.values() for tensor in tensors_in(item)] if isinstance(value, dict) else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_of_tensors_of_all_kinds(name, dtype):
    if dtype != torch.float32 and not KINDS[name].alone:
        pytest.skip("it takes fp32 weights")
    tensors = make_tensors(dtype)
    optimizer = make_optimizer(name, tensors)
    take_steps(optimizer, tensors, range(1))
    predicted = state_bytes(name, SHAPES, bf16_weights=dtype != torch.float32)
    assert predicted.device + predicted.host == sum(tensor.nbytes for tensor in held(optimizer))
    assert predicted.update == (0 if dtype == torch.float32 else 12 * 256 * 512)
    assert (predicted.host > 0) == KINDS[name].pages


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.alone and not kind.pages])
def test_of_what_lies_on_the_host(name):
    """What is large there, the rest on the device, and two slots that hold the largest."""
    tensors = make_tensors()
    optimizer = make_optimizer(name, tensors, offload=True)
    take_steps(optimizer, tensors, range(4))
    predicted = state_bytes(name, SHAPES, offload=True)
    sizes = [tensor.nbytes for tensor in held(optimizer)]
    assert predicted.host == sum(size for size in sizes if size >= SMALLEST_MOVED)
    assert predicted.device == sum(size for size in sizes if size < SMALLEST_MOVED)
    slots = [slot.buffer.nbytes for slot in optimizer._host._slots if slot.buffer is not None]
    assert predicted.update == 2 * max(slots, default=0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_of_a_tiny_run(tmp_path, method):
    model = TINY["ltx-0.9.0"].write(tmp_path)
    for name in KINDS:
        options = lora() if method == "lora" else full()
        trainer = make_trainer(model, [make_batch([0])], options=options, optimizer=name, steps=1)
        shapes = [tuple(parameter.shape) for parameter in trainer.trained.values()]
        zeros = [tuple(parameter.shape) for parameter in trainer.trained.values() if not parameter.any()]
        trainer.fit()
        predicted = state_bytes(name, shapes, zeros=zeros)
        assert predicted.device + predicted.host == sum(tensor.nbytes for tensor in held(trainer.optimizer)), name
