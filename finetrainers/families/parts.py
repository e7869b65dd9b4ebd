"""What families share in handling a diffusers folder: loading its parts, T5 text, sizes, given frames, frames out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetrainers.types import Bucket, TokenCount

# Shape suffixes: B batch, C channels, F frames, H height, W width, L text tokens, D features.


def build_network(class_name: str, folder: Path, part: str) -> torch.nn.Module:
    """A diffusers network as its config describes it, with no weights read."""
    import diffusers

    kind = getattr(diffusers, class_name)
    network: torch.nn.Module = kind.from_config(kind.load_config(folder / part))
    return network


def load_network(
    class_name: str, folder: Path, part: str, dtype: torch.dtype, *, device: torch.device | None = None
) -> Any:
    """A diffusers network with its weights, on the CPU; for the meta device without them, in the types in which they
    are loaded."""
    import diffusers

    if device is not None and device.type == "meta":
        with device:
            network = build_network(class_name, folder, part)
        return cast_as_loaded(network, dtype, kept=getattr(network, "_keep_in_fp32_modules", None) or ())
    return getattr(diffusers, class_name).from_pretrained(folder, subfolder=part, dtype=dtype, use_safetensors=True)


def build_encoder(folder: Path, part: str) -> torch.nn.Module:
    """A transformers network as its config describes it, with no weights read."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder / part)
    network: torch.nn.Module = getattr(transformers, config.architectures[0])(config)
    return network


def cast_as_loaded(network: Any, dtype: torch.dtype, *, kept: Iterable[str]) -> Any:
    """A network on the meta device with its parameters and saved buffers in the types in which they are loaded: what
    lies under the names of `kept` is fp32."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    return network


def load_vae(class_name: str, folder: Path, device: torch.device, dtype: torch.dtype, *, tiling: bool) -> Any:
    """A frozen VAE on its device; on the meta device, no weights are read."""
    vae = load_network(class_name, folder, "vae", dtype, device=device).requires_grad_(False).eval().to(device)
    if tiling:
        vae.enable_tiling()
    return vae


def load_encoder(class_name: str, folder: Path, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen transformers network on its device; `eval` because T5 would otherwise drop out. On the meta device, no
    weights are read."""
    import transformers

    kind = getattr(transformers, class_name)
    if device.type == "meta":
        with device:
            encoder = cast_as_loaded(kind(transformers.AutoConfig.from_pretrained(folder / part)), dtype, kept=())
    else:
        encoder = kind.from_pretrained(folder, subfolder=part, dtype=dtype, use_safetensors=True)
    return encoder.requires_grad_(False).eval().to(device)


def load_tokenizer(folder: Path, part: str = "tokenizer") -> Any:
    """A tokenizer by its own files."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / part)


def pad_tokens(tokenizer: Any, captions: Sequence[str], limit: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, limit], cut and padded to the limit."""
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=limit,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


def count_tokens(tokenizer: Any, captions: Sequence[str], limit: int, **options: Any) -> list[TokenCount]:
    """Tokens of each caption before it is cut, and what of it the tokenizer does not know."""
    counts = []
    for caption in captions:
        # verbose=False: transformers would warn of indexing errors, though nothing longer is given to the encoder.
        tokens = tokenizer(caption, return_offsets_mapping=True, verbose=False, **options)
        pairs = zip(tokens.input_ids, tokens.offset_mapping, strict=True)
        unknown = [end - start for token, (start, end) in pairs if token == tokenizer.unk_token_id]
        share = sum(unknown) / max(len(caption), 1)
        counts.append(TokenCount(len(tokens.input_ids), len(unknown), share, limit))
    return counts


def refuse_bucket(bucket: Bucket, *, frames: int, space: int, name: str) -> str | None:
    """None if a bucket has `frames` * k + 1 frames and a height and width that are multiples of `space`; otherwise
    what `name` takes, and the nearest such size."""
    frames_fit = bucket.num_frames % frames == 1
    if frames_fit and bucket.height % space == 0 and bucket.width % space == 0:
        return None
    num_frames = bucket.num_frames if frames_fit else max(round((bucket.num_frames - 1) / frames), 0) * frames + 1
    height, width = (max(round(size / space), 1) * space for size in (bucket.height, bucket.width))
    first = ", ".join(str(frames * k + 1) for k in range(4))
    return (
        f"{name} takes {frames}k+1 frames ({first}, ...) and a height and width that are multiples of {space}; "
        f"the nearest is {Bucket(num_frames, height, width)}"
    )


def to_pixels(video_FCHW: Tensor, network: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A uint8 clip as a VAE takes it: [1, C, F, H, W] in [-1, 1], on the network's device, in its type or another."""
    pixels_FCHW = video_FCHW.to(network.device, non_blocking=True).float() / 127.5 - 1
    return pixels_FCHW.permute(1, 0, 2, 3)[None].to(dtype or network.dtype)


def dtype_of(transformer: Any) -> torch.dtype:
    """The type of a transformer's inputs: its `dtype`, for which diffusers looks through all its modules each time,
    several milliseconds a pass. It is that of the first floating-point weight that is not kept in fp32."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    for name, parameter in transformer.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            return parameter.dtype
    found: torch.dtype = transformer.dtype
    return found


def put_given(latents_BCFHW: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """Noised latents with the clean ones, `given["latents"]`, in the latent frames that `given["frames"]` [B, F] marks;
    unchanged where no frames are given."""
    if "frames" not in given:
        return latents_BCFHW
    return torch.where(given["frames"][:, None, :, None, None], given["latents"], latents_BCFHW)


def frames_out(frames_FCHW: Tensor) -> Tensor:
    """A pipeline's frames in [0, 1] as uint8 FHWC on the CPU."""
    return (frames_FCHW.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
