"""Which kernel computes attention, of those that torch has or that can be installed beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from finetrainers.errors import UserError


@dataclass(frozen=True)
class _Package:
    """FlashAttention of a later version than torch's own, which takes the place of it."""

    torch_name: str
    module: str
    capabilities: tuple[int, ...]
    """Major ones of the GPUs that it is for."""


_PACKAGES = {
    "flash_3": _Package("FA3", "flash_attn_interface", (9,)),
    "flash_4": _Package("FA4", "flash_attn.cute.interface", (9, 10)),
}


def check_attention(option: str, device: torch.device) -> None:
    """Raise UserError where `training.attention` asks for a kernel that cannot be had."""
    if option == "auto":
        return
    if device.type != "cuda":
        raise UserError(f"training.attention {option} is for NVIDIA GPUs; leave it out")
    if (package := _PACKAGES.get(option)) is None:
        return
    major, _ = torch.cuda.get_device_capability(device)
    if major not in package.capabilities:
        wanted = " and ".join(f"{each}.x" for each in package.capabilities)
        raise UserError(
            f"training.attention {option} is for GPUs of compute capability {wanted}, and this one has {major}.x; take "
            "auto"
        )
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise UserError(f"training.attention {option} needs a later torch than {torch.__version__}; take auto")
    if not _is_installed(package.module):
        raise UserError(
            f"training.attention {option} needs {package.module}, which is not installed: see "
            "https://github.com/Dao-AILab/flash-attention, or take auto"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # Of a version of the package that lacks what the module lies in.
        return False


@contextmanager
def attention_by(option: str) -> Iterator[None]:
    """In the block, attention is computed by the kernel that `training.attention` names wherever it can be, such as
    without a mask, and by the next that torch has where it cannot."""
    if option == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if package := _PACKAGES.get(option):
        torch.nn.attention.activate_flash_attention_impl(package.torch_name)
    first = kernels["flash" if package else option]
    try:
        # Named twice, the first place counts.
        with sdpa_kernel([first, *kernels.values()], set_priority=True):
            yield
    finally:
        if package:
            torch.nn.attention.restore_flash_attention_impl()
