"""Every sample once an epoch, and draws that depend on seed, epoch, sample and step alone."""

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from finetrainers.data.batch import BatchDrawer, BatchOrder, BatchStream, Strata
from finetrainers.data.cache import Cache
from finetrainers.data.transfer import Transfer
from finetrainers.hashing import digest, generator_for
from finetrainers.types import Batch, Bucket, Condition, Sample

BUCKETS = [Bucket(9, 64, 96), Bucket(17, 64, 64), Bucket(1, 32, 32)]
NONE, FIRST, BOTH = (Condition.parse(text) for text in ("none", "first", "first_last"))


def sample(number: int, bucket: Bucket) -> Sample:
    return Sample(
        name=f"{number}.mp4",
        video_key=digest(["video", number]),
        text_key=digest(["text", number]),
        empty_text_key=digest(["empty", number]),
        condition_keys={str(BOTH): digest(["condition", number])},
        caption=f"caption {number}",
        bucket=bucket,
        fps=16.0 + number,
        num_tokens=10 + number,
    )


def samples_of(num: int, num_buckets: int = 1) -> list[Sample]:
    return [sample(number, BUCKETS[number % num_buckets]) for number in range(num)]


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> BatchDrawer:
    """Seven samples of one bucket, each with moments, texts, a condition and a frame rate of its own."""
    cache = Cache(tmp_path_factory.mktemp("cache"))
    samples = samples_of(7)
    for number, each in enumerate(samples):
        moments = {
            "mean": torch.full((2, 2, 2, 3), float(number), dtype=torch.bfloat16),
            "logvar": torch.full((2, 2, 2, 3), -2.0, dtype=torch.bfloat16),
            "shift": torch.tensor([1.0, -1.0]),
            "scale": torch.tensor([2.0, 0.5]),
        }
        cache.write("videos", each.video_key, moments)
        for key, value in ((each.text_key, number), (each.empty_text_key, -1 - number)):
            cache.write("texts", key, {"embeds": torch.full((3, 4), float(value), dtype=torch.bfloat16)})
        cache.write("conditions", each.condition_keys[str(BOTH)], {"last": torch.full((2,), 100.0 + number)})
    return BatchDrawer(
        samples=samples,
        cache=cache,
        law=telling_law,
        strata=Strata(seed=5, batch_size=4, batches_per_step=2),
        caption_dropout=0.25,
        conditions=[(NONE, 1.0)],
        given=telling_given,
    )


def telling_law(num_tokens: int, u: float) -> float:
    """A level that tells both of what it was given."""
    return (num_tokens + u) / 100


def telling_given(
    condition: Condition,
    latents_CFHW: torch.Tensor,
    encoded: Mapping[str, torch.Tensor],
    generator: torch.Generator | None,
) -> dict[str, torch.Tensor]:
    """What tells all of what it was given."""
    if condition.is_none:
        return {}
    drawn = torch.zeros(3) if generator is None else torch.rand(3, generator=generator)
    frames = torch.arange(latents_CFHW.shape[1]) < condition.num_first
    return {"frames": frames, "latents": latents_CFHW, "drawn": drawn, **encoded}


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    given = {f"given {name}": tensor for name, tensor in batch.given.items()}
    drawn = {"latents": batch.latents_BCFHW, "noise": batch.noise_BCFHW, "level": batch.level_B, "fps": batch.fps_B}
    return {**drawn, **batch.text, **given}


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.names, one.num_tokens) == (other.names, other.num_tokens)
    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


SIZES = [(n, k, b) for n in (1, 2, 5, 12, 31) for k in (1, 2, 3) for b in (1, 2, 4, 40) if k <= n]


@pytest.mark.parametrize(("num", "num_buckets", "batch_size"), SIZES)
def test_every_sample_once_an_epoch_in_batches_of_one_bucket(num, num_buckets, batch_size):
    samples = samples_of(num, num_buckets)
    order = BatchOrder(samples, batch_size=batch_size, seed=3)
    counts = Counter(each.bucket for each in samples)
    assert order.batches_per_epoch == sum((count + batch_size - 1) // batch_size for count in counts.values())
    for epoch in (0, 1, 7):
        start = epoch * order.batches_per_epoch
        epochs, batches = zip(*(order[start + i] for i in range(order.batches_per_epoch)), strict=True)
        assert set(epochs) == {epoch}
        assert sorted(index for batch in batches for index in batch) == list(range(num))
        assert all(len({samples[index].bucket for index in batch}) == 1 for batch in batches)
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= batch_size
        assert sum(size < batch_size for size in sizes) == sum(bool(count % batch_size) for count in counts.values())
        assert sizes == sorted(sizes, key=lambda size: size < batch_size), "what fills no batch comes last"


@pytest.mark.parametrize(("num", "num_buckets", "batch_size"), SIZES)
def test_the_order_is_that_of_a_walk(num, num_buckets, batch_size):
    """A permutation is walked, and a batch comes as its bucket fills; what did not fill comes as it began to."""
    samples = samples_of(num, num_buckets)
    order = BatchOrder(samples, batch_size=batch_size, seed=3)
    for epoch in (0, 1):
        filling: dict[Bucket, list[int]] = {}
        expected = []
        for index in torch.randperm(num, generator=generator_for(3, "order", epoch)).tolist():
            batch = filling.setdefault(samples[index].bucket, [])
            batch.append(index)
            if len(batch) == batch_size:
                expected.append(tuple(filling.pop(samples[index].bucket)))
        expected += [tuple(batch) for batch in filling.values()]
        assert [order[epoch * order.batches_per_epoch + i][1] for i in range(len(expected))] == expected


def sequence(num: int, *, batch_size: int, seed: int, epoch: int) -> list[int]:
    order = BatchOrder(samples_of(num), batch_size=batch_size, seed=seed)
    start = epoch * order.batches_per_epoch
    return [index for i in range(order.batches_per_epoch) for index in order[start + i][1]]


def test_the_order_differs_between_epochs_and_seeds():
    keys = [(seed, epoch) for seed in (0, 1, 2**62) for epoch in range(5)]
    orders = [sequence(30, batch_size=1, seed=seed, epoch=epoch) for seed, epoch in keys]
    assert len({tuple(order) for order in orders}) == len(keys)
    assert list(range(30)) not in orders
    assert orders == [sequence(30, batch_size=1, seed=seed, epoch=epoch) for seed, epoch in keys]


def test_each_sample_comes_first_as_often_as_others():
    firsts = Counter(sequence(4, batch_size=1, seed=9, epoch=epoch)[0] for epoch in range(400))
    # 100 expected of each, with a standard deviation of 8.7.
    assert all(60 < firsts[index] < 140 for index in range(4)), firsts


@pytest.mark.parametrize("batch_size", [2, 3, 7, 30, 64])
def test_with_one_bucket_the_sequence_does_not_depend_on_the_batch_size(batch_size):
    for epoch in range(3):
        assert sequence(30, batch_size=batch_size, seed=1, epoch=epoch) == sequence(
            30, batch_size=1, seed=1, epoch=epoch
        )


def test_random_access_is_sequential_access():
    samples = samples_of(11, 3)
    walked = BatchOrder(samples, batch_size=2, seed=8)
    positions = range(5 * walked.batches_per_epoch)
    in_order = [walked[position] for position in positions]
    jumped = BatchOrder(samples, batch_size=2, seed=8)
    for position in torch.randperm(len(positions), generator=torch.Generator().manual_seed(0)).tolist():
        assert jumped[position] == in_order[position]
        assert BatchOrder(samples, batch_size=2, seed=8)[position] == in_order[position]


def test_a_draw_does_not_depend_on_the_batch(drawer):
    """But for the levels, which are shared out over the step."""
    drawer = replace(drawer, conditions=[(BOTH, 1.0)])
    together = drawer.draw(7, 2, [3, 0, 5, 6])
    assert together.size == 4
    assert together.names == ("3.mp4", "0.mp4", "5.mp4", "6.mp4")
    assert together.fps_B.tolist() == [19.0, 16.0, 21.0, 22.0]
    assert together.num_tokens == 13 + 10 + 15 + 16
    draws = drawer.strata.draw(7, 4)
    for row, index in enumerate([3, 0, 5, 6]):
        alone = drawer.draw(11, 2, [index])
        assert together.level_B[row].item() == pytest.approx((10 + index + draws[row]) / 100)
        for name, tensor in tensors(together).items():
            assert name == "level" or torch.equal(tensor[row : row + 1], tensors(alone)[name]), (index, name)


def test_types_and_shapes(drawer):
    batch = replace(drawer, conditions=[(BOTH, 1.0)]).draw(0, 0, [1, 2])
    assert {batch.latents_BCFHW.dtype, batch.noise_BCFHW.dtype, batch.level_B.dtype} == {torch.float32}
    assert batch.latents_BCFHW.shape == batch.noise_BCFHW.shape == (2, 2, 2, 2, 3)
    assert batch.level_B.shape == (2,)
    assert batch.text["embeds"].dtype == torch.bfloat16 and batch.text["embeds"].shape == (2, 3, 4)
    assert batch.given["frames"].dtype == torch.bool and batch.given["frames"].tolist() == [[True, False]] * 2
    assert batch.given["last"].tolist() == [[101.0] * 2, [102.0] * 2], "each sample's own"
    assert torch.equal(batch.given["latents"], batch.latents_BCFHW), "the draw that is learned, not another one"


def test_everything_drawn_differs_between_epochs_samples_and_seeds(drawer):
    def numbers(epoch: int, index: int, seed: int = 5) -> list[torch.Tensor]:
        strata = replace(drawer.strata, seed=seed, batch_size=1, batches_per_step=1)
        batch = replace(drawer, strata=strata, conditions=[(FIRST, 1.0)]).draw(10 * epoch + index, epoch, [index])
        shift, scale = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
        latents = batch.latents_BCFHW[0] / scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1) - index
        return [latents, batch.noise_BCFHW[0], batch.level_B % 0.01, batch.given["drawn"][0]]

    reference = numbers(0, 1)
    for others in (numbers(1, 1), numbers(0, 2), numbers(0, 1, seed=6)):
        assert not any(torch.allclose(one, other) for one, other in zip(reference, others, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(reference, numbers(0, 1), strict=True))
    latents, noise, _, drawn = reference
    assert not torch.allclose(latents / math.exp(-1), noise, atol=0.1), "two draws, not one used twice"
    assert not torch.allclose(drawn, noise.flatten()[:3])


def parts_of(draws: list[float]) -> list[int]:
    """Which part of (0, 1) each of n draws lies in, of n alike."""
    assert all(0 <= draw < 1 for draw in draws)
    return [int(draw * len(draws)) for draw in draws]


@pytest.mark.parametrize(("batch_size", "batches_per_step"), [(1, 1), (1, 8), (8, 1), (4, 2), (2, 4), (3, 5)])
def test_the_levels_of_a_step_are_spread_evenly(batch_size, batches_per_step):
    """One draw in each part, in another order and at other places in every step; however the step is cut up."""
    total = batch_size * batches_per_step
    strata = Strata(seed=3, batch_size=batch_size, batches_per_step=batches_per_step)
    steps = []
    for step in range(50):
        positions = range(step * batches_per_step, (step + 1) * batches_per_step)
        draws = [draw for position in positions for draw in strata.draw(position, batch_size)]
        assert sorted(parts_of(draws)) == list(range(total))
        assert draws == Strata(seed=3, batch_size=total, batches_per_step=1).draw(step, total)
        assert draws != Strata(seed=4, batch_size=total, batches_per_step=1).draw(step, total)
        steps.append(draws)
    assert len({draw for draws in steps for draw in draws}) == 50 * total
    assert total == 1 or len({tuple(parts_of(draws)) for draws in steps}) > 1, "each sample sees all parts"
    shares = torch.tensor(steps) * total % 1
    assert abs(shares.mean() - 0.5) < 4 / (12 * 50 * total) ** 0.5, "anywhere within a part"


def test_a_draw_of_levels_is_a_function_of_seed_and_position():
    strata = Strata(seed=3, batch_size=4, batches_per_step=2)
    in_order = [strata.draw(position, 4) for position in range(20)]
    state = torch.get_rng_state()
    for position in torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist():
        assert Strata(seed=3, batch_size=4, batches_per_step=2).draw(position, 4) == in_order[position]
        assert strata.draw(position, 3) == in_order[position][:3], "a smaller batch takes the first"
    assert torch.equal(torch.get_rng_state(), state)


def test_over_many_steps_every_sample_of_a_batch_sees_all_levels():
    """Rank within the step is drawn anew: the mean at each place is that of a uniform draw."""
    strata = Strata(seed=0, batch_size=2, batches_per_step=2)
    draws = torch.tensor([strata.draw(position, 2) for position in range(1200)]).view(600, 4)
    # The standard deviation of a uniform draw is the root of 1/12.
    assert (draws.mean(0) - 0.5).abs().max() < 4 * (1 / 12 / 600) ** 0.5


CONDITIONS = [
    [(NONE, 1.0)],
    [(FIRST, 1.0)],
    [(FIRST, 0.5), (NONE, 0.5)],
    [(FIRST, 0.2), (BOTH, 0.7), (NONE, 0.1)],
]


@pytest.mark.parametrize("conditions", CONDITIONS)
def test_conditions_come_in_their_shares(drawer, conditions):
    """One for the whole batch, drawn by its first sample and the epoch; nothing else is drawn otherwise for it."""
    drawer, counts, num = replace(drawer, conditions=conditions), Counter(), 600
    plain = replace(drawer, conditions=[(NONE, 1.0)])
    for epoch in range(num):
        indices = [epoch % 7, (epoch + 2) % 7, (epoch + 3) % 7]
        batch = drawer.draw(epoch, epoch, indices)
        given = batch.given
        counts[BOTH if "last" in given else FIRST if given else NONE] += 1
        assert all(len(tensor) == 3 for tensor in given.values())
        if epoch < 20:
            assert_equal(replace(batch, given={}), plain.draw(epoch, epoch, indices))
            alone = drawer.draw(0, epoch, indices[:1]).given
            assert {name: tuple(tensor[0].tolist()) for name, tensor in given.items() if name == "drawn"} == {
                name: tuple(tensor[0].tolist()) for name, tensor in alone.items() if name == "drawn"
            }, "keyed by the first sample and the epoch, not by the batch"
            assert given.keys() == alone.keys()
    for condition, share in conditions:
        assert abs(counts[condition] / num - share) <= 4 * (share * (1 - share) / num) ** 0.5


def test_the_condition_differs_between_samples_epochs_and_seeds(drawer):
    drawer = replace(drawer, conditions=[(FIRST, 0.5), (NONE, 0.5)])

    def drawn(seed: int, epochs: range, indices: range) -> list[bool]:
        seeded = replace(drawer, strata=replace(drawer.strata, seed=seed))
        return [bool(seeded.draw(0, epoch, [index]).given) for epoch in epochs for index in indices]

    assert len(set(drawn(1, range(30), range(1)))) == 2
    assert len(set(drawn(1, range(1), range(7)))) == 2
    assert drawn(1, range(10), range(7)) != drawn(2, range(10), range(7))
    assert drawn(1, range(10), range(7)) == drawn(1, range(10), range(7))


def test_a_still_image_is_given_no_frames(drawer):
    still = [replace(each, bucket=BUCKETS[2]) for each in drawer.samples]
    drawer = replace(drawer, samples=still, conditions=[(FIRST, 1.0)])
    assert all(drawer.draw(0, epoch, [0, 1]).given == {} for epoch in range(20))
    assert drawer.fixed(0, 0.5).given == {}


def test_latents_are_a_normalised_draw_from_the_posterior(drawer):
    """(draw - shift) * scale with draw ~ N(mean, exp(logvar)), over 24 values in each of 60 epochs."""
    drawn = torch.stack([drawer.draw(0, epoch, [4]).latents_BCFHW[0] for epoch in range(60)], dim=1).flatten(1)
    deviation = math.exp(-1)
    for channel, (shift, scale) in enumerate([(1.0, 2.0), (-1.0, 0.5)]):
        error = scale * deviation / drawn.shape[1] ** 0.5
        assert abs(drawn[channel].mean() - (4 - shift) * scale) < 4 * error
        assert drawn[channel].std().item() == pytest.approx(scale * deviation, rel=4 / (2 * drawn.shape[1]) ** 0.5)


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_captions_are_dropped_at_their_rate(drawer, rate):
    dropping = replace(drawer, caption_dropout=rate, strata=Strata(5, 7, 1))
    num_dropped, in_epoch = 0, set()
    for epoch in range(60):
        batch = dropping.draw(epoch, epoch, range(7))
        in_epoch.add(int((batch.text["embeds"] < 0).sum()) // 12)
        for index, embeds in enumerate(batch.text["embeds"].float()):
            value = embeds.unique().tolist()
            assert value in ([-1.0 - index], [float(index)]), "its own empty caption's text, or its own"
            num_dropped += value == [-1.0 - index]
    assert len(in_epoch) > 2 or rate in (0, 1), "each sample by a coin of its own"
    error = (rate * (1 - rate) / 420) ** 0.5
    assert abs(num_dropped / 420 - rate) <= 4 * error


def test_a_fixed_batch_is_the_same_at_every_call_and_another_at_every_level(drawer):
    """Under the most common condition, with nothing drawn about it."""
    drawer = replace(drawer, conditions=[(NONE, 0.3), (BOTH, 0.6), (FIRST, 0.1)])
    levels = [0.1, 0.2, 0.9]
    batches = [drawer.fixed(2, level) for level in levels]
    for level, batch in zip(levels, batches, strict=True):
        assert_equal(batch, drawer.fixed(2, level))
        assert batch.level_B.tolist() == pytest.approx([level])
        assert (batch.given["last"].tolist(), batch.given["drawn"].tolist()) == ([[102.0] * 2], [[0.0] * 3])
        assert torch.equal(batch.given["latents"], batch.latents_BCFHW)
        assert (batch.names, batch.fps_B.tolist(), batch.num_tokens, batch.size) == (("2.mp4",), [18.0], 12, 1)
        expected = torch.tensor([(2 - 1.0) * 2.0, (2 + 1.0) * 0.5]).view(1, 2, 1, 1, 1).expand(1, 2, 2, 2, 3)
        assert torch.equal(batch.latents_BCFHW, expected), "the mean of the posterior, normalised"
        assert batch.text["embeds"].unique().tolist() == [2.0], "a caption is never dropped"
    noises = [batch.noise_BCFHW for batch in batches] + [drawer.fixed(3, 0.1).noise_BCFHW]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises)


def test_a_fixed_batch_does_not_depend_on_the_other_samples(drawer):
    """Clips that come or go move indices; the noise belongs to the clip."""
    fewer = replace(drawer, samples=drawer.samples[2:])
    assert_equal(drawer.fixed(4, 0.3), fewer.fixed(2, 0.3))


def stream(drawer: BatchDrawer, num_workers: int, batch_size: int = 2) -> BatchStream:
    order = BatchOrder(drawer.samples, batch_size=batch_size, seed=drawer.strata.seed)
    return BatchStream(order, drawer, num_workers=num_workers, transfer=Transfer(torch.device("cpu")))


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("position", [0, 1, 4, 9])
def test_workers_and_start_never_change_a_batch(drawer, num_workers, position):
    """Twelve batches are three epochs of four, some given the first frame and some nothing."""
    drawer = replace(drawer, strata=Strata(5, 2, 3), conditions=[(FIRST, 0.5), (NONE, 0.5)])
    order = BatchOrder(drawer.samples, batch_size=2, seed=5)
    batches = stream(drawer, num_workers).start(position)
    for number, drawn in enumerate(islice(batches, 12 - position), start=position):
        expected_epoch, indices = order[number]
        assert drawn.epoch == expected_epoch == number // 4
        assert (drawn.position, drawn.num_samples) == (number, len(indices))
        assert_equal(drawn.batch, drawer.draw(number, drawn.epoch, indices))
    batches.close()


def test_sizes_are_told_without_reading(drawer):
    told = replace(drawer, samples=samples_of(7, 2), conditions=[(FIRST, 0.5), (NONE, 0.5)])
    order = BatchOrder(told.samples, batch_size=3, seed=2)
    sizes = [replace(stream(told, 0), order=order, world_size=2).sizes(position) for position in range(0, 24, 2)]
    for number, size in enumerate(size for of_round in sizes for size in of_round):
        epoch, indices = order[number]
        assert {told.samples[index].bucket for index in indices} == {size.bucket}
        assert size.num_samples == len(indices)
        # Of other samples, which can be read, the batch that these indices make.
        drawn = replace(drawer, conditions=told.conditions).draw(number, epoch, indices)
        assert bool(drawn.given) == (size.condition == FIRST)
    assert {size.condition for of_round in sizes for size in of_round} == {FIRST, NONE}


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_share_out_what_one_would_take(drawer, num_workers, world_size):
    """Every batch of each round once, and all know how many samples the round has; also across the ends of epochs."""
    alone = list(islice(stream(drawer, 0).start(0), 6 * world_size))
    shares = [
        list(islice(replace(stream(drawer, num_workers), rank=rank, world_size=world_size).start(0), 6))
        for rank in range(world_size)
    ]
    for number in range(6):
        together = [share[number] for share in shares]
        expected = alone[number * world_size : (number + 1) * world_size]
        assert {each.num_samples for each in together} == {sum(each.batch.size for each in expected)}
        for ours, theirs in zip(together, expected, strict=True):
            assert (ours.position, ours.epoch) == (theirs.position, theirs.epoch)
            assert_equal(ours.batch, theirs.batch)


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("batches")}


def assert_threads_end(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + 10
    while reader_threads() - before:
        assert time.monotonic() < deadline, "threads still run"
        time.sleep(0.01)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_closing_ends_the_threads(drawer, num_workers):
    before = reader_threads()
    batches = stream(drawer, num_workers).start(0)
    next(batches)
    assert reader_threads() - before
    batches.close()
    assert_threads_end(before)


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_an_error_in_a_worker_surfaces(drawer, num_workers, tmp_path):
    """At the batch that cannot be read, and not before."""
    samples = [*drawer.samples[:6], sample(99, BUCKETS[0])]
    broken = replace(drawer, samples=samples, caption_dropout=0.0)
    order = BatchOrder(samples, batch_size=2, seed=5)
    bad = next(number for number in range(4) if 6 in order[number][1])
    before = reader_threads()
    batches = BatchStream(order, broken, num_workers, Transfer(torch.device("cpu"))).start(0)
    for number in range(bad):
        assert next(batches).batch.names == tuple(samples[index].name for index in order[number][1])
    with pytest.raises(FileNotFoundError, match=digest(["video", 99])):
        next(batches)
    assert_threads_end(before)


def test_reading_ahead_is_bounded(drawer, monkeypatch):
    """However slow the step, no more batches than workers wait in memory, with one under way and one in hand."""
    loaded = []
    draw = BatchDrawer.draw
    monkeypatch.setattr(BatchDrawer, "draw", lambda self, *given: (loaded.append(given), draw(self, *given))[1])
    batches = stream(drawer, num_workers=3).start(0)
    for taken in range(1, 5):
        next(batches)
        time.sleep(0.1)
        assert len(loaded) <= taken + 4
    batches.close()


def test_map_changes_every_tensor_and_nothing_else(drawer):
    batch = replace(drawer, conditions=[(BOTH, 1.0)]).draw(0, 0, [0, 1])
    doubled = batch.map(lambda tensor: tensor * 2)
    assert len(tensors(batch)) == 9
    assert all(torch.equal(tensors(doubled)[name], 2 * tensor) for name, tensor in tensors(batch).items())
    assert (doubled.names, doubled.num_tokens) == (batch.names, batch.num_tokens)


def test_what_a_cache_holds_is_not_touched(drawer):
    files = sorted(Path(drawer.cache.root).rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in files]
    for epoch, other in pairwise(range(3)):
        replace(drawer, conditions=[(BOTH, 1.0)]).draw(epoch, epoch, [0])
        drawer.fixed(other, 0.5)
    assert [path.stat().st_mtime_ns for path in files] == before
