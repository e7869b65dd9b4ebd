"""The loop: draw batches, take a step, tell the callbacks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetrainers.data.batch import BatchStream, Drawn
from finetrainers.engines.base import Engine, Loss
from finetrainers.hashing import seed_for
from finetrainers.memory.exhausted import free, is_exhausted, told
from finetrainers.memory.report import Held, held
from finetrainers.methods.base import Method
from finetrainers.training.callback import Callback
from finetrainers.training.recorded import Pass, RecordedPasses, Recorder
from finetrainers.training.rescue import Rescue
from finetrainers.training.state import StepOutcome, TrainState
from finetrainers.types import Batch


@dataclass
class Trainer:
    """Everything that a run is made of, put together; `fit` runs it to its end or to the first request to stop."""

    method: Method
    models: dict[str, torch.nn.Module]
    """What takes part in training, by name, on the device."""
    trained: dict[str, torch.nn.Parameter]
    batches: BatchStream
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    engine: Engine
    callbacks: Sequence[Callback]
    steps: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    seed: int
    rescue: Rescue = field(default_factory=Rescue)
    """What is done when a step exhausts the memory."""
    recorder: Recorder | None = None
    """Records passes, to launch them at once when their size comes back; None runs each."""
    stop_requested: Callable[[], bool] = lambda: False
    state: TrainState = field(default_factory=TrainState)
    _asked: bool = field(default=False, init=False)
    _spread: Loss = field(init=False)
    _run: Pass = field(init=False)
    _refresh: Callable[[], None] = field(init=False)
    """Brings copies of the weights up to date."""

    def __post_init__(self) -> None:
        # Weights that processes share out are whole only while they are computed with.
        self._refresh = (lambda: None) if self.engine.shares else self.method.copy_weights(self.models)
        self._spread = self.engine.spread(
            functools.partial(self.method.loss, self.models), self.models, self.optimizer, self.max_grad_norm
        )
        self._run = self._run_here
        if self.recorder is not None:
            self._run = RecordedPasses(self._run_here, self.recorder, list(self.trained.values()))

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def stopping(self) -> bool:
        """Whether the run ends before its last step because a process of it was asked to."""
        return self._asked and self.state.step < self.steps

    def fit(self) -> None:
        """Train from `state` to the last step. The callbacks are closed however it ends."""
        stream = self.batches.start(self.state.batches)
        # A checkpoint may have been loaded.
        self._refresh()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            self.set_training(True)
            while self.state.step < self.steps and not self._is_asked_to_stop():
                outcome = self.step(stream)
                for callback in self.callbacks:
                    callback.on_step_end(self, outcome)
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            for callback in self.callbacks:
                callback.close()

    def step(self, stream: Iterator[Drawn]) -> StepOutcome:
        """One optimizer step over `gradient_accumulation_steps` batches of each process, or of each group that splits
        them; each sample weighs the same."""
        begun = time.perf_counter()
        drawn = [next(stream) for _ in range(self.gradient_accumulation_steps)]
        data_time = time.perf_counter() - begun
        num_samples = sum(each.num_samples for each in drawn)
        shares = self._passes(drawn, num_samples)
        lr = self.optimizer.param_groups[0]["lr"]
        with told("the optimizer's step", self.device, advice=self.rescue.advice, held=self.held):
            grad_norm = self.engine.step()
            self._refresh()
        self.schedule.step()
        self.state.step += 1
        self.state.batches += len(drawn) * self.engine.data_size
        self.state.samples += num_samples
        return StepOutcome(
            step=self.state.step,
            epoch=drawn[0].epoch,
            loss=self.engine.sum(functools.reduce(torch.add, shares)),
            grad_norm=grad_norm,
            lr=lr,
            step_time=time.perf_counter() - begun,
            data_time=data_time,
            num_samples=num_samples,
            # Of this process; the others' are as many but for the last batches of an epoch.
            num_tokens=sum(each.batch.num_tokens for each in drawn) * self.engine.data_size,
        )

    def _passes(self, drawn: Sequence[Drawn], num_samples: int) -> list[Tensor]:
        """The forward and backward pass of each batch, which leaves gradients; this process's shares of the loss. Where
        memory runs out they are done again, with the same noise, if a measure could be taken."""
        while True:
            try:
                return [self._pass(each, num_samples, is_last=each is drawn[-1]) for each in drawn]
            except RuntimeError as error:
                if not is_exhausted(error):
                    raise
                self.rescue.take(self, error)
            # Not before here has Python let go of the error, and with it of the pass that failed.
            free(self.device)

    def _pass(self, drawn: Drawn, num_samples: int, *, is_last: bool) -> Tensor:
        # The only draws not made with the batch are a method's own, such as LoRA dropout; of a batch that is split each
        # process draws for its tokens.
        seed = seed_for(self.seed, "pass", drawn.position) + self.engine.context_rank
        self.engine.generator.manual_seed(seed)
        with self.engine.accumulate(is_last=is_last):
            return self._run(self._to_device(drawn.batch), num_samples)

    def _run_here(self, batch: Batch, num_samples: int) -> Tensor:
        share = self._spread(batch).sum() / num_samples
        self.engine.backward(share)
        return share.detach()

    def held(self) -> Held:
        """What the device holds for training, by part."""
        return held(self.models.values(), self.optimizer, self.device)

    def _is_asked_to_stop(self) -> bool:
        """Whether any process was, so that all end after the same step."""
        self._asked = self.engine.any(self.stop_requested())
        return self._asked

    def set_training(self, training: bool) -> None:
        """Switch what is random in a forward pass, such as dropout, on or off."""
        for name, model in self.models.items():
            # A text encoder's own dropout was for its pretraining; it stays off.
            model.train(training and name.startswith("transformer"))

    def loss(self, batch: Batch) -> Tensor:
        """Loss of each sample of a batch [B], on the device; of this process alone."""
        return self.method.loss(self.models, self._to_device(batch))

    def _to_device(self, batch: Batch) -> Batch:
        return batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
