"""Activations that are computed again in the backward pass rather than kept, by whole blocks or by layers within."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from finetrainers.memory.offload import ActivationOffloader

_EVERY = "every-"
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def set_activations(
    model: Any,
    blocks: Sequence[nn.Module],
    checkpointing: str,
    *,
    layers: Sequence[nn.Module] = (),
    offloader: ActivationOffloader | None = None,
) -> None:
    """Say what a diffusers transformer keeps for the backward pass. Every number stays what it was, to the bit, and so
    do the names of its weights; another call takes back what an earlier one said.

    `checkpointing` is `full` (each of the `blocks` is computed again), `every-N` (blocks 0, N, 2N, ...), or anything
    else for none of them; `layers` are parts of blocks that are computed again by themselves. What is kept then lies
    where the `offloader` puts it.
    """
    for module in model.modules():
        if hasattr(module.forward, "plain"):
            module.forward = module.forward.plain
    for layer in layers:
        _compute_layer_again(layer)
    every = _step(checkpointing)
    if every is None and offloader is None:
        model.disable_gradient_checkpointing()
        return
    indices = {block: index for index, block in enumerate(blocks)}
    drawing = {block for block in blocks if draws(block)}

    def run(block: nn.Module, *args: Any) -> Any:
        def compute(*args: Any) -> Any:
            if every is not None and indices[block] % every == 0:
                # Through the block's own call, so that whatever hangs on it happens again as well.
                return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=block in drawing)
            return block(*args)

        return compute(*args) if offloader is None else offloader.run(indices[block], compute, *args)

    model.enable_gradient_checkpointing(run)


def draws(module: nn.Module) -> bool:
    """Whether a module's pass is random: it has dropout, by torch's own modules. Of others the state of the generators
    need not be kept for when they are computed again, which takes the host longer than a small kernel."""
    return any(isinstance(part, _DROPOUT) and part.p > 0 for part in module.modules())


def _step(checkpointing: str) -> int | None:
    """From one block that is computed again to the next; None where none is."""
    if checkpointing.startswith(_EVERY):
        return int(checkpointing.removeprefix(_EVERY))
    return 1 if checkpointing == "full" else None


def _compute_layer_again(layer: nn.Module) -> None:
    plain: Callable[..., Any] = layer.forward
    is_random = draws(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        names = tuple(kwargs)

        def compute(*given: Any) -> Any:
            num_args = len(given) - len(names)
            return plain(*given[:num_args], **dict(zip(names, given[num_args:], strict=True)))

        # One by one: of what is given by name, torch would keep tensors where no hook sees them.
        return checkpoint(compute, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=is_random)

    forward.plain = plain  # type: ignore[attr-defined]
    layer.forward = forward
