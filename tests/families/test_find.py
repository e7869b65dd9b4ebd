"""From `model.path` to a family: what is found, and what is refused with the way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetrainers.config.schema import ModelConfig
from finetrainers.errors import UserError
from finetrainers.families.find import all_families, find_family
from tests.families.ltx_models import OLD
from tests.families.tiny import OURS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return OLD(tmp_path_factory.mktemp("model"))


def find(path: Path | str, **options: object):
    return find_family(ModelConfig(path=str(path), **options))


INDEXES = [
    (None, r"no model_index\.json"),
    ("{", "not JSON"),
    ("[]", "not JSON"),
    ('{"a": 1}', "names no `_class_name`"),
    ('{"_class_name": "FluxPipeline"}', r"FluxPipeline, which is not supported; supported are: .*ltx \(LTXPipeline"),
    ('{"_class_name": "LTXPipeline"}', r"the file transformer/config\.json of a ltx model is missing"),
]


@pytest.mark.parametrize(("index", "refusal"), INDEXES)
def test_a_folder_of_another_kind_is_refused(tmp_path, index, refusal):
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UserError, match=refusal):
        find(tmp_path)


def test_a_missing_part_is_named(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(UserError, match="the folder tokenizer/ of a ltx model is missing"):
        find(copy)
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "nowhere")


def test_every_supported_pipeline_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError) as refused:
        find(tmp_path)
    assert all(name in str(refused.value) for kind in all_families() for name in (kind.name, *kind.pipelines))


OPTIONS = [
    ({"experts": "both"}, "model.experts is no option of ltx; it is for wan"),
    ({"learned_positions": "keep"}, "model.learned_positions is no option of ltx; it is for cogvideox"),
    ({"embedded_guidance": 1.0}, "model.embedded_guidance is no option of ltx; it is for hunyuan"),
]


@pytest.mark.parametrize(("options", "refusal"), OPTIONS)
def test_an_option_of_another_family_is_refused(folder, options, refusal):
    with pytest.raises(UserError, match=refusal):
        find(folder, **options)


@pytest.mark.parametrize("name", ["cogvideox-5b", "hunyuan", "ltx-0.9.0", "wan-2.1", "wan-2.2-5b"])
def test_a_length_that_the_model_knows_needs_no_stretching(name, tmp_path):
    row = OURS[name]
    model = row.write(tmp_path / "model")
    longest = row.open(model).longest
    with pytest.raises(UserError, match=f"frames {longest} is not beyond the {longest} frames"):
        row.open(model, rope_temporal={"method": "interpolate", "frames": longest})
    row.open(model, rope_temporal={"method": "interpolate", "frames": longest + 8})


def test_a_hub_id_is_found_in_the_hubs_own_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--tiny-ltx" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "models--someone--tiny-ltx" / "refs").mkdir()
    (tmp_path / "models--someone--tiny-ltx" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = find("someone/tiny-ltx")
    assert found.load_transformers(torch.float32)["transformer"].config.num_layers == 2
    with pytest.raises(UserError, match="the hub did not give it"):
        find("someone/other")


def test_a_family_from_outside_is_found_by_its_dotted_name(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "own")
    index = json.loads((copy / "model_index.json").read_text()) | {"_class_name": "OwnPipeline"}
    (copy / "model_index.json").write_text(json.dumps(index))
    assert find(copy, family="tests.families.own_family.OwnVideo").name == "own"
    with pytest.raises(UserError, match="OwnPipeline, which is not supported"):
        find(copy)
    with pytest.raises(UserError, match=r"is a LTXPipeline, which is not supported; supported are: own \(Own"):
        find(folder, family="tests.families.own_family.OwnVideo")


DOTTED = [
    ("tests.families.nowhere.Own", "cannot be imported"),
    ("tests.families.own_family.Other", "cannot be imported"),
    ("tests.families.own_family.NoFamily", "is no subclass"),
]


@pytest.mark.parametrize(("dotted", "refusal"), DOTTED)
def test_a_dotted_name_that_is_none_is_refused(folder, dotted, refusal):
    with pytest.raises(UserError, match=refusal):
        find(folder, family=dotted)
