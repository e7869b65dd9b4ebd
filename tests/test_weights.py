"""What a user takes away: the same weights are the same file, and `latest` points at a whole folder."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetrainers.folder import LORA_FILE, steps_in
from finetrainers.hashing import file_digest
from finetrainers.weights import SECOND, WeightsFolder, read_notes, write_card, write_loras, write_transformer
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


NOTES = {"rope_temporal": {"method": "interpolate", "frames": 513}, "learned_positions": "resize"}


def write_lora(folder: Path, weights: dict, config: dict, part: str = "transformer", **notes: object) -> Path:
    write_loras(folder, {part: (weights, config)}, notes=notes)
    return folder / LORA_FILE


@contextmanager
def said_by_diffusers() -> Iterator[list[str]]:
    """What diffusers warns of meanwhile."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("diffusers").removeHandler(handler)


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
from finetrainers.weights import write_loras
config = {"target_modules": {f"layer.{number}" for number in range(20)}, "r": 4}
folder = Path(sys.argv[1])
write_loras(folder, {"transformer": ({"layer.a": torch.ones(3)}, config)}, notes={"b": 1, "a": {"d": 1, "c": 2}})
print(file_digest(folder / "pytorch_lora_weights.safetensors"))
"""


def test_the_same_weights_are_the_same_file_in_every_process(tmp_path):
    """Names of layers are a set, whose order each process draws anew."""
    (tmp_path / "other").mkdir()
    layers = {f"layer.{number}" for number in range(20)}
    config = {"r": 4, "target_modules": layers}
    path = write_lora(tmp_path, {"layer.a": torch.ones(3)}, config, a={"c": 2, "d": 1}, b=1)
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
    folder = tmp_path / "transformer"
    state = {name: tensor.to(dtype) for name, tensor in transformer.state_dict().items()}
    write_transformer(folder, state, transformer, notes={})
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


def test_several_models_in_one_file_and_the_second_expert_beside_it(tmp_path):
    others = {"q.lora_A.weight": torch.ones(2, 3)}
    parts = {"transformer": (adapters(), CONFIG), "text_encoder": (others, {"r": 2}), SECOND: (others, {"r": 3})}
    write_loras(tmp_path, parts, notes=NOTES)
    files = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert files == [LORA_FILE, f"transformer_2/{LORA_FILE}"]
    together, second = (tmp_path / file for file in files)
    assert load_file(together).keys() == {f"transformer.{name}" for name in adapters()} | {
        "text_encoder.q.lora_A.weight"
    }
    assert load_file(second).keys() == {"transformer.q.lora_A.weight"}, "as loaders ask for it"
    described = []
    for path in (together, second):
        assert read_notes(path) == NOTES
        with safe_open(path, framework="pt") as file:
            described.append(json.loads(file.metadata()["lora_adapter_metadata"]))
    assert (described[0]["transformer.r"], described[0]["text_encoder.r"]) == (4, 2)
    assert described[1]["transformer.r"] == 3 and "text_encoder.r" not in described[1]
    (tmp_path / "alone").mkdir()
    write_loras(tmp_path / "alone", {SECOND: (others, {"r": 3})}, notes={})
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [SECOND]


def test_notes_of_a_lora_are_passed_over_by_diffusers(tmp_path):
    """They come back from the file, and the adapters load as they would without."""
    model = TINY["ltx-0.9.0"].write(tmp_path / "model")
    layers = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_v"]
    weights = {
        f"{layer}.lora_{part}.weight": torch.full((4, 32) if part == "A" else (32, 4), 0.1)
        for layer in layers
        for part in "AB"
    }
    path = write_lora(tmp_path, weights, {"r": 4, "lora_alpha": 12, "target_modules": layers}, **NOTES)
    assert read_notes(path) == NOTES
    pipeline = LTXPipeline.from_pretrained(model)
    with said_by_diffusers() as said:
        pipeline.load_lora_weights(tmp_path)
    assert said == []
    named = {name: module for name, module in pipeline.transformer.named_modules() if hasattr(module, "lora_A")}
    assert sorted(named) == layers
    for module in named.values():
        torch.testing.assert_close(module.get_delta_weight("default_0"), torch.full((32, 32), 3 * 4 * 0.01))
    assert read_notes(write_lora(tmp_path, weights, {"r": 4})) == {}
    save_file(weights, path)
    assert read_notes(path) == {}, "another tool's file"


def test_notes_of_a_transformer_are_passed_over_by_diffusers(tmp_path):
    model = TINY["ltx-0.9.0"].write(tmp_path / "model")
    transformer = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    folders = {"noted": NOTES, "plain": {}}
    for name, notes in folders.items():
        write_transformer(tmp_path / name, transformer.state_dict(), transformer, notes=notes)
        assert read_notes(tmp_path / name) == notes
        with said_by_diffusers() as said:
            back = LTXVideoTransformer3DModel.from_pretrained(tmp_path / name)
        assert said == [] and {k: v for k, v in back.config.items() if k[0] != "_"} == {
            k: v for k, v in transformer.config.items() if k[0] != "_"
        }
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in folders]
    assert configs[0].keys() - configs[1].keys() == {f"_finetrainers.{name}" for name in NOTES}
    assert read_notes(model / "transformer") == {}, "the base model's own"


def test_no_other_option_is_taken_from_a_file(tmp_path):
    """What comes from anywhere may not say which model is opened or what is imported."""
    foreign = {"path": "elsewhere", "family": "their.Family", "revision": "x", "learned_positions": "remove"}
    assert read_notes(write_lora(tmp_path, adapters(), CONFIG, **foreign)) == {"learned_positions": "remove"}
    config = {f"_finetrainers.{name}": value for name, value in foreign.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_notes(tmp_path) == {"learned_positions": "remove"}


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
    else:
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text("{}")
    facts = {"base_model": base_model, "family": "ltx", "task": "image-to-video", "method": method}
    write_card(tmp_path, **facts, step=250, trigger=trigger)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": base_model,
        "library_name": "diffusers",
        "tags": ["image-to-video", method],
    }
    assert "Trained for 250 steps" in body
    assert (json.dumps(trigger) in body) == bool(trigger)
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert json.dumps(base_model) in code
    assert ("load_lora_weights" in code) == is_lora
    assert ("/transformer" in code) == (not is_lora)


LOADS = {
    "a LoRA": (["transformer"], [], ['pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")']),
    "a LoRA of two experts": (
        ["transformer", SECOND],
        [],
        [
            'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")',
            'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER/transformer_2", load_into_transformer_2=True)',
        ],
    ),
    "a LoRA of the second expert": (
        [SECOND],
        [],
        ['pipeline.load_lora_weights("PATH_OF_THIS_FOLDER/transformer_2", load_into_transformer_2=True)'],
    ),
    "a LoRA of the text encoder too": (
        ["transformer", "text_encoder"],
        [],
        [
            'pipeline.load_lora_weights("PATH_OF_THIS_FOLDER")',
            "pipeline.text_encoder.load_adapter(adapter_state_dict=adapters, peft_config=LoraConfig(**options))",
        ],
    ),
    "two transformers": (
        [],
        ["transformer", SECOND],
        [
            f'pipeline.{part} = type(pipeline.{part}).from_pretrained("PATH_OF_THIS_FOLDER/{part}")'
            for part in ("transformer", "transformer_2")
        ],
    ),
}


@pytest.mark.parametrize("case", LOADS)
def test_a_card_loads_each_of_the_weights_beside_it(tmp_path, case):
    """One line each, in order, and no line for what is not there."""
    parts, folders, lines = LOADS[case]
    if parts:
        write_loras(tmp_path, {part: (adapters(), CONFIG) for part in parts}, notes={})
    for name in folders:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    facts = {"base_model": "org/model", "family": "wan", "task": "text-to-video", "method": "lora"}
    write_card(tmp_path, **facts, step=1, trigger="")
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert [line for line in code.splitlines() if line.startswith("pipeline.")] == lines
