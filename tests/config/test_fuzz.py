"""Whatever a config file or an override holds, it is accepted, or refused in one line that names the file."""

import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetrainers.config.load import dump_config, identity, load_config
from finetrainers.config.schema import METHODS, RunConfig
from finetrainers.errors import UserError

Draw = random.Random

WHOLE = {
    "model": {
        "path": "base",
        "task": "text-to-video",
        "revision": "main",
        "rope_temporal": {"method": "ntk", "frames": 97},
    },
    "data": {
        "train": ["clips", {"path": "more"}],
        "validation": 0.1,
        "buckets": ["49x512x768"],
        "trigger": "BW",
        "conditions": {"first": 0.5, "prefix-9": 0.1},
    },
    "method": {"name": "lora", "rank": 8, "alpha": 8, "target_modules": ["to_q"]},
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99], "lr_scheduler": "cosine"},
    "training": {"steps": 10, "batch_size": 2, "precision": "fp32"},
    "validation": {"every": 5, "prompts": ["a cat"], "bucket": "9x32x32"},
    "checkpoint": {"every": 5, "keep": None},
    "tracking": {"trackers": ["wandb"]},
    "output": "runs/x",
}
KEYS = [
    *RunConfig.model_fields,
    *(name for field in RunConfig.model_fields.values() for name in getattr(field.annotation, "model_fields", {})),
    *(name for options in METHODS.values() for name in options.model_fields),
]
# Values as YAML text, so that tags and anchors can be among them; one between bars.
PLAUSIBLE = """
1|2|0.5|1e-4|1_000|null|text|'2'|9x32x32|[9x32x32]|[a, b]|[0.9, 0.9]|fp32|linear|full|wandb|é漢
"""
ODD = r"""
true|no|0|-1|1e400|.inf|-.nan|0x10|0o7|1:30|2024-01-01|2024-13-45|2024-01-01T25:00:00Z|~|''||0x0x0|99999x1x1|[]|{}|[[[]]]
{a: {b: {c: 1}}}|[null, 1, x]|!!binary aGVsbG8=|!!binary "é"|!!set {a, b}|!!set [a]|!!omap [a: 1]|!!omap 5
!!pairs [a: 1, a: 2]|!!int abc|!!int ""|!!float x|!!bool maybe|!!null x|!!timestamp x|!!str [a]|!!seq x|!!map x
!!python/object:os.system {}|!!python/name:os.system ""|!!python/object/apply:os.system [ls]|!custom {a: 1}|!<tag:x> 5
&a [*a]|&a {b: *a}|*missing|"a\0b"|"a\nb"|"\ud800"|"\u202eabc"|"\x85\u2028"|"\e[31m"|"\q"
{1: 2}|{null: 1}|{[a]: 1}|{{a: 1}: 1}|{a: 1, a: 2}|{<<: {a: 1}}|=|<<|{? a}|'|[|{|}|: |@|`|%|- a|a: b: c|>
"""
VALUES = [
    value for table in 5 * [PLAUSIBLE] + [ODD] for line in table.strip().splitlines() for value in line.split("|")
]
HUGE = [
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "0x" + "f" * 5000,
    "x" * 100_000,
    "[" * 400,
    "{a: " * 400,
    "[" * 99 + "]" * 99,
]
BOMB = "&a [" + "x, " * 9 + "]\n" + "\n".join(f"k{n}: &{chr(97 + n)} [{f'*{chr(96 + n)}, ' * 9}]" for n in range(1, 9))


def some_text(draw: Draw) -> str:
    alphabet = draw.choice(
        [string.ascii_lowercase, string.printable, "\0\n\t\r\x85\u2028\u202e", "éß漢\U0001f600", ":{}[]&*!|>"]
    )
    return "".join(draw.choices(alphabet, k=draw.randrange(1, 20)))


def misspelt(draw: Draw, word: str) -> str:
    at = draw.randrange(len(word) + 1)
    return draw.choice(
        [word[:at] + word[at + 1 :], word[:at] + some_text(draw) + word[at:], word.upper(), word * 30, ""]
    )


def walk(node: object, path: tuple = ()) -> list[tuple]:
    """The path of everything inside a nested config."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in entries for place in [(*path, key), *walk(value, (*path, key))]]


def mutate(draw: Draw, content: dict) -> None:
    """Delete, rename, add, swap or replace one thing; a `@@n@@` stands for the n-th of VALUES."""
    places = walk(content)
    if not places:
        return
    *parents, key = draw.choice(places)
    parent = content
    for part in parents:
        parent = parent[part]
    token = f"@@{draw.randrange(len(VALUES))}@@"
    kind = draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[misspelt(draw, key)] = parent.pop(key)
    elif kind == 2 and isinstance(parent, dict):
        parent[draw.choice([draw.choice(KEYS), some_text(draw)])] = token
    elif kind == 3:
        *_, other = draw.choice(places)
        parent[key] = draw.choice(
            [parent[key], [parent[key]], {str(other): parent[key]}, str(parent[key]), some_text(draw)]
        )
    else:
        parent[key] = token


def structured(draw: Draw) -> str:
    content = yaml.safe_load(yaml.safe_dump(WHOLE))
    for _ in range(draw.choice([0, 1, 1, 1, 1, 2, 20])):
        mutate(draw, content)
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=draw.choice([True, False, None]))
    for number, value in enumerate(VALUES):
        text = text.replace(f"'@@{number}@@'", value)
    if draw.random() < 0.05:
        text = text.replace("10", draw.choice(HUGE), 1)
    return text


def scrambled(draw: Draw) -> bytes:
    """A good file with bytes, lines or indentation disturbed."""
    data = bytearray(yaml.safe_dump(WHOLE, sort_keys=False).encode())
    for _ in range(draw.randrange(1, 8)):
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(3)] = draw.choice(
            [draw.randbytes(draw.randrange(1, 4)), b"\t", b"\n", b"  ", b"\xff", b""]
        )
    return bytes(data)


def hopeless(draw: Draw) -> bytes:
    odd = [
        draw.randbytes(draw.randrange(200)),
        BOMB.encode(),
        draw.choice(HUGE + VALUES).encode(),
        b"\xef\xbb\xbfmodel: x",
    ]
    return draw.choice(
        [*odd, draw.choice(KEYS).encode() + b": " + draw.choice(HUGE).encode(), some_text(draw).encode()]
    )


def some_override(draw: Draw) -> str:
    *parents, key = draw.choice(walk(WHOLE))
    parts = [*map(str, parents), str(key)]
    if draw.random() < 0.3:
        parts[draw.randrange(len(parts))] = misspelt(draw, draw.choice(parts))
    if draw.random() < 0.1:
        parts = parts * draw.choice([0, 3, 500])
    value = draw.choice([*draw.choices(VALUES, k=8), some_text(draw), draw.choice(HUGE)])
    return ".".join(parts) + draw.choice(["=", "=", "=", "=", " = ", "", "=="]) + value


def outcome(path: Path, overrides: list[str]) -> str:
    """`good` or `refused`; fails for anything else."""
    try:
        config = load_config(path, overrides)
    except UserError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 600, message
        assert path.name in message or "override " in message, message
        return "refused"
    identity(config)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    return "good"


KINDS: list[Callable[[Draw], str | bytes]] = [*[structured] * 6, scrambled, hopeless]


def fuzz(folder: Path, seeds: range) -> None:
    counts = {"good": 0, "refused": 0}
    for seed in seeds:
        draw = Draw(seed)
        text = draw.choice(KINDS)(draw)
        overrides = [some_override(draw) for _ in range(draw.choice([0, 0, 0, 1, 3]))]
        path = folder / "fuzzed.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            counts[outcome(path, overrides)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {str(text)[:2000]!r} with {str(overrides)[:2000]}") from error
    # Were all refused, or none, the mutations would say nothing.
    assert min(counts.values()) > len(seeds) / 20, counts


def test_the_unmutated_config_is_good(tmp_path):
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    assert outcome(path, []) == "good"


@pytest.mark.parametrize("part", range(3))
def test_fuzz(tmp_path, part):
    fuzz(tmp_path, range(part * 500, (part + 1) * 500))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_fuzz_at_length(tmp_path, part):
    fuzz(tmp_path, range(10_000 + part * 1000, 10_000 + (part + 1) * 1000))


@pytest.mark.parametrize("text", [f"a: {BOMB}", f"{yaml.safe_dump(WHOLE)}memory: {BOMB}"])
def test_a_value_that_aliases_make_endless_is_refused_at_once(tmp_path, text):
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    assert outcome(path, []) == "refused"
