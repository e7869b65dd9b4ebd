"""Versions and devices as they are here, and a missing package by name."""

import shutil
from importlib import metadata
from pathlib import Path

import torch

from finetrainers.commands import doctor as module
from tests.end_to_end.runs import write_config


def test_what_is_here(call):
    answer = call("doctor")
    assert answer.code == 0, answer.out
    for package in ("torch", "diffusers", "transformers", "peft"):
        assert f"  {package} {metadata.version(package)}\n" in answer.out
    if not torch.cuda.is_available():
        assert "devices: CPU only" in answer.out
    for feature in ("video files (PyAV): yes, decodes h264", "8-bit AdamW", "parquet", "TensorBoard", "Weights"):
        assert feature in answer.out
    assert "GiB free" in answer.out


def test_a_missing_package_is_named_and_fails(call, monkeypatch):
    def version(package: str) -> str:
        if package == "peft":
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    monkeypatch.setattr(module, "version", version)
    answer = call("doctor")
    assert answer.code == 1
    assert "peft: not installed" in answer.out and "missing: peft" in answer.out


def test_an_optional_feature_that_does_not_work_is_said(call, monkeypatch):
    def broken() -> str:
        raise ImportError("libcudart is missing\nlong story")

    monkeypatch.setitem(module._OPTIONAL, "parquet tables", broken)
    answer = call("doctor")
    assert answer.code == 0, "it is optional"
    assert "parquet tables: no (libcudart is missing)\n" in answer.out


def test_captions_that_the_tokenizer_does_not_know(call, clips, model, tmp_path):
    """With the trigger before each; shares of tokens, and the first caption of each kind."""
    texts = ["a red circle", "红色的圆", "x" * 300]
    paths = [shutil.copy(path, tmp_path) for path, _ in zip(sorted(clips.glob("*.mp4")), texts, strict=False)]
    for path, text in zip(paths, texts, strict=True):
        Path(path).with_suffix(".txt").write_text(text, encoding="utf-8")
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(tmp_path), "trigger": "BW"},
        output=str(tmp_path / "run"),
    )
    answer = call("doctor", config)
    assert answer.code == 0, answer.err
    # Each word begins with a token of its own, a known character is one, a run of unknown ones is one, and the end.
    num_tokens = [3 + 14, 3 + 3, 3 + 302]
    assert f"captions: 3, of {sum(num_tokens)} tokens\n" in answer.out
    characters = f"standing for {4 / (15 + 7 + 303):.1%} of the characters"
    assert f"unknown to the tokenizer: {1 / sum(num_tokens):.1%}, {characters}, first in: BW 红色的圆\n" in answer.out
    lost = (num_tokens[2] - 128) / sum(num_tokens)
    assert f"beyond the 128 tokens that the model reads: {lost:.1%}, in 1 captions, first in: BW xxx" in answer.out
    assert not (tmp_path / "run").exists()
    assert "captions:" not in call("doctor").out
    assert call("doctor", config, "data.train=nowhere").code == 2
