"""Weights in low precision that are kept on disk: read instead of made, the same numbers, never stale, never half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from finetrainers.engines.single import SingleEngine
from finetrainers.memory import quantized
from finetrainers.training import kept
from tests.memory.low_precision import FORMATS, ROWS, load, lora_method, quantized_layers

LTX = "ltx-0.9.5-i2v"


def codes_of(name: str, folder: Path, kept_in: Path, format: str = "fp8", dtype: torch.dtype = torch.float32):
    """What a run holds of each layer."""
    method = lora_method(name, folder, dtype)
    models, _ = load(method, base_weights=format, keep_quantized=True, kept_in=kept_in)
    return {path: (layer.weight, layer.scale) for path, layer in quantized_layers(models).items()}


def same(one, other) -> bool:
    assert one.keys() == other.keys() and one
    return all(torch.equal(a, b) for path in one for a, b in zip(one[path], other[path], strict=True))


@pytest.fixture
def refuse(monkeypatch):
    """From then on nothing may be quantized."""
    return lambda: monkeypatch.setattr(quantized, "quantize", lambda *given: pytest.fail("quantized again"))


@pytest.mark.parametrize("name", ROWS)
def test_the_next_run_reads_what_the_first_one_made(folders, tmp_path, name, refuse):
    made = {format: codes_of(name, folders[name], tmp_path, format) for format in FORMATS}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == len(FORMATS) * (2 if name == "wan-2.2-a14b" else 1), "one for each transformer and format"
    refuse()
    for format in FORMATS:
        assert same(codes_of(name, folders[name], tmp_path, format), made[format])
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_nothing_is_written_unless_it_is_asked_for(folders, tmp_path):
    load(lora_method(LTX, folders[LTX]), base_weights="fp8", kept_in=tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_other_weights_another_type_or_other_layers_have_a_file_of_their_own(folders, tmp_path, monkeypatch):
    first = codes_of(LTX, folders[LTX], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    model = shutil.copytree(folders[LTX], tmp_path.parent / "model", dirs_exist_ok=True)
    file = next((model / "transformer").glob("*.safetensors"))
    save_file({key: tensor * 2 for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert not same(codes_of(LTX, model, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 2
    codes_of(LTX, folders[LTX], tmp_path, dtype=torch.bfloat16)
    assert len(list(tmp_path.iterdir())) == 3
    # Adapters elsewhere leave other layers without one, under other paths.
    method = lora_method(LTX, folders[LTX], target_modules="transformer_blocks.0.attn1.to_q")
    load(method, base_weights="fp8", keep_quantized=True, kept_in=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(quantized, "VERSION", quantized.VERSION + 1)
    codes_of(LTX, folders[LTX], tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "a layer is missing": lambda file: save_file(dict(list(load_file(file).items())[2:]), file),
    "another size": lambda file: save_file({key: tensor[:1].clone() for key, tensor in load_file(file).items()}, file),
    "another type": lambda file: save_file({key: tensor.float() for key, tensor in load_file(file).items()}, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole_is_said_and_written_again(folders, tmp_path, caplog, damage, refuse):
    first = codes_of(LTX, folders[LTX], tmp_path)
    (file,) = tmp_path.iterdir()
    DAMAGE[damage](file)
    assert same(codes_of(LTX, folders[LTX], tmp_path), first)
    assert "will be written again" in caplog.text
    refuse()
    assert same(codes_of(LTX, folders[LTX], tmp_path), first)


def test_a_run_that_is_stopped_while_writing_leaves_nothing(folders, tmp_path, monkeypatch):
    def stopped(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(kept, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        codes_of(LTX, folders[LTX], tmp_path)
    assert list(tmp_path.iterdir()) == []


def resident_mib(folder: Path) -> float:
    """How much of the files in a folder this process has in memory, as mapped."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = line.find(str(folder)) >= 0
        elif words[0] == "Rss:" and inside:
            total += int(words[1])
    return total / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is mapped")
def test_weights_that_are_kept_are_not_read_from_the_model(folders, tmp_path, monkeypatch):
    """Loading maps a model's files; nothing looks at what is replaced."""
    model = shutil.copytree(folders["ltx-0.9.0"], tmp_path / "model") / "transformer"
    config = json.loads((model / "config.json").read_text())
    config |= {"num_attention_heads": 16, "attention_head_dim": 32, "cross_attention_dim": 512, "num_layers": 2}
    for file in model.glob("*.safetensors"):
        file.unlink()
    LTXVideoTransformer3DModel.from_config(config).bfloat16().save_pretrained(model)
    whole = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
    assert whole > 15
    seen: list[float] = []
    prepare = SingleEngine.prepare
    monkeypatch.setattr(
        SingleEngine, "prepare", lambda self, *given: (seen.append(resident_mib(model)), prepare(self, *given))
    )
    for _ in range(2):
        codes_of("ltx-0.9.0", model.parent, tmp_path / "weights", dtype=torch.bfloat16)
    assert seen[0] > 0.8 * whole and seen[1] < 0.2 * whole, (seen, whole)
