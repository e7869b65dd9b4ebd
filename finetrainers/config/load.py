"""A YAML file and `section.key=value` overrides become one frozen RunConfig, or one line that says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from finetrainers.config.explain import explain, one_line, shown
from finetrainers.config.schema import RunConfig
from finetrainers.config.section import FREE
from finetrainers.errors import UserError
from finetrainers.types import Bucket, Condition


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, reads 1e-4 as a number, and says on which line a value is wrong."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # What PyYAML lets through for a value that does not suit its tag, such as 2024-13-45 or `!!bool maybe`.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            text = shown(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            raise _mistake(f"{text} is not a valid {node.tag.rpartition(':')[2]}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    key = shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                    raise _mistake(f"a key must be a word, but is {key}", key_node)
                if key_node.value in seen:
                    raise _mistake(f"key {shown(key_node.value)} is given twice", key_node)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads back equal: the text 1e-4 is quoted, and line breaks are escaped."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds Unicode's own line breaks, and loses some, in any style but this.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


# YAML 1.1 asks for a dot and a signed exponent; people write 1e-4.
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def _mistake(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        where = f" (line {text.count(chr(10), 0, error.position) + 1})"
        problem = f"character {shown(chr(error.character))} is not allowed"
    except RecursionError:
        where, problem = "", "it is nested too deeply"
    raise UserError(f"{origin}{where} is not valid YAML: {one_line(problem)}")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config file and apply overrides. Raises UserError, in one line, for anything that is wrong in either."""
    origin = one_line(path, limit=4096)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {origin} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"config file {origin} cannot be read: {reason}") from None
    content = _parse_yaml(text, origin)
    if not isinstance(content, dict):
        raise UserError(f"{origin} must hold sections such as `model:` and `data:`, but holds {shown(content)}")
    for override in overrides or []:
        _apply_override(content, override)
    return build_config(content, origin=origin)


def build_config(content: dict[Any, Any], origin: str = "the config") -> RunConfig:
    """Validate a plain dict. Raises UserError that names `origin`, the key, what is wrong and what is allowed."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{origin}: {explain(content, error)}") from None


def _apply_override(content: dict[Any, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {shown(override)} must be section.key=value, such as training.steps=500")
    target = content
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(
                f"override {shown(override)}: `{one_line(part, 40)}` is {shown(target)}, which has no keys to set"
            )
    target[parts[-1]] = _parse_yaml(value, f"the value of override {shown(override)}")


def fill_defaults(config: RunConfig, defaults: dict[str, Any]) -> RunConfig:
    """Put the family's values where the user gave none. `defaults` maps `section.key` to a value; keys that the
    chosen method does not have are passed over."""
    content = config.model_dump()
    for key, value in defaults.items():
        section, name = key.split(".")
        if name in content[section] and content[section][name] is None:
            content[section][name] = value
    return RunConfig.model_validate(content)


def dump_config(config: RunConfig) -> str:
    """The config as YAML, every option written out: enough to repeat the run."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def identity(config: RunConfig) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it continues, as a flat `section.key` dict."""
    flat: dict[str, Any] = {}
    for section_name, section in config:
        if not isinstance(section, BaseModel):
            continue
        values = section.model_dump(mode="json")
        flat |= {
            f"{section_name}.{name}": values[name]
            for name, field in type(section).model_fields.items()
            if field.json_schema_extra != FREE
        }
    # A schedule that bends towards the last step gives other learning rates when that step moves.
    if not config.optimizer.lr_scheduler.startswith("constant"):
        flat["training.steps"] = config.training.steps
    return flat


def resolved_buckets(config: RunConfig) -> list[Bucket]:
    """`data.buckets` as Bucket objects; they must have been filled in."""
    assert config.data.buckets is not None
    return [Bucket.parse(bucket) for bucket in config.data.buckets]


def resolved_conditions(config: RunConfig) -> list[tuple[Condition, float]]:
    """`data.conditions` as Condition objects with shares that add up to 1; they must have been filled in."""
    assert config.data.conditions is not None
    shares = {Condition.parse(text): share for text, share in config.data.conditions.items()}
    left = 1 - sum(shares.values())
    if left > 1e-6:
        shares[Condition()] = shares.get(Condition(), 0.0) + left
    return [(condition, share) for condition, share in shares.items() if share > 0]
