"""What is forecast of a run is what a tiny real one then holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetrainers.config.schema import FullOptions, LoraOptions, MemoryConfig, ObjectiveConfig, OptimizerConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.hashing import generator_for
from finetrainers.memory.layout import footprint, spread
from finetrainers.memory.report import Held, held
from finetrainers.memory.simulation import LiveBytes
from finetrainers.methods.base import Method
from finetrainers.methods.find import find_method
from finetrainers.objectives import build_objective
from finetrainers.optimizers.build import build_optimizer
from finetrainers.text_encoders import load_text_encoders, streamed_layers
from finetrainers.training.forecast import (
    Phase,
    Work,
    encoding_phases,
    simulate_step,
    simulate_validation,
    training_phases,
)
from finetrainers.training.models import load_models
from finetrainers.types import Bucket, Condition
from tests.families.tiny import TINY
from tests.memory.training import random_batch
from tests.training.tiny_run import optimizer_options

CPU = torch.device("cpu")


def make(row: str, folder: Any, options: Any = None, dtype: torch.dtype = torch.bfloat16) -> Method:
    family = TINY[row].open(folder)
    chosen = ObjectiveConfig(timestep_sampling="uniform", shift=1.0)
    objective = build_objective(chosen, alphas_cumprod=family.alphas_cumprod(), noise_range=family.noise_range)
    if options is None:
        options = {"rank": 4}
    if isinstance(options, dict):
        targets = family.defaults("lora")["method.target_modules"]
        options = LoraOptions(**({"target_modules": targets} | options))
    return find_method(options, family, objective, dtype=dtype)


def work_of(method: Method, row: str, *, other: bool = False, **changes: Any) -> Work:
    bucket = Bucket.parse(TINY[row].other_bucket if other else TINY[row].bucket)
    given: dict[str, Any] = {"batch_size": 1, "sampled": None, "validates": False}
    return Work(method, bucket, Condition.parse(TINY[row].conditions[0]), **(given | changes))


def forecast(
    work: Work, memory: MemoryConfig, optimizer: OptimizerConfig, *, word: str = "full", accumulates: bool = False
) -> list[Phase]:
    step = simulate_step(work, checkpointing=word, memory=memory, release=accumulates)
    return training_phases(step, None, memory=memory, optimizer=optimizer, keeps=accumulates)


class Real:
    """The same run with its weights."""

    def __init__(self, method: Method, memory: MemoryConfig, tmp_path: Any, *, word: str = "full") -> None:
        self.method, self.engine = method, SingleEngine()
        self.models, self.trained = load_models(
            method, self.engine, options=memory, seed=0, checkpointing=word, kept_in=tmp_path
        )
        # As the loop does.
        method.copy_weights(self.models)

    def step(self, work: Work, optimizer: OptimizerConfig) -> Held:
        """After a step, as long as gradients are there."""
        built = build_optimizer(self.trained, optimizer, seed=0)
        self._loss(work).backward()
        # Of two experts one was at work.
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        built.step()
        return held(self.models.values(), built, CPU)

    def _loss(self, work: Work) -> torch.Tensor:
        for model in self.models.values():
            model.train()
        if self.method.trains_text_encoder:
            from finetrainers.training.simulated import blank_batch

            return self.method.loss(self.models, blank_batch(self.method, work.bucket, work.condition)).sum()
        size = str(work.bucket)
        batch = random_batch(self.method, size, condition=str(work.condition), size=work.batch_size)
        return self.method.loss(self.models, batch).sum()

    def height(self, work: Work, *, accumulates: bool = False) -> int:
        """The most that a step holds beyond weights and state."""
        self._loss(work).backward()  # A family remembers things of a size.
        kept = 0
        for parameter in self.trained.values():
            if accumulates:
                kept += parameter.nbytes
            else:
                parameter.grad = None
        live = LiveBytes()
        with live.counted():
            self._loss(work).backward()
        return kept + live.peak


HELD = [
    ("ltx-0.9.0", None, {}, "adamw"),
    ("ltx-0.9.0", FullOptions(name="full"), {}, "adamw"),
    ("ltx-0.9.0", FullOptions(name="full", weights_dtype="bf16"), {}, "adamw"),
    ("ltx-0.9.0", FullOptions(name="full", float8_recipe="tensorwise"), {}, "adamw"),
    ("ltx-0.9.0", FullOptions(name="full"), {}, "adamw_8bit"),
    ("ltx-0.9.0", {"rank": 4, "text_encoder": "lora"}, {}, "adamw"),
    ("ltx-0.9.0", None, {"base_weights": "int8"}, "adamw"),
    ("ltx-0.9.0", None, {"base_weights": "nf4"}, "adamw_8bit"),
    ("cogvideox-5b", None, {"base_weights": "nf4"}, "adamw"),
    ("cogvideox-2b", FullOptions(name="full"), {}, "adamw"),
    ("hunyuan", None, {}, "adamw"),
    ("hunyuan", {"rank": 4}, {"base_weights": "int8"}, "adamw_8bit"),
    ("hunyuan", FullOptions(name="full"), {}, "adamw"),
    ("wan-2.1", FullOptions(name="full"), {}, "adamw"),
    ("wan-2.1-i2v", None, {"base_weights": "fp8"}, "adamw"),
    ("wan-2.2-a14b", None, {}, "adamw"),
    ("wan-2.2-a14b", FullOptions(name="full"), {}, "adamw"),
]


@pytest.mark.parametrize(("row", "options", "memory", "optimizer"), HELD)
def test_weights_gradients_and_state_are_those_of_a_real_step(folders, tmp_path, row, options, memory, optimizer):
    chosen, method = MemoryConfig(**memory), make(row, folders[row], options)
    work, settings = work_of(method, row), optimizer_options(optimizer)
    train, save = forecast(work, chosen, settings)
    real = Real(make(row, folders[row], options), chosen, tmp_path).step(work, settings)
    assert (train.weights, train.gradients, train.optimizer) == (real.weights, real.gradients, real.optimizer)
    assert train.host == 0 and train.name == "train"
    assert (save.name, save.weights, save.optimizer, save.gradients) == ("save", real.weights, real.optimizer, 0)
    assert save.peak == real.weights + real.optimizer
    assert train.peak >= real.weights + real.gradients + real.optimizer


def test_the_state_on_the_host(folders, tmp_path, monkeypatch):
    from finetrainers.optimizers import host_states, size

    for module in (host_states, size):
        monkeypatch.setattr(module, "SMALLEST_MOVED", 8)
    options, settings = FullOptions(name="full"), optimizer_options("adamw", offload=True)
    method = make("ltx-0.9.0", folders["ltx-0.9.0"], options)
    work = work_of(method, "ltx-0.9.0")
    train, save = forecast(work, MemoryConfig(), settings)
    plain, _ = forecast(work, MemoryConfig(), optimizer_options("adamw"))
    assert train.optimizer + train.host == plain.optimizer and train.host > 0.9 * plain.optimizer
    assert save.host == train.host
    shapes = [parameter.numel() for parameter in method.trained(Real(method, MemoryConfig(), tmp_path).models).values()]
    assert train.host == sum(2 * 4 * count for count in shapes if count >= 2), "both means; a step is a single number"


@pytest.mark.parametrize("options", [None, FullOptions(name="full")], ids=["lora", "full"])
@pytest.mark.parametrize("count", ["all", 1])
def test_streamed_blocks(folders, tmp_path, options, count):
    """What is forecast is what the layout of the real models comes to; a CPU's copies lie in the same memory."""
    memory, row = MemoryConfig(stream_blocks=count), "hunyuan"
    method = make(row, folders[row], options)
    train, _ = forecast(work_of(method, row), memory, optimizer_options("adamw"))
    real = Real(make(row, folders[row], options), MemoryConfig(), tmp_path)
    model = real.models["transformer"]
    blocks = method.family.blocks("transformer", model)
    size = footprint(model, spread(blocks, len(blocks) if count == "all" else count), trained_too=options is not None)
    # Of what is trained there, gradients and the optimizer's state lie on the host too.
    moved = [each for block in blocks for each in block.parameters()] if options is not None and count == "all" else []
    assert train.weights == size.resident + size.ring
    if options is None or moved:
        assert train.host == size.host + sum(2 * each.nbytes + 4 for each in moved)
    whole, _ = forecast(work_of(method, row), MemoryConfig(), optimizer_options("adamw"))
    assert train.host > size.host - 1 and whole.host == 0
    assert train.optimizer + train.host - size.host == whole.optimizer


SIZES = [
    ("ltx-0.9.0", None, 1, False, "full"),
    ("ltx-0.9.0", FullOptions(name="full"), 2, True, "none"),
    ("cogvideox-5b", None, 2, False, "every-2"),
    ("hunyuan", None, 1, True, "none"),
    ("wan-2.1", FullOptions(name="full"), 1, False, "full"),
    ("hunyuan", FullOptions(name="full", float8_recipe="tensorwise"), 1, False, "none"),
    ("hunyuan", FullOptions(name="full", float8_recipe="rowwise"), 1, False, "full"),
    ("wan-2.2-a14b", None, 1, True, "full"),
    ("ltx-0.9.5-i2v", None, 2, False, "full"),
]


@pytest.mark.parametrize(("row", "options", "batch_size", "other", "word"), SIZES)
def test_the_height_of_a_step_is_that_of_a_real_one(folders, tmp_path, row, options, batch_size, other, word):
    accumulates = isinstance(options, FullOptions) and word == "none"
    method = make(row, folders[row], options)
    work = work_of(method, row, other=other, batch_size=batch_size)
    train, _ = forecast(work, MemoryConfig(), optimizer_options("adamw"), word=word, accumulates=accumulates)
    real = Real(make(row, folders[row], options), MemoryConfig(), tmp_path, word=word)
    height = real.height(work, accumulates=accumulates)
    assert train.peak - train.weights - train.optimizer == pytest.approx(height, rel=0.05)
    assert 0 < train.activations <= height * 1.05


def test_more_of_everything_is_more(folders):
    method = make("ltx-0.9.0", folders["ltx-0.9.0"])
    settings, memory = optimizer_options("adamw"), MemoryConfig()
    small, two, four = (
        forecast(work_of(method, "ltx-0.9.0", batch_size=size), memory, settings)[0] for size in (1, 2, 4)
    )
    assert small.activations < two.activations < four.activations
    assert small.weights == two.weights == four.weights


def test_shards_share_weights_gradients_and_state(folders):
    method = make("ltx-0.9.0", folders["ltx-0.9.0"], FullOptions(name="full"))
    work, memory = work_of(method, "ltx-0.9.0"), MemoryConfig()
    step = simulate_step(work, checkpointing="full", memory=memory, release=False)
    settings = optimizer_options("adamw")
    one, four = (training_phases(step, None, memory=memory, optimizer=settings, shards=n)[0] for n in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(four, name) == getattr(one, name) // 4
    assert four.peak < one.peak


def loaded_bytes(parts: dict[str, Any]) -> int:
    networks = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(each): each for net in networks for each in (*net.parameters(), *net.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("row", ["ltx-0.9.0", "cogvideox-5b", "hunyuan", "hunyuan-i2v", "wan-2.1-i2v"])
def test_encoders_weigh_what_those_that_are_loaded_do(folders, row):
    dtype = torch.bfloat16
    method = make(row, folders[row], dtype=dtype)
    text, video = encoding_phases(work_of(method, row), memory=MemoryConfig())
    family = method.family
    assert (text.name, video.name) == ("encode text", "encode video")
    assert text.weights == loaded_bytes(family.load_text_encoders(CPU, dtype))
    assert video.weights == loaded_bytes(family.load_video_encoders(CPU, dtype))
    # Where it puts the image depends on the tokens.
    assert (text.activations is None) == family.text_sees_image
    assert video.activations > 0 and video.peak == video.weights + video.activations
    assert (text.gradients, text.optimizer, video.gradients, video.optimizer) == (0, 0, 0, 0)


@pytest.mark.parametrize("row", ["ltx-0.9.0", "wan-2.1"])
def test_encoding_a_clip_is_that_of_a_real_one(folders, row):
    method = make(row, folders[row])
    work = work_of(method, row)
    video = encoding_phases(work, memory=MemoryConfig())[-1]
    family = method.family
    encoders = family.load_video_encoders(CPU, torch.bfloat16)
    size = (work.bucket.num_frames, 3, work.bucket.height, work.bucket.width)
    clip = torch.randint(0, 256, size, generator=generator_for(0, "clip"), dtype=torch.uint8)
    live = LiveBytes()
    with torch.no_grad(), live.counted():
        family.encode_video(encoders, clip)
    assert video.activations == pytest.approx(live.peak + clip.nbytes, rel=0.05)


def test_captions_of_a_text_encoder_that_is_trained_are_not_encoded(folders):
    method = make("ltx-0.9.0", folders["ltx-0.9.0"], {"rank": 4, "text_encoder": "lora"})
    assert [phase.name for phase in encoding_phases(work_of(method, "ltx-0.9.0"), memory=MemoryConfig())] == [
        "encode video"
    ]


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_text_encoder_in_low_precision(folders, format):
    method = make("ltx-0.9.0", folders["ltx-0.9.0"])
    phase = encoding_phases(work_of(method, "ltx-0.9.0"), memory=MemoryConfig(text_encoder_weights=format))[0]
    loaded = load_text_encoders(method.family, CPU, torch.bfloat16, weights_format=format, is_streamed=False)
    assert phase.weights == loaded_bytes(loaded) and phase.host == 0


def test_a_text_encoder_that_is_streamed(folders):
    """Its layers lie on the host, and a ring of two of them on the device."""
    method = make("ltx-0.9.0", folders["ltx-0.9.0"])
    plain, phase = (
        encoding_phases(work_of(method, "ltx-0.9.0"), memory=MemoryConfig(stream_text_encoder=streamed))[0]
        for streamed in (False, True)
    )
    encoder = method.family.load_text_encoders(CPU, torch.bfloat16)["text_encoder"]
    size = footprint(encoder, streamed_layers(method.family, "text_encoder", encoder))
    assert (phase.weights, phase.host) == (size.resident + size.ring, size.host)
    assert phase.host > 0 == plain.host and size.resident < plain.weights


def test_validation(folders):
    """None where there is none; a pass without gradients is less than a step, and sampling has the decoder too."""
    method = make("ltx-0.9.0", folders["ltx-0.9.0"])
    memory = MemoryConfig()
    assert simulate_validation(work_of(method, "ltx-0.9.0"), memory=memory) is None
    validates = simulate_validation(work_of(method, "ltx-0.9.0", validates=True), memory=memory)
    sampled = Bucket.parse(TINY["ltx-0.9.0"].bucket)
    both = simulate_validation(work_of(method, "ltx-0.9.0", validates=True, sampled=sampled), memory=memory)
    assert 0 < validates < both
    assert both > loaded_bytes(method.family.load_video_encoders(CPU, torch.bfloat16))
    step = simulate_step(work_of(method, "ltx-0.9.0"), checkpointing="full", memory=memory, release=False)
    phases = training_phases(step, both, memory=memory, optimizer=optimizer_options("adamw"))
    assert [phase.name for phase in phases] == ["train", "validate", "save"]
    train, validate, _ = phases
    assert (validate.weights, validate.optimizer, validate.gradients) == (train.weights, train.optimizer, 0)
    assert validate.peak == train.weights + train.optimizer + both


def test_gradients_that_are_applied_in_the_backward_pass_are_never_there_together(folders):
    """The plan of a step whose updates come with its gradients has no more than a block's at a time."""
    row = "ltx-0.9.0"
    work = work_of(make(row, folders[row], FullOptions(name="full", weights_dtype="bf16")), row)
    memory = MemoryConfig()
    at_once = optimizer_options("adamw_8bit")
    released = at_once.model_copy(update={"in_backward": True})
    plain = training_phases(
        simulate_step(work, checkpointing="full", memory=memory, release=False), None, memory=memory, optimizer=at_once
    )[0]
    ours = training_phases(
        simulate_step(work, checkpointing="full", memory=memory, release=True), None, memory=memory, optimizer=released
    )[0]
    assert (ours.weights, ours.optimizer) == (plain.weights, plain.optimizer)
    assert ours.gradients == 0 < plain.gradients
    assert ours.peak < plain.peak


def test_recorded_passes_keep_their_memory(tmp_path):
    """A validation's comes on top of that of a pass, and of gradients that stay."""
    work = work_of(make("ltx-0.9.5", TINY["ltx-0.9.5"].write(tmp_path / "model")), "ltx-0.9.5")
    memory, optimizer = MemoryConfig(), optimizer_options("adamw")
    step = simulate_step(work, checkpointing="full", memory=memory, release=True)
    phases = [
        training_phases(step, 1000, memory=memory, optimizer=optimizer, keeps=True, records=records)
        for records in (False, True)
    ]
    (train, validate, save), (same, more, saving) = phases
    assert same == train
    height = train.peak - train.weights - train.optimizer
    assert height > train.gradients > 0
    assert (more.peak, saving.peak) == (validate.peak + height, save.peak + height)
