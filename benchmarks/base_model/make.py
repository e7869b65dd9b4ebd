"""Makes the bundled model from nothing: its VAE, its clips, its transformer, and what was measured of it.

    python -m benchmarks.base_model.make --output work

Two CPU cores take a few hours. A stage whose result lies in the output folder is not done again, and the transformer's
training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(script: str, *arguments: str | Path) -> None:
    """Run one of the scripts beside this one."""
    print("+", script, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", f"{__package__}.{script}", *arguments], cwd=ROOT, check=True)


def pack(blank: Path, *, vae: Path, transformer: Path, output: Path) -> None:
    """The model in fp16, whose mantissa is longer than that of bf16. The text encoder, which is small, stays in fp32: a
    pipeline that is loaded without a type is then fp32 in all its parts."""
    pipeline = LTXPipeline.from_pretrained(
        blank,
        vae=AutoencoderKLLTXVideo.from_pretrained(vae),
        transformer=LTXVideoTransformer3DModel.from_pretrained(transformer),
    )
    pipeline.vae.half()
    pipeline.transformer.half()
    pipeline.save_pretrained(output)
    for config in output.rglob("*.json"):
        told = json.loads(config.read_text())
        # Where the parts lay here is nobody's affair.
        if told.pop("_name_or_path", None):
            config.write_text(json.dumps(told, indent=2) + "\n")
    shutil.copy(HERE / "card.md", output / "README.md")


def write_log(work: Path) -> None:
    """What training said of the loss, each fiftieth step of the transformer's, in one file."""
    log = {name: json.loads((work / name / "training.json").read_text()) for name in ("vae", "vae-sharper")}
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "validation_loss" in row or row["step"] % 50 == 0]
    seconds = sum(row["step_time"] for row in rows if "step_time" in row)
    log["transformer"] = {"seconds": round(seconds), "log": kept}
    (work / "log.json").write_text(
        json.dumps(log, indent=None, separators=(", ", ": ")).replace("}, {", "},\n{") + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    work = parser.parse_args().output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "vae" / "config.json").is_file():
        run("vae", "--output", work / "vae")
    if not (work / "vae-sharper" / "config.json").is_file():
        longer = ("--steps", "1000", "--lr", "1e-3", "--seed", "1")
        run("vae", "--decoder-of", work / "vae", "--output", work / "vae-sharper", *longer)
    if not (work / "clips" / "metadata.csv").is_file():
        run("clips", "--output", work / "clips")
    if not (work / "blank" / "model_index.json").is_file():
        run("blank", "--vae", work / "vae", "--output", work / "blank")
    shutil.copy(HERE / "base.yaml", work)
    # The config names its folders from where it lies.
    subprocess.run([sys.executable, "-m", "finetrainers", "train", "base.yaml"], cwd=work, check=True)
    weights = work / "run" / "weights" / "latest" / "transformer"
    pack(work / "blank", vae=work / "vae-sharper", transformer=weights, output=work / "ltx-shapes")
    write_log(work)
    run("evaluate", work / "ltx-shapes", "--output", work / "evaluation.json")


if __name__ == "__main__":
    main()
