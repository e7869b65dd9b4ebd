"""DeepSpeed's ZeRO: processes share the optimizer's state (stage 1), gradients too (2), and weights too (3)."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetrainers.engines.base import Loss
from finetrainers.engines.ddp import LossModule
from finetrainers.engines.processes import Processes
from finetrainers.errors import UserError

logger = logging.getLogger(__name__)

_OWNED = {
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.lr_scheduler",
    "gradient_clipping": "training.max_grad_norm",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "train_batch_size": "training.batch_size",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
}
"""Keys of DeepSpeed's JSON that our own config decides."""
_TAG = "zero"


class DeepSpeedEngine(Processes):
    """DeepSpeed around our own optimizer, which keeps to fp32 weights where they are trained."""

    shares = True

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` are DeepSpeed's own, as `zero_settings` gives them."""
        super().__init__()
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Each of its collectives goes by a name that newer versions of torch call old.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed

        # Takes the processes as they have found each other.
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo")
        self._settings = dict(settings)
        self.together = self.stage == 3

    @property
    def stage(self) -> int:
        """How much is shared."""
        return int(self._settings["zero_optimization"]["stage"])

    def prepare(
        self, models: Mapping[str, nn.Module], blocks: Mapping[str, Sequence[nn.Module]], dtype: torch.dtype | None
    ) -> None:
        import deepspeed

        self.refuse_two_experts(models, "deepspeed")
        for name, model in models.items():
            if self.stage < 3:
                self.receive(model)
                continue
            # One layer is whole on the device at a time.
            for module in (*blocks[name], model):
                self.receive(module)
                deepspeed.zero.Init(module=module, config_dict_or_path=self._settings)

    def within_blocks(self, dtype: torch.dtype | None) -> str | None:
        return "ZeRO stage 3 brings weights together within blocks" if self.stage == 3 else super().within_blocks(dtype)

    def spread(
        self, loss: Loss, models: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> Loss:
        import deepspeed

        settings = {**self._settings, "gradient_clipping": max_grad_norm}
        self._zero, *_ = deepspeed.initialize(
            model=LossModule(loss, nn.ModuleDict(models)), optimizer=optimizer, config=settings
        )
        partitions = [group["params"] for group in self._zero.optimizer.optimizer.param_groups]
        if self.stage == 3:
            partitions = [self._zero.optimizer.fp32_partitioned_groups_flat]
        held = sum(partition.numel() for group in partitions for partition in group)
        logger.info(
            "ZeRO stage %d: this process's optimizer has %s numbers", self._zero.zero_optimization_stage(), f"{held:,}"
        )
        answer: Loss = self._zero
        return answer

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self._zero.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # It divides by the number of processes; shares of a loss are to be added up.
        self._zero.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self._zero.step()
        # A plain number where gradients are not finite; the step was left out then.
        return torch.as_tensor(self._zero.get_global_grad_norm(), dtype=torch.float32)

    def _whole(self, tensor: Tensor) -> Tensor:
        import deepspeed

        # Below stage 3 parameters are views into one long tensor.
        if not hasattr(tensor, "ds_id"):
            return tensor.detach().clone()
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    @property
    def layout(self) -> str:
        return f"deepspeed stage {self.stage} on {self.world_size} processes"

    def save(
        self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path
    ) -> Callable[[], None]:
        # Not while training goes on: DeepSpeed's own checkpoint is written when this returns.
        self._zero.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        self.wait()
        return lambda: None

    def load(self, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, folder: Path) -> None:
        with _weights_only():
            self._zero.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)

    def close(self) -> None:
        self._zero.destroy()
        super().close()


def zero_settings(*, stage: int | None, offload: str, user: Mapping[str, Any] | None) -> dict[str, Any]:
    """DeepSpeed's configuration: a user's own, and over it what this toolkit needs. Values that say `auto` are left to
    us, as other tools have it; without a stage it is 2.

    Raises UserError where both say something else, and where the stage cannot do what is asked.
    """
    settings = _without_auto(user or {})
    for key, place in _OWNED.items():
        if settings.get(key):
            raise UserError(f"parallel.deepspeed_config: {key} is decided by {place}; remove it")
    zero = {"stage": 2, **settings.get("zero_optimization", {})}
    if stage is not None and stage != settings.get("zero_optimization", {}).get("stage", stage):
        raise UserError(
            f"parallel.zero_stage is {stage}, and parallel.deepspeed_config says stage {zero['stage']}; remove one"
        )
    zero["stage"] = zero["stage"] if stage is None else stage
    if offload == "parameters" and zero["stage"] != 3:
        raise UserError("parallel.offload parameters needs parallel.zero_stage 3; below it, optimizer can be offloaded")
    if offload != "none":
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    if offload == "parameters":
        zero.setdefault("offload_param", {"device": "cpu"})
    # It would put a function of its own into torch, for good.
    zero["memory_efficient_linear"] = False
    needed = {
        # Batches are counted by the trainer, and may be of any size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"steps_per_print": None, **settings, **needed, "zero_optimization": zero}


def read_user_settings(path: Path) -> dict[str, Any]:
    """A user's own DeepSpeed JSON. Raises UserError when there is none."""
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"parallel.deepspeed_config {path} cannot be read as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"parallel.deepspeed_config {path} must hold a JSON object")
    return loaded


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            value = _without_auto(value)
        if value != "auto":
            kept[key] = value
    return kept


@contextmanager
def _weights_only() -> Iterator[None]:
    """In the block torch reads tensors and plain values alone, and of DeepSpeed's classes the few that its checkpoints
    hold; DeepSpeed itself would run whatever a file says."""
    from collections import OrderedDict

    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, OrderedDict]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
