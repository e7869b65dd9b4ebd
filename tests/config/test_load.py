"""What a config may hold, and the one line that answers each way of getting it wrong."""

from pathlib import Path

import pytest

from finetrainers.config.load import (
    build_config,
    dump_config,
    fill_defaults,
    identity,
    load_config,
    resolved_buckets,
    resolved_conditions,
)
from finetrainers.errors import UserError
from finetrainers.types import Bucket, Condition

# Less data.train.
REST = "model: {path: x}\noutput: y\n"
MINIMAL = "model: {path: base}\ndata: {train: ./clips}\noutput: runs/x\n"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def content(**sections) -> dict:
    return {"model": {"path": "base"}, "data": {"train": "./clips"}, "output": "runs/x"} | sections


def refusal(path: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_three_keys_are_a_whole_config(tmp_path):
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.path == "base"
    assert [source.path for source in config.data.train] == ["./clips"]
    assert (config.method.name, config.method.rank) == ("lora", 64)
    assert config.training.steps == 1000


# (what the file says, what the message must hold besides the file's name)
BAD_FILES = {
    "misspelt key": (MINIMAL + "training: {stepz: 5}", ["unknown key `training.stepz`", "mean `training.steps`?"]),
    "misspelt section": (MINIMAL + "trainin: {}", ["unknown key `trainin`", "did you mean `training`?"]),
    "key of another section": (
        MINIMAL + "training: {caption_dropout: 0.1}",
        ["unknown key `training.caption_dropout`", "did you mean `data.caption_dropout`?"],
    ),
    "key of another method": (
        MINIMAL + "method: {name: full, rank: 4}",
        ["unknown key `method.rank`", "an option of method lora"],
    ),
    "key like no other": (MINIMAL + "memory: {zzz: 1}", ["unknown key `memory.zzz`", "allowed there: budget"]),
    "misspelt method": (MINIMAL + "method: {name: lor}", ["`method.name` is 'lor'", "lora, full", "mean `lora`?"]),
    "method by name alone": (MINIMAL + "method: full", ["`method` is 'full'", "must hold keys"]),
    "misspelt choice": (MINIMAL + "optimizer: {name: adam}", ["`optimizer.name` is 'adam'", "'prodigy' or 'muon'"]),
    "wrong type": (MINIMAL + "training: {steps: many}", ["`training.steps` is 'many'", "valid integer"]),
    "a budget in other words": (MINIMAL + "memory: {budget: 24MB}", ["`memory.budget` is '24MB'", "such as 24GB"]),
    "half a step": (MINIMAL + "training: {steps: 1.5}", ["`training.steps` is 1.5", "valid integer"]),
    "yes for a number": (MINIMAL + "checkpoint: {every: yes}", ["`checkpoint.every` is True", "no yes or no"]),
    "out of range": (MINIMAL + "training: {batch_size: 0}", ["`training.batch_size` is 0", "or equal to 1"]),
    "not finite": (MINIMAL + "optimizer: {lr: .nan}", ["`optimizer.lr` is nan", "finite number"]),
    "section that is a number": (MINIMAL + "training: 5", ["`training` is 5", "must hold keys such as `steps:`"]),
    "section that is empty": (MINIMAL + "training:", ["`training` is nothing", "must hold keys"]),
    "section left out": ("data: {train: x}\noutput: y", ["`model` is missing"]),
    "key left out": ("model: {}\ndata: {train: x}\noutput: y", ["`model.path` is missing"]),
    "no clips": (REST + "data: {train: []}", ["`data.train` is []", "at least 1 item"]),
    "source without path": (REST + "data: {train: [a, {}]}", ["`data.train.1.path` is missing"]),
    "source of the wrong kind": (REST + "data: {train: 5}", ["`data.train` is 5", "must hold keys such as `path:`"]),
    "source with a misspelt key": (REST + "data: {train: {pat: x}}", ["did you mean `data.train.path`?"]),
    "no such task": (MINIMAL.replace("base", "base, task: dance"), ["`model.task` is 'dance'", "'image-to-video'"]),
    "no such condition": (
        REST + "data: {train: x, conditions: {last: 0.5}}",
        ["`data.conditions", "condition 'last' is none of", "first_last", "prefix-N"],
    ),
    "condition of no frames": (REST + "data: {train: x, conditions: prefix-0}", ["condition 'prefix-0' is none of"]),
    "condition by a second name": (
        REST + "data: {train: x, conditions: {first: 0.5, prefix-1: 0.3}}",
        ["condition 'prefix-1' is none of", "from 2 up"],
    ),
    "condition without a number": (REST + "data: {train: x, conditions: prefix-}", ["'prefix-' is none of"]),
    "shares over 1": (
        REST + "data: {train: x, conditions: {first: 0.6, none: 0.5}}",
        ["`data.conditions` is {'first': 0.6, 'none': 0.5}", "add up to 1 at most"],
    ),
    "share that is negative": (REST + "data: {train: x, conditions: {first: -0.1}}", ["-0.1", "or equal to 0"]),
    "share that is no number": (REST + "data: {train: x, conditions: {first: half}}", ["'half'", "valid number"]),
    "conditions that are a list": (REST + "data: {train: x, conditions: [first]}", ["['first']", "dictionary"]),
    "rope of no method": (MINIMAL.replace("base", "base, rope_temporal: {frames: 9}"), ["method` is missing"]),
    "rope of another method": (
        MINIMAL.replace("base", "base, rope_temporal: {method: yarn, frames: 9}"),
        ["`model.rope_temporal.method` is 'yarn'", "'interpolate', 'ntk' or 'riflex'"],
    ),
    "rope with a misspelt key": (
        MINIMAL.replace("base", "base, rope_temporal: {method: ntk, frame: 9}"),
        ["unknown key `model.rope_temporal.frame` (did you mean `model.rope_temporal.frames`?)"],
    ),
    "rope that is a number": (
        MINIMAL.replace("base", "base, rope_temporal: 9"),
        ["`model.rope_temporal` is 9", "must hold keys such as `method:`"],
    ),
    "family without a module": (MINIMAL.replace("base", "base, family: Mine"), ["`model.family` is 'Mine'", "pattern"]),
    "family that is a path": (MINIMAL.replace("base", "base, family: a/b.py"), ["`model.family` is 'a/b.py'"]),
    "mode that turns back": (MINIMAL + "objective: {mode_scale: 1.8}", ["`objective.mode_scale` is 1.8", "1.75"]),
    "shift of nothing": (MINIMAL + "objective: {shift: 0}", ["`objective.shift` is 0", "greater than 0"]),
    "bucket": (REST + "data: {train: x, buckets: 49x512}", ["`data.buckets` is '49x512'", "49x512x768"]),
    "bucket in a list": (
        REST + "data: {train: x, buckets: [1x32x32, 0x32x32]}",
        ["`data.buckets.1` is '0x32x32'", "positive whole numbers"],
    ),
    "either of two types": (
        REST + "data: {train: x, validation: 1.5}",
        ["`data.validation` is 1.5", "less than 1 or a valid string"],
    ),
    "empty path": ("model: {path: ''}\ndata: {train: x}\noutput: y", ["`model.path` is ''", "on one line"]),
    "two mistakes": (MINIMAL + "training: {steps: -1}\nmemory: {a: 1}", ["`training.steps`", "; unknown key `memory"]),
    "sixty mistakes": (MINIMAL + "\n".join(f"key_{n}: 1" for n in range(60)), ["unknown key `key_0`", " more"]),
    "key given twice": (MINIMAL + "output: runs/y", ["(line 4)", "key 'output' is given twice"]),
    "nested key given twice": (MINIMAL + "training:\n  steps: 1\n  steps: 2", ["(line 6)", "'steps' is given twice"]),
    "key that is no word": (MINIMAL + "5: x", ["(line 4)", "a key must be a word, but is '5'"]),
    "merge key": ("a: &a {b: 1}\nc: {<<: *a}", ["(line 2)", "a key must be a word, but is '<<'"]),
    "not YAML": ("model: {path: x\ndata: 5", ["(line 2)", "is not valid YAML"]),
    "tab": ("model:\n\tpath: x", ["(line 2)", "is not valid YAML"]),
    "no such date": (MINIMAL + "tracking: {name: 2024-13-45}", ["(line 4)", "'2024-13-45' is not a valid timestamp"]),
    "python object": ("model: !!python/object:os.system {}", ["(line 1)", "python/object"]),
    "NUL": ("model: x\noutput: \0", ["(line 2)", r"'\x00' is not allowed"]),
    "two documents": ("model: x\n---\nmodel: y", ["(line 2)", "single document"]),
    "nested 2000 deep": ("[" * 2000, ["nested too deeply"]),
    "a list": ("- a\n- b", ["holds ['a', 'b']"]),
    "nothing": ("", ["holds nothing"]),
    "not text": (b"\xff\xfe\x00", ["it is not UTF-8 text"]),
    "control characters": (
        MINIMAL + 'tracking: {wandb_mode: "a\\e[31m\\n\\u202e"}',
        [r"`tracking.wandb_mode` is 'a\x1b[31m\n\u202e'"],
    ),
    "control characters in a key": (MINIMAL + '"a\\n\\u202eb": 1', [r"unknown key `a\n\u202eb`"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    text, expected = BAD_FILES[case]
    path = write(tmp_path, text)
    message = refusal(path)
    for part in [str(path), *expected]:
        assert part in message


def test_file_that_cannot_be_read(tmp_path):
    assert refusal(tmp_path / "none.yaml") == f"config file {tmp_path / 'none.yaml'} does not exist"
    assert "directory" in refusal(tmp_path)
    assert r"a\nb.yaml does not exist" in refusal(tmp_path / "a\nb.yaml")
    assert r"a\x00b.yaml cannot be read" in refusal(tmp_path / "a\0b.yaml")


OVERRIDES = {
    "number": ("training.steps=5", lambda config: config.training.steps == 5),
    "exponent without a dot": ("optimizer.lr=1e-4", lambda config: config.optimizer.lr == 1e-4),
    "exponent without a sign": ("optimizer.lr=2.5E3", lambda config: config.optimizer.lr == 2500),
    "dry run": ("optimizer.lr=0", lambda config: config.optimizer.lr == 0),
    "null": ("checkpoint.keep=null", lambda config: config.checkpoint.keep is None),
    "nothing is null": ("checkpoint.keep=", lambda config: config.checkpoint.keep is None),
    "top level": ("output=runs/y", lambda config: config.output == "runs/y"),
    "value with an equals sign": ("data.trigger=a=b", lambda config: config.data.trigger == "a=b"),
    "list": ("data.buckets=[1x32x32, 9x32x32]", lambda config: config.data.buckets == ["1x32x32", "9x32x32"]),
    "list of one": ("data.buckets=9x32x32", lambda config: config.data.buckets == ["9x32x32"]),
    "section": ("training={steps: 7}", lambda config: config.training.steps == 7),
    "section not in the file": ("validation.prompts=hello", lambda config: config.validation.prompts == ["hello"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_override(tmp_path, case):
    override, holds = OVERRIDES[case]
    assert holds(load_config(write(tmp_path, MINIMAL), [override]))


def test_the_last_override_wins(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["training.steps=1", "training.steps=2"])
    assert config.training.steps == 2


BAD_OVERRIDES = {
    "training.steps": ["override 'training.steps'", "section.key=value"],
    "=5": ["override '=5'", "section.key=value"],
    "training..steps=5": ["section.key=value"],
    "output.x=5": ["override 'output.x=5'", "`output` is 'runs/x'"],
    "training.steps=[": ["override 'training.steps=['", "is not valid YAML"],
    "training.stepz=5": ["unknown key `training.stepz`", "did you mean `training.steps`?"],
    "training.steps.x=5": ["`training.steps`"],
    "a\nb": [r"override 'a\nb'"],
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override(tmp_path, override):
    message = refusal(write(tmp_path, MINIMAL), [override])
    for part in BAD_OVERRIDES[override]:
        assert part in message


@pytest.mark.parametrize(
    ("train", "paths"),
    [
        ("a", ["a"]),
        (Path("a"), ["a"]),
        (["a", "b"], ["a", "b"]),
        ({"path": "a"}, ["a"]),
        (["a", {"path": "b"}, Path("c")], ["a", "b", "c"]),
    ],
)
def test_forms_of_data_train(train, paths):
    config = build_config(content(data={"train": train}))
    assert [source.path for source in config.data.train] == paths


def test_method_is_one_of_two():
    assert build_config(content(method={"rank": 8})).method.rank == 8
    assert build_config(content(method={"name": "full"})).method.name == "full"


def test_build_config_names_its_origin():
    with pytest.raises(UserError, match=r"^the demo: unknown key `x`"):
        build_config(content(x=1), origin="the demo")


def test_buckets_are_spelt_one_way_and_once():
    config = build_config(content(data={"train": "x", "buckets": [" 049x512x768", "49x512x768", "1x32x32"]}))
    assert config.data.buckets == ["49x512x768", "1x32x32"]
    assert resolved_buckets(config) == [Bucket(49, 512, 768), Bucket(1, 32, 32)]


CONDITIONS = [
    ("first", {"first": 1.0}),
    ({"first": 0.5}, {"first": 0.5, "none": 0.5}),
    ({"first": 0.25, "none": 0.25}, {"first": 0.25, "none": 0.75}),
    ({"none": 0.1, "first_last": 0.2, "prefix-9": 0.7}, {"none": 0.1, "first_last": 0.2, "prefix-9": 0.7}),
    ({"first": 0, "prefix-17": 1}, {"prefix-17": 1.0}),
    ({"first": 1 / 3, "first_last": 1 / 3, "none": 1 / 3}, {"first": 1 / 3, "first_last": 1 / 3, "none": 1 / 3}),
    ({}, {"none": 1.0}),
]


@pytest.mark.parametrize(("conditions", "expected"), CONDITIONS)
def test_shares_of_conditions_add_up_to_one(tmp_path, conditions, expected):
    config = build_config(content(data={"train": "x", "conditions": conditions}))
    resolved = resolved_conditions(config)
    assert {str(condition): pytest.approx(share) for condition, share in resolved} == expected
    assert len(resolved) == len(expected) and all(Condition.parse(str(each)) == each for each, _ in resolved)
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("family", ["mine.Family", "some.package.module.Family_2", "_a._b"])
def test_a_family_of_ones_own_is_a_dotted_name(family):
    assert build_config(content(model={"path": "base", "family": family})).model.family == family


def test_fill_defaults_never_overrules_the_user():
    config = build_config(content(optimizer={"lr": 0}))
    defaults = {"optimizer.lr": 1e-4, "method.target_modules": ["to_q"], "data.buckets": ["1x32x32"]}
    filled = fill_defaults(config, defaults)
    assert (filled.optimizer.lr, filled.method.target_modules) == (0, ["to_q"])
    assert filled.data.buckets == ["1x32x32"]
    assert config.method.target_modules is None


def test_fill_defaults_passes_over_what_the_method_has_not():
    filled = fill_defaults(build_config(content(method={"name": "full"})), {"method.target_modules": ["to_q"]})
    assert filled.method.model_dump() == {"name": "full", "weights_dtype": "fp32", "float8_recipe": None}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "full"}, "optimizer": {"lr": 1e-5, "betas": [0.8, 0.95]}},
        # Texts that YAML could take for something else.
        {
            "data": {"train": "1e-4", "trigger": "1e5", "validation": 0.2},
            "tracking": {"name": "null"},
            "output": "12e3",
        },
        {"validation": {"prompts": ["a\nb", "yes", "- c", "é\x85\u2028\U0001f600", "#d: e", "", " f "]}},
    ],
)
def test_what_is_dumped_reads_back_equal(tmp_path, sections):
    config = build_config(content(**sections))
    assert load_config(write(tmp_path, dump_config(config))) == config


# Every option, with another value than MINIMAL's: does a resumed run have to share it?
CHANGES_NUMBERS = {
    "model.path": "other", "model.task": "image-to-video", "model.revision": "main", "model.family": "mine.Family",
    "model.experts": "both", "model.embedded_guidance": 6, "model.learned_positions": "resize",
    "model.rope_temporal": {"method": "ntk", "frames": 81},
    "data.train": "./other", "data.validation": 0.5, "data.buckets": "9x32x32", "data.fps": 24, "data.window": "all",
    "data.trigger": "BW", "data.caption_dropout": 0.5, "data.conditions": "first",
    "method.name": "full", "method.rank": 8, "method.alpha": 8, "method.target_modules": "q", "method.dropout": 0.1,
    "method.text_encoder": "lora",
    "objective.timestep_sampling": "uniform", "objective.logit_mean": 1, "objective.logit_std": 2,
    "objective.uniform_share": 0.5, "objective.shift": 7, "objective.mode_scale": 0.5,
    "objective.loss_weighting": "min_snr", "objective.snr_gamma": 1,
    "optimizer.name": "adamw_8bit", "optimizer.lr": 1, "optimizer.betas": [0, 0], "optimizer.eps": 1,
    "optimizer.weight_decay": 1, "optimizer.lr_scheduler": "cosine", "optimizer.lr_warmup_steps": 5,
    "training.batch_size": 2, "training.gradient_accumulation_steps": 2, "training.seed": 1,
    "training.precision": "fp32", "training.max_grad_norm": 2,
    "memory.vae_tiling": True, "memory.base_weights": "fp8", "memory.text_encoder_weights": "nf4",
}  # fmt: skip
CHANGES_NONE = {
    "output": "runs/y", "data.num_workers": 0, "data.strict": True, "data.cache": "cache", "training.steps": 5,
    "optimizer.offload": True, "optimizer.in_backward": True,
    "training.gradient_checkpointing": False, "memory.offload_activations": True, "memory.keep_quantized": True,
    "training.compile": "off", "training.cuda_graphs": True, "training.attention": "flash",
    "parallel.strategy": "ddp",
    "memory.stream_blocks": "all", "memory.stream_text_encoder": True, "memory.budget": "24GB",
    "memory.on_oom": "adapt",
    "parallel.context_parallel_size": 2, "parallel.shard_size": 2, "parallel.zero_stage": 3,
    "parallel.offload": "optimizer", "parallel.deepspeed_config": "ds.json",
    "validation.every": 5, "validation.prompts": "x", "validation.num_videos": 0, "validation.negative_prompt": "x",
    "validation.num_inference_steps": 1, "validation.guidance_scale": 1, "validation.bucket": "9x32x32",
    "validation.timesteps": 1, "validation.images": "x.png", "checkpoint.every": 5, "checkpoint.keep": 1,
    "checkpoint.keep_weights": 1,
    "tracking.trackers": "wandb", "tracking.project": "x", "tracking.name": "x", "tracking.wandb_mode": "offline",
}  # fmt: skip


def with_option(key: str, value: object) -> dict:
    section, _, name = key.rpartition(".")
    base = content()
    (base.setdefault(section, {}) if section else base)[name] = value
    return base


@pytest.mark.parametrize("key", [*CHANGES_NUMBERS, *CHANGES_NONE])
def test_identity_holds_what_changes_numbers(key):
    value = (CHANGES_NUMBERS | CHANGES_NONE)[key]
    same = identity(build_config(with_option(key, value))) == identity(build_config(content()))
    assert same == (key in CHANGES_NONE)


def test_identity_was_decided_for_every_option():
    config = build_config(content())
    options = {f"{name}.{key}" for name, section in config if name != "output" for key in type(section).model_fields}
    assert options | {"output"} == CHANGES_NUMBERS.keys() | CHANGES_NONE.keys()


# With another value than the default.
OF_FULL = {"weights_dtype": "bf16", "float8_recipe": "rowwise"}


@pytest.mark.parametrize("option", OF_FULL)
def test_options_of_full_fine_tuning_are_part_of_the_identity(option):
    kinds = [identity(build_config(content(method={"name": "full"} | given))) for given in ({}, OF_FULL)]
    assert kinds[0][f"method.{option}"] != kinds[1][f"method.{option}"]
    assert OF_FULL.keys() == type(build_config(content(method={"name": "full"})).method).model_fields.keys() - {"name"}


def test_steps_are_part_of_the_identity_of_a_schedule_that_bends_towards_the_end():
    def schedule(name, steps):
        return identity(build_config(content(optimizer={"lr_scheduler": name}, training={"steps": steps})))

    assert schedule("constant_with_warmup", 5) == schedule("constant_with_warmup", 10)
    assert schedule("cosine", 5) != schedule("cosine", 10)
