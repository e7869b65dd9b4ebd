"""The runs by name: what each is set to, what it should reach, and what others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

PART_SECONDS = 8 * 60
"""What the runs of one part may take together."""


@dataclass(frozen=True)
class Run:
    """One process that measures one thing, and writes one line."""

    name: str
    kind: str
    """`train`, `peft`, `save`, `encode` or `limits`: what is measured."""
    setting: str
    """In words."""
    goal: str
    published: str
    limit: str
    """What the hardware allows at best, as computed."""
    minutes: float
    """Expected, on an H200, with what comes before the first step."""
    model: str = ""
    size: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the config, as `section.key`, where they are not the defaults."""
    card_gib: float | None = None
    """Memory of the smaller card that is emulated."""
    against: str = ""
    """The run whose time this one's is compared with."""
    floor_seconds: float | None = None
    """Least time that one clip takes to encode, as computed."""


def _lora(rank: int, checkpointing: str = "full", **memory: Any) -> dict[str, Any]:
    return {
        "method.name": "lora",
        "method.rank": rank,
        "training.gradient_checkpointing": checkpointing,
        **{f"memory.{key}": value for key, value in memory.items()},
    }


_FULL_8BIT = {
    "method.name": "full",
    "method.weights_dtype": "bf16",
    "optimizer.name": "adamw_8bit",
    "optimizer.in_backward": True,
    # What is applied in the backward pass cannot be clipped.
    "training.max_grad_norm": 0.0,
}
_STREAMED = {"stream_blocks": "all"}
_LTX = {"model": "LTX-Video 2B", "size": "49x512x768"}
_COGVIDEOX = {"model": "CogVideoX-5b", "size": "49x480x720"}
_HUNYUAN = {"model": "HunyuanVideo 13B", "size": "49x512x768"}
_WAN_SMALL = {"model": "Wan 2.1 1.3B", "size": "81x480x480"}
_WAN = {"model": "Wan 2.1 14B", "size": "49x480x832"}


def _train(name: str, setting: str, about: tuple[str, str, str], minutes: float, **more: Any) -> Run:
    """`about` is goal, published and limit."""
    goal, published, limit = about
    return Run(name, "train", setting, goal, published, limit, minutes, **more)


def _encode(name: str, published: Mapping[str, str], floor: float) -> Run:
    goal = f"<= {floor / 0.4:.2f} s a clip (40 % of limit), <= 8 GiB"
    setting, about = "the VAE encodes one clip, bf16, no tiling", (goal, "under 16 GB")
    return Run(f"R13-{name}", "encode", setting, *about, f"{floor:.3f} s", 0.5, floor_seconds=floor, **published)


_RUNS = [
    Run("R0", "limits", "matmul 8k, attention, copies", "recorded", "", "790 TFLOP/s, 620 TFLOP/s, 55 GB/s", 1.0),
    Run(
        "R1-peft", "peft", "LoRA r128, diffusers + PEFT, plain loop, eager", "the one to beat", ".274 s (480x480)",
        "", 1.0, options=_lora(128, "none"), **_LTX,
    ),
    _train(
        "R1", "LoRA r128, no checkpointing", ("<= .09 s, <= 10 GiB, a third of R1-peft's time",
        ".274 s (480x480), 8.8 GiB", ".031 s"), 1.0, options=_lora(128, "none"), against="R1-peft", **_LTX,
    ),
    _train("R2", "LoRA r128", ("<= .12 s", ".462 s (480x480)", ".044 s"), 1.0, options=_lora(128), **_LTX),
    _train(
        "R2-r16", "LoRA r16", ("<= .06 s, <= 4.2 GiB", ".462 s, 4.21 GiB", ".024 s"), 1.0,
        options=_lora(16), **(_LTX | {"size": "49x480x480"}),
    ),
    _train(
        "R3", "LoRA r128, fp8 weights", ("<= 4.4 GiB", "5 GiB", "4.0 GiB"), 1.0,
        options=_lora(128, base_weights="fp8"), **_LTX,
    ),
    _train("R4", "LoRA r128", ("<= 6.3 GiB", "10.9 GiB", "5.7 GiB"), 1.0, options=_lora(128), **_LTX),
    _train(
        "R5", "full, bf16 weights, 8-bit AdamW in the backward pass", ("<= 9.5 GiB, <= .13 s", "20.4 GiB", "7.7 GiB"),
        2.0, options=_FULL_8BIT, **_LTX,
    ),
    _train(
        "R6", "LoRA r128", ("<= 19 GiB, <= 2.9 s", "20.7 GiB", "17.8 GiB, 2.46 s"), 2.0, options=_lora(128),
        **_COGVIDEOX,
    ),
    _train(
        "R6-fp8", "LoRA r128, fp8 weights", ("<= 14 GiB, <= 2.9 s", "18 GiB", "12.6 GiB, 2.46 s"), 2.0,
        options=_lora(128, base_weights="fp8"), **_COGVIDEOX,
    ),
    _train(
        "R7", "LoRA r128, all blocks streamed", ("fits a 12 GiB card, <= 1.1x R6", "18 GiB", "8.0 GiB"), 2.0,
        options=_lora(128, **_STREAMED), card_gib=12.0, against="R6", **_COGVIDEOX,
    ),
    _train(
        "R8", "full, bf16 weights, 8-bit AdamW in the backward pass", ("<= 31 GiB", "52.9 GiB", "26.5 GiB"), 3.0,
        options=_FULL_8BIT, **_COGVIDEOX,
    ),
    _train(
        "R9", "LoRA r128", ("<= 37 GiB, <= 4.3 s", "42.4 GiB", "34.7 GiB, 3.65 s"), 3.0, options=_lora(128),
        **_HUNYUAN,
    ),
    _train(
        "R9-fp8", "LoRA r128, fp8 weights", ("<= 25 GiB, <= 4.3 s", "32 GiB", "22.7 GiB, 3.65 s"), 3.0,
        options=_lora(128, base_weights="fp8"), **_HUNYUAN,
    ),
    *(
        _train(
            f"R10-{card}", f"LoRA r128, all blocks streamed{words}", (goal, "32 GiB", limit), 3.0,
            options=_lora(128, **_STREAMED, **more), card_gib=float(card), against="R9", **_HUNYUAN,
        )
        for card, words, goal, limit, more in (
            (24, "", "fits a 24 GiB card", "12.0 GiB", {}),
            (16, "", "fits a 16 GiB card, <= 1.15x R9", "12.0 GiB", {}),
            (12, ", activations too", "fits a 12 GiB card, <= 1.3x R9", "5.3 GiB", {"offload_activations": True}),
        )
    ),
    _train(
        "R11", "LoRA r16, no checkpointing", ("<= .75 s, <= 45 GiB", "1.407 s, 71.9 GiB", ".58 s"), 1.0,
        options=_lora(16, "none"), **_WAN_SMALL,
    ),
    _train(
        "R11-streamed", "LoRA r16, all blocks streamed", ("<= 1.0 s, <= 4.5 GiB", "2.099 s, 4.73 GiB", ".76 s"),
        1.0, options=_lora(16, **_STREAMED), **_WAN_SMALL,
    ),
    *(
        _train(
            f"R12-{card}", f"LoRA r32, all blocks streamed{words}", (goal, published, "4.91 s, 12.9 GiB"), 3.5,
            options=_lora(32, **_STREAMED, **more), card_gib=float(card), **_WAN,
        )
        for card, words, goal, published, more in (
            (24, "", "<= 5.8 s on a 24 GiB card", "24 GB, no speed", {}),
            # Without it the plan says 18 GiB.
            (16, ", activations too", "fits a 16 GiB card", "", {"offload_activations": True}),
        )
    ),
    _encode("ltx", _LTX, 0.020),
    _encode("cogvideox", _COGVIDEOX, 0.189),
    _encode("hunyuan", _HUNYUAN, 0.301),
    _encode("wan", _WAN, 0.125),
    Run(
        "R13-save", "save", "R9, and a checkpoint written meanwhile", "<= 0.2 s of stall", "", "", 3.0,
        options=_lora(128), **_HUNYUAN,
    ),
]  # fmt: skip


def _eager(run: Run) -> Run:
    """A run whose blocks are not compiled, which they otherwise are on a GPU."""
    options = {**run.options, "training.compile": "off"}
    return replace(run, name=f"{run.name}-eager", setting=f"{run.setting}, eager", options=options)


def _recorded(run: Run) -> Run:
    """A run whose passes are launched at once."""
    options = {**run.options, "training.cuda_graphs": True}
    return replace(run, name=f"{run.name}-graphs", setting=f"{run.setting}, CUDA graphs", options=options)


def _variants(run: Run) -> list[Run]:
    eager = [_eager(run)] if run.name in ("R1", "R2", "R6", "R9", "R11") else []
    recorded = [_recorded(run)] if run.name in ("R1", "R2", "R2-r16", "R11") else []
    return [run, *eager, *recorded]


_RUNS = [each for run in _RUNS for each in _variants(run)]
RUNS = {run.name: run for run in _RUNS}


def choose(names: Sequence[str]) -> list[Run]:
    """The runs of these names, each with its variants (`R6` and `R6-fp8`); all of them where none is named. Raises
    KeyError with a name that there is not."""
    for name in names:
        if not any(_is_of(run, name) for run in _RUNS):
            raise KeyError(name)
    return [run for run in _RUNS if not names or any(_is_of(run, name) for name in names)]


def _is_of(run: Run, name: str) -> bool:
    return run.name == name or run.name.startswith(f"{name}-")


def parts(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in their order, in parts that are expected to be through within `PART_SECONDS`."""
    grouped: list[list[Run]] = []
    for run in runs:
        if not grouped or 60 * sum(each.minutes for each in (*grouped[-1], run)) > PART_SECONDS:
            grouped.append([])
        grouped[-1].append(run)
    return grouped


def tiny(run: Run) -> Run:
    """The same for a tiny model of the same family, on any machine: with little to adapt, and nothing recorded."""
    options = {key: value for key, value in run.options.items() if key != "training.cuda_graphs"}
    if "method.rank" in options:
        options["method.rank"] = 4
    return replace(run, options=options)
