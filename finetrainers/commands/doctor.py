"""`finetrainers doctor`: versions, devices, which optional features work here, and whether captions are understood."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from finetrainers.captions import count_captions
from finetrainers.config.schema import RunConfig
from finetrainers.data.source import read_source
from finetrainers.families.find import find_family

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "av", "pydantic", "numpy")


def doctor(*, config: RunConfig | None = None) -> int:
    """Print what is here, and with a config, how its model's tokenizer copes with its captions. Returns 1 if something
    that every run needs is missing."""
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    missing = [name for name in _PACKAGES if not _print_version(name)]
    _print_devices()
    print("optional:")
    for feature, check in _OPTIONAL.items():
        print(f"  {feature}: {_outcome(check)}")
    free_gib = shutil.disk_usage(".").free / 2**30
    print(f"disk: {free_gib:.0f} GiB free here")
    if missing:
        print(f"missing: {', '.join(missing)}; run `pip install finetrainers` again")
    if config is not None:
        check_captions(config)
    return 1 if missing else 0


def check_captions(config: RunConfig) -> None:
    """Print what share of the captions' tokens is unknown to the model's tokenizer, or beyond the model's length."""
    family = find_family(config.model, weights=False)
    records = [record for source in config.data.train for record in read_source(source.path)]
    captions = [" ".join(filter(None, (config.data.trigger, record.caption))) for record in records]
    report = count_captions(family, family.load_tokenizers(), captions)
    print(f"captions: {report.num_captions}, of {report.num_tokens:,} tokens")
    hidden = f"{report.unknown_share:.1%}, standing for {report.unknown_characters:.1%} of the characters"
    print(f"  unknown to the tokenizer: {hidden}" + _example(report.first_unknown))
    lost = f"{report.lost_share:.1%}, in {report.num_cut} captions"
    print(f"  beyond the {report.limit} tokens that the model reads: {lost}" + _example(report.first_cut))


def _example(caption: str) -> str:
    return f", first in: {caption:.80}" if caption else ""


def _print_version(package: str) -> bool:
    try:
        print(f"  {package} {version(package)}")
    except PackageNotFoundError:
        print(f"  {package}: not installed")
        return False
    return True


def _print_devices() -> None:
    if not torch.cuda.is_available():
        print("devices: CPU only; training works, at the size of tiny models")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: set training.precision=fp32"
        print(f"devices: cuda:{number} {facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}")


def _outcome(check: Callable[[], str]) -> str:
    try:
        return check()
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as error:
        return f"no ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _importable(module: str, package: str) -> Callable[[], str]:
    def check() -> str:
        importlib.import_module(module)
        return f"yes, {package} {version(package)}"

    return check


def _video_codecs() -> str:
    import av

    found = [name for name in ("h264", "hevc", "vp9", "av1", "libdav1d") if name in av.codecs_available]
    return f"yes, decodes {', '.join(found)}" + ("; writes h264" if "libx264" in av.codecs_available else "")


def _eight_bit() -> str:
    from bitsandbytes.optim import AdamW8bit

    weight = torch.nn.Parameter(torch.ones(4096))
    weight.grad = torch.ones_like(weight)
    AdamW8bit([weight], lr=0.1).step()
    if bool((weight == 1).any()):
        raise RuntimeError("bitsandbytes is installed, but its step changes nothing here")
    return f"yes, bitsandbytes {version('bitsandbytes')}"


_OPTIONAL: dict[str, Callable[[], str]] = {
    "video files (PyAV)": _video_codecs,
    "8-bit AdamW (optimizer.name=adamw_8bit)": _eight_bit,
    "8-bit and 4-bit AdamW (optimizer.name=torchao_adamw_8bit)": _importable("torchao.optim", "torchao"),
    "float8 (method.float8_recipe=tensorwise)": _importable("torchao.float8", "torchao"),
    "Prodigy (optimizer.name=prodigy)": _importable("prodigyopt", "prodigyopt"),
    "parquet tables": _importable("pyarrow.parquet", "pyarrow"),
    "TensorBoard (tracking.trackers=tensorboard)": _importable("torch.utils.tensorboard", "tensorboard"),
    "Weights & Biases (tracking.trackers=wandb)": _importable("wandb", "wandb"),
}
