"""A YAML file and `section.key=value` overrides become one frozen RunConfig, or one line that says what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from finetrainers.config.schema import FREE, FullOptions, LoraOptions, RunConfig
from finetrainers.errors import UserError
from finetrainers.types import Bucket

_METHODS: dict[str, type[BaseModel]] = {"lora": LoraOptions, "full": FullOptions}


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as the number that it is."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (list, dict)):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: _mapping(loader, node, deep=True))
# YAML 1.1 asks for a dot and a signed exponent; people write 1e-4.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{origin}{where} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        first_line = (str(error).splitlines() or ["it cannot be read"])[0]
        raise UserError(f"{origin} is not valid YAML: {first_line}") from None


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config file and apply overrides. Raises UserError, in one line, for anything that is wrong in either."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"config file {path} cannot be read: {reason}") from None
    content = _parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, but holds {_describe(content)}")
    for override in overrides or []:
        _apply_override(content, override)
    return build_config(content, origin=str(path))


def build_config(content: dict[Any, Any], origin: str = "the config") -> RunConfig:
    """Validate a plain dict. Raises UserError that names `origin`, the key, what is wrong and what is allowed."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(content, error))) from None
    except (RecursionError, UserError) as error:
        raise UserError(f"{origin}: {error}") from None


def _apply_override(content: dict[Any, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r} must be section.key=value, such as training.steps=500")
    target = content
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            raise UserError(f"override {override!r}: {part} is {_describe(target)}, which has no keys to set")
    target[parts[-1]] = _parse_yaml(value, f"the value of override {override!r}")


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(content: dict[Any, Any], error: ValidationError) -> Iterator[str]:
    """One short clause a mistake: the key, what is wrong with it, and what would be right."""
    seen = set()
    for mistake in error.errors(include_url=False):
        location = _strip_tags(mistake["loc"])
        key = ".".join(str(part) for part in location)
        kind = mistake["type"]
        if kind == "extra_forbidden":
            clause = f"unknown key `{key}`{_suggest(content, location)}"
        elif kind == "missing":
            clause = f"`{key}` is missing"
        elif kind == "union_tag_invalid":
            name = mistake["input"].get("name") if isinstance(mistake["input"], dict) else mistake["input"]
            close = difflib.get_close_matches(str(name), _METHODS, n=1)
            hint = f" (did you mean `{close[0]}`?)" if close else ""
            clause = f"`{key}.name` is {_describe(name)}; it must be one of {', '.join(_METHODS)}{hint}"
        else:
            message = mistake["msg"].removeprefix("Value error, ")
            message = message[0].lower() + message[1:]
            clause = f"`{key}` is {_describe(mistake['input'])}: {message}"
        # A union reports each of its members; one line for a key is enough.
        if key not in seen:
            seen.add(key)
            yield clause


def _strip_tags(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Drop what pydantic adds for unions and validators: ('method', 'lora', 'rank') -> ('method', 'rank')."""
    if len(location) > 1 and location[0] == "method" and location[1] in _METHODS:
        location = (location[0], *location[2:])
    return tuple(part for part in location if isinstance(part, int) or re.fullmatch(r"[^\[\]()]*", part))


def _keys_of(section: str, content: dict[Any, Any]) -> list[str]:
    if section == "method":
        method = content.get("method")
        name = method.get("name", "lora") if isinstance(method, dict) else "lora"
        return list(_METHODS.get(name, LoraOptions).model_fields)
    field = RunConfig.model_fields.get(section)
    kind = field.annotation if field else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _suggest(content: dict[Any, Any], location: tuple[int | str, ...]) -> str:
    """The nearest key of the same section, or of any; failing both, the keys that the section has."""
    name = str(location[-1])
    section = str(location[0]) if len(location) > 1 else ""
    siblings = _keys_of(section, content) if section else list(RunConfig.model_fields)
    prefix = f"{section}." if section else ""
    if len(location) <= 2:
        if close := difflib.get_close_matches(name, siblings, n=1):
            return f" (did you mean `{prefix}{close[0]}`?)"
        everywhere = {key: other for other in RunConfig.model_fields for key in _keys_of(other, content)}
        if close := difflib.get_close_matches(name, everywhere, n=1):
            return f" (did you mean `{everywhere[close[0]]}.{close[0]}`?)"
    return f"; allowed there: {', '.join(siblings)}" if siblings else ""


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
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def identity(config: RunConfig) -> dict[str, Any]:
    """The options that a resumed run must share with the run that it continues, as a flat `section.key` dict."""
    flat: dict[str, Any] = {}
    for section_name, section in config:
        if not isinstance(section, BaseModel):
            continue
        for name, field in type(section).model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if extra.get("resume") != FREE["resume"]:
                flat[f"{section_name}.{name}"] = section.model_dump(mode="json")[name]
    return flat


def resolved_buckets(config: RunConfig) -> list[Bucket]:
    """`data.buckets` as Bucket objects; they must have been filled in."""
    assert config.data.buckets is not None
    return [Bucket.parse(bucket) for bucket in config.data.buckets]

