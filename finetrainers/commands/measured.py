"""What `bench` measured, as JSON and as people read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Setup:
    """What ran, and where."""

    device: str
    processes: int
    family: str
    method: str
    precision: str
    compiled: bool
    cuda_graphs: bool
    gradient_checkpointing: str
    sizes: list[dict[str, Any]]
    """Of the batches of the timed steps, of the main process: `bucket`, `condition`, `samples`, and how many
    `batches`."""

    def lines(self) -> list[str]:
        compiled = ", compiled" if self.compiled else ""
        recorded = ", CUDA graphs" if self.cuda_graphs else ""
        where = f"{self.processes} processes, each on {self.device}" if self.processes > 1 else self.device
        sizes = (
            f"  {size['bucket']}, given {size['condition']}, batches of {size['samples']}: {size['batches']}"
            for size in self.sizes
        )
        return [f"{self.family}, {self.method}, {self.precision}{compiled}{recorded}, on {where}", *sizes]


@dataclass(frozen=True)
class Steps:
    """Times of the main process, and what all processes together get through."""

    steps: int
    """Those that were timed. What stands below `warm_up_seconds` is about them."""
    first_step_seconds: float
    warm_up_steps: int
    """All that were not timed, the first one too."""
    warm_up_seconds: float
    seconds: float
    """Of all together."""
    step_seconds_median: float
    step_seconds_p95: float
    data_seconds_median: float
    """Of a step, waiting for batches."""
    data_seconds_p95: float
    data_share: float
    samples: int
    tokens: int
    """Of video, as the transformer sees them."""
    samples_per_second: float
    tokens_per_second: float

    def lines(self) -> list[str]:
        return [
            _row("first step", f"{self.first_step_seconds:.3g} s, compiling included"),
            _row("warm-up", f"{self.warm_up_seconds:.3g} s, {self.warm_up_steps} steps with the first"),
            _row(
                "step",
                f"{self.step_seconds_median:.3g} s median, {self.step_seconds_p95:.3g} s p95, of {self.steps} steps",
            ),
            _row(
                "waiting for data",
                f"{self.data_seconds_median:.3g} s median, {self.data_seconds_p95:.3g} s p95; "
                f"{self.data_share:.1%} of all steps",
            ),
            _row("speed", f"{self.samples_per_second:.3g} samples/s, {self.tokens_per_second:,.4g} video tokens/s"),
        ]


@dataclass(frozen=True)
class Memory:
    """Of the main process."""

    peak_allocated_gib: float
    """On a GPU in all steps; on a CPU of the process since it began, encoding included."""
    peak_reserved_gib: float | None
    """On a GPU what the allocator kept for that."""
    predicted_gib: float | None
    """What `plan` says of the training phase, for the largest size of the config; None where it cannot."""

    def lines(self) -> list[str]:
        peak = f"{self.peak_allocated_gib:.2f} GiB at most of the process, encoding included"
        if self.peak_reserved_gib is not None:
            peak = f"{self.peak_allocated_gib:.2f} GiB allocated at most, {self.peak_reserved_gib:.2f} GiB reserved"
        predicted = "" if self.predicted_gib is None else f"; plan predicts {self.predicted_gib:.2f} GiB of tensors"
        return [_row("memory", peak + predicted)]


@dataclass(frozen=True)
class Arithmetic:
    """Of the main process; None where the family's operations cannot be counted."""

    flop: float | None
    """Operations that a step needs, on average; a multiplication and an addition are two."""
    executed_flop: float | None
    """With those that gradient checkpointing does again."""
    matmul_side: int
    """Rows and columns of the matrices whose product was measured."""
    matmul_flop_per_second: float
    mfu: float | None
    """Share of that rate, by what is needed."""
    hfu: float | None
    """The same by what is executed."""

    @classmethod
    def of(cls, work: tuple[float, float] | None, *, seconds: float, side: int, rate: float) -> Arithmetic:
        """From the operations of a step, needed and executed, and its mean seconds."""
        if work is None:
            return cls(None, None, side, rate, None, None)
        return cls(*work, side, rate, *(flop / seconds / rate for flop in work))

    def lines(self, precision: str) -> list[str]:
        rate = f"{self.matmul_flop_per_second / 1e12:.3g} TFLOP/s in {precision}"
        rows = [_row("matrix products", f"{rate}, measured here ({self.matmul_side} x {self.matmul_side})")]
        if self.flop is not None and self.executed_flop is not None:
            needed, executed = self.flop / 1e12, self.executed_flop / 1e12
            rows.append(_row("operations", f"{needed:.3g} TFLOP a step needed, {executed:.3g} TFLOP executed"))
            rows.append(_row("of that rate", f"{self.mfu:.1%} needed (MFU), {self.hfu:.1%} executed (HFU)"))
        return rows


@dataclass(frozen=True)
class Kernels:
    """Of one step on a GPU; None on a CPU."""

    kernels: int | None = None
    kernel_seconds: float | None = None
    """Of all of them together."""
    busy_share: float | None = None
    """Of the step, while anything ran or was copied."""

    def lines(self) -> list[str]:
        if self.kernels is None:
            return []
        seconds = f"{self.kernel_seconds:.3g} s of them; the GPU is busy {self.busy_share:.0%} of a step"
        return [_row("kernels", f"{self.kernels:,} a step, {seconds}")]


@dataclass(frozen=True)
class Measured:
    """All of it."""

    setup: Setup
    steps: Steps
    memory: Memory
    arithmetic: Arithmetic
    kernels: Kernels
    verdict: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: one level of keys."""
        parts = (self.setup, self.steps, self.memory, self.arithmetic, self.kernels)
        return {key: value for part in parts for key, value in asdict(part).items()} | {"verdict": self.verdict}

    def lines(self) -> list[str]:
        """As people read it."""
        return [
            *self.setup.lines(),
            *self.steps.lines(),
            *self.memory.lines(),
            *self.arithmetic.lines(self.setup.precision),
            *self.kernels.lines(),
            *self.verdict,
        ]


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}"
