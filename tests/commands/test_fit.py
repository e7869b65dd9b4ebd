"""A budget takes the cheapest measures that fit it, and no more; what does not fit is refused with what would."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from finetrainers.cli import main
from finetrainers.commands import fit
from finetrainers.commands.completing import complete
from finetrainers.commands.fit import MEASURES, Fitted, NothingFits, cheapest, get_option, given_options, set_option
from finetrainers.commands.forecasting import Forecaster
from finetrainers.commands.opening import check_options
from finetrainers.config.load import build_config, identity
from finetrainers.config.schema import RunConfig
from finetrainers.engines.single import SingleEngine
from finetrainers.errors import UserError
from finetrainers.optimizers import host_states, size
from tests.memory.training import write_deeper

OPTIONS = [measure.option for measure in MEASURES]
LORA, FULL = {"name": "lora", "rank": 64}, {"name": "full"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model that weighs something beside what a step keeps."""
    wider = {"num_attention_heads": 16, "attention_head_dim": 16, "cross_attention_dim": 256}
    return write_deeper("ltx-0.9.0", tmp_path_factory.mktemp("wide") / "model", num_layers=3, **wider)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """All of a budget is for tensors, and tensors of any size move."""
    monkeypatch.setattr(fit, "CONTEXT_GIB", 0)
    monkeypatch.setattr(fit, "SPLIT_SHARE", 0)
    for module in (host_states, size):
        monkeypatch.setattr(module, "SMALLEST_MOVED", 8)


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture(autouse=True)
def _trains_only(monkeypatch, known):
    """Of a tiny model the encoders take more than all else, and each variant is simulated once."""

    def forecaster(family: Any, config: RunConfig) -> Forecaster:
        what = (family.folder, config.data, config.method.name, config.training.batch_size, config.validation)
        return known.setdefault(str(what), Forecaster(family, config))

    monkeypatch.setattr(fit, "Forecaster", forecaster)
    monkeypatch.setattr(Forecaster, "_encoding", lambda self, config: [])


def content_of(model: Path, **sections: Any) -> dict[str, Any]:
    content = {
        "model": {"path": str(model)},
        "data": {"train": "clips", "buckets": ["17x64x96"]},
        "method": LORA,
        "validation": {"every": 0},
        "output": "out",
    }
    return content | sections


class Fit:
    """The choice for one config."""

    def __init__(self, model: Path, **sections: Any) -> None:
        self.config = build_config(content_of(model, **sections))
        self.given = given_options(self.config)
        self.family, self.whole = complete(self.config)
        self.forecaster = fit.Forecaster(self.family, self.whole)

    def check(self, variant: RunConfig) -> None:
        check_options(self.family, variant, SingleEngine())

    def choose(self, limit: float) -> Fitted | NothingFits:
        return cheapest(self.forecaster, self.whole, limit, given=self.given, check=self.check)

    def peak(self, config: RunConfig) -> float:
        return self.forecaster.peak_gib(config)

    def is_taken(self, variant: RunConfig) -> bool:
        try:
            self.check(variant)
        except UserError:
            return False
        return True

    @property
    def start(self) -> RunConfig:
        left = "training.gradient_checkpointing" not in self.given
        return set_option(self.whole, "training.gradient_checkpointing", "none") if left else self.whole

    @property
    def ladder(self) -> list[RunConfig]:
        """The config with more and more measures."""
        left = fit._left_to_choose(self.start, self.given, self.check)
        return [functools.reduce(fit._take, left[:count], self.start) for count in range(len(left) + 1)]


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_over_a_falling_budget(wide, method):
    run = Fit(wide, method=method)
    peaks = sorted({run.peak(variant) for variant in run.ladder}, reverse=True)
    assert len(peaks) >= 5, "most of them save something"
    last = -1
    for peak in peaks[:: len(peaks) // 5]:
        found = run.choose(peak)
        assert isinstance(found, Fitted), peak
        assert run.peak(found.config) <= peak and run.is_taken(found.config)
        chosen = [each.option for each in found.chosen]
        assert chosen == sorted(set(chosen), key=OPTIONS.index), "in the order of what they cost"
        for each in found.chosen:
            assert get_option(found.config, each.option) == each.value
            without = set_option(found.config, each.option, get_option(run.start, each.option))
            assert not run.is_taken(without) or run.peak(without) > peak, f"{each.option} is not needed"
        reached = max([MEASURES.index(each) for each in measures_of(found)], default=-1)
        assert reached >= last, "a smaller budget takes what costs more"
        last = reached
        assert_told(run, found)
    nothing = run.choose(0.99 * peaks[-1])
    assert isinstance(nothing, NothingFits)
    assert nothing.least == run.ladder[-1]


def measures_of(found: Fitted) -> list[fit.Measure]:
    values = {each.option: each.value for each in found.chosen}
    return [
        measure
        for measure in MEASURES
        if measure.option in values and (values[measure.option] == measure.value or measure.value == "all")
    ]


def assert_told(run: Fit, found: Fitted) -> None:
    """Each measure with the peak before and after it, one after another."""
    peaks = [each.before_gib for each in found.chosen] + [each.after_gib for each in found.chosen[-1:]]
    assert [each.after_gib for each in found.chosen] == peaks[1:]
    if found.chosen:
        assert peaks[0] == run.peak(run.start) and peaks[-1] == run.peak(found.config)


def test_all_that_fits_as_it_is_takes_nothing(wide):
    run = Fit(wide)
    found = run.choose(run.peak(run.start))
    assert found == Fitted(run.start, [])
    assert found.config.training.gradient_checkpointing == "none", "the default is a measure too"


def test_what_is_given_stays(wide):
    given = {"training": {"gradient_checkpointing": "every-2"}, "memory": {"offload_activations": False}}
    run = Fit(wide, optimizer={"name": "adafactor", "offload": False}, **given)
    least = run.ladder[-1]
    found = run.choose(run.peak(least))
    assert isinstance(found, Fitted)
    for option in (
        "training.gradient_checkpointing",
        "memory.offload_activations",
        "optimizer.name",
        "optimizer.offload",
    ):
        assert get_option(found.config, option) == get_option(run.whole, option)
    assert not {each.option for each in found.chosen} & run.given


def test_a_config_that_a_run_wrote_down_gives_everything(wide):
    whole = Fit(wide).whole
    written = build_config(yaml.safe_load(yaml.safe_dump(whole.model_dump(mode="json"))))
    assert {option for option in OPTIONS if fit.has_option(written, option)} <= given_options(written)


def test_what_is_refused_is_not_chosen(wide, monkeypatch):
    run = Fit(wide)
    measures = {each.option for each in fit._left_to_choose(run.start, run.given, run.check)}
    assert {"optimizer.name", "memory.stream_blocks", "memory.base_weights"} <= measures
    assert "method.weights_dtype" not in measures, "of LoRA there is none"
    shares = SingleEngine()
    shares.shares = True
    sharded = functools.partial(check_options, run.family, engine=shares)
    left = {each.option for each in fit._left_to_choose(run.start, run.given, sharded)}
    assert "memory.stream_blocks" not in left
    every = Fit(wide, training={"gradient_checkpointing": "none"})
    assert "memory.stream_blocks" not in {
        each.option for each in fit._left_to_choose(every.start, every.given, every.check)
    }
    monkeypatch.setattr("finetrainers.memory.quantized.find_spec", lambda name: None)
    monkeypatch.setattr("finetrainers.optimizers.build.find_spec", lambda name: None, raising=False)
    left = [(each.option, each.value) for each in fit._left_to_choose(run.start, run.given, run.check)]
    assert ("memory.base_weights", "nf4") not in left and ("memory.base_weights", "int8") in left


def test_bitsandbytes_that_is_not_installed_is_not_chosen(wide, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *given: None if name == "bitsandbytes" else find(name, *given)
    )
    for module in ("finetrainers.optimizers.build", "finetrainers.optimizers.kinds", "finetrainers.memory.quantized"):
        if hasattr(importlib.import_module(module), "find_spec"):
            monkeypatch.setattr(f"{module}.find_spec", importlib.util.find_spec)
    run = Fit(wide)
    left = [each.value for each in fit._left_to_choose(run.start, run.given, run.check)]
    assert "adamw_8bit" not in left and "nf4" not in left and "int8" in left


def test_the_fewest_blocks_that_fit_are_streamed(wide):
    run = Fit(wide, training={"gradient_checkpointing": "full"}, optimizer={"offload": False, "name": "adamw"})
    counts = [0, 1, 2, 3]
    peaks = {count: run.peak(set_option(run.whole, "memory.stream_blocks", count)) for count in counts}
    for limit in sorted(set(peaks.values()), reverse=True):
        found = run.choose(limit)
        fitting = [count for count in counts if peaks[count] <= limit]
        if isinstance(found, Fitted) and get_option(found.config, "memory.stream_blocks"):
            chosen = found.config.memory.stream_blocks
            assert (3 if chosen == "all" else chosen) == min(fitting)


def test_the_refusal_names_a_size_that_fits(wide):
    left = {"base_weights": None, "offload_activations": False, "vae_tiling": False}
    run = Fit(wide, memory=left, data={"train": "clips", "buckets": ["49x128x192"]})
    least = run.peak(run.ladder[-1])
    smaller = Fit(wide, memory=left, data={"train": "clips", "buckets": ["17x64x96"]})
    budget = (least + smaller.peak(smaller.ladder[-1])) / 2
    config = set_option(run.whole, "memory.budget", f"{budget:.9f}GB")
    with pytest.raises(UserError) as caught:
        fit.fit(run.family, config, given=run.given, check=run.check)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and line.startswith("memory.budget 0.")
    named = re.search(r"data\.buckets (\S+) instead of 49x128x192 would need", line)
    assert named, line
    fits = Fit(wide, data={"train": "clips", "buckets": [named[1]]}, memory=left | {"budget": f"{budget:.9f}GB"})
    _, plan = fit.fit(fits.family, fits.whole, given=fits.given, check=fits.check)
    assert plan.as_dict()["fits"] is True
    config = set_option(run.whole, "memory.budget", "0.000000001GB")
    with pytest.raises(UserError, match="smaller clips would not do"):
        fit.fit(run.family, config, given=run.given, check=run.check)


def test_auto_is_what_the_device_has(monkeypatch):
    monkeypatch.setattr(fit, "device_gib", lambda: 42.0)
    assert fit.usable_gib("auto") == 42.0 and fit.usable_gib("1.5GB") == 1.5
    monkeypatch.setattr(fit, "CONTEXT_GIB", 2)
    monkeypatch.setattr(fit, "SPLIT_SHARE", 0.1)
    assert fit.usable_gib("auto") == pytest.approx(36.0)


def test_measures_that_change_numbers_come_last_and_stop_a_resume(wide):
    """A run is resumed with whatever changes no number."""
    exact = True
    for measure in MEASURES:
        run = Fit(wide, method=FULL if measure.option.startswith("method") else LORA)
        same = identity(run.start) == identity(set_option(run.start, measure.option, measure.value))
        assert same <= exact, f"{measure.option} changes no number and comes after what does"
        exact = same
    assert not exact


def test_a_family_that_cannot_be_simulated():
    family = SimpleNamespace(runs_on_meta=False, name="mochi")
    config = build_config(content_of(Path("m")))
    answer, plan = fit.fit(family, config, given=(), check=lambda config: None)
    assert answer is config and plan.phases == [] and plan.peak_gib is None
    assert plan.lines() == ["memory: cannot be told without the weights"]
    assert plan.as_dict() == {"phases": [], "peak_gib": None, "budget_gib": None, "fits": None, "chosen": []}
    with pytest.raises(UserError, match=r"^memory\.budget: what mochi holds cannot be told without its weights"):
        fit.fit(family, set_option(config, "memory.budget", "24GB"), given=(), check=lambda config: None)


# Through the command line.


@pytest.fixture(scope="module")
def config(wide, clips, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    data = {"train": str(clips), "buckets": ["17x64x96"], "cache": str(root / "cache"), "num_workers": 0}
    training = {"steps": 1, "batch_size": 4}
    path = root / "c.yaml"
    path.write_text(yaml.safe_dump(content_of(wide, data=data, training=training, checkpoint={"every": 1})))
    return path


def budget_for(call, config: Path, *overrides: str) -> str:
    """What a run with these options needs, rounded up."""
    plan = json.loads(call("plan", config, "--json", *overrides).out)["memory"]
    return f"memory.budget={plan['peak_gib'] + 1e-6:.6f}GB"


# The first measure alone is left open.
FIXED = ["memory={offload_activations: false, stream_blocks: 0, stream_text_encoder: false, vae_tiling: false}"]
FIXED += ["optimizer.name=adamw", "optimizer.offload=false"]
NO_LOW_PRECISION = "memory.base_weights=null"


def test_plan_says_what_is_chosen(call, config):
    fixed = [*FIXED, NO_LOW_PRECISION]
    budget = budget_for(call, config, "training.gradient_checkpointing=full")
    plan = json.loads(call("plan", config, "--json", *fixed, budget).out)["memory"]
    assert plan["fits"] is True and plan["peak_gib"] <= plan["budget_gib"]
    (chosen,) = plan["chosen"]
    assert (chosen["option"], chosen["value"]) == ("training.gradient_checkpointing", "full")
    assert chosen["before_gib"] > plan["budget_gib"] >= chosen["after_gib"] == plan["peak_gib"]
    text = call("plan", config, *fixed, budget).out.splitlines()
    assert f"memory.budget leaves {plan['budget_gib']:.1f} GiB; taken for it, of what was left open:" in text
    assert text[-1].startswith("  training.gradient_checkpointing=full: ") and text[-1].endswith("(a third more work)")
    refusal = call("plan", config, *fixed, "memory.budget=0.000001GB").refusal
    assert "with every measure that is left open this run needs" in refusal


def test_train_writes_down_what_was_chosen_and_keeps_to_it(call, config, tmp_path):
    output = f"output={tmp_path / 'run'}"
    full = "training.gradient_checkpointing=full"
    budget = budget_for(call, config, full)
    assert main(["train", str(config), output, "training.gradient_checkpointing=none"]) == 0
    answer = call("train", config, output, "training.steps=2", *FIXED, NO_LOW_PRECISION, budget)
    assert answer.code == 0, answer.err
    assert "training.gradient_checkpointing=full" in answer.err, "a resumed run may choose what changes no number"
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["training"]["gradient_checkpointing"] == "full" and written["memory"]["stream_blocks"] == 0
    answer = call("train", tmp_path / "run" / "config.yaml", "training.steps=3")
    assert answer.code == 0 and "nothing, as all fits" in answer.err, answer.err
    again = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert again == written | {"training": written["training"] | {"steps": 3}}
    # All but one are given, and with that one the run would have other numbers.
    fixed = [full, *FIXED]
    budget = budget_for(call, config, *fixed, "memory.base_weights=int8")
    refusal = call("train", config, output, "training.steps=4", *fixed, budget).refusal
    assert "memory.base_weights" in refusal
