"""fp32 numbers rounded to bf16 at random, so that what is lost in one step is not lost in the mean of many."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16
"""What fp32 has and bf16 has not."""


def round_stochastically(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16: up or down to a neighbour, the likelier the nearer, so that the mean over many draws is the number
    itself. What is a bf16 number already stays, and so does what is not finite."""
    drawn = torch.empty(tensor.shape, dtype=torch.int32, device=tensor.device)
    drawn.random_(0, 1 << _LOW_BITS, generator=generator)
    # The bits of a number grow with its magnitude, so that the draw carries into the bits that stay as often as it
    # should, whatever the sign.
    drawn.add_(tensor.view(torch.int32)).bitwise_and_(-1 << _LOW_BITS)
    rounded = drawn.view(torch.float32)
    # A NaN's bits may be the largest there are, and would turn over to zero.
    return torch.where(tensor.isfinite(), rounded, tensor, out=rounded).to(torch.bfloat16)
