"""Errors of exhausted memory: recognised, read, and told in one line."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from finetrainers.errors import RunError
from finetrainers.memory.exhausted import asked_bytes, explain, free, is_exhausted, told
from finetrainers.memory.report import Held

CPU = torch.device("cpu")
GIB = 2**30
ADVICE = ("memory.offload_activations=true", "data.buckets of smaller pictures")
ON_CUDA = (
    "CUDA out of memory. Tried to allocate {}. GPU 0 has a total capacity of 139.80 GiB of which 1.19 GiB is free. "
    "Including non-PyTorch memory, this process has 138.60 GiB memory in use."
)
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "{} bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(ON_CUDA.format("2.00 GiB")), 2 * GIB),
        (torch.OutOfMemoryError(ON_CUDA.format("512.00 MiB")), GIB // 2),
        (torch.OutOfMemoryError(ON_CUDA.format("20.00 KiB")), 20 * 2**10),
        (torch.OutOfMemoryError(ON_CUDA.format("512 bytes")), 512),
        (torch.OutOfMemoryError("HIP out of memory"), None),
        (RuntimeError(ON_CPU.format(4000000000000)), 4_000_000_000_000),
    ],
)
def test_what_allocators_say(error, asked):
    assert is_exhausted(error)
    assert asked_bytes(error) == asked


def test_the_allocator_of_this_machine():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert is_exhausted(caught.value) and asked_bytes(caught.value) == 2**52


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ValueError("can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not(error):
    assert not is_exhausted(error)


def test_the_line():
    error = torch.OutOfMemoryError(ON_CUDA.format("2.50 GiB"))
    line = explain(error, "step 12", CPU, Held(weights=3 * GIB, optimizer=GIB // 4), ADVICE)
    assert line.startswith("out of memory in step 12, 2.50 GiB more were asked for, and of ")
    assert "(weights 3.00, optimizer 0.25, activations and all else 0.00)" in line, "no part that is empty"
    assert line.endswith(
        "What helps, the cheapest first: memory.offload_activations=true, data.buckets of smaller pictures"
    )
    assert "\n" not in line
    assert "asked for" not in explain(torch.OutOfMemoryError("gone"), "step 1", CPU, Held(), ADVICE)


def test_the_rest_is_what_no_part_holds():
    kept = torch.ones(GIB // 4)
    line = explain(torch.OutOfMemoryError("gone"), "step 1", CPU, Held(weights=GIB // 2), ADVICE)
    rest = float(line.partition("all else ")[2].partition(")")[0])
    held = float(line.partition("GiB ")[2].partition(" were held")[0])
    assert kept.nbytes == GIB and rest > 0.5
    assert rest == pytest.approx(held - 0.5, abs=0.011)


def test_told():
    asked = []

    def held() -> Held:
        asked.append(1)
        return Held(weights=GIB)

    with told("decoding", CPU, advice=ADVICE, held=held):
        pass
    assert asked == [], "nothing is counted where all goes well"
    error = torch.OutOfMemoryError(ON_CUDA.format("1.00 GiB"))
    with (
        pytest.raises(RunError, match=r"^out of memory in decoding, 1\.00 GiB more .*weights 1\.00") as caught,
        told("decoding", CPU, advice=ADVICE, held=held),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("x"), RunError("y"), KeyboardInterrupt()])
def test_other_errors_pass_untouched(error):
    with pytest.raises(type(error)) as caught, told("decoding", CPU, advice=ADVICE):
        raise error
    assert caught.value is error and error.__cause__ is None


def test_free_collects_what_refers_to_itself():
    class Ring:
        pass

    gc.disable()
    try:
        ring = Ring()
        ring.self, dead = ring, weakref.ref(ring)
        del ring
        assert dead() is not None
        free(CPU)
        assert dead() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_on_a_device_the_real_error_is_read_and_memory_comes_back():
    device = torch.device("cuda")
    whole = torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2 * whole, dtype=torch.uint8, device=device)
    assert is_exhausted(caught.value)
    assert asked_bytes(caught.value) == pytest.approx(2 * whole, rel=0.01)
    let_go = torch.empty(GIB, dtype=torch.uint8, device=device)
    before = torch.cuda.memory_reserved(device)
    del let_go
    free(device)
    assert before - torch.cuda.memory_reserved(device) >= GIB
