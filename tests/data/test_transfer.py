"""Batches on their way to the device: the next one is when one is handed out; and on a GPU nobody waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from finetrainers.data.batch import BatchOrder, BatchStream
from finetrainers.data.transfer import Transfer
from finetrainers.hashing import generator_for
from finetrainers.types import Batch, Bucket, Sample

SAMPLES = [Sample(f"{number}.mp4", "", "", "", {}, "", Bucket(9, 64, 96), 16.0, 12) for number in range(7)]


class Drawer:
    """Stands for BatchDrawer."""

    def draw(self, position: int, epoch: int, indices: tuple[int, ...]) -> Batch:
        def drawn(what: str, *shape: int) -> torch.Tensor:
            return torch.stack([torch.randn(shape, generator=generator_for(0, what, index)) for index in indices])

        return Batch(
            latents_BCFHW=drawn("latents", 4, 8, 32, 32),
            noise_BCFHW=drawn("noise", 4, 8, 32, 32),
            level_B=torch.full((len(indices),), 0.5),
            text={"embeds": drawn("text", 64, 128)},
            given={},
            fps_B=torch.full((len(indices),), 16.0, dtype=torch.float64),
            names=tuple(SAMPLES[index].name for index in indices),
            num_tokens=12 * len(indices),
        )


def stream(num_workers: int, transfer: Transfer) -> BatchStream:
    drawer: Any = Drawer()
    return BatchStream(BatchOrder(SAMPLES, batch_size=2, seed=5), drawer, num_workers, transfer)


class Diary(Transfer):
    """Writes down what is sent and received."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[tuple[str, tuple[str, ...]]] = []

    def send(self, batch: Batch) -> Callable[[], Batch]:
        self.events.append(("sent", batch.names))
        return lambda: (self.events.append(("received", batch.names)), batch)[1]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_next_batch_is_on_its_way_when_one_is_handed_out(num_workers):
    diary = Diary()
    batches = stream(num_workers, diary).start(0)
    for _ in range(5):
        names = next(batches).batch.names
        # The step's passes would be launched here, and threads read.
        time.sleep(0.1)
    batches.close()
    sent = [names for event, names in diary.events if event == "sent"]
    received = [names for event, names in diary.events if event == "received"]
    assert received == sent[: len(received)] and received[-1] == names
    # Not from the first on, before anything was read.
    assert diary.events[-2:] == [("sent", sent[5]), ("received", names)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_arrive_whole_on_a_gpu(num_workers):
    """However busy it is, and whatever happens to the memory of those that were let go."""
    device = torch.device("cuda")
    here = islice(stream(0, Transfer(torch.device("cpu"))).start(0), 30)
    there = stream(num_workers, Transfer(device)).start(0)
    busy = torch.randn(4096, 4096, device=device)
    for expected in here:
        busy = (busy @ busy).div_(64)
        found = next(there).batch
        assert found.latents_BCFHW.device.type == "cuda"
        sums = [(tensor.double().sum().item(), tensor.cpu()) for tensor in (found.latents_BCFHW, found.text["embeds"])]
        torch.empty(4, 8, 32, 32, 2, device=device).fill_(7.0)
        wanted = (expected.batch.latents_BCFHW, expected.batch.text["embeds"])
        assert all(torch.equal(pair[0][1], pair[1]) for pair in zip(sums, wanted, strict=True))
