"""Runs whose blocks are streamed give the numbers of plain runs, to the bit, and what cannot stream is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from finetrainers.cli import main
from finetrainers.config.schema import LoraOptions, MemoryConfig
from finetrainers.data.cache import Cache
from finetrainers.demo.clips import render_clips
from finetrainers.encoding import Encoder
from finetrainers.engines.base import replace_tensors
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.families.base import Family
from finetrainers.memory.streaming import BlockStream, is_parked
from finetrainers.methods.find import find_method
from finetrainers.planning import count_flop
from finetrainers.training.streaming import check_streaming
from finetrainers.types import Bucket, Condition
from tests.counted import Counts
from tests.end_to_end.runs import exact_rows, write_config
from tests.engines.together import run_together
from tests.families.deep import write_deep
from tests.families.tiny import TINY
from tests.training.tiny_run import OBJECTIVE

CPU, META = torch.device("cpu"), torch.device("meta")
METHODS = {"lora": "method={name: lora, rank: 4, alpha: 8, dropout: 0.1}", "full": "method={name: full}"}


class Deep:
    """Runs on a row's model with more blocks than the ring takes."""

    def __init__(self, name: str, root: Path) -> None:
        self.row, self.root = TINY[name], root
        self.model = write_deep(name, root / "model")
        self.clips = []
        for size in (self.row.bucket, self.row.other_bucket):
            bucket = Bucket.parse(size)
            shape = {"num_frames": bucket.num_frames + 1, "height": bucket.height, "width": bucket.width}
            self.clips.append(str(render_clips(root / size, 2, fps=16.0, **shape).parent))

    def settings(self) -> dict[str, Any]:
        row = self.row
        given = {} if row.task == "text-to-video" else {"conditions": {row.conditions[0]: 1.0}}
        return copy.deepcopy(
            {
                "model": {"path": str(self.model), "task": row.task, **row.options},
                "data": {
                    "train": self.clips,
                    "buckets": [row.bucket, row.other_bucket],
                    "validation": 0.25,
                    "num_workers": 0,
                    "cache": str(self.root / "cache"),
                    **given,
                },
                "optimizer": {"lr": 1e-2},
                "training": {
                    "steps": 4,
                    "precision": "fp32",
                    "max_grad_norm": 0.01,
                    "gradient_accumulation_steps": 2,
                },
                "validation": {"every": 4, "num_inference_steps": 2, "num_videos": 1, "timesteps": 1},
                "checkpoint": {"every": 2},
            }
        )

    def config(self, output: str) -> str:
        return str(write_config(self.root / f"{output}.yaml", **self.settings(), output=str(self.root / output)))

    def train(self, output: str, *overrides: str) -> Path:
        assert main(["train", self.config(output), *overrides]) == 0
        return self.root / output


@pytest.fixture(scope="module")
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep("ltx-0.9.0", tmp_path_factory.mktemp("ltx"))


def assert_same(one: Path, other: Path) -> None:
    """Losses, gradient norms, held-out losses, the weights to take away and the sample videos, to the bit."""
    assert exact_rows(one) == exact_rows(other)
    for pattern in ("weights/latest/**/*.safetensors", "samples/**/*.mp4"):
        files, twins = (sorted(run.glob(pattern)) for run in (one, other))
        assert [path.relative_to(one) for path in files] == [path.relative_to(other) for path in twins] != []
        for path, twin in zip(files, twins, strict=True):
            assert path.read_bytes() == twin.read_bytes(), path


RUNS = [
    ("ltx-0.9.5-i2v", "lora"),
    ("ltx-0.9.5-i2v", "full"),
    ("cogvideox-5b", "lora"),
    ("cogvideox-5b", "full"),
    ("hunyuan", "full"),
    ("hunyuan-i2v", "lora"),
    ("wan-2.2-a14b", "lora"),
    ("wan-2.2-a14b", "full"),
]


@pytest.mark.parametrize(("deep", "method"), RUNS, indirect=["deep"])
def test_streamed_run_is_the_plain_run(deep, method, capfd):
    """Buckets mixed, gradients accumulated and clipped; stopped half way, and resumed with other blocks streamed."""
    chosen = METHODS[method]
    plain = deep.train(f"plain-{method}", chosen)
    streamed = f"streamed-{method}"
    deep.train(streamed, chosen, "memory.stream_blocks=all", "training.steps=2")
    assert re.search(r"(\d) of \1 blocks of transformer are streamed", capfd.readouterr().err)
    deep.train(streamed, chosen, "memory.stream_blocks=3")
    assert re.search(r"\n3 of \d blocks of transformer are streamed", capfd.readouterr().err)
    assert_same(plain, deep.root / streamed)
    latest = deep.root / streamed / "weights" / "latest"
    pipeline = DiffusionPipeline.from_pretrained(deep.model)
    if method == "lora":
        pipeline.load_lora_weights(latest, use_safetensors=True)
    else:
        type(pipeline.transformer).from_pretrained(latest / "transformer")


@pytest.mark.parametrize("options", ["method={name: full}", "method={name: lora, rank: 4, text_encoder: lora}"])
def test_streamed_run_in_bf16_is_the_plain_one(ltx, options):
    settings = [options, "training.precision=bf16", "training.steps=2", "validation.every=2"]
    name = "full" if "full" in options else "text"
    plain = ltx.train(f"bf16-{name}", *settings)
    assert_same(plain, ltx.train(f"bf16-{name}-streamed", *settings, "memory.stream_blocks=4"))


def test_streamed_run_on_two_processes_is_the_plain_one(ltx, tmp_path):
    outputs = {"two": [], "two-streamed": ["memory.stream_blocks=all"]}
    short = [METHODS["lora"], "training.steps=2", "validation.every=2"]
    commands = [["train", ltx.config(name), *short, *given] for name, given in outputs.items()]
    said = run_together(2, commands, tmp_path / "log")
    assert "5 of 5 blocks of transformer are streamed" in said
    assert_same(ltx.root / "two", ltx.root / "two-streamed")


def test_streamed_text_encoders_fill_the_same_cache(ltx, capfd):
    for name, given in (("resident", []), ("streamed", ["memory.stream_text_encoder=true"])):
        cache = ltx.root / f"cache-{name}"
        assert main(["precompute", ltx.config(name), f"data.cache={cache}", "training.precision=bf16", *given]) == 0
    texts, twins = (
        {path.name: path.read_bytes() for path in (ltx.root / f"cache-{name}" / "texts").rglob("*.safetensors")}
        for name in ("resident", "streamed")
    )
    assert texts == twins != {}


REFUSED = {
    "no checkpointing": (
        ["memory.stream_blocks=all", "training.gradient_checkpointing=false"],
        "memory.stream_blocks all needs training.gradient_checkpointing full",
    ),
    "more than there are": (["memory.stream_blocks=9"], "memory.stream_blocks 9: transformer has 5 blocks"),
    "text encoder that is trained": (
        ["memory.stream_text_encoder=true", "method.text_encoder=lora"],
        "memory.stream_text_encoder is for text encoders that only embed captions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed_is_refused_in_one_line(ltx, capfd, case):
    overrides, expected = REFUSED[case]
    assert main(["train", ltx.config("refused"), *overrides]) == 2
    assert len(lines := capfd.readouterr().err.strip().splitlines()) == 1 and expected in lines[0]
    assert not (ltx.root / "refused").exists()


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ({"shares": True}, "lora"),
        ({"shares": False, "context_size": 2}, "lora"),
        ({"shares": False, "context_size": 1, "world_size": 2}, "full"),
    ],
)
def test_engines_that_cannot_stream_name_what_does_it_there(engine, name):
    options = MemoryConfig(stream_blocks="all")
    method = SimpleNamespace(name=name, saves_trained_only=name == "lora", trains_text_encoder=False)
    with pytest.raises(UserError, match=r"parallel\.offload parameters") as caught:
        check_streaming(method, SimpleNamespace(**engine), options, checkpointing="full")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["ltx-0.9.5-i2v", "cogvideox-5b", "hunyuan-i2v", "wan-2.2-a14b"])
def test_no_family_uses_a_block_that_rests(folders, name):
    """Blocks lie on the host, all else and the inputs on the meta device, which torch refuses to mix."""
    family = TINY[name].open(folders[name])
    targets = family.defaults("lora")["method.target_modules"]
    method = find_method(LoraOptions(rank=4, target_modules=targets), family, OBJECTIVE, dtype=torch.bfloat16)
    models = method.load(META)
    method.attach(models, seed=1)
    for part, model in models.items():
        model.enable_gradient_checkpointing()
        stream = BlockStream(family.blocks(part, model), device=META, ring=1)
        SingleEngine().park(stream)
        replace_tensors(model, lambda tensor: tensor.to(META))
        stream.start()
        assert model.device == META and model.dtype == torch.bfloat16
        assert all(parameter.device == META for parameter in method.trained({part: model}).values())
    bucket, condition = Bucket.parse(TINY[name].bucket), Condition.parse(TINY[name].conditions[0])
    forward, training = count_flop(family, models, bucket, condition)
    assert 0 < 2 * forward < training


def streaming(family: Family, folder: Path, device: torch.device, dtype: torch.dtype) -> Encoder:
    engine = SingleEngine()
    engine.device = device
    return Encoder(family, Cache(folder), engine, dtype, 0, Counts().progress, stream_text_encoder=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ltx-0.9.0", "cogvideox-5b", "hunyuan", "hunyuan-i2v", "wan-2.1"])
def test_text_encoders_embed_the_same_and_answer_the_device(folders, name, dtype, tmp_path):
    family = TINY[name].open(folders[name])
    pixels = torch.randint(0, 256, (3, 32, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = [pixels, pixels.flip(-1)] if family.text_sees_image else None
    tokens = family.tokenize(family.load_tokenizers(), ["a red ball rolls", ""], images)
    plain = family.load_text_encoders(CPU, dtype)
    ours = streaming(family, tmp_path, CPU, dtype)._load_text_encoders(num_loaders=1)
    elsewhere = streaming(family, tmp_path, META, dtype)._load_text_encoders(num_loaders=1)
    with torch.no_grad():
        expected, embedded = family.embed(plain, tokens), family.embed(ours, tokens)
    assert all(torch.equal(embedded[key], expected[key]) for key in expected)
    for encoder in elsewhere.values():
        parked = [each for each in encoder.parameters() if is_parked(each)]
        assert encoder.device == META and 0 < len(parked) < len(list(encoder.parameters()))
        assert all(each.device == (CPU if is_parked(each) else META) for each in encoder.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_device_a_streamed_run_is_the_plain_one(ltx, method):
    plain = exact_rows(ltx.train(f"gpu-plain-{method}", METHODS[method]))
    ours = exact_rows(ltx.train(f"gpu-streamed-{method}", METHODS[method], "memory.stream_blocks=all"))
    for one, other in zip(ours, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-5 if method == "lora" else 1e-3)
