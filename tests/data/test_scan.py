"""Every clip becomes items or a problem that is named, and a held-out clip stays held out."""

import itertools
import random
from pathlib import Path

import pytest
from PIL import Image

from finetrainers.data.index import FileIndex
from finetrainers.data.scan import Item, scan, split_by_hash
from finetrainers.demo.clips import render_clips
from finetrainers.errors import UserError
from finetrainers.hashing import digest, file_digest
from finetrainers.types import Bucket, Media, Problem, Record, Window

BUCKETS = [Bucket(9, 64, 96)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three clips of 20 frames at 10 fps."""
    folder = tmp_path_factory.mktemp("clips")
    return sorted(render_clips(folder, 3, num_frames=20, height=64, width=96, fps=10.0).parent.glob("*.mp4"))


def record(path: Path) -> Record:
    return Record(path.name, path, f"caption of {path.name}")


def zero(folder: Path) -> Path:
    (folder / "zero.mp4").touch()
    return folder / "zero.mp4"


def garbage(folder: Path) -> Path:
    (folder / "garbage.mp4").write_bytes(bytes(range(256)) * 4)
    return folder / "garbage.mp4"


def image(folder: Path) -> Path:
    Image.new("RGB", (96, 64)).save(folder / "image.png")
    return folder / "image.png"


def short(folder: Path) -> Path:
    table = render_clips(folder / "short", 1, num_frames=4, height=64, width=96, fps=10.0)
    return next(table.parent.glob("*.mp4")).rename(folder / "short.mp4")


BAD = {
    "zero bytes": (zero, "empty (0 bytes)"),
    "garbage": (garbage, "cannot be read as a video"),
    "absent": (lambda folder: folder / "absent.mp4", "cannot be read (No such file"),
    "an image": (image, "is an image, and no bucket is for images"),
    "too short": (short, "is too short: 4 frames at 10 fps"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_clip_among_good_ones(clips, tmp_path, case):
    make, reason = BAD[case]
    bad = make(tmp_path)
    seen = []
    records = [record(clips[0]), record(bad), record(clips[1])]
    index = FileIndex(tmp_path / "files.json")
    items, problems = scan(
        records, index, buckets=BUCKETS, fps=None, window="first", advance=lambda: seen.append(len(seen))
    )
    assert [item.name for item in items] == [clips[0].name, clips[1].name]
    assert [problem.name for problem in problems] == [bad.name]
    assert reason in problems[0].reason
    assert seen == [0, 1, 2], "progress counts the bad ones too"
    assert (tmp_path / "files.json").is_file()


def test_items_are_what_the_clips_are(clips, tmp_path):
    records = [record(path) for path in clips]
    items, problems = scan(records, FileIndex(tmp_path / "f.json"), buckets=BUCKETS, fps=None, window="first")
    assert problems == []
    assert [item.record for item in items] == records
    assert [item.digest for item in items] == [file_digest(path) for path in clips]
    assert len({item.digest for item in items}) == 3
    for item in items:
        assert item.bucket == BUCKETS[0]
        assert (item.media.num_frames, item.media.fps, item.media.width, item.media.height) == (20, 10.0, 96, 64)
        assert item.window == Window(0.0, 9, 10.0)


WINDOWS = [
    ("first", None, [0.0], 10.0),
    ("middle", None, [0.5], 10.0),
    ("all", None, [0.0, 0.9], 10.0),
    ("all", 5.0, [0.0], 5.0),
    ("all", 20.0, [0.0, 0.45, 0.9, 1.35], 20.0),
]


@pytest.mark.parametrize(("policy", "fps", "starts", "rate"), WINDOWS)
def test_windows(clips, tmp_path, policy, fps, starts, rate):
    """Twenty frames at 10 fps are two seconds: 10 frames at 5 fps, 40 at 20 fps."""
    items, _ = scan([record(clips[0])], FileIndex(tmp_path / "f.json"), buckets=BUCKETS, fps=fps, window=policy)
    assert [item.window.start_seconds for item in items] == pytest.approx(starts)
    assert {(item.window.num_frames, item.window.fps) for item in items} == {(9, rate)}
    names = [clips[0].name] if len(starts) == 1 else [f"{clips[0].name}#{number}" for number in range(len(starts))]
    assert [item.name for item in items] == names


def test_each_clip_goes_to_the_bucket_that_suits_it(clips, tmp_path):
    buckets = [Bucket(9, 64, 64), Bucket(17, 64, 96), Bucket(9, 64, 96), Bucket(1, 64, 96), Bucket(33, 64, 96)]
    records = [record(clips[0]), record(image(tmp_path))]
    items, _ = scan(records, FileIndex(tmp_path / "f.json"), buckets=buckets, fps=None, window="first")
    assert [item.bucket for item in items] == [Bucket(17, 64, 96), Bucket(1, 64, 96)]
    assert items[1].window == Window(0.0, 1, 0.0)


def test_no_records(tmp_path):
    assert scan([], FileIndex(tmp_path / "f.json"), buckets=BUCKETS, fps=None, window="all") == ([], [])


def made_up(value: object, name: str = "") -> Item:
    name = name or f"{value}.mp4"
    media = Media(96, 64, 9, 10.0, 0.9)
    return Item(name, Record(name, Path(name), ""), digest(value), media, Window(0.0, 9, 10.0), BUCKETS[0])


def held_out(items: list[Item], share: float) -> set[str]:
    train, out = split_by_hash(items, share)
    assert sorted(item.name for item in train + out) == sorted(item.name for item in items)
    assert not {item.digest for item in train} & {item.digest for item in out}
    return {item.name for item in out}


def side_alone(item: Item, share: float) -> bool:
    """Held out by its own digest: its first 48 bits as a fraction lie below the share."""
    return int(item.digest, 16) / 16**64 < share


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_the_share_is_roughly_met_and_each_clip_decides_for_itself(share):
    items = [made_up(number) for number in range(2000)]
    out = held_out(items, share)
    error = (2000 * share * (1 - share)) ** 0.5
    assert abs(len(out) - 2000 * share) < 4 * error
    assert out == {item.name for item in items if side_alone(item, share)}


def test_no_clip_moves_when_others_come_or_go():
    """Beyond those that make the split possible at all: 40 clips and more hold some on each side."""
    items = [made_up(number) for number in range(300)]
    whole = held_out(items, 0.2)
    draw = random.Random(0)
    for size in (40, 100, 250, 299):
        some = draw.sample(items, size)
        assert held_out(some, 0.2) == whole & {item.name for item in some}
    assert held_out(list(reversed(items)), 0.2) == whole


def test_a_larger_share_only_adds():
    items = [made_up(number) for number in range(300)]
    outs = [held_out(items, share) for share in (0.05, 0.1, 0.3, 0.8)]
    assert all(less < more for less, more in itertools.pairwise(outs))


def test_order_of_the_clips_is_kept():
    items = [made_up(number) for number in range(50)]
    train, out = split_by_hash(items, 0.3)
    assert train == [item for item in items if item in train] and out == [item for item in items if item in out]


def test_copies_and_windows_of_a_clip_stay_on_one_side():
    items = [made_up(number // 4, name=f"{number}.mp4") for number in range(400)]
    out = held_out(items, 0.3)
    for start in range(0, 400, 4):
        assert len({f"{number}.mp4" in out for number in range(start, start + 4)}) == 1


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("num", [2, 3, 5])
def test_each_side_has_at_least_one(share, num):
    for start in range(0, 40, num):
        items = [made_up(number) for number in range(start, start + num)]
        assert 1 <= len(held_out(items, share)) <= num - 1


@pytest.mark.parametrize("items", [[made_up(1)], [made_up(1), made_up(1, name="copy.mp4")]])
def test_a_single_clip_cannot_be_shared(items):
    with pytest.raises(UserError, match=r"data\.validation 0\.2 holds out a share .* only 1"):
        split_by_hash(items, 0.2)


def test_problems_are_values():
    assert Problem("a", "b") == Problem("a", "b")
