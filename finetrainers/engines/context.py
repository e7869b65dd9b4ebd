"""Context parallelism: processes that take the same batch split its video tokens between them, through diffusers' own
hooks. In self-attention they exchange tokens for heads, so that each has all tokens of its share of the heads (Ulysses,
arXiv 2309.14509); everything else is done by the token."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Shape suffixes: B batch, S video tokens.

_SELF_ATTENTION = "attn1"
"""As diffusers calls it in every layer; `attn2` is to text, of which each process has the whole."""


def split_tokens(transformers: Iterable[Any], plan: Mapping[str, Any], *, device: torch.device, size: int) -> None:
    """Let each process take its part of the video tokens: groups of `size` processes of following ranks, by a family's
    `context_plan`. Adapters must be there already, and every process of the run calls it.

    From then on the processes of a group call a transformer together and with the same inputs, and each gets the whole
    answer. If each computes the loss of it, the sum of their gradients is that of one process.
    """
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    # diffusers 0.42 calls it as torch did before 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*all_gather_tensor` is deprecated")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape, names = (world_size // size, 1, size), ("data", "ring", "ulysses")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Not `enable_parallelism`, which divides by the number of accelerators, also where there is none (diffusers 0.42),
    # and splits LTX-Video's text, which seldom divides.
    context = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    parallel = ParallelConfig(context_parallel_config=context)
    parallel.setup(rank, world_size, device, mesh=mesh)
    for transformer in transformers:
        for name, module in transformer.named_modules():
            if name.rpartition(".")[2] == _SELF_ATTENTION:
                _exchange(module, parallel)
        timestep_of_part = functools.partial(_split_timestep, size=size, part=rank % size)
        transformer.register_forward_pre_hook(timestep_of_part, with_kwargs=True)
        apply_context_parallel(transformer, context, dict(plan))
    logger.info("the video tokens of each batch are split over %d processes", size)


def _exchange(attention: Any, parallel: Any) -> None:
    """Let a self-attention exchange tokens for heads."""
    attention.processor._parallel_config = parallel
    # Autocast on CUDA gives norms in fp32, and the exchange does not know that attention is to be in bf16.
    for norm in (attention.norm_q, attention.norm_k):
        norm.register_forward_hook(_in_type_of_input)


def _in_type_of_input(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def _split_timestep(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, size: int, part: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A timestep for each token [B, S] goes with its tokens; one for all of them, [B] or [B, 1], is everybody's."""
    timestep = kwargs["timestep"]
    if timestep.ndim == 2 and timestep.shape[1] > 1:
        kwargs["timestep"] = timestep.chunk(size, dim=1)[part]
    return args, kwargs
