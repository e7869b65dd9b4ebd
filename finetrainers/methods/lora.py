"""LoRA through peft: small adapters move, the base stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetrainers.errors import UserError
from finetrainers.methods.base import Method
from finetrainers.weights import write_loras


class CastingLinear(nn.Linear):
    """A linear layer with fp32 weights that computes in its input's type.

    peft would compute fp32 adapters in fp32, which keeps a third more activations for the backward pass.
    """

    cast: Tensor | None
    """The weight in the type that is computed in, kept up to date by who moves the weight; with none, or for inputs of
    another type, the weight is cast whenever the layer runs. A buffer that is not saved."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        self.register_buffer("cast", None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.cast is None or self.cast.dtype != input.dtype:
            return nn.functional.linear(input, self.weight.to(input.dtype))
        answer: Tensor = _LinearOfCopy.apply(input, self.weight, self.cast)
        return answer


class _LinearOfCopy(torch.autograd.Function):
    """Computes with a copy of the weight, and gives the weight its gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(input, copy)
        return nn.functional.linear(input, copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, copy = ctx.saved_tensors
        to_input = gradient @ copy if ctx.needs_input_grad[0] else None
        to_weight = gradient.flatten(0, -2).mT @ input.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return to_input, None if to_weight is None else to_weight.float(), None


class Lora(Method):
    """Adapters of low rank beside frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    name = "lora"
    saves_trained_only = True

    @property
    def weights_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def alpha(self) -> float:
        return self.options.rank if self.options.alpha is None else self.options.alpha

    @property
    def trains_text_encoder(self) -> bool:
        return bool(self.options.text_encoder == "lora")

    def attach(self, models: Mapping[str, Any], seed: int) -> None:
        for part, model in models.items():
            model.requires_grad_(False)
            if targets := self._targets(part, model):
                self._add_adapters(model, targets, seed)
        for parameter in self.trained(models).values():
            parameter.data = parameter.data.float()

    def copy_weights(self, models: Mapping[str, nn.Module]) -> Callable[[], None]:
        layers = self._casting_layers(models)
        masters = [layer.weight for layer in layers]
        copies = [master.detach().to(self.dtype) for master in masters]
        for layer, copy in zip(layers, copies, strict=True):
            layer.cast = copy

        @torch.no_grad()
        def refresh() -> None:
            if copies:
                torch._foreach_copy_(copies, masters)

        return refresh

    def copied_bytes(self, models: Mapping[str, nn.Module]) -> int:
        return sum(layer.weight.numel() * self.dtype.itemsize for layer in self._casting_layers(models))

    def _casting_layers(self, models: Mapping[str, nn.Module]) -> list[CastingLinear]:
        """Those whose weights are of another type than what is computed in."""
        modules = [module for model in models.values() for module in model.modules()]
        layers = [module for module in modules if isinstance(module, CastingLinear)]
        return layers if self.dtype != self.trained_dtype else []

    def _targets(self, part: str, model: nn.Module) -> list[str]:
        """Whole paths of the layers of one model that get adapters, so that the file says exactly what was trained."""
        if part.startswith("transformer"):
            return self._matched_targets(model)
        # A second text encoder that only gives a summary of the prompt stays as it is.
        matches = re.compile(self.family.text_encoder_targets).fullmatch
        return [name for name, _ in model.named_modules() if part == "text_encoder" and matches(name)]

    def _add_adapters(self, model: Any, targets: list[str], seed: int) -> None:
        from peft import LoraConfig

        config = LoraConfig(
            r=self.options.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.options.dropout,
            target_modules=targets,
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.add_adapter(config)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                _compute_in_input_dtype(module)

    def _matched_targets(self, transformer: nn.Module) -> list[str]:
        """The linear layers that the option names."""
        targets = self.options.target_modules
        try:
            matches = (
                re.compile(targets).fullmatch
                if isinstance(targets, str)
                else re.compile(rf"(.*\.)?({'|'.join(map(re.escape, targets))})").fullmatch
            )
        except re.error as error:
            raise UserError(f"method.target_modules {targets!r} is not a regular expression: {error}") from None
        linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        found = [name for name in linear if matches(name)]
        if not found:
            raise UserError(
                f"method.target_modules {targets!r} matches no linear layer of the transformer; its layers are named "
                f"like {', '.join(linear[-6:])}"
            )
        return found

    def save(self, models: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
        from peft import get_peft_model_state_dict

        adapters = {}
        for part, tensors in weights.items():
            # Left to itself, peft asks the hub whether the vocabulary of a text encoder was resized.
            named = get_peft_model_state_dict(models[part], state_dict=dict(tensors), save_embedding_layers=False)
            adapters[part] = (named, models[part].peft_config["default"].to_dict())
        write_loras(folder, adapters, notes=self.family.notes())


def _compute_in_input_dtype(layer: Any) -> None:
    """Let a peft layer's adapters compute in the type of the activations, with their weights kept in fp32."""
    layer.cast_input_dtype_enabled = False
    for adapters in (layer.lora_A, layer.lora_B):
        for name, old in adapters.items():
            new = CastingLinear(old.in_features, old.out_features, bias=False, device="meta")
            new.weight = old.weight
            adapters[name] = new
