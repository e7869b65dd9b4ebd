"""`finetrainers plan`: what a run would do, before anything heavy is loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict
from json import dumps
from typing import Any

import torch

from finetrainers.commands.completing import build_method, complete
from finetrainers.commands.fit import fit, given_options
from finetrainers.commands.fit_table import build_table, table_lines
from finetrainers.commands.opening import check_options
from finetrainers.config.load import resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.data.dataset import cache_folder, open_dataset
from finetrainers.data.index import FileIndex
from finetrainers.engines.single import SingleEngine
from finetrainers.folder import RunFolder
from finetrainers.methods.base import Method
from finetrainers.planning import BucketPlan, Plan, count_parameters, plan_buckets, plan_run
from finetrainers.scaling import ENGINES, TFLOPS, Cluster, Work, predict
from finetrainers.training.measures import save_activations
from finetrainers.training.progress import phase_progress


def plan(config: RunConfig, *, json: bool, nodes: int | None, gpus_per_node: int, table: bool) -> int:
    """Print the plan, and with `nodes` the time of a step on them, or with `table` what each card needs instead; no
    weights are read, and nothing is written but the index of the clips."""
    given = given_options(config)
    if table:
        rows = build_table(config, given=given, check=functools.partial(check_options, engine=SingleEngine()))
        print(dumps([row.as_dict() for row in rows], indent=2) if json else "\n".join(table_lines(rows)))
        return 0
    family, config = complete(config, weights=False)
    check = functools.partial(check_options, family, engine=SingleEngine())
    config, memory = fit(family, config, given=given, check=check)
    folder = cache_folder(config.data, RunFolder(config.output).cache)
    dataset = open_dataset(config.data, FileIndex(folder / "files.json"), phase_progress)
    method = build_method(family, config)
    with torch.device("meta"):
        models = method.build()
        method.attach(models, seed=0)
    parameters = count_parameters(models)
    save_activations(method, models, checkpointing=str(config.training.gradient_checkpointing), offload=False)
    condition = max(resolved_conditions(config), key=lambda entry: entry[1])[0]
    made = plan_run(
        family,
        dataset,
        plan_buckets(family, models, dataset.train, condition),
        parameters,
        method=config.method.name,
        options=config.training,
    )
    answer = made.as_dict() | {"memory": memory.as_dict()}
    lines = [*_plan_lines(made), *memory.lines()]
    if nodes is not None:
        # Every step waits for the process with the largest batch; with many processes there nearly always is one.
        bucket = max(made.buckets, key=lambda each: each.training_tflop or 0)
        work = step_work(method, models, bucket, config.training)
        cluster = Cluster(nodes, gpus_per_node, tflops=TFLOPS[config.training.precision])
        scaling = _scaling(work, cluster, bucket)
        answer["scaling"] = scaling
        lines += _scaling_lines(scaling, made.family)
    print(dumps(answer, indent=2) if json else "\n".join(lines))
    return 0


def step_work(method: Method, models: Mapping[str, torch.nn.Module], bucket: BucketPlan, options: Any) -> Work | None:
    """What a step on batches of one bucket asks of each GPU, from models on the meta device to which the method is
    attached, and the config's `training` section; None where the family cannot be counted. Of two experts one is
    gathered, because a pass asks one."""
    if bucket.forward_tflop is None or bucket.training_tflop is None:
        return None
    every, trained = count_parameters(models)
    transformer = next(model for name, model in models.items() if name.startswith("transformer"))
    gathered = method.weights_dtype if str(options.compile) == "blocks" else method.dtype
    return Work(
        forward_tflop=options.batch_size * bucket.forward_tflop,
        training_tflop=options.batch_size * bucket.training_tflop,
        passes=options.gradient_accumulation_steps,
        batch_size=options.batch_size,
        trained_parameters=trained,
        weight_bytes=method.trained_dtype.itemsize * trained + method.weights_dtype.itemsize * (every - trained),
        gathered_bytes=gathered.itemsize * sum(parameter.numel() for parameter in transformer.parameters()),
        num_blocks=len(method.family.blocks("transformer", transformer)),
    )


def _scaling(work: Work | None, cluster: Cluster, bucket: BucketPlan) -> dict[str, Any] | None:
    """The prediction for each engine, as JSON has it."""
    if work is None:
        return None
    engines = [asdict(predict(engine, work, cluster)) for engine in ENGINES]
    return {"bucket": bucket.bucket, "cluster": asdict(cluster), "work": asdict(work), "engines": engines}


def _plan_lines(made: Plan) -> list[str]:
    share = made.trained_parameters / made.parameters
    lines = [f"{made.family}, {made.method}: trains {made.trained_parameters:,} parameters ({share:.1%} of all)"]
    for bucket in made.buckets:
        work = "" if bucket.training_tflop is None else f", {bucket.training_tflop:,.3g} TFLOP each"
        lines.append(f"  {bucket.bucket}: {bucket.clips} samples of {bucket.tokens:,} tokens{work}")
    lines.append(f"samples: {made.train_samples} to train on, {made.held_out_samples} held out")
    lines += [f"left out: {problem['name']}: {problem['reason']}" for problem in made.left_out]
    lines.append(f"steps: {made.steps}, which is {made.epochs:.1f} epochs of {made.batches_per_epoch} batches")
    return lines


def _scaling_lines(scaling: dict[str, Any] | None, family: str) -> list[str]:
    if scaling is None:
        return [f"no step time: the work of {family} cannot be counted without its weights"]
    cluster = scaling["cluster"]
    where = f"{cluster['nodes']} x {cluster['gpus_per_node']} H100s"
    lines = [f"a step of {scaling['bucket']} on {where}, predicted, not measured (docs/cluster.md):"]
    names = ("step s", "exposed s", "efficiency", "samples/s", "sent GB", "held GiB")
    lines.append(f"  {'engine':<19}" + "".join(f"{name:>12}" for name in names))
    for row in scaling["engines"]:
        cells = (
            f"{row['step_seconds']:.3g}",
            f"{row['exposed_seconds']:.3g}",
            f"{row['efficiency']:.1%}",
            f"{row['samples_per_second']:.3g}",
            f"{row['sent_bytes'] / 1e9:.3g}",
            f"{row['state_bytes'] / 2**30:.3g}",
        )
        lines.append(f"  {row['engine']:<19}" + "".join(f"{cell:>12}" for cell in cells))
    return lines
