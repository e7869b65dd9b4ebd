"""`finetrainers train`: encode what is not yet encoded, train, validate, checkpoint, save weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from finetrainers.commands.completing import DTYPES
from finetrainers.commands.fit import MEASURES, get_option, has_option
from finetrainers.commands.opening import open_run
from finetrainers.commands.precompute import Prepared, encode
from finetrainers.config.load import dump_config, identity, resolved_buckets, resolved_conditions
from finetrainers.config.schema import RunConfig
from finetrainers.data.batch import BatchDrawer, BatchOrder, BatchStream, Strata
from finetrainers.data.transfer import Transfer
from finetrainers.encoding import Prompt
from finetrainers.families.base import SamplingOptions
from finetrainers.folder import RunFolder, write_atomically
from finetrainers.hashing import digest, seed_for
from finetrainers.optimizers.build import build_optimizer
from finetrainers.reporting.report import write_report
from finetrainers.training.attention import attention_by
from finetrainers.training.callback import Callback
from finetrainers.training.checkpoint import Checkpointer
from finetrainers.training.compiling import is_compiled
from finetrainers.training.memory import MemoryPhases
from finetrainers.training.metrics import MetricsFile
from finetrainers.training.models import load_models
from finetrainers.training.progress import ProgressLine
from finetrainers.training.random_state import seed_random_state
from finetrainers.training.recorded import CudaGraphs
from finetrainers.training.rescue import Rescue
from finetrainers.training.saving import WeightsSaver
from finetrainers.training.schedule import build_schedule
from finetrainers.training.signals import StopSignals
from finetrainers.training.tracking import Trackers, build_trackers, check_trackers
from finetrainers.training.trainer import Trainer
from finetrainers.training.validation import HeldOutLoss, SampleVideos, Scene, Validation
from finetrainers.types import Bucket, Condition, Sample
from finetrainers.weights import WeightsFolder, write_card

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, resume: str = "auto") -> int:
    """The main job, from clips to weights; returns 0. Raises Interrupted after a signal, once all is saved."""
    with StopSignals() as signals:
        check_trackers(config.tracking.trackers)
        run = RunFolder(config.output)
        family, config, engine = open_run(config)
        if resume == "never" and engine.is_main:
            set_aside(run)
        engine.wait()
        prepared = encode(family, config, engine)
        models, trained = load(prepared)
        checkpointer = build_checkpointer(prepared)
        callbacks = build_callbacks(prepared, checkpointer)
        trainer = build_trainer(prepared, models, trained, callbacks=callbacks, stop_requested=signals.requested)
        if resume != "never":
            checkpointer.resume(trainer, resume)
        # Not before: a resume that is refused must leave the earlier run's config as it was.
        if engine.is_main:
            write_atomically(run.config, dump_config(config))
        signals.defer()
        with attention_by(config.training.attention):
            trainer.fit()
        if engine.is_main:
            write_report(run)
        engine.close()
        signals.raise_if_requested()
    if engine.is_main:
        print(f"weights: {run.weights / 'latest'}\nreport:  {run.report}")
    return 0


def load(prepared: Prepared) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """The models as they are trained, on their device, and the parameters of them that move."""
    config, engine = prepared.config, prepared.engine
    seed_random_state(config.training.seed)
    return load_models(
        prepared.method,
        engine,
        options=config.memory,
        seed=config.training.seed,
        checkpointing=str(config.training.gradient_checkpointing),
        kept_in=prepared.cache.root / "weights",
        compiles=is_compiled(str(config.training.compile), engine, prepared.method.linear_dtype),
    )


def build_trainer(
    prepared: Prepared,
    models: dict[str, nn.Module],
    trained: dict[str, nn.Parameter],
    *,
    callbacks: Sequence[Callback],
    stop_requested: Callable[[], bool],
) -> Trainer:
    """The loop over the training clips, before its first step."""
    config = prepared.config
    drawer = build_drawer(prepared, prepared.data.train)
    optimizer = build_optimizer(trained, config.optimizer, seed=config.training.seed)
    return Trainer(
        method=prepared.method,
        models=models,
        trained=trained,
        batches=build_stream(prepared, drawer),
        optimizer=optimizer,
        schedule=build_schedule(
            config.optimizer.lr_scheduler,
            optimizer,
            warmup_steps=config.optimizer.lr_warmup_steps,
            steps=config.training.steps,
        ),
        engine=prepared.engine,
        callbacks=callbacks,
        stop_requested=stop_requested,
        recorder=CudaGraphs(prepared.engine.device) if config.training.cuda_graphs else None,
        rescue=build_rescue(config),
        **config.training.model_dump(include={"steps", "gradient_accumulation_steps", "max_grad_norm", "seed"}),
    )


def set_aside(run: RunFolder) -> None:
    """Move what an earlier run left to `previous-N`, so that a run started anew shares nothing with it."""
    old = [
        run.checkpoints,
        run.weights,
        run.samples,
        run.metrics,
        run.memory,
        run.report,
        run.root / "wandb_run_id.txt",
    ]
    if present := [path for path in old if path.exists()]:
        number = next(n for n in range(1, 10_000) if not (run.root / f"previous-{n:03d}").exists())
        target = run.root / f"previous-{number:03d}"
        target.mkdir()
        for path in present:
            path.rename(target / path.name)
        logger.info("what the earlier run left was moved to %s", target)


def build_rescue(config: RunConfig) -> Rescue:
    """What is done when a step exhausts the memory."""
    left = [
        f"{measure.option}={str(measure.value).lower()}"
        for measure in MEASURES
        if has_option(config, measure.option) and get_option(config, measure.option) not in (measure.value, "full")
    ]
    return Rescue(
        checkpointing=str(config.training.gradient_checkpointing),
        offload=config.memory.offload_activations,
        adapts=config.memory.on_oom == "adapt",
        advice=[*left, "data.buckets of fewer frames or smaller pictures"],
    )


def build_drawer(prepared: Prepared, samples: list[Sample]) -> BatchDrawer:
    """Draws batches of these samples from the cache."""
    training = prepared.config.training
    return BatchDrawer(
        samples=samples,
        cache=prepared.cache,
        law=prepared.method.objective.law,
        strata=Strata(
            training.seed,
            training.batch_size,
            training.gradient_accumulation_steps * prepared.engine.data_size,
        ),
        caption_dropout=prepared.config.data.caption_dropout,
        conditions=resolved_conditions(prepared.config),
        given=prepared.family.given,
    )


def build_stream(prepared: Prepared, drawer: BatchDrawer) -> BatchStream:
    """The endless run of training batches, read ahead."""
    config = prepared.config
    training, engine = config.training, prepared.engine
    order = BatchOrder(drawer.samples, batch_size=training.batch_size, seed=training.seed)
    logger.info(
        "%d samples in %d batches an epoch; %d steps are %.1f epochs",
        len(drawer.samples),
        order.batches_per_epoch,
        training.steps,
        training.steps * training.gradient_accumulation_steps * engine.data_size / order.batches_per_epoch,
    )
    return BatchStream(
        order,
        drawer,
        config.data.num_workers,
        Transfer(engine.device),
        rank=engine.data_rank,
        world_size=engine.data_size,
    )


def build_checkpointer(prepared: Prepared) -> Checkpointer:
    """Saves and resumes; what a resumed run must share is its options, the model's weights and the encoded clips."""
    config = prepared.config
    clips = sorted((sample.video_key, sample.text_key) for sample in prepared.data.train)
    shared = identity(config) | {
        "the transformer's weights": prepared.family.fingerprint("transformer"),
        "the training clips and captions": digest(clips),
    }
    # Content counts, not where it lies: a model or dataset that was moved is the same.
    for place in ("model.path", "model.revision", "model.family", "data.train", "data.validation"):
        del shared[place]
    # Steps are compared by what they are made up of, processes included.
    del shared["training.gradient_accumulation_steps"]
    return Checkpointer(
        prepared.run.checkpoints, every=config.checkpoint.every, keep=config.checkpoint.keep, identity=shared
    )


def build_callbacks(prepared: Prepared, checkpointer: Checkpointer) -> list[Callback]:
    """What hangs on the loop, in the order in which it is called; the checkpoint comes last, when all else is done."""
    config, run = prepared.config, prepared.run
    if not prepared.engine.is_main:
        # It takes its share of validations, weights and checkpoints.
        return [build_validation(prepared, MetricsFile(run)), build_saver(prepared), checkpointer]
    progress = ProgressLine()
    trackers = Trackers(build_trackers(config.tracking, run, settings=config.model_dump(mode="json")))
    metrics = MetricsFile(run, listeners=[progress.on_row, trackers.on_row])
    return [
        metrics,
        progress,
        trackers,
        MemoryPhases(prepared.memory),
        build_validation(prepared, metrics),
        build_saver(prepared),
        checkpointer,
    ]


def build_saver(prepared: Prepared) -> WeightsSaver:
    """Saves the weights to take away, with their card, as often as checkpoints."""
    options = prepared.config.checkpoint
    return WeightsSaver(
        WeightsFolder(prepared.run.weights, keep=options.keep_weights),
        every=options.every,
        write_card=lambda folder, step: describe(folder, step, prepared),
    )


def build_validation(prepared: Prepared, metrics: MetricsFile) -> Validation:
    """Held-out loss where clips are held out, sample videos where there are scenes."""
    options = prepared.config.validation
    held_out = None
    if prepared.data.held_out:
        drawer = build_drawer(prepared, prepared.data.held_out)
        held_out = HeldOutLoss(drawer, options.timesteps, prepared.family.noise_range)
    videos = build_videos(prepared) if prepared.scenes else None
    return Validation(every=options.every, metrics=metrics, held_out=held_out, videos=videos)


def build_videos(prepared: Prepared) -> SampleVideos:
    """Renders the scenes as they were encoded."""
    config, options, encoder = prepared.config, prepared.config.validation, prepared.encoder
    # Sampling at another rate than training would stretch time, so the clips' most common one is taken.
    fps = Counter(sample.fps for sample in prepared.data.train).most_common(1)[0][0]
    conditions = [entry for entry in resolved_conditions(config) if not entry[0].is_none]
    return SampleVideos(
        family=prepared.family,
        cache=prepared.cache,
        folder=prepared.run,
        scenes=[
            Scene(
                scene.text,
                encoder.text_key(scene),
                encoder.text_key(Prompt(options.negative_prompt, scene.item)),
                scene.item,
            )
            for scene in prepared.scenes
        ],
        # A pipeline that animates an image needs one, also where the run gives none; a scene of text alone has no item.
        condition=max(conditions, key=lambda entry: entry[1])[0] if conditions else Condition(1),
        bucket=Bucket.parse(options.bucket) if options.bucket else resolved_buckets(config)[0],
        options=SamplingOptions(
            options.num_inference_steps, options.guidance_scale, fps, seed_for(config.training.seed, "videos")
        ),
        dtype=DTYPES[config.training.precision],
    )


def describe(folder: Path, step: int, prepared: Prepared) -> None:
    """The card beside the weights."""
    write_card(
        folder,
        base_model=prepared.config.model.path,
        family=prepared.family.name,
        task=prepared.family.task,
        method=prepared.method.name,
        step=step,
        trigger=prepared.config.data.trigger,
    )
