"""Forwards the rows of `metrics.jsonl` and the sample videos to Weights & Biases and TensorBoard."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetrainers.config.schema import TrackingConfig
from finetrainers.errors import RunError, UserError
from finetrainers.folder import RunFolder, write_atomically
from finetrainers.training.callback import Callback

if TYPE_CHECKING:
    from finetrainers.training.trainer import Trainer


class Tracker:
    """A place outside the run's folder that shows its numbers, under the names that they have in `metrics.jsonl`.

    Making one refuses at once what would fail later: a missing package, a missing login. The package is imported
    there and nowhere else.
    """

    def __init__(self, config: TrackingConfig, folder: RunFolder, *, settings: dict[str, Any]) -> None:
        """`settings` is the whole config as it is written to `config.yaml`; it holds no secrets."""

    def start(self, step: int) -> None:
        """The run goes on from `step`: what was logged beyond it will come again."""

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        """Numbers of a step or of a validation."""

    def video(self, name: str, path: Path, *, caption: str, step: int) -> None:
        """A sample video; `name` is the same at every step."""

    def close(self, *, failed: bool) -> None:
        """Send what is pending."""


class WandbTracker(Tracker):
    """Weights & Biases. A resumed run goes on under its id, kept in `wandb_run_id.txt`."""

    def __init__(self, config: TrackingConfig, folder: RunFolder, *, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        folder.root.mkdir(parents=True, exist_ok=True)
        kept = folder.root / "wandb_run_id.txt"
        if not kept.exists():
            write_atomically(kept, uuid.uuid4().hex[:12] + "\n")
        self._wandb = wandb
        online = config.wandb_mode == "online"
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or folder.root.resolve().name,
                id=kept.read_text().strip(),
                resume="allow" if online else None,
                mode=config.wandb_mode,
                dir=str(folder.root),
                config=settings,
                allow_val_change=True,
                # The console is not captured: its live line would fill the log.
                settings=wandb.Settings(console="off", disable_git=True),
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(
                f"tracking.trackers: wandb refused to start ({error}); "
                "log in with `wandb login`, or set tracking.wandb_mode=offline"
            ) from error
        except wandb.errors.CommError as error:
            raise RunError(
                f"Weights & Biases cannot be reached ({error}); tracking.wandb_mode=offline keeps the run on disk"
            ) from error
        # wandb's own step refuses to go back, as a resumed run must.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self._run.log({"step": step, **metrics})

    def video(self, name: str, path: Path, *, caption: str, step: int) -> None:
        video = self._wandb.Video(str(path), caption=caption, format="mp4")
        self._run.log({"step": step, f"samples/{name}": video})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class TensorBoardTracker(Tracker):
    """Event files under `tensorboard/`. Videos are shown by their path: TensorBoard itself shows only GIFs."""

    def __init__(self, config: TrackingConfig, folder: RunFolder, *, settings: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._make_writer = SummaryWriter
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, step: int) -> None:
        # TensorBoard hides what earlier files hold from purge_step on.
        self._writer = self._make_writer(str(self._folder.root / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        assert self._writer is not None, "a number before start"
        for name, number in metrics.items():
            self._writer.add_scalar(name, number, step)

    def video(self, name: str, path: Path, *, caption: str, step: int) -> None:
        assert self._writer is not None, "a video before start"
        self._writer.add_text(f"samples/{name}", f"{caption}\n\n{path.relative_to(self._folder.root)}", step)

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "tensorboard": TensorBoardTracker}
"""By the names that `tracking.trackers` takes."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before anything slow, a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise _missing(name)


def build_trackers(config: TrackingConfig, folder: RunFolder, *, settings: dict[str, Any]) -> list[Tracker]:
    """Those that the config asks for, started. Raises UserError when one cannot be."""
    return [TRACKERS[name](config, folder, settings=settings) for name in dict.fromkeys(config.trackers)]


class Trackers(Callback):
    """Sends each row and each sample video to every tracker. Give `on_row` to `MetricsFile` as a listener."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)
        self._ended = False

    def on_start(self, trainer: Trainer) -> None:
        for tracker in self._trackers:
            tracker.start(trainer.state.step)

    def on_row(self, row: dict[str, Any]) -> None:
        """Take a row of `metrics.jsonl`."""
        metrics = {name: number for name, number in row.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(metrics, step=row["step"])

    def on_validation(self, trainer: Trainer, metrics: dict[str, float], videos: dict[str, Path]) -> None:
        for prompt, path in videos.items():
            for tracker in self._trackers:
                tracker.video(path.stem, path, caption=prompt, step=trainer.state.step)

    def on_end(self, trainer: Trainer) -> None:
        self._ended = True

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close(failed=not self._ended)


def _missing(package: str) -> UserError:
    return UserError(
        f"tracking.trackers: {package} is not installed; pip install finetrainers[{package}], or leave it out"
    )
