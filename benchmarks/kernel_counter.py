"""Counts the kernels that a step launches and the bytes that they move, on tensors without memory: operations of eager
torch one by one, and of compiled programs what inductor's scheduler makes of them for a GPU, before code is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import TracingContext

from finetrainers.memory.simulation import tensors_in

GPU = torch.device("cuda", 0)
"""What programs are scheduled for."""
MATMULS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITING = {"copy_", "fill_", "zero_"}
"""What these write they have not read."""


@dataclass
class Launches:
    """Kernels, and the bytes that go in and out of those that are neither matrix products nor attention."""

    matmuls: int = 0
    attention: int = 0
    others: int = 0
    moved_bytes: int = 0

    @property
    def kernels(self) -> int:
        """All of them."""
        return self.matmuls + self.attention + self.others

    def add(self, name: str, moved_bytes: int) -> None:
        """One kernel more, by the name of its operation."""
        if name in MATMULS:
            self.matmuls += 1
        elif name in ATTENTION:
            self.attention += 1
        else:
            self.others += 1
            self.moved_bytes += moved_bytes

    def add_all(self, more: Launches) -> None:
        """Those of a program that has run."""
        self.matmuls += more.matmuls
        self.attention += more.attention
        self.others += more.others
        self.moved_bytes += more.moved_bytes


@dataclass
class KernelCounter:
    """Counts what runs in `counted`; blocks compiled with `backend` are counted as compiled."""

    launches: Launches = field(default_factory=Launches)
    programs: list[Launches] = field(default_factory=list)
    """Of each forward and backward program that was compiled, what one call launches."""
    _within: bool = False
    """Whether a program runs, whose operations are no kernels of their own."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """In the block, operations and programs are counted, those of backward passes included."""
        from torch.utils._python_dispatch import TorchDispatchMode

        see = self._see

        class Watch(TorchDispatchMode):
            @classmethod
            def ignore_compile_internals(cls) -> bool:
                return True  # Else nothing would be compiled in the block.

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                answer = func(*args, **(kwargs or {}))
                see(func, (args, kwargs), answer)
                return answer

        with Watch():
            yield

    def backend(self, program: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """For `torch.compile`: everything up to inductor's code is done, then the program runs operation by operation.

        AOTAutograd, the partitioner and inductor's passes see a CPU, as in every simulation; what follows is told that
        the tensors lie on a GPU, because fusion differs.
        """
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(enable_autograd_cache=False):
            return compile_fx(program, list(inputs), inner_compile=self._count_program)

    def _see(self, func: Any, given: Any, made: Any) -> None:
        # What dynamo and AOTAutograd compute while they trace is never launched.
        traced = TracingContext.try_get() is not None
        if not traced and not self._within and is_launched(func, given, made):
            name = func._schema.name.split("::")[1]
            self.launches.add(name, moved_bytes(name, given, made))

    def _count_program(self, program: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        launches = count_program(
            program,
            inputs,
            is_backward=options.get("is_backward", False),
            is_inference=options.get("is_inference", False),
        )
        self.programs.append(launches)

        def run(arguments: list[Any]) -> Any:
            self._within = True
            answer = program(*arguments)
            self._within = False
            self.launches.add_all(launches)
            return answer

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def is_launched(func: Any, given: Any, made: Any) -> bool:
    """Whether an operation launches a kernel: it writes into a tensor, or makes one that is no view."""
    if func._schema.name.split("::")[1] in ALLOCATIONS:
        return False
    old = {tensor.untyped_storage()._cdata for tensor in tensors_in(given)}
    new = [tensor for tensor in tensors_in(made) if tensor.untyped_storage()._cdata not in old]
    return bool(new) or func._schema.is_mutable


def moved_bytes(name: str, given: Any, made: Any) -> int:
    """What an operation reads and writes; of a tensor that is repeated along a dimension what is there."""
    read = list(tensors_in(given))[name in OVERWRITING :]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in (*read, *tensors_in(made)))


def count_program(
    program: torch.fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool, is_inference: bool
) -> Launches:
    """What one call of a program launches, once inductor has fused it for a GPU."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    program = deepcopy(program)
    with ExitStack() as stack:
        stack.enter_context(_pretended_gpu())
        stack.enter_context(DebugContext())
        # The steps of torch's `_InProcessFxCompile.codegen_and_compile`.
        compile_fx.view_to_reshape(program)
        with torch.no_grad():
            fake_mode = compile_fx.fake_tensor_prop(program, inputs)
        compile_fx._recursive_record_original_output_strides(program)
        stack.enter_context(V.set_fake_mode(fake_mode))
        compile_fx._recursive_post_grad_passes(program, is_inference=is_inference)
        inputs = _moved_to_gpu(program, inputs, fake_mode)
        graph = GraphLowering(program, example_inputs=inputs, is_inference=is_inference, is_backward=is_backward)
        stack.enter_context(V.set_graph_handler(graph))
        stack.enter_context(V.set_extern_kernel_nodes([]))
        graph.run(*inputs)
        graph.init_wrapper_code()
        graph._update_scheduler()
        launches = Launches()
        for node in graph.scheduler.nodes:
            if (name := _kernel_name(node)) is not None:
                launches.add(name, node.get_read_write_buffers_sizes())
    return launches


def _kernel_name(node: Any) -> str | None:
    """Of a scheduled node the operation that it calls, `fused` where inductor writes a kernel, None where there is
    none."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, MultiOutput):
        return None
    if not node.is_extern():
        return "fused"
    # `extern_kernels.mm`, or `torch.ops.aten.convolution.default`.
    words = node.node.python_kernel_name.removeprefix("torch.ops.").split(".")
    return str(words[1])


def _moved_to_gpu(program: torch.fx.GraphModule, inputs: Sequence[Any], fake_mode: Any) -> list[Any]:
    """Inputs for the program that lie on the GPU; what it makes of them is to lie there too."""

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        with fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in program.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", GPU)
        if "val" in node.meta:
            node.meta["val"] = moved(node.meta["val"])
    return [moved(value) for value in inputs]


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    """In the block inductor finds an H100, and a Triton that it does not call."""
    from torch._inductor.runtime.hints import DeviceProperties

    h100 = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    answers = {
        "torch._inductor.runtime.hints.DeviceProperties.create": h100,
        "torch.cuda.get_device_properties": h100,
        "torch.cuda.get_device_capability": (9, 0),
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.fx_passes.post_grad.is_gpu": True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        yield
