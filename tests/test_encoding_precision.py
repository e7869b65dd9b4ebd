"""Text encoders in low precision: other embeddings under other names, near the plain ones, and nothing else changed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetrainers.data.cache import Cache
from finetrainers.encoding import Encoder, Prompt
from finetrainers.engines.single import SingleEngine
from finetrainers.memory.quantized import QuantizedLinear
from tests.families.tiny import TINY

FORMATS = {"fp8": 0.027, "int8": 0.007, "nf4": 0.093}
"""Each with the relative error of weights that are a bell; int8's of a whole block, of which tiny layers have none."""
ROWS = ["ltx-0.9.5", "cogvideox-5b", "wan-2.1", "hunyuan"]
CAPTIONS = ["a red circle moves", "", "two blue squares, and a green one that stays"]


def encoder_of(name: str, folder: Path, cache: Path, format: str | None, dtype: torch.dtype) -> Encoder:
    quiet = SimpleNamespace(advance=lambda n=1: None)
    return Encoder(
        TINY[name].open(folder),
        Cache(cache),
        SingleEngine(),
        dtype,
        num_workers=0,
        progress=lambda what, total: nullcontext(quiet),
        weights_format=format,
    )


def embedded(name: str, folder: Path, cache: Path, format: str | None = None) -> list[dict[str, torch.Tensor]]:
    """The captions' entries in the cache."""
    encoder = encoder_of(name, folder, cache, format, torch.float32)
    encoder.encode_texts([Prompt(caption) for caption in CAPTIONS])
    return [encoder.cache.read("texts", encoder.text_key(Prompt(caption))) for caption in CAPTIONS]


@pytest.mark.parametrize("name", ROWS)
def test_embeddings_are_near_and_lie_beside_the_plain_ones(folders, tmp_path, name):
    plain = embedded(name, folders[name], tmp_path)
    for number, (format, step) in enumerate(FORMATS.items()):
        ours = embedded(name, folders[name], tmp_path, format)
        assert len(list((tmp_path / "texts").rglob("*.safetensors"))) == len(CAPTIONS) * (number + 2)
        for entry, exact in zip(ours, plain, strict=True):
            assert {key: (t.shape, t.dtype) for key, t in entry.items()} == {
                key: (t.shape, t.dtype) for key, t in exact.items()
            }
            error = (entry["prompt_embeds"].float() - exact["prompt_embeds"].float()).norm()
            # Of errors that add up in squares over some dozen layers.
            assert 0 < error / exact["prompt_embeds"].float().norm() < 5 * step, format
        # A mask has no numbers to change, and a second encoder that gives a summary stays as it is.
        for key in ours[0].keys() - {"prompt_embeds"}:
            assert torch.equal(ours[0][key], plain[0][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*ROWS, "hunyuan-i2v"])
def test_layers_hold_codes_and_all_else_is_as_it_was(folders, tmp_path, name, dtype):
    for format in FORMATS:
        encoder = encoder_of(name, folders[name], tmp_path, format, dtype)
        loaded = encoder._load_text_encoders(num_loaders=1)
        plain = encoder.family.load_text_encoders(encoder.engine.device, dtype)
        assert loaded.keys() == plain.keys()
        codes = {path for path, module in loaded["text_encoder"].named_modules() if isinstance(module, QuantizedLinear)}
        assert codes and not any("vision" in path or "norm" in path for path in codes)
        for part, network in plain.items():
            ours = dict(loaded[part].named_parameters())
            for key, parameter in network.named_parameters():
                path, _, tensor = key.rpartition(".")
                if part == "text_encoder" and path in codes and tensor == "weight":
                    assert ours[key].dtype == torch.int8
                else:
                    assert torch.equal(ours[key], parameter) and ours[key].dtype == parameter.dtype, key
        left = [
            path
            for path, module in loaded["text_encoder"].named_modules()
            if type(module) is torch.nn.Linear and "vision" not in path
        ]
        assert all("block" not in path and "layers" not in path for path in left), left
        with torch.no_grad():
            tokens = encoder.family.load_tokenizers()
            if not encoder.family.text_sees_image:
                answer = encoder.family.embed(loaded, encoder.family.tokenize(tokens, CAPTIONS))
                assert answer["prompt_embeds"].dtype == dtype and answer["prompt_embeds"].isfinite().all()


def test_names_of_what_is_there_already_stay(folders, tmp_path):
    """Caches of before are found again, and each format has names of its own."""
    folder = folders["ltx-0.9.5"]
    keys = {
        format: encoder_of("ltx-0.9.5", folder, tmp_path, format, torch.float32).text_key(Prompt("a caption"))
        for format in (None, *FORMATS)
    }
    assert len(set(keys.values())) == 4
    from finetrainers.encoding import VERSION
    from finetrainers.hashing import digest

    family = TINY["ltx-0.9.5"].open(folder)
    made_by = [family.fingerprint("text_encoder"), "torch.float32", False]
    assert keys[None] == digest(["text", VERSION, "ltx", made_by, "a caption", None])


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_the_whole_encoder_is_never_on_the_device(folders, tmp_path, format, monkeypatch):
    encoder = encoder_of("ltx-0.9.5", folders["ltx-0.9.5"], tmp_path, format, torch.bfloat16)
    load = encoder.family.load_text_encoders
    devices = []

    def watched(device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
        devices.append(device.type)
        return load(device, dtype)

    monkeypatch.setattr(
        encoder.family,
        "load_text_encoders",
        watched,
    )
    loaded = encoder._load_text_encoders(num_loaders=1)
    assert devices == ["cpu"]
    assert {parameter.device.type for parameter in loaded["text_encoder"].parameters()} == {"cuda"}
