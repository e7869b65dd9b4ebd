"""Every option of a run, with its type, its default and its meaning; `docs/options.md` is printed from here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
)

from finetrainers.config.memory import MemoryConfig
from finetrainers.config.section import FREE, Section
from finetrainers.config.values import (
    BucketText,
    CheckpointingText,
    CompileText,
    ConditionText,
    Count,
    Fraction,
    PathText,
    PositiveCount,
    Share,
    as_list,
    as_shares,
    as_sources,
    without_repeats,
)


class RopeTemporal(Section):
    """How rotary positions in time reach beyond the length that the base model was trained on."""

    method: Literal["interpolate", "ntk", "riflex"]
    """`interpolate` squeezes the positions into the trained length, `ntk` raises the base of the frequencies, `riflex`
    slows down the one frequency that would make the video repeat itself."""
    frames: Annotated[int, Field(ge=1, le=100_000)]
    """Length in pixel frames that is reached for."""


class ModelConfig(Section):
    """The base model."""

    path: PathText
    """Hub id or local diffusers folder; the family is detected from its `model_index.json`."""
    task: Literal["text-to-video", "image-to-video"] | None = None
    """What is trained; `finetrainers models` lists the tasks of each family. Left out: what the model is for."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    family: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")] | None = None
    """Dotted name of a Family class of your own, `package.module.Class`, which is imported. Left out: detected."""
    experts: Literal["both", "high_noise", "low_noise"] | None = None
    """Which of Wan 2.2 A14B's two transformers is trained, each on its own range of noise levels. Left out: both."""
    embedded_guidance: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Guidance scale that HunyuanVideo is told while it trains. Left out: 1, which is no amplification."""
    learned_positions: Literal["keep", "resize", "remove"] | None = None
    """What becomes of CogVideoX-5b-I2V's learned position table at other sizes than 49x480x720: `keep` refuses them,
    `resize` interpolates the table, `remove` leaves only the rotary positions. Left out: keep."""
    rope_temporal: RopeTemporal | None = None
    """Train beyond the base model's length: `{method: interpolate|ntk|riflex, frames: N}`. Left out: as it is."""


class SourceConfig(Section):
    """One place that clips come from."""

    path: PathText
    """A folder of clips, or a csv, jsonl or parquet table."""


class DataConfig(Section):
    """The clips and how they become samples."""

    train: Annotated[list[SourceConfig], BeforeValidator(as_sources), Field(min_length=1)]
    """A folder, a csv, jsonl or parquet table, or a list of them (each a path or `{path: ...}`)."""
    validation: Annotated[float, Field(gt=0, lt=1)] | PathText | None = None
    """Held-out clips: a path, or a share (0..1) split off by a hash of each clip. Left out: 5 % from 40 clips up."""
    buckets: (
        Annotated[list[BucketText], BeforeValidator(as_list), AfterValidator(without_repeats), Field(min_length=1)]
        | None
    ) = None
    """Sizes that clips are brought to, FRAMESxHEIGHTxWIDTH; each takes the best one. Left out: the family's own."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second that clips are resampled to. Left out: each clip keeps its own rate."""
    conditions: Annotated[dict[ConditionText, Share], BeforeValidator(as_shares)] | None = None
    """Frames of a clip that the model is given, and how often: shares of `first`, `first_last`, `prefix-N` (N frames)
    and `none`, such as `{first: 0.5}`; what is left of 1 is `none`. Left out: the family's own for the task."""
    window: Literal["first", "middle", "all"] = "first"
    """Which part of a clip longer than its bucket is used; `all` makes a sample of each part that fits."""
    trigger: str = ""
    """Id token put before each caption, such as `BW_STYLE`."""
    caption_dropout: Share = 0.05
    """Share of samples that see the empty caption instead of theirs, so that guidance keeps working."""
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(2, json_schema_extra=FREE)
    """Threads that decode clips and read batches ahead of the step; 0 reads in the step. Never changes a number."""
    strict: bool = Field(False, json_schema_extra=FREE)
    """Stop, naming each, when any clip cannot be used; otherwise they are named, counted and left out."""
    cache: PathText | None = Field(None, json_schema_extra=FREE)
    """Folder of the encoded dataset, which runs may share. Left out: `cache` in the output folder."""

    @field_validator("conditions")
    @classmethod
    def _add_up(cls, shares: dict[str, float] | None) -> dict[str, float] | None:
        if shares is not None and sum(shares.values()) > 1 + 1e-6:
            raise ValueError("the shares must add up to 1 at most")
        return shares


class LoraOptions(Section):
    """Train low-rank adapters beside the frozen weights."""

    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=8192)] = 64
    """Rank of the adapters: more learns more, and weighs more."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapters' output is scaled by alpha / rank. Left out: equal to `rank`, which is a scale of 1."""
    target_modules: list[str] | str | None = None
    """Layers that get adapters: names (matched at the end of a layer's path) or one regular expression for the whole
    path. Left out: the family's own, the attention projections of every block."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    text_encoder: Literal["frozen", "lora"] = "frozen"
    """`lora` trains adapters of the text encoder too, of the same rank; captions are then embedded in every step."""


class FullOptions(Section):
    """Train every weight of the transformer."""

    name: Literal["full"]
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """How trained weights are kept. `bf16` halves weights and gradients: updates are computed in fp32 and rounded at
    random, so that small ones are kept in the mean."""
    float8_recipe: Literal["tensorwise", "rowwise"] | None = None
    """Matrix products of the blocks' linear layers in float8 (torchao), by its recipes: `tensorwise` has a scale for
    each tensor, `rowwise` one for each row. For GPUs of compute capability 8.9 (`rowwise` 9.0) and up; on a CPU it is
    emulated, slowly. Left out: in `training.precision`."""


METHODS: dict[str, type[Section]] = {"lora": LoraOptions, "full": FullOptions}
"""The options of each method, by the value of `method.name`."""


def _method_name(value: Any) -> str:
    name = value.get("name", "lora") if isinstance(value, dict) else getattr(value, "name", "lora")
    return name if isinstance(name, str) else ""


MethodConfig = Annotated[
    Annotated[LoraOptions, Tag("lora")] | Annotated[FullOptions, Tag("full")], Discriminator(_method_name)
]


class ObjectiveConfig(Section):
    """How noise levels are drawn, and how they are weighed."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode", "shifted_logit_normal"] | None = None
    """The law of the noise level; `finetrainers models --timesteps FAMILY` shows it. `shifted_logit_normal` moves
    towards more noise with more tokens, as LTX-Video was trained. Left out: the family's own."""
    shift: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Moves every noise level towards more noise (above 1) or less: s * x / (1 + (s - 1) * x). Left out: the family's
    own, such as 7 for HunyuanVideo."""
    logit_mean: float = 0.0
    """Mean of the normal under `logit_normal`; more is more noise."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the normal under `logit_normal` and `shifted_logit_normal`."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    """Under `mode`: above 0 more of the middle noise levels, below 0 more of the ends."""
    uniform_share: Share = 0.1
    """Share of draws that are uniform under `shifted_logit_normal`, so that no noise level is forgotten."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """`min_snr` gives the easiest noise levels less weight, for models that predict v (CogVideoX)."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """Signal-to-noise ratio from which `min_snr` weighs a noise level down."""


class OptimizerConfig(Section):
    """The optimizer and the schedule of its learning rate."""

    name: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_8bit",
        "torchao_adamw_8bit",
        "torchao_adamw_4bit",
        "adafactor",
        "prodigy",
        "muon",
    ] = "adamw"
    """Bytes of state for each trained number: `adamw` 8; `adamw_8bit` 2 (bitsandbytes), `paged_adamw_8bit` the same,
    spilling to the host's memory; `torchao_adamw_8bit` 2, `torchao_adamw_4bit` 1 (torchao); `adafactor` next to none;
    `prodigy` 16, finds its own learning rate; `muon` 4, orthogonal updates of matrices, and AdamW for the rest."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Learning rate; 0 is a dry run of everything else. Left out: the family's own for the method, and 1 for prodigy,
    which scales it."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay of the running means of the gradient and of its square (not adafactor's). Left out: 0.9 and 0.999."""
    eps: Annotated[float, Field(gt=0)] | None = None
    """Added to the denominator of the update (not adafactor's). Left out: 1e-8."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Course of the learning rate over the run, by diffusers' names."""
    lr_warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0 (not with `constant`)."""
    offload: bool = Field(False, json_schema_extra=FREE)
    """Keep the state in the host's memory, and bring that of a tensor to the device when it is updated."""
    in_backward: bool = Field(False, json_schema_extra=FREE)
    """Update each tensor in the backward pass as soon as its gradient is complete, so that those of the whole model
    never exist at once. It takes one process, one batch a step and `training.max_grad_norm` 0."""


class TrainingConfig(Section):
    """The loop."""

    steps: Count = Field(1000, json_schema_extra=FREE)
    """Optimizer steps of the whole run. A resumed run may go on for longer under the constant schedules only."""
    batch_size: PositiveCount = 1
    """Clips per forward pass, all of one bucket."""
    gradient_accumulation_steps: PositiveCount = 1
    """Forward passes per optimizer step; the gradient equals that of one large batch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Fixes everything that is drawn: order, noise, noise levels, dropout, initial adapters."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the transformer. Trained weights are kept in fp32 either way, but for `method.weights_dtype`."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""
    gradient_checkpointing: CheckpointingText = Field("full", json_schema_extra=FREE)
    """What is computed again in the backward pass rather than kept: `full` (or true) all blocks, a third more work;
    `every-N` blocks 0, N, 2N, ...; `attention` or `feed_forward` those layers of each; `none` (or false) nothing."""
    compile: CompileText = Field("auto", json_schema_extra=FREE)
    """`blocks` (or true) lets torch compile the layers of the transformer that repeat: fewer and larger
    kernels, and fewer activations kept; rounding changes a little. `auto` does so on a GPU. The first steps wait for
    the compiler; what it made is kept for later runs."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math", "flash_3", "flash_4"] = Field(
        "auto", json_schema_extra=FREE
    )
    """On a GPU, the kernel that computes attention where it can: one of torch's, or FlashAttention 3 or 4, which are
    installed beside it. `auto` leaves it to torch. `finetrainers bench` tells which is fastest."""
    cuda_graphs: bool = Field(False, json_schema_extra=FREE)
    """On a GPU, record a pass when a size of clips comes back, and launch it at once from then on: for models whose
    kernels run faster than the host launches them. It takes one process, and keeps the memory of a pass."""


class ParallelConfig(Section):
    """How the run is spread over processes."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field("auto", json_schema_extra=FREE)
    """`ddp` gives each process the whole model and its own batches. `fsdp` gives each a share of every weight, gradient
    and optimizer state (torch's FSDP2), which takes less memory and more communication. `deepspeed` is DeepSpeed's
    ZeRO. `auto` takes `ddp` where there are several processes (`--nproc`, torchrun), and runs without it in one."""
    context_parallel_size: PositiveCount = Field(1, json_schema_extra=FREE)
    """With `ddp` and `fsdp`, the number of processes that take each batch together and split its video tokens between
    them, for clips whose activations do not fit one GPU (LTX-Video and Wan). It must divide the number of processes, of
    attention heads, and of tokens of each size."""
    shard_size: PositiveCount | None = Field(None, json_schema_extra=FREE)
    """With `fsdp`, the number of processes that share one copy of the weights. Left out: all. On several machines, the
    number of GPUs in one keeps weights from crossing the network (hybrid sharding)."""
    zero_stage: Literal[1, 2, 3] | None = Field(None, json_schema_extra=FREE)
    """With `deepspeed`, what processes share: 1 the optimizer's state, 2 gradients too, 3 weights too. Left out: what
    `deepspeed_config` says, else 2."""
    offload: Literal["none", "optimizer", "parameters"] = Field("none", json_schema_extra=FREE)
    """With `fsdp` and `deepspeed`, what lies in the host's memory. `parameters` are weights, gradients and optimizer
    state, and a layer is brought to the device when it runs (`fsdp`, and `zero_stage` 3); `optimizer` is its state
    alone (`deepspeed`)."""
    deepspeed_config: PathText | None = Field(None, json_schema_extra=FREE)
    """A DeepSpeed JSON of your own, for what has no option here. Values that say `auto` are filled in."""


class ValidationConfig(Section):
    """What is measured and shown while training."""

    every: Count = Field(250, json_schema_extra=FREE)
    """Optimizer steps between validations, the first before step 1; 0 is never."""
    prompts: Annotated[list[str], BeforeValidator(as_list)] = Field([], json_schema_extra=FREE)
    """Prompts of the sample videos. Left out: captions of held-out clips, or of training clips if there are none."""
    images: Annotated[list[PathText], BeforeValidator(as_list)] = Field([], json_schema_extra=FREE)
    """For image-to-video, an image or clip for each of `prompts`, whose frames are given."""
    num_videos: Annotated[int, Field(ge=0, le=64)] = Field(2, json_schema_extra=FREE)
    """How many captions are used when `prompts` is left out; 0 makes no videos."""
    negative_prompt: str = Field("", json_schema_extra=FREE)
    """What the videos are guided away from."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = Field(30, json_schema_extra=FREE)
    """Denoising steps per video."""
    guidance_scale: Annotated[float, Field(ge=0)] | None = Field(None, json_schema_extra=FREE)
    """Strength of the prompt. Left out: the family's own."""
    bucket: BucketText | None = Field(None, json_schema_extra=FREE)
    """Size of the videos, FRAMESxHEIGHTxWIDTH. Left out: the first of `data.buckets`."""
    timesteps: Annotated[int, Field(ge=1, le=100)] = Field(4, json_schema_extra=FREE)
    """Noise levels, evenly spread, at which the loss of each held-out clip is measured."""


class CheckpointConfig(Section):
    """What is saved to go on from, and when."""

    every: Count = Field(500, json_schema_extra=FREE)
    """Optimizer steps between checkpoints, each with the weights to take away; 0 saves only the last."""
    keep: PositiveCount | None = Field(3, json_schema_extra=FREE)
    """Newest checkpoints to keep; null keeps all."""
    keep_weights: PositiveCount | None = Field(None, json_schema_extra=FREE)
    """Newest `weights/` folders to keep; null keeps all."""


class TrackingConfig(Section):
    """Where numbers and videos go besides `metrics.jsonl`, which is always written."""

    trackers: Annotated[list[Literal["wandb", "tensorboard"]], BeforeValidator(as_list)] = Field(
        [], json_schema_extra=FREE
    )
    """Any of `wandb` and `tensorboard`."""
    project: str = Field("finetrainers", json_schema_extra=FREE)
    """Project under which Weights & Biases files the run."""
    name: str | None = Field(None, json_schema_extra=FREE)
    """Name of the run. Left out: the name of the output folder."""
    wandb_mode: Literal["online", "offline"] = Field("online", json_schema_extra=FREE)
    """`offline` keeps the Weights & Biases run on disk, to be sent with `wandb sync`."""


class RunConfig(Section):
    """A whole run. Only `model.path`, `data.train` and `output` must be given."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig = Field(default_factory=LoraOptions)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    output: PathText = Field(json_schema_extra=FREE)
    """Folder that the run writes to, and resumes from."""
