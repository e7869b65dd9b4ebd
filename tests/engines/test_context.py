"""Tokens of one batch split over processes: the numbers of one process, and what cannot be split is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from finetrainers.data.video import probe, read_window
from finetrainers.demo.clips import render_clips
from finetrainers.engines.context import split_tokens
from finetrainers.engines.single import SingleEngine
from finetrainers.folder import steps_in
from finetrainers.types import Bucket, Condition, Window
from tests.end_to_end.runs import SERVER, run, write_config, written_to
from tests.engines.tiny_runs import assert_close, settings
from tests.engines.together import run_together
from tests.families.parity import inputs_of, random_clip, rates
from tests.families.tiny import TINY
from tests.training.tiny_run import lora, make_batch, make_trainer

pytestmark = pytest.mark.timeout(600)
METHODS = {"lora": "method={name: lora, rank: 4, alpha: 8}", "full": "method={name: full}"}
"""Without dropout: of a split batch each process draws its own."""
CASES = [
    ("ltx-0.9.0", "none"),
    ("ltx-0.9.5-i2v", "first"),
    ("ltx-0.9.5-i2v", "first_last"),
    ("wan-2.1-i2v", "first"),
    ("wan-2.2-5b-i2v", "first"),
]
SPREAD = {2: ["ddp"], 4: ["ddp", "fsdp"]}
"""The engines by number of processes."""


def config_of(folders: Any, clips: Path, tmp_path: Path, name: str, condition: str) -> Path:
    """Frames are given half of the time, where the model can do without; three passes of held-out loss and one sample
    video leave one of two groups with nothing to do."""
    options = settings(name, folders[name], clips, tmp_path)
    # Wan 2.1 is always given its frame.
    shares = {} if condition == "none" else {condition: 1.0 if name == "wan-2.1-i2v" else 0.5}
    held_out = render_clips(tmp_path / "held-out", 1, num_frames=22, height=64, width=96, fps=16.0, seed=1).parent
    options["data"] |= {"validation": str(held_out), "conditions": shares}
    options["validation"] = {"every": 10, "timesteps": 3, "num_inference_steps": 2}
    return write_config(tmp_path / "c.yaml", **options, output="-")


def command(config: Path, output: Path, method: str, *, accumulated: int, steps: int = 20, **parallel: Any) -> list:
    chosen = [f"parallel.{key}={value}" for key, value in parallel.items()]
    numbers = [f"training.gradient_accumulation_steps={accumulated}", f"training.steps={steps}"]
    return ["train", config, METHODS[method], f"output={output}", *numbers, *chosen]


def assert_same_run(one: Path, other: Path) -> None:
    """Numbers, weights, where the run stands, and what the first sample video shows."""
    assert_close(one, other)
    last = [list(steps_in(run / "checkpoints").values())[-1] for run in (one, other)]
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in last]
    assert states[0]["train"] == states[1]["train"]
    videos = [sorted((folder / "samples").rglob("*.mp4")) for folder in (one, other)]
    assert [path.name for path in videos[0]] == [path.name for path in videos[1]]
    assert len(videos[0]) == len(steps_in(one / "samples")) == 3
    # Before the first step, while the weights are the same: two denoising steps make much of a difference of 1e-6.
    first, twin = (next(iter(steps_in(folder / "samples").values())) for folder in (one, other))
    for path in first.glob("*.mp4"):
        # Of 255. A rounding to eight bits that falls otherwise is coded otherwise.
        assert (pixels_of(path) - pixels_of(twin / path.name)).abs().mean() < 2, (other.name, path.name)


def pixels_of(path: Path) -> torch.Tensor:
    media = probe(path)
    window = Window(0.0, media.num_frames, media.fps)
    return read_window(path, media, window, height=media.height, width=media.width).float()


QUICK = {("ltx-0.9.5-i2v", "first_last", "lora"), ("wan-2.2-5b-i2v", "first", "full")}
"""Half a minute each; the others are marked slow."""


@pytest.mark.parametrize(
    ("name", "condition", "method"),
    [
        pytest.param(*case, method, marks=[] if (*case, method) in QUICK else [pytest.mark.slow])
        for case in CASES
        for method in METHODS
    ],
)
def test_split_tokens_give_the_numbers_of_one_process(folders, clips, tmp_path, name, condition, method):
    """Pairs split each batch: one pair, and two with batches of their own; twenty steps with clipping at work."""
    config = config_of(folders, clips, tmp_path, name, condition)
    alone = tmp_path / "alone"
    code, said = run(command(config, alone, method, accumulated=4), tmp_path / "alone.log")
    assert code == 0, said
    for count, engines in SPREAD.items():
        outputs = {engine: tmp_path / f"{engine}-{count}" for engine in engines}
        commands = [
            command(config, output, method, accumulated=8 // count, context_parallel_size=2, strategy=engine)
            for engine, output in outputs.items()
        ]
        said = run_together(count, commands, tmp_path / f"{count}.log")
        assert said.count("tokens of each batch are split over 2 processes") == len(engines)
        for output in outputs.values():
            assert_same_run(alone, output)


def test_a_run_goes_on_with_tokens_split_otherwise(folders, clips, tmp_path):
    """Two pairs, four together in shards of two, two pairs in one shard, and one process alone."""
    config = config_of(folders, clips, tmp_path, "ltx-0.9.5-i2v", "first")
    # Of 12 tokens, which 4 divides.
    size = "data.buckets=17x64x64"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, said = run([*command(config, whole, "lora", accumulated=4), size], tmp_path / "log")
    assert code == 0, said
    legs = [
        (5, 2, {"strategy": "ddp", "context_parallel_size": 2}),
        (10, 4, {"strategy": "fsdp", "context_parallel_size": 4, "shard_size": 2}),
        (15, 2, {"strategy": "fsdp", "context_parallel_size": 2, "offload": "parameters"}),
    ]
    for steps, accumulated, parallel in legs:
        leg = command(config, parts, "lora", accumulated=accumulated, steps=steps, **parallel)
        said = run_together(4, [[*leg, size]], tmp_path / "log")
    assert said.count("resumed from") == len(legs) - 1
    code, said = run([*command(config, parts, "lora", accumulated=4), size], tmp_path / "log")
    assert code == 0, said
    assert_same_run(whole, parts)


REFUSED = {
    "family": ("hunyuan", 2, 2, [], "tokens of ltx and wan can be split over processes, not of hunyuan; set 1"),
    "tokens": ("ltx-0.9.5-i2v", 4, 4, [], "not divide the 18 video tokens of data.buckets 17x64x96 with first given"),
    "last frame": (
        "ltx-0.9.5-i2v",
        4,
        4,
        ["data.buckets=9x64x96", "data.conditions=first_last"],
        "not divide the 18 video tokens of data.buckets 9x64x96 with first_last given; .* take 1 or 2",
    ),
    "sample videos": (
        "ltx-0.9.5-i2v",
        4,
        4,
        ["data.buckets=9x64x96", "validation.bucket=17x64x96"],
        "not divide the 18 video tokens of validation.bucket 17x64x96",
    ),
    "heads": (
        "wan-2.1",
        4,
        4,
        ["data.buckets=9x32x64"],
        "not divide the 2 attention heads of the model; .* take 1 or 2",
    ),
    "processes": ("ltx-0.9.5-i2v", 3, 2, [], "context_parallel_size 2 does not divide 3 processes into whole groups"),
    "deepspeed": ("ltx-0.9.5-i2v", 2, 2, ["parallel.strategy=deepspeed"], "ddp and fsdp; this run is deepspeed"),
}
"""Of which model, on how many processes, split over how many; what else is asked for; and what is said."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused_before_anything_is_encoded(folders, clips, tmp_path, case):
    name, count, size, more, expected = REFUSED[case]
    config = write_config(tmp_path / "c.yaml", **settings(name, folders[name], clips, tmp_path), output="-")
    refused = command(config, tmp_path / "refused", "lora", accumulated=1, context_parallel_size=size)
    with pytest.raises(AssertionError, match=expected):
        run_together(count, [[*refused, *more]], tmp_path / "log")
    assert not (tmp_path / "cache").exists()


def test_one_process_has_nobody_to_split_with(folders, clips, tmp_path):
    config = write_config(tmp_path / "c.yaml", **settings("wan-2.1", folders["wan-2.1"], clips, tmp_path), output="-")
    alone = command(config, tmp_path / "refused", "lora", accumulated=1, context_parallel_size=2)
    code, said = run(alone, tmp_path / "log")
    assert code == 2 and "this run is single" in said, said


class Half(SingleEngine):
    """One of the two processes that split the tokens of the only batch."""

    world_size, context_size = 2, 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank


def test_each_process_of_a_split_batch_draws_dropout_for_its_own_tokens(folders):
    """And what a step counts is the batch once."""
    drawn: list[list[float]] = []
    for engine in (SingleEngine(), Half(0), Half(1)):
        trainer = make_trainer(folders["ltx-0.9.0"], [make_batch([0, 1])], options=lora(dropout=0.5))
        engine.spread(trainer._spread, trainer.models, trainer.optimizer, 1.0)
        trainer.engine = engine
        trainer.models["transformer"].register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3).tolist()))
        outcome = trainer.step(trainer.batches.start(0))
        assert (outcome.num_tokens, trainer.state.batches, trainer.state.samples) == (24, 1, 2)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("name", "condition"), CASES, ids=lambda value: value)
def test_each_process_computes_half_of_the_tokens(folders, tmp_path, name, condition):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    log = tmp_path / "log"
    pair = [
        SERVER.Process(target=_half, args=(rank, store.port, name, str(folders[name]), condition, str(log)))
        for rank in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0], log.read_text()


def _half(rank: int, port: int, name: str, folder: str, condition: str, log: str) -> None:
    """One of two processes: whole, then split, and split under autocast as CUDA has it."""
    import torch.distributed as dist

    with written_to(log):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=TCPStore("localhost", port), rank=rank, world_size=2)
        row = TINY[name]
        family, bucket = row.open(Path(folder)), Bucket.parse(row.bucket)
        latents, inputs = inputs_of(family, random_clip(bucket), Condition.parse(condition))
        (transformer,) = family.load_transformers(torch.float32).values()
        transformer.train().enable_gradient_checkpointing()
        for module in transformer.modules():
            # As autocast gives them on CUDA, and on CPUs does not.
            if isinstance(module, nn.RMSNorm):
                module.register_forward_hook(lambda _, args, output: output.float())
        lengths: list[int] = []
        for key, module in transformer.named_modules():
            if key.endswith("attn1.to_q"):
                module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))

        def passed(dtype: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            """The answer, under autocast to a type if one is given, and the gradient of its square."""
            lengths.clear()
            transformer.zero_grad(set_to_none=True)
            models = {"transformer": transformer}
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                answer = family.predict(models, latents, torch.tensor([400.0]), fps_B=rates(16.0), **inputs)
            answer.square().mean().backward()
            return answer.detach(), {key: value.grad for key, value in transformer.named_parameters()}

        whole, expected = passed()
        length = family.sequence_length(bucket, Condition.parse(condition))
        assert set(lengths) == {length}, lengths
        split_tokens([transformer], family.context_plan(), device=torch.device("cpu"), size=2)
        answer, gradients = passed()
        assert set(lengths) == {length // 2}, lengths
        torch.testing.assert_close(answer, whole, rtol=1e-5, atol=1e-6)
        largest = max(gradient.abs().max() for gradient in expected.values())
        assert largest > 1e-4
        for key, gradient in gradients.items():
            dist.all_reduce(gradient)
            torch.testing.assert_close(gradient / largest, expected[key] / largest, rtol=1e-4, atol=1e-5, msg=key)
        answer, _ = passed(torch.bfloat16)
        torch.testing.assert_close(answer, whole, rtol=0.1, atol=0.1)
        dist.destroy_process_group()
