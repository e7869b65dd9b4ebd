"""`plan --nodes`: the step that is predicted is that of the run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from finetrainers.families.ltx import LTXVideo
from finetrainers.scaling import ENGINES, Cluster, Work, predict
from tests.end_to_end.runs import write_config
from tests.families.tiny import TINY


@pytest.fixture
def config(model: Path, clips: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": ["9x64x96"]},
        method={"name": "lora", "rank": 4},
        training={"batch_size": 2, "gradient_accumulation_steps": 3},
        output=str(tmp_path / "run"),
    )


def num_parameters(model: Path, part: str = "transformer") -> int:
    with safe_open(next((model / part).glob("*.safetensors")), "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it is no dict


CASES = [
    # Bytes a base weight, bytes a weight in the arithmetic, 1e12 operations a second.
    ([], 2, 2, 989),
    (["training.precision=fp32"], 4, 4, 67),
    (["method={name: full}"], 4, 2, 989),
    # Compiled blocks are gathered for as they lie.
    (["method={name: full}", "training.compile=blocks"], 4, 4, 989),
    (["training.compile=blocks"], 2, 2, 989),
    (["method={name: full}", "training.precision=fp32"], 4, 4, 67),
]


@pytest.mark.parametrize(("overrides", "base_bytes", "arithmetic_bytes", "tflops"), CASES)
def test_the_work_is_that_of_the_run(call, config, model, overrides, base_bytes, arithmetic_bytes, tflops):
    """Trained weights lie in fp32, frozen ones in the type of the arithmetic, in which all are gathered."""
    plan = json.loads(call("plan", config, "--json", "--nodes", 4, *overrides).out)
    (bucket,), trained, base = plan["buckets"], plan["trained_parameters"], num_parameters(model)
    adapters = plan["parameters"] - base
    work = Work(
        forward_tflop=2 * bucket["forward_tflop"],
        training_tflop=2 * bucket["training_tflop"],
        passes=3,
        batch_size=2,
        trained_parameters=trained,
        weight_bytes=base_bytes * base + 4 * adapters,
        gathered_bytes=arithmetic_bytes * (base + adapters),
        num_blocks=2,
    )
    cluster = Cluster(4, 8, tflops=tflops)
    assert plan["scaling"] == {
        "bucket": "9x64x96",
        "cluster": asdict(cluster),
        "work": asdict(work),
        "engines": [asdict(predict(engine, work, cluster)) for engine in ENGINES],
    }


def test_without_nodes_nothing_changes(call, config):
    bare, more = (json.loads(call("plan", config, "--json", *given).out) for given in ([], ["--nodes", "2"]))
    assert "scaling" not in bare and bare == {key: more[key] for key in bare}
    assert more.keys() - bare.keys() == {"scaling"}
    lines, longer = (call("plan", config, *given).out.splitlines() for given in ([], ["--nodes", "2"]))
    assert longer[: len(lines)] == lines and len(longer) == len(lines) + 2 + len(ENGINES)


def test_the_text_says_what_the_json_says(call, config):
    given = ["--nodes", "16", "--gpus-per-node", "4"]
    rows = json.loads(call("plan", config, "--json", *given).out)["scaling"]["engines"]
    title, head, *table = call("plan", config, *given).out.splitlines()[-2 - len(ENGINES) :]
    assert title == "a step of 9x64x96 on 16 x 4 H100s, predicted, not measured (docs/cluster.md):"
    assert " ".join(head.split()) == "engine step s exposed s efficiency samples/s sent GB held GiB"
    for line, row in zip(table, rows, strict=True):
        assert line.startswith(f"  {row['engine']} ")
        expected = [
            f"{row['step_seconds']:.3g}",
            f"{row['exposed_seconds']:.3g}",
            f"{100 * row['efficiency']:.1f}%",
            f"{row['samples_per_second']:.3g}",
            f"{row['sent_bytes'] / 1e9:.3g}",
            f"{row['state_bytes'] / 2**30:.3g}",
        ]
        assert line.split()[-6:] == expected


def test_the_largest_bucket_counts(call, config, clips, tmp_path):
    """A step waits for the process that has it, though most clips are smaller."""
    folder = shutil.copytree(clips, tmp_path / "mixed")
    (folder / "metadata.csv").unlink()
    kept, *others = sorted(folder.glob("*.mp4"))
    for index, other in enumerate(others):
        other.unlink()
        Image.new("RGB", (96, 64)).save(folder / f"still-{index}.png")
    for media in [kept, *folder.glob("*.png")]:
        media.with_suffix(".txt").write_text("a caption")
    given = [f"data.train={folder}", "data.buckets=[1x64x96, 9x64x96]"]
    plan = json.loads(call("plan", config, "--json", "--nodes", "1", *given).out)
    largest, smaller = plan["buckets"]
    assert largest["clips"] == 1 and smaller["clips"] == 6
    assert plan["scaling"]["bucket"] == largest["bucket"] == "9x64x96"
    assert plan["scaling"]["work"]["training_tflop"] == 2 * largest["training_tflop"]


def test_of_two_experts_one_is_gathered(call, clips, tmp_path):
    """A pass asks one of them; both lie there, and both are trained."""
    row = TINY["wan-2.2-a14b"]
    model = row.write(tmp_path / "wan")
    config = write_config(
        tmp_path / "c.yaml",
        model={"path": str(model)},
        data={"train": str(clips), "buckets": [row.bucket]},
        method={"name": "full"},
        output=str(tmp_path / "run"),
    )
    plan = json.loads(call("plan", config, "--json", "--nodes", "1").out)
    one, other = num_parameters(model), num_parameters(model, "transformer_2")
    work = plan["scaling"]["work"]
    assert work["gathered_bytes"] == 2 * one
    assert work["weight_bytes"] == 4 * (one + other) == 4 * work["trained_parameters"]


def test_a_family_that_cannot_be_counted(call, config, monkeypatch):
    monkeypatch.setattr(LTXVideo, "runs_on_meta", False)
    assert json.loads(call("plan", config, "--json", "--nodes", "8").out)["scaling"] is None
    bare, answer = call("plan", config).out, call("plan", config, "--nodes", "8")
    assert answer.code == 0
    assert answer.out == bare + "no step time: the work of ltx cannot be counted without its weights\n"


@pytest.mark.parametrize("given", [["--nodes", "0"], ["--nodes", "-1"], ["--nodes", "two"], ["--gpus-per-node", "0"]])
def test_wrong_numbers_are_refused(call, config, given):
    answer = call("plan", config, *given)
    assert answer.code == 2 and given[0] in answer.err and len(answer.err.splitlines()) == 1, answer.err
