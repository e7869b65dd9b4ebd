"""What a user takes away: the same weights are the same file, and `latest` points at a whole folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LTXVideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from finetrainers.folder import steps_in
from finetrainers.hashing import file_digest
from finetrainers.weights import WeightsFolder, write_card, write_lora, write_transformer
from tests.families.tiny import TINY

LAYERS = {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k", "transformer_blocks.1.attn2.to_out.0"}
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": LAYERS,
    "rank_pattern": {"to_q": 2, "to_k": 3},
    "peft_type": torch.float32,
    "exclude_modules": None,
    "init_lora_weights": True,
    "layers_to_transform": (1, 0),
}


def adapters() -> dict[str, torch.Tensor]:
    tensors = {}
    for number, layer in enumerate(sorted(LAYERS)):
        tensors[f"{layer}.lora_A.weight"] = torch.arange(12.0).view(4, 3) + number
        tensors[f"{layer}.lora_B.weight"] = (torch.arange(12.0) - number).view(4, 3).t()
    return tensors


def test_a_lora_file(tmp_path):
    path = write_lora(tmp_path, adapters(), CONFIG)
    assert path == tmp_path / "pytorch_lora_weights.safetensors" and list(tmp_path.iterdir()) == [path]
    tensors = load_file(path)
    assert tensors.keys() == {f"transformer.{name}" for name in adapters()}
    assert all(torch.equal(tensors[f"transformer.{name}"], tensor) for name, tensor in adapters().items())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"lora_adapter_metadata"}, "several would stand in random order"
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.target_modules": sorted(LAYERS),
        "transformer.rank_pattern": {"to_q": 2, "to_k": 3},
        "transformer.peft_type": "torch.float32",
        "transformer.exclude_modules": None,
        "transformer.init_lora_weights": True,
        "transformer.layers_to_transform": [1, 0],
    }


WRITE = """
import sys
from pathlib import Path
import torch
from finetrainers.hashing import file_digest
from finetrainers.weights import write_lora
config = {"target_modules": {f"layer.{number}" for number in range(20)}, "r": 4}
print(file_digest(write_lora(Path(sys.argv[1]), {"layer.a": torch.ones(3)}, config)))
"""


def test_the_same_weights_are_the_same_file_in_every_process(tmp_path):
    """Names of layers are a set, whose order each process draws anew."""
    (tmp_path / "other").mkdir()
    layers = {f"layer.{number}" for number in range(20)}
    path = write_lora(tmp_path, {"layer.a": torch.ones(3)}, {"r": 4, "target_modules": layers})
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "other")],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == file_digest(path)


def test_the_file_is_a_function_of_the_weights(tmp_path):
    digests = [file_digest(write_lora(tmp_path, adapters(), CONFIG)) for _ in range(3)]
    turned = dict(reversed(adapters().items())), dict(reversed(CONFIG.items()))
    digests.append(file_digest(write_lora(tmp_path, *turned)))
    assert len(set(digests)) == 1
    changed = adapters()
    changed["transformer_blocks.0.attn1.to_q.lora_A.weight"][0, 0] += 1e-6
    assert file_digest(write_lora(tmp_path, changed, CONFIG)) not in digests
    assert file_digest(write_lora(tmp_path, adapters(), CONFIG | {"lora_alpha": 4})) not in digests


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_transformer_folder(tmp_path, dtype):
    model = TINY["ltx-0.9.0"].write(tmp_path / "model")
    transformer = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    folder = write_transformer(tmp_path, transformer.state_dict(), transformer, dtype)
    assert folder == tmp_path / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert tensors.keys() == transformer.state_dict().keys()
    assert all(torch.equal(tensors[name], value.to(dtype)) for name, value in transformer.state_dict().items())
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float32}, "the model stays as it was"
    back = LTXVideoTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert back.config.num_layers == transformer.config.num_layers


def save(weights: WeightsFolder, step: int, content: str = "") -> Path:
    folder = weights.begin(step)
    assert not folder.name.startswith("step-") and list(folder.iterdir()) == []
    (folder / "file").write_text(content or str(step))
    return weights.finish(folder, step)


KEPT = [(None, [1, 2, 3, 10]), (1, [10]), (2, [3, 10]), (9, [1, 2, 3, 10])]


@pytest.mark.parametrize(("keep", "expected"), KEPT)
def test_latest_and_what_is_kept(tmp_path, keep, expected):
    weights = WeightsFolder(tmp_path / "weights", keep=keep)
    for step in (1, 2, 3, 10):
        assert save(weights, step) == tmp_path / "weights" / f"step-{step:08d}"
        latest = tmp_path / "weights" / "latest"
        assert latest.is_symlink() and (latest / "file").read_text() == str(step)
        assert not latest.readlink().is_absolute(), "the folder may be moved"
    assert list(steps_in(tmp_path / "weights")) == expected
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {
        "latest",
        *(f"step-{step:08d}" for step in expected),
    }
    (tmp_path / "weights").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest" / "file").read_text() == "10"


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    weights = WeightsFolder(tmp_path, keep=None)
    save(weights, 5, "old")
    save(weights, 5, "new")
    assert (tmp_path / "latest" / "file").read_text() == "new"
    assert list(steps_in(tmp_path)) == [5]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_saved_is_kept(tmp_path, keep):
    """A run that goes on from an earlier checkpoint finds weights of later steps."""
    for step in (7, 8, 9):
        save(WeightsFolder(tmp_path, keep=None), step)
    save(WeightsFolder(tmp_path, keep=keep), 4)
    assert (tmp_path / "latest" / "file").read_text() == "4"
    assert len(steps_in(tmp_path)) == keep


def test_a_save_that_was_killed_leaves_the_last_one(tmp_path):
    weights = WeightsFolder(tmp_path, keep=1)
    save(weights, 1)
    (weights.begin(2) / "half").write_text("torn")
    assert (tmp_path / "latest" / "file").read_text() == "1"
    assert list(steps_in(tmp_path)) == [1]
    save(WeightsFolder(tmp_path, keep=1), 2)
    assert sorted(path.name for path in (tmp_path / "latest").iterdir()) == ["file"]


CARDS = [
    ("org/model", "", True),
    ("a: b # \"c\" 'd'", "", False),
    ("models/é", "BW_STYLE", True),
    ("- [x", 'say "hi"', False),
]


@pytest.mark.parametrize(("base_model", "trigger", "is_lora"), CARDS)
def test_a_card(tmp_path, base_model, trigger, is_lora):
    method = "lora" if is_lora else "full"
    if is_lora:
        write_lora(tmp_path, adapters(), CONFIG)
    write_card(tmp_path, base_model=base_model, family="ltx", method=method, step=250, trigger=trigger)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": base_model,
        "library_name": "diffusers",
        "tags": ["text-to-video", method],
    }
    assert "Trained for 250 steps" in body
    assert (json.dumps(trigger) in body) == bool(trigger)
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert json.dumps(base_model) in code
    assert ("load_lora_weights" in code) == is_lora
    assert ("/transformer" in code) == (not is_lora)
