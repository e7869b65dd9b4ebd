"""Each example config is short, is read, and fits the variant that it is for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from finetrainers.cli import build_parser
from finetrainers.commands.completing import build_method
from finetrainers.config.load import fill_defaults, load_config, resolved_conditions
from finetrainers.families.find import find_family
from finetrainers.types import Bucket
from tests.families.tiny import TINY

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "cluster")
OF_ROW = {
    "own-family": "own_family/config.yaml",
    "own-family-empty-prompt-kept": "own_family/config.yaml",
    "cogvideox-2b": "cogvideox_lora/2b.yaml",
    "cogvideox-5b": "cogvideox_lora/5b.yaml",
    "cogvideox-5b-i2v": "cogvideox_lora/5b-i2v.yaml",
    "cogvideox-1.5": "cogvideox_lora/1.5-5b.yaml",
    "cogvideox-1.5-i2v": "cogvideox_lora/1.5-5b-i2v.yaml",
    "hunyuan": "hunyuan_lora/t2v.yaml",
    "hunyuan-i2v": "hunyuan_lora/i2v.yaml",
    "hunyuan-i2v-33ch": "hunyuan_lora/i2v-33ch.yaml",
    "ltx-0.9.0": "ltx_lora/config.yaml",
    "ltx-0.9.0-i2v": "ltx_image_to_video_lora/first_frame.yaml",
    "ltx-0.9.5": "ltx_lora/13b.yaml",
    "ltx-bundled": "ltx_style_lora/config.yaml",
    "ltx-0.9.5-i2v": "ltx_image_to_video_lora/config.yaml",
    "wan-2.1": "wan_lora/2.1-t2v-1.3b.yaml",
    "wan-2.1-i2v": "wan_lora/2.1-i2v-14b.yaml",
    "wan-2.1-flf2v": "wan_lora/2.1-flf2v-14b.yaml",
    "wan-2.2-5b": "wan_lora/2.2-t2v-5b.yaml",
    "wan-2.2-5b-i2v": "wan_lora/2.2-i2v-5b.yaml",
    "wan-2.2-a14b": "wan_lora/2.2-t2v-a14b.yaml",
    "wan-2.2-a14b-i2v": "wan_lora/2.2-i2v-a14b.yaml",
}


def test_there_are_some():
    assert len(CONFIGS) >= len(OF_ROW)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_it_is_short_and_is_read(config):
    load_config(config)
    assert len(config.read_text().splitlines()) <= 40


@pytest.mark.parametrize("name", TINY)
def test_every_variant_has_one_that_fits(name, tmp_path):
    """Its task, options, conditions and method, on the tiny model of the variant; sizes are the full model's."""
    row = TINY[name]
    folder = row.write(tmp_path / "model")
    # The example names its family as it is found from its own folder.
    named = [f"model.family={row.options['family']}"] if "family" in row.options else []
    config = load_config(EXAMPLES / OF_ROW[name], [f"model.path={folder}", "data.train=.", *named])
    family = find_family(config.model)
    config = fill_defaults(config, family.defaults(config.method.name))
    assert family.task == row.task == config.model.task
    for condition, _ in resolved_conditions(config):
        assert family.check_condition(condition, Bucket(49, 512, 768)) is None
    assert build_method(family, config).name == config.method.name


def test_cluster_scripts_start_what_there_is():
    """The shell reads the one and YAML the other, and both end in a command that the command line knows."""
    script = EXAMPLES / "cluster" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.read_text().rstrip().endswith('-m finetrainers train "$@"')
    job = yaml.safe_load((EXAMPLES / "cluster" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    torchrun, _, module, *arguments = container["command"]
    assert (torchrun, module) == ("torchrun", "finetrainers")
    assert build_parser().parse_args(arguments).overrides == ["output=/data/run", "data.cache=/data/cache"]
