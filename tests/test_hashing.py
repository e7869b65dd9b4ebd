"""Names made from content notice every change they should, and seeds are the same in every process."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch

from finetrainers.hashing import digest, file_digest, folder_digest, generator_for, seed_for, weights_digest

MIB = 1 << 20


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digest_is_the_sha256_of_sorted_json():
    assert digest({"b": 1, "a": ["é", None]}) == sha256('{"a":["é",null],"b":1}'.encode())
    assert digest({"b": {"y": 1, "x": 2}, "a": 0}) == digest({"a": 0, "b": {"x": 2, "y": 1}})


DIFFERENT = [[1, 2], [2, 1], ["1", 2], [1, [2]], {"1": 2}, [1, 2.5], [1, 2, None], "[1,2]", None, [], {}]


def test_digests_of_different_values_differ():
    assert len({digest(value) for value in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 3 * MIB + 5])
def test_file_digest_reads_all(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert file_digest(path) == sha256(content[:size]) == weights_digest(path)


def set_byte(path: Path, at: int, value: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([value]))


def test_weights_digest_of_a_big_file_notices_its_size_its_start_and_every_piece(tmp_path):
    """The file is sparse: 65 MiB that take no room."""
    path = tmp_path / "model.safetensors"
    size = 65 * MIB
    path.touch()
    os.truncate(path, size)
    seen = {weights_digest(path)}
    places = [0, 8, MIB - 1, *(size * probe // 32 + offset for probe in range(32) for offset in (0, 65535))]
    for place in places:
        set_byte(path, place)
        seen.add(weights_digest(path))
        set_byte(path, place, 0)
    assert len(seen) == 1 + len(set(places))
    for other_size in (size + 1, size - 1):
        os.truncate(path, other_size)
        seen.add(weights_digest(path))
    assert len(seen) == 3 + len(set(places))


def test_weights_digest_reads_up_to_64_mib_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    os.truncate(path, 64 * MIB)
    before = weights_digest(path)
    # Between two of the pieces that would be read of a larger file.
    set_byte(path, 3 * MIB + 100 * 1024)
    assert weights_digest(path) != before


def rename(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")


def change(folder: Path) -> None:
    (folder / "sub" / "model.bin").write_bytes(b"weightz")


def move(folder: Path) -> None:
    (folder / "sub" / "model.bin").rename(folder / "model.bin")


def exchange(folder: Path) -> None:
    one, other = folder / "config.json", folder / "sub" / "model.bin"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "renamed": (rename, True),
    "changed": (change, True),
    "moved": (move, True),
    "contents exchanged": (exchange, True),
    "added": (lambda folder: (folder / "new").touch(), True),
    "removed": (lambda folder: (folder / "config.json").unlink(), True),
    "a hidden file": (lambda folder: (folder / ".lock").touch(), False),
    "an empty folder": (lambda folder: (folder / "empty").mkdir(), False),
    "touched": (lambda folder: os.utime(folder / "config.json", (1, 1)), False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_folder_digest_notices(tmp_path, case):
    folder = tmp_path / "vae"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "model.bin").write_bytes(b"weights")
    before = folder_digest(folder)
    make, is_noticed = CHANGES[case]
    make(folder)
    assert (folder_digest(folder) != before) == is_noticed
    moved = folder.rename(tmp_path / "elsewhere")
    assert (folder_digest(moved) != before) == is_noticed, "where the folder lies does not matter"


KEYS = [
    (42, "noise", 3, 7),
    (42, "noise", 7, 3),
    (43, "noise", 3, 7),
    (42, "sigma", 3, 7),
    (42, "noise", 37),
    (42, "noise", 3, "7"),
    (42, "noise", 3),
    (42, "noise"),
    (42, "noise, 3", 7),
]


def test_seeds_are_frozen():
    """A change of these would make every run of an earlier version another run."""
    hexdigest = sha256(b"(42, 'noise', 3, 7)")
    assert seed_for(42, "noise", 3, 7) == int(hexdigest[:16], 16) // 2
    assert (
        seed_for(42, "validation", "ab", "0.125000")
        == int(sha256(b"(42, 'validation', 'ab', '0.125000')")[:16], 16) // 2
    )


def test_seeds_are_the_same_in_every_process():
    shown = "seed_for(42, 'a', 'b', 3), digest({'x': [1], 'y': 2})"
    code = f"from finetrainers.hashing import digest, seed_for; print({shown})"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert said == {f"{seed_for(42, 'a', 'b', 3)} {digest({'x': [1], 'y': 2})}\n".encode()}


def test_distinct_keys_give_distinct_streams():
    streams = [torch.randn(64, generator=generator_for(*key)) for key in KEYS]
    for (one, left), (other, right) in combinations(zip(KEYS, streams, strict=True), 2):
        assert not torch.equal(left, right), (one, other)
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 5 / 64**0.5, (one, other)
    again = [torch.randn(64, generator=generator_for(*key)) for key in reversed(KEYS)]
    assert all(torch.equal(left, right) for left, right in zip(streams, reversed(again), strict=True))


def test_seeds_do_not_collide_and_fit_a_generator():
    seeds = {seed_for(seed, "noise", epoch, sample) for seed in range(5) for epoch in range(20) for sample in range(50)}
    assert len(seeds) == 5 * 20 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 and min(seeds) < 2**53, "they use the whole width"


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    torch.rand(3, generator=generator_for(1, "x"))
    assert torch.equal(before, torch.random.get_rng_state())
