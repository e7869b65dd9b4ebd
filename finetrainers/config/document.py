"""The option reference, `docs/options.md`, printed from the schema: `python -m finetrainers.config.document`."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetrainers.config.schema import METHODS, RunConfig, SourceConfig
from finetrainers.config.section import FREE

_INTRODUCTION = """# Options

Every key of a config file, printed from `finetrainers/config/schema.py`. Any of them may be overridden on the command
line as `section.key=value`, where the value is YAML. Unknown keys are errors. What is marked † may differ between a run
and its resumption; a resumed run must share everything else. *Left out* says what stands for `null`.
"""
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", types.NoneType: "`null`"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
# Bounds that only keep a slip of the finger out.
_UNTOLD = {10**9, 2**63}


def options_markdown() -> str:
    """One table a section: option, type, default, meaning."""
    top = {name: field for name, field in RunConfig.model_fields.items() if not _sections(name, field)}
    parts = [_INTRODUCTION, "## Top level\n", _table("", top)]
    for name, field in RunConfig.model_fields.items():
        for title, section in _sections(name, field):
            parts += [f"## {title}\n", f"{_prose(section.__doc__)}\n", _table(f"{name}.", section.model_fields)]
    return "\n".join(parts)


def _sections(name: str, field: FieldInfo) -> list[tuple[str, type[BaseModel]]]:
    """The tables of one key of the config, by title; `method` has one for each method, a plain key none."""
    if name == "method":
        return [(f"method: {method}", options) for method, options in METHODS.items()]
    kind = field.annotation
    return [(name, kind)] if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| option | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        mark = " †" if field.json_schema_extra == FREE else ""
        cells = [f"`{prefix}{name}`{mark}", _type(field.annotation, field.metadata), _default(field), _meaning(field)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _meaning(field: FieldInfo) -> str:
    # A method's name is explained by its section.
    return _prose(field.description) or "Chooses this method."


def _prose(text: str | None) -> str:
    return " ".join((text or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**must be given**"
    default = field.default
    if default is None:
        return "`null`"
    if isinstance(default, str):
        return f"`{default}`" if default else "empty"
    if isinstance(default, tuple):
        default = list(default)
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in the words of someone who writes YAML, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], _flat([*metadata, *arguments[1:]]))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument, metadata) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is list:
        return "list of paths" if arguments[0] is SourceConfig else f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if issubclass(annotation, BaseModel):
        keys = [
            f"`{name}` ({_type(field.annotation, field.metadata)})" for name, field in annotation.model_fields.items()
        ]
        return f"mapping with {' and '.join(keys)}"
    return " ".join([_WORDS[annotation], ", ".join(_bounds(metadata))]).strip()


def _flat(metadata: Iterable[Any]) -> list[Any]:
    """The metadata of an annotation, with those that `Field(...)` bundles unpacked."""
    return [part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def _bounds(metadata: Iterable[Any]) -> list[str]:
    given = [
        (sign, getattr(entry, name)) for entry in metadata for name, sign in _SIGNS.items() if hasattr(entry, name)
    ]
    return [f"{sign} {bound}" for sign, bound in given if bound not in _UNTOLD]


if __name__ == "__main__":
    print(options_markdown(), end="")
