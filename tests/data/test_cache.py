"""What was written is read back; what is damaged is said and counts as missing, wherever the damage is."""

import logging
import os
import stat
import zlib
from pathlib import Path

import pytest
import torch

from finetrainers.data.cache import Cache
from finetrainers.hashing import digest

KEYS = [digest(number) for number in range(4)]
TENSORS = {
    "mean": torch.linspace(-3, 3, 24).view(2, 3, 4).bfloat16(),
    "shift": torch.tensor([0.1, -0.2]),
    "scale": torch.tensor(1.5),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).view(2, 3).t(),
}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Two videos and a text, their checksums known."""
    cache = Cache(tmp_path)
    for number, key in enumerate(KEYS[:2]):
        cache.write("videos", key, {"mean": torch.full((4, 5), float(number))})
    cache.write("texts", KEYS[2], {"embeds": torch.ones(3, dtype=torch.bfloat16)})
    cache.remember()
    return cache


def test_tensors_come_back_as_they_were(tmp_path):
    Cache(tmp_path).write("videos", KEYS[0], TENSORS)
    back = Cache(tmp_path).read("videos", KEYS[0])
    assert back.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert torch.equal(back[name], tensor), name


def test_each_kind_has_its_own_folder(cache, tmp_path):
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    videos = {f"videos/{key[:2]}/{key}.safetensors" for key in KEYS[:2]}
    assert files == videos | {f"texts/{KEYS[2][:2]}/{KEYS[2]}.safetensors", "whole.json"}


def test_a_write_that_fails_leaves_nothing_that_is_read(cache, tmp_path, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("finetrainers.folder.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        cache.write("videos", KEYS[0], {"mean": torch.zeros(1)})
    with pytest.raises(OSError, match="no space"):
        cache.write("videos", KEYS[3], {"mean": torch.zeros(1)})
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    for fresh in (cache, Cache(tmp_path)):
        assert fresh.missing("videos", KEYS) == KEYS[2:]
        assert torch.equal(fresh.read("videos", KEYS[0])["mean"], torch.zeros(4, 5)), "the old content stays"


def test_missing_names_each_once_in_order(cache, tmp_path):
    wanted = [KEYS[3], KEYS[1], KEYS[2], KEYS[3], KEYS[0]]
    for fresh in (cache, Cache(tmp_path)):
        assert fresh.missing("videos", wanted) == [KEYS[3], KEYS[2]]
        assert fresh.missing("texts", [KEYS[2]]) == []
        assert fresh.missing("texts", iter([])) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def truncate_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


def flip_header_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"mean")] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "truncated in its header": truncate_header,
    "zero bytes": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(300)),
    "text": lambda path: path.write_text("<html>404</html>" * 20),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "one bit of a tensor": flip_bit,
    "one bit of a name": flip_header_bit,
    "another entry's content": lambda path: path.write_bytes(
        Path(str(path).replace(KEYS[0], KEYS[1]).replace(f"/{KEYS[0][:2]}/", f"/{KEYS[1][:2]}/")).read_bytes()
    ),
}
KNOWN_BY_CHECKSUM = {"one bit of a tensor", "one bit of a name", "another entry's content"}


CASES = [(how, known) for how in DAMAGES for known in (True, False) if known or how not in KNOWN_BY_CHECKSUM]


@pytest.mark.parametrize(("how", "checksums_are_known"), CASES)
def test_a_damaged_entry_is_said_and_missing(cache, tmp_path, caplog, how, checksums_are_known):
    if not checksums_are_known:
        (tmp_path / "whole.json").unlink()
    path = cache.path("videos", KEYS[0])
    DAMAGES[how](path)
    opened = Cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert opened.missing("videos", KEYS[:2]) == KEYS[:1]
    (record,) = caplog.records
    assert path.name in record.getMessage() and "damaged and will be encoded again" in record.getMessage()

    opened.write("videos", KEYS[0], {"mean": torch.zeros(4, 5)})
    opened.remember()
    caplog.clear()
    for fresh in (opened, Cache(tmp_path)):
        assert fresh.missing("videos", KEYS[:2]) == []
        assert torch.equal(fresh.read("videos", KEYS[0])["mean"], torch.zeros(4, 5))
    assert not caplog.records


def test_damage_while_the_cache_is_open_is_noticed(cache):
    flip_bit(cache.path("videos", KEYS[1]))
    assert cache.missing("videos", KEYS[:2]) == [KEYS[1]]


def test_an_untouched_file_is_not_read_again(cache, tmp_path, monkeypatch):
    opened = Cache(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr("finetrainers.data.cache.safe_open", lambda *args, **kwargs: pytest.fail("opened"))
    assert opened.missing("videos", KEYS[:2]) == []


def test_a_file_that_was_only_touched_is_whole(cache, tmp_path, caplog):
    os.utime(cache.path("videos", KEYS[0]), (1, 1))
    assert Cache(tmp_path).missing("videos", KEYS[:2]) == []
    assert not caplog.records


WHOLE_FILES = {
    "garbage": b"\x80\xff\0",
    "torn": b'{"abc": [1, 2',
    "empty": b"",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "other values": b'{"KEY": 3}',
    "short stamps": b'{"KEY": [1]}',
    "no stamps": b'{"KEY": {"size": 1}}',
}


@pytest.mark.parametrize("how", WHOLE_FILES)
def test_a_damaged_whole_json_is_ignored(cache, tmp_path, how):
    file = tmp_path / "whole.json"
    file.write_bytes(WHOLE_FILES[how].replace(b"KEY", KEYS[0].encode()))
    opened = Cache(tmp_path)
    assert opened.missing("videos", KEYS) == KEYS[2:]
    assert opened.missing("texts", KEYS[2:3]) == []
    flip_bit(opened.path("videos", KEYS[0]))
    assert Cache(tmp_path).missing("videos", KEYS[:2]) == KEYS[:1], "the checksums are known again"


def test_two_runs_share_a_folder(cache, tmp_path, caplog):
    """Each writes the list of checksums without the other's; that costs a second look, and nothing else."""
    one, other = Cache(tmp_path), Cache(tmp_path)
    more = [digest(f"more {number}") for number in range(4)]
    one.write("videos", more[0], {"mean": torch.zeros(1)})
    other.write("videos", more[1], {"mean": torch.ones(1)})
    one.write("videos", more[2], {"mean": torch.full((1,), 2.0)})
    other.write("videos", more[2], {"mean": torch.full((1,), 2.0)})
    other.remember()
    one.remember()
    for fresh in (one, other, Cache(tmp_path)):
        assert fresh.missing("videos", [*KEYS[:2], *more]) == more[3:]
        assert [fresh.read("videos", key)["mean"].item() for key in more[:3]] == [0.0, 1.0, 2.0]
    assert not caplog.records


def test_the_same_tensors_are_the_same_file(tmp_path):
    digests = set()
    for number, names in enumerate((list(TENSORS), list(reversed(TENSORS)))):
        cache = Cache(tmp_path / str(number))
        cache.write("videos", KEYS[0], {name: TENSORS[name] for name in names})
        digests.add(zlib.crc32(cache.path("videos", KEYS[0]).read_bytes()))
    assert len(digests) == 1


def test_left_over_temporary_files_are_passed_over(cache, tmp_path, caplog):
    (cache.path("videos", KEYS[0]).parent / ".abc.tmp").write_bytes(b"half")
    (tmp_path / ".whole.json.abc.tmp").write_bytes(b"{")
    assert Cache(tmp_path).missing("videos", KEYS[:2]) == []
    assert not caplog.records


def test_asking_an_empty_folder_writes_nothing(tmp_path):
    cache = Cache(tmp_path / "cache")
    assert cache.missing("videos", KEYS) == KEYS
    assert not (tmp_path / "cache").exists()


def test_entries_of_a_shared_cache_may_be_read_by_others(cache):
    """A cache may be shared between people: the umask decides, as for any file."""
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE(cache.path("videos", KEYS[0]).stat().st_mode)
    assert mode == 0o666 & ~umask
