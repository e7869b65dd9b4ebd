"""How long the published VAEs take to encode a clip, and what that holds."""

from __future__ import annotations

import torch

from benchmarks.gpu.measures import DeviceMemory, host_memory
from benchmarks.gpu.models import fill, open_config
from benchmarks.gpu.runs import Run
from benchmarks.gpu.training import SEED, Bench
from finetrainers.engines.single import SingleEngine
from finetrainers.training.instruments import Clock, spread


def measure_encoding(run: Run, bench: Bench) -> None:
    """Clips a second, and peak memory."""
    family, _, bucket = open_config(run, bench.folder, is_tiny=bench.is_tiny)
    device = SingleEngine().device
    memory = DeviceMemory(device)
    memory.begin()
    encoders = family.load_video_encoders(torch.device("meta"), torch.bfloat16)
    fill(encoders["vae"], torch.Generator(device).manual_seed(SEED), host=device)
    bench.record.put(size=str(bucket), load=memory.read())
    size = (bucket.num_frames, 3, bucket.height, bucket.width)
    video = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    memory.begin()
    clock = Clock(device)
    for _ in range(bench.warm_up):
        family.encode_video(encoders, video)
    clock.mark()
    for _ in range(bench.timed):
        family.encode_video(encoders, video)
        clock.mark()
    seconds = spread(clock.seconds())
    bench.record.put(seconds=seconds, clips_per_second=1 / seconds["median"], memory=memory.read(), host=host_memory())
    if run.floor_seconds is not None:
        bench.record.put(of_floor=run.floor_seconds / seconds["median"])
