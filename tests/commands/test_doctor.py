"""Versions and devices as they are here, and a missing package by name."""

from importlib import metadata

import torch

from finetrainers.commands import doctor as module


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
