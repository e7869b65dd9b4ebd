"""`finetrainers plan`: what a run would do, before anything heavy is loaded."""

from __future__ import annotations

import json
from typing import Any, cast

import torch

from finetrainers.commands.precompute import build_method, complete
from finetrainers.config.load import resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.data.dataset import cache_folder, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.folder import RunFolder
from finetrainers.planning import Plan, count_parameters, plan_buckets, plan_run
from finetrainers.training.progress import phase_progress


def plan(config: RunConfig, *, json: bool) -> int:
    """Print the plan; no weights are read, and nothing is written but the index of the clips."""
    family, config = complete(config, weights=False)
    folder = cache_folder(config.data, RunFolder(config.output).cache)
    dataset = open_dataset(config.data, FileIndex(folder / "files.json"), phase_progress)
    method = build_method(family, config)
    with torch.device("meta"):
        models = method.build()
        trained = method.attach(models, seed=0)
    for name, model in models.items():
        if config.training.gradient_checkpointing and name.startswith("transformer"):
            cast(Any, model).enable_gradient_checkpointing()
    condition = max(resolved_conditions(config), key=lambda entry: entry[1])[0]
    made = plan_run(
        family,
        dataset,
        plan_buckets(family, models, dataset.train, condition),
        count_parameters(models, trained),
        method=config.method.name,
        options=config.training,
    )
    print(_as_json(made) if json else _as_text(made))
    return 0


def _as_json(made: Plan) -> str:
    return json.dumps(made.as_dict(), indent=2)


def _as_text(made: Plan) -> str:
    share = made.trained_parameters / made.parameters
    lines = [f"{made.family}, {made.method}: trains {made.trained_parameters:,} parameters ({share:.1%} of all)"]
    for bucket in made.buckets:
        work = "" if bucket.training_tflop is None else f", {bucket.training_tflop:,.3g} TFLOP each"
        lines.append(f"  {bucket.bucket}: {bucket.clips} samples of {bucket.tokens:,} tokens{work}")
    lines.append(f"samples: {made.train_samples} to train on, {made.held_out_samples} held out")
    lines += [f"left out: {problem['name']}: {problem['reason']}" for problem in made.left_out]
    lines.append(f"steps: {made.steps}, which is {made.epochs:.1f} epochs of {made.batches_per_epoch} batches")
    return "\n".join(lines)
