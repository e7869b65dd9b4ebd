"""Every way to compute activations again, and to keep them on the host, against the plain run: to the bit."""

from __future__ import annotations

import pytest
import torch

from finetrainers.memory import offload
from tests.families.tiny import TINY
from tests.memory.training import (
    FAMILIES,
    METHODS,
    WORDS,
    Trained,
    load,
    make_method,
    random_batch,
    train,
    write_deeper,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of more blocks than two, so that there is a first one, a last one and others."""
    return {row: write_deeper(row, tmp_path_factory.mktemp("deeper") / row) for row in FAMILIES}


def trained(folders, row, name, word, *, offloaded=False, dtype=torch.float32):
    method = make_method(row, folders[row], name, dtype=dtype)
    sizes = (TINY[row].bucket, TINY[row].other_bucket, TINY[row].bucket)
    models = load(method, word, offload=offloaded)
    return train(method, models, [random_batch(method, size) for size in sizes])


@pytest.fixture(scope="module")
def plain(folders):
    """The run without any of it, once for each family, method and type."""
    made: dict[tuple, Trained] = {}

    def run(row, name, dtype=torch.float32):
        if (row, name, dtype) not in made:
            made[row, name, dtype] = trained(folders, row, name, "none", dtype=dtype)
        return made[row, name, dtype]

    return run


@pytest.fixture
def all_sizes(monkeypatch):
    """Tensors of tiny models are sent too."""
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.mark.parametrize("word", [word for word in WORDS if word != "none"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes(row, name, word, folders, plain):
    trained(folders, row, name, word).assert_equals(plain(row, name))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("row", FAMILIES)
def test_no_number_changes_with_activations_on_the_host(row, name, word, folders, plain, all_sizes):
    trained(folders, row, name, word, offloaded=True).assert_equals(plain(row, name))
