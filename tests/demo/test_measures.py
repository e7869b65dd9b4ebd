"""Simple measures see in a rendered clip what its caption says, and tell the styles apart."""

import itertools
import random

import numpy as np
import pytest

from finetrainers.demo.clips import Course, Scene, flat, neon, render_scene, scenes_in_order
from finetrainers.demo.measures import recognise, share_of_way, style_of

SIZE = {"num_frames": 17, "height": 64, "width": 64}


def test_every_part_of_a_scene_is_recognised() -> None:
    draw = random.Random(5)
    for scene in itertools.islice(scenes_in_order(3), 40):
        seen = recognise(render_scene(scene, course=Course.draw(scene.motion, draw), **SIZE))
        assert seen == Scene(scene.shape, scene.colour, scene.motion)


def test_a_shape_is_recognised_through_noise_and_blur() -> None:
    draw = random.Random(6)
    noise = np.random.default_rng(0)
    for scene in itertools.islice(scenes_in_order(4), 20):
        video = render_scene(scene, course=Course.draw(scene.motion, draw), **SIZE).astype(float)
        video = sum(np.roll(video, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 9
        video = (video + noise.normal(0, 8, video.shape)).clip(0, 255).astype(np.uint8)
        seen = recognise(video)
        assert seen and (seen.colour, seen.motion) == (scene.colour, scene.motion)


@pytest.mark.parametrize("level", [0, 128])
def test_nothing_is_recognised_where_there_is_no_colour(level: int) -> None:
    assert recognise(np.full((17, 64, 64, 3), level, np.uint8)) is None


def test_noise_is_mostly_not_what_was_asked_for() -> None:
    video = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)
    seen = recognise(video)
    assert seen is None or seen.motion == "stays still"


def test_styles_differ_in_both_statistics() -> None:
    scenes = list(itertools.islice(scenes_in_order(7), 20))
    plain, glowing = ([render_scene(scene, style=style, **SIZE) for scene in scenes] for style in (flat, neon))
    assert np.mean([style_of(video)["black"] for video in plain]) < 0.01
    assert np.mean([style_of(video)["black"] for video in glowing]) > 0.8
    assert share_of_way(plain, plain, glowing) == pytest.approx({"black": 0, "hollow": 0})
    assert share_of_way(plain, glowing, glowing) == pytest.approx({"black": 1, "hollow": 1})
    half = share_of_way(plain, [*plain, *glowing], glowing)
    assert half == pytest.approx({"black": 0.5, "hollow": 0.5})
