"""The rendered clips show what their captions say."""

import csv
import random
from pathlib import Path

import av
import numpy as np
import pytest

from finetrainers.demo.clips import (
    BACKGROUNDS,
    COLOURS,
    FLAT,
    FLAT_UNSAID,
    MOTIONS,
    NEON,
    SHAPES,
    Course,
    Scene,
    flat,
    neon,
    render_clips,
    render_scene,
)


def paths(motion: str, num_frames: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Centre of an orange circle in each frame, in pixels, x and y; and its area."""
    scene = Scene("circle", "orange", motion, "dark")
    video = render_scene(scene, num_frames=num_frames, height=80, width=120)
    near = np.abs(video.astype(int) - COLOURS["orange"]).max(axis=-1) < 60
    return np.array([np.argwhere(frame).mean(axis=0)[::-1] for frame in near]), near.sum((1, 2))


@pytest.mark.parametrize(
    ("motion", "moved"),
    [
        ("moves to the right", (1, 0)),
        ("moves to the left", (-1, 0)),
        ("moves upwards", (0, -1)),
        ("moves downwards", (0, 1)),
        ("stays still", (0, 0)),
    ],
)
def test_a_shape_goes_where_its_caption_says(motion: str, moved: tuple[int, int]) -> None:
    """0.42 of the shorter side, 80 pixels, y pointing down."""
    centers, areas = paths(motion)
    way = 0.42 * 80 * np.array(moved)
    assert centers[-1] - centers[0] == pytest.approx(way, abs=1.5)
    assert np.ptp(areas) < 0.05 * areas[0]
    # Evenly, not in leaps.
    assert np.diff(centers, axis=0) == pytest.approx(np.tile(way / 8, (8, 1)), abs=1)


@pytest.mark.parametrize(("motion", "turn"), [("circles clockwise", 1), ("circles counterclockwise", -1)])
def test_a_round_turns_as_its_caption_says(motion: str, turn: int) -> None:
    centers, _ = paths(motion, num_frames=17)
    # As seen, with y pointing down, clockwise is the way of growing angles.
    angles = np.unwrap(np.arctan2(centers[:, 1] - 40, centers[:, 0] - 60))
    assert turn * (angles[-1] - angles[0]) == pytest.approx(1.5 * np.pi, abs=0.2)
    assert np.hypot(centers[:, 1] - 40, centers[:, 0] - 60) == pytest.approx(0.17 * 80, abs=1)


@pytest.mark.parametrize(("motion", "first", "last"), [("grows", 0.45, 1.4), ("shrinks", 1.4, 0.45)])
def test_growing_and_shrinking_change_the_radius(motion: str, first: float, last: float) -> None:
    centers, areas = paths(motion)
    assert np.sqrt(areas[[0, -1]] / np.pi) == pytest.approx(np.array([first, last]) * 0.23 * 80, abs=1)
    assert np.ptp(centers, axis=0) == pytest.approx(np.zeros(2), abs=0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_and_soft_edges(shape: str) -> None:
    scene = Scene(shape, "orange", "stays still", "dark")
    assert scene.caption == f"an orange {shape} stays still over a dark background"
    # A third of a pixel aside, so that no side of the square lies between two pixels.
    video = render_scene(scene, num_frames=1, height=80, width=120, course=Course(x=0.504, y=0.504))
    assert video.shape == (1, 80, 120, 3) and video.dtype == np.uint8
    # Covered area in pixels, soft edges counted by their share; the radius is 0.23 of 80.
    share = ((video[0].astype(float) - 56) / (np.array(COLOURS["orange"]) - 56.0))[..., 0].clip(0, 1)
    radius, tip, notch = 18.4, 1.3 * 18.4, 0.45 * 1.3 * 18.4
    area = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.88 * radius) ** 2,
        "triangle": 3 * np.sqrt(3) * (0.55 * radius) ** 2,
        "cross": 2 * (2 * radius) * (2 * 0.38 * radius) - (2 * 0.38 * radius) ** 2,
        # Ten triangles with two sides that meet at 36 degrees.
        "star": 10 * 0.5 * tip * notch * np.sin(np.pi / 5),
    }[shape]
    assert share[share > 0.1].sum() == pytest.approx(area, rel=0.05)
    assert ((share > 0.2) & (share < 0.8)).sum() > 8, "edges must be soft"


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_shape_stays_in_the_picture(motion: str) -> None:
    draw = random.Random(0)
    for _ in range(20):
        video = render_scene(
            Scene("circle", "red", motion, "dark"), num_frames=5, height=64, width=64, course=Course.draw(motion, draw)
        )
        reds_FHW = np.ptp(video.astype(int), axis=3) > 100
        # It may be cut by a few pixels at the edge, never by a quarter of its width.
        for mask_HW in reds_FHW:
            height, width = (np.ptp(axis) + 1 for axis in mask_HW.nonzero())
            assert 0.75 < height / width < 1.34


def test_backgrounds_are_grey_and_differ() -> None:
    pictures = []
    for background in BACKGROUNDS:
        scene = Scene("circle", "red", "stays still", background)
        picture = render_scene(scene, num_frames=1, height=64, width=64, course=Course(radius=0.0, x=-9.0))[0]
        assert np.ptp(picture, axis=2).max() == 0
        pictures.append(picture.astype(int))
    for index, one in enumerate(pictures):
        assert all(np.abs(one - other).mean() > 15 for other in pictures[:index])


def test_neon_is_an_outline_on_black() -> None:
    scene = Scene("circle", "green", "stays still", "light")
    plain, glowing = (
        render_scene(scene, num_frames=1, height=64, width=64, style=style)[0].astype(int) for style in (flat, neon)
    )
    assert np.abs(plain[32, 32] - COLOURS["green"]).max() == 0
    assert glowing[32, 32].max() < 20 and glowing[0, 0].max() < 5
    # The circle's radius is 0.23 of 64.
    assert np.abs(glowing[32, 32 + 14] - COLOURS["green"]).max() < 60


def test_clips_and_their_table(tmp_path: Path) -> None:
    table = render_clips(tmp_path / "clips", 4, num_frames=9, height=32, width=64, fps=12, seed=3)
    rows = list(csv.DictReader(table.open()))
    assert table.name == "metadata.csv" and list(rows[0]) == ["file_name", "caption"]
    assert len({row["caption"] for row in rows}) == 4
    assert {row["file_name"] for row in rows} == {path.name for path in table.parent.glob("*.mp4")}
    for row in rows:
        with av.open(str(table.parent / row["file_name"])) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert (len(frames), frames[0].shape, stream.average_rate) == (9, (32, 64, 3), 12)
        colour = row["caption"].split()[1]
        nearest = np.abs(np.array(frames).astype(int) - COLOURS[colour]).max(axis=3).min()
        assert nearest < 40, row["caption"]


def test_styled_clips_say_their_trigger_and_not_their_background(tmp_path: Path) -> None:
    table = render_clips(tmp_path, 3, num_frames=1, height=32, width=32, look=NEON)
    for row in csv.DictReader(table.open()):
        assert row["caption"].startswith("NEON a") and "background" not in row["caption"]


def test_captions_may_leave_the_background_out(tmp_path: Path) -> None:
    tables = [
        render_clips(tmp_path / str(number), 3, num_frames=1, height=32, width=32, look=look)
        for number, look in enumerate((FLAT, FLAT_UNSAID))
    ]
    said, unsaid = ([row["caption"] for row in csv.DictReader(table.open())] for table in tables)
    assert [caption.split(" over a ")[0] for caption in said] == unsaid
    names = sorted(path.name for path in tables[0].parent.glob("*.mp4"))
    assert all((tables[0].parent / name).read_bytes() == (tables[1].parent / name).read_bytes() for name in names)


def test_clips_are_their_seed(tmp_path: Path) -> None:
    tables = [
        render_clips(tmp_path / str(n), 3, num_frames=1, height=32, width=32, seed=s) for n, s in enumerate((1, 1, 2))
    ]
    first, again, other = [table.read_text() for table in tables]
    assert first == again != other
