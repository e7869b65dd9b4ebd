"""A step that exhausts the memory: the run ends in one line, or goes on with the very numbers it would have had."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import pytest
import torch

from finetrainers.cli import main
from finetrainers.commands.opening import check_rescue
from finetrainers.config.load import build_config
from finetrainers.demo.clips import render_clips
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import RunError, UserError
from finetrainers.training.callback import Callback
from finetrainers.training.measures import save_activations
from finetrainers.training.rescue import Rescue
from tests.end_to_end.runs import exact_rows, write_config
from tests.training.tiny_run import full, lora, make_batch, make_trainer

BATCHES = [make_batch([index]) for index in range(4)]
MEASURES = [("every-2", False), ("full", False), ("full", True)]


class Numbers(Callback):
    def __init__(self) -> None:
        self.rows = []

    def on_step_end(self, trainer, outcome):
        self.rows.append((outcome.step, outcome.loss.item(), outcome.grad_norm.item(), outcome.num_samples))


class Exhausts:
    """A block that says that the memory is exhausted in some of its calls, counted over both directions of passes."""

    def __init__(self, block, *, backward: bool, at: set[int]) -> None:
        self.backward, self.at, self.calls = backward, at, 0
        self.failed = []
        block.register_forward_hook(self.after)

    def after(self, block, args, answer):
        if self.backward:
            if answer.requires_grad:
                answer.register_hook(lambda gradient: self.run_out(answer))
        else:
            self.run_out(answer)

    def run_out(self, answer):
        self.calls += 1
        if self.calls in self.at:
            self.failed.append(weakref.ref(answer))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def trainer_of(model, *, adapts=True, options=None, **settings):
    numbers = Numbers()
    given = {"steps": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "callbacks": [numbers]}
    trainer = make_trainer(model, BATCHES, options=options or lora(dropout=0.2), **(given | settings))
    # As a run that begins without measures.
    trainer.rescue = Rescue("none", False, adapts)
    save_activations(trainer.method, trainer.models, checkpointing="none", offload=False)
    return trainer, numbers


def finished(trainer, numbers):
    trainer.fit()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}
    return numbers.rows, weights


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        assert torch.equal(weight, other[1][name]), name


@pytest.fixture(scope="module")
def model(folders):
    return folders["ltx-0.9.0"]


# A forward pass of the second batch of step 1, and in it, when it is repeated: the passes are 1 and 2 before, 3 and 4
# or 5 and 6 after.
CASES = {
    "forward": (False, {1}, 1),
    "forward of the second batch": (False, {2}, 1),
    "backward": (True, {1}, 1),
    "backward of the second batch": (True, {2}, 1),
    "twice in a row": (False, {2, 3}, 2),
    "in two steps": (False, {2, 7}, 2),
    "three times": (False, {1, 2, 3}, 3),
}


@pytest.fixture(scope="module")
def plain(model):
    """Runs that never fail, by method."""
    return {options.name: finished(*trainer_of(model, options=options)) for options in (lora(dropout=0.2), full())}


RUNS = [
    *((case, lora(dropout=0.2)) for case in CASES),
    ("backward of the second batch", full()),
    ("three times", full()),
]


@pytest.mark.parametrize(("case", "options"), RUNS, ids=lambda given: getattr(given, "name", given))
def test_the_run_has_the_numbers_of_one_that_never_failed(model, plain, case, options, caplog):
    backward, at, taken = CASES[case]
    trainer, numbers = trainer_of(model, options=options)
    exhausts = Exhausts(trainer.models["transformer"].proj_out, backward=backward, at=at)
    caplog.set_level(logging.WARNING)
    assert_same(plain[options.name], finished(trainer, numbers))
    assert len(exhausts.failed) == len(at) and len(numbers.rows) == 3
    assert (trainer.rescue.checkpointing, trainer.rescue.offload) == MEASURES[taken - 1]
    for message, (checkpointing, offload) in zip(caplog.messages, MEASURES[:taken], strict=True):
        assert message.startswith("out of memory in step ") and "2.00 GiB more were asked for" in message
        assert f"training.gradient_checkpointing={checkpointing} memory.offload_activations={offload}" in message
    assert trainer.models["transformer"].is_gradient_checkpointing


def test_the_failed_pass_is_let_go_before_the_repeat(model):
    trainer, numbers = trainer_of(model)
    exhausts = Exhausts(trainer.models["transformer"].proj_out, backward=False, at={2})
    seen = []
    trainer.models["transformer"].register_forward_pre_hook(
        lambda *given: seen.append([dead() is None for dead in exhausts.failed])
    )
    finished(trainer, numbers)
    assert seen[:3] == [[], [], [True]]


def test_gradients_of_the_failed_passes_are_dropped(model, monkeypatch):
    trainer, _ = trainer_of(model)
    Exhausts(trainer.models["transformer"].proj_out, backward=False, at={2})
    left = []
    monkeypatch.setattr(
        "finetrainers.training.trainer.free",
        lambda device: left.extend(each.grad for each in trainer.trained.values()),
    )
    trainer.fit()
    assert left and not any(gradient is not None for gradient in left)


def test_when_nothing_is_left_the_run_ends_with_the_line(model):
    trainer, _ = trainer_of(model)
    exhausts = Exhausts(trainer.models["transformer"].proj_out, backward=False, at={3, 4, 5, 6})
    with pytest.raises(RunError, match=r"^out of memory in step 2, 2\.00 GiB more") as caught:
        trainer.fit()
    assert len(exhausts.failed) == 4 and trainer.state.step == 1
    assert (trainer.rescue.checkpointing, trainer.rescue.offload) == ("full", True)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_stop_takes_no_measure(model):
    trainer, _ = trainer_of(model, adapts=False)
    exhausts = Exhausts(trainer.models["transformer"].proj_out, backward=False, at={1})
    with pytest.raises(RunError, match="out of memory in step 1"):
        trainer.fit()
    assert exhausts.calls == 1 and trainer.rescue.checkpointing == "none"


@pytest.mark.parametrize("start", [("attention", False), ("every-4", True), ("feed_forward", False)])
def test_other_beginnings_come_to_whole_blocks(start):
    rescue = replace(Rescue(), checkpointing=start[0], offload=start[1])
    assert rescue._next() == ("full", start[1])


def test_any_other_error_passes_untouched(model):
    trainer, _ = trainer_of(model)
    wrong = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def fails(*given):
        raise wrong

    trainer.models["transformer"].proj_out.register_forward_hook(fails)
    with pytest.raises(RuntimeError) as caught:
        trainer.fit()
    assert caught.value is wrong and trainer.rescue.checkpointing == "none"


def test_the_step_of_the_optimizer_is_told_and_not_repeated(model, monkeypatch):
    trainer, _ = trainer_of(model)

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(trainer.engine, "step", fails)
    with pytest.raises(RunError, match=r"out of memory in the optimizer's step, 1\.00 GiB more .*weights .*gradients"):
        trainer.fit()
    assert trainer.rescue.checkpointing == "none"


# Through the command line.


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("rescue")
    clips = render_clips(root / "clips", 2, num_frames=10, height=64, width=96, fps=16.0).parent
    return write_config(
        root / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": ["9x64x96"], "cache": str(root / "cache"), "num_workers": 0},
        method={"name": "lora", "rank": 4, "dropout": 0.2},
        training={"steps": 2, "precision": "fp32", "gradient_checkpointing": "none"},
        validation={"every": 0},
    )


def exhausting(monkeypatch, at):
    """The transformer's forward pass runs out of memory in these calls."""
    from diffusers import LTXVideoTransformer3DModel as Transformer

    forward, calls = Transformer.forward, []

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", fails)


def test_stop_from_the_command_line(config, tmp_path, monkeypatch, capfd):
    exhausting(monkeypatch, {2})
    assert main(["train", str(config), f"output={tmp_path / 'run'}"]) == 1
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("finetrainers: ")]
    assert len(lines) == 1 and "Traceback" not in err
    assert "out of memory in step 2, 3.00 GiB more were asked for" in lines[0]
    assert all(part in lines[0] for part in ("weights ", "activations and all else "))
    advice = lines[0].partition("the cheapest first: ")[2].split(", ")
    assert advice[0] == "training.gradient_checkpointing=every-2" and "memory.offload_activations=true" in advice
    assert "method.weights_dtype=bf16" not in advice, "LoRA has no such option"
    assert advice[-1] == "data.buckets of fewer frames or smaller pictures"


def test_adapt_from_the_command_line(config, tmp_path, monkeypatch, capfd):
    plain, adapted = tmp_path / "plain", tmp_path / "adapted"
    assert main(["train", str(config), f"output={plain}"]) == 0
    exhausting(monkeypatch, {2})
    assert main(["train", str(config), f"output={adapted}", "memory.on_oom=adapt"]) == 0
    assert "Step 2 is repeated with training.gradient_checkpointing=every-2" in capfd.readouterr().err
    assert exact_rows(plain) == exact_rows(adapted) != []
    ours, theirs = (next(run.glob("weights/latest/*.safetensors")).read_bytes() for run in (plain, adapted))
    assert ours == theirs


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("encode_video", "encoding videos"),
        ("embed", "encoding captions"),
        ("render", "validation"),
    ],
)
def test_other_phases_say_what_they_were_doing(config, tmp_path, monkeypatch, capfd, place, doing):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(f"finetrainers.families.ltx.LTXVideo.{place}", fails)
    given = [f"output={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
    given += ["validation={every: 1, num_videos: 1, num_inference_steps: 2}"]
    assert main(["train", str(config), *given]) == 1
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("finetrainers: "))
    assert "Traceback" not in err
    told = line.partition("out of memory in ")[2].partition(",")[0]
    assert told == doing, line


@pytest.mark.parametrize(
    ("engine", "given", "said"),
    [
        ({"world_size": 2}, {}, "memory.on_oom adapt is for one process"),
        ({}, {"optimizer": {"in_backward": True}}, "memory.on_oom adapt cannot repeat"),
    ],
)
def test_what_cannot_be_repeated_is_refused(engine, given, said):
    content = {"model": {"path": "m"}, "data": {"train": "c"}, "memory": {"on_oom": "adapt"}, "output": "o", **given}
    single = SingleEngine()
    for name, value in engine.items():
        setattr(single, name, value)
    with pytest.raises(UserError, match=said) as caught:
        check_rescue(build_config(content), single)
    assert len(str(caught.value).splitlines()) == 1
    check_rescue(build_config(content | {"memory": {}}), single)
