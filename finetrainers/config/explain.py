"""What is wrong with a config, in one line for the person who wrote it: the key, what it holds, what would be right."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from finetrainers.config.schema import METHODS, RunConfig

# Characters of mistakes that still read as one message; those beyond are counted.
_ROOM = 400

Location = tuple[int | str, ...]


class _Brief(reprlib.Repr):
    """repr that is bounded before it is built: aliases let a small YAML file hold a value of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to spell integers of more than 4300 digits.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else "a huge number"


def shown(value: Any) -> str:
    """A value as messages quote it: on one line, in about 60 characters."""
    return "nothing" if value is None else _cut(_Brief().repr(value), 60)


def one_line(text: object, limit: int = 200) -> str:
    """Any text, such as a file name or a parser's words, with control characters escaped."""
    return _cut("".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text)), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def explain(content: Mapping[Any, Any], error: ValidationError) -> str:
    """The mistakes of a config, one short clause for each key, as many as a line bears."""
    by_location: dict[Location, list[Any]] = {}
    for mistake in error.errors(include_url=False):
        by_location.setdefault(_location(content, mistake), []).append(mistake)
    line = ""
    for index, (location, mistakes) in enumerate(by_location.items()):
        clause = _clause(content, location, mistakes)
        if line and len(line) + len(clause) > _ROOM:
            return f"{line}; and {len(by_location) - index} more"
        line = f"{line}; {clause}" if line else clause
    return line


def _location(content: Mapping[Any, Any], mistake: Any) -> Location:
    """Where the mistake lies in what the user wrote: pydantic's location, less the names of a union's members and the
    index into a list that a single value was made into."""
    location: list[int | str] = []
    value: Any = content
    for part in mistake["loc"]:
        if part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value)):
            location.append(part)
            value = value[part]
    if mistake["type"] == "missing":
        location.append(mistake["loc"][-1])
    return tuple(location)


def _clause(content: Mapping[Any, Any], location: Location, mistakes: Sequence[Any]) -> str:
    key = ".".join(one_line(part, 40) for part in location)
    kind, value = mistakes[0]["type"], mistakes[0]["input"]
    if kind == "extra_forbidden":
        return f"unknown key `{key}`{_suggest(content, location)}"
    if kind == "missing":
        return f"`{key}` is missing"
    if kind == "union_tag_invalid":
        name = value.get("name") if isinstance(value, dict) else None
        return f"`{key}.name` is {shown(name)}: it must be one of {', '.join(METHODS)}{_did_you_mean(name, METHODS)}"
    if kind == "model_type":
        return (
            f"`{key}` is {shown(value)}: it must hold keys such as `{next(iter(_keys_of(content, location)), 'path')}:`"
        )
    # Each member of a union says what it would have taken.
    words = " or ".join(dict.fromkeys(_words(mistake["msg"]) for mistake in mistakes))
    return f"`{key}` is {shown(value)}: {words.replace(' or it must be ', ' or ')}"


def _words(message: str) -> str:
    message = message.removeprefix("Value error, ").replace("Input should", "it must")
    return message[0].lower() + message[1:]


def _keys_of(content: Mapping[Any, Any], location: Location) -> list[str]:
    """The keys of the section that `location` names; those of the whole config when it is empty."""
    kind: Any = RunConfig
    if location and location[0] == "method":
        kind = METHODS[_method_of(content)]
    else:
        for part in (part for part in location if isinstance(part, str)):
            field = kind.model_fields.get(part) if kind else None
            kind = _section_in(field.annotation) if field else None
    return list(kind.model_fields) if kind else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a type is, or holds as one of a union or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _method_of(content: Mapping[Any, Any]) -> str:
    method = content.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) and name in METHODS else "lora"


def _suggest(content: Mapping[Any, Any], location: Location) -> str:
    """The nearest key of the same section, or of any; failing both, the keys that the section has."""
    *parents, name = location
    siblings = _keys_of(content, tuple(parents))
    prefix = "".join(f"{parent}." for parent in parents)
    if hint := _did_you_mean(name, siblings, prefix):
        return hint
    if others := [
        other for other, options in METHODS.items() if parents == ["method"] and name in options.model_fields
    ]:
        return f": it is an option of method {' and '.join(others)}, and `method.name` is {_method_of(content)}"
    everywhere = {key: section for section in RunConfig.model_fields for key in _keys_of(content, (section,))}
    if close := difflib.get_close_matches(str(name), everywhere, n=1):
        return f" (did you mean `{everywhere[close[0]]}.{close[0]}`?)"
    return f"; allowed there: {', '.join(siblings)}" if siblings else ""


def _did_you_mean(given: Any, allowed: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(given, list(allowed), n=1) if isinstance(given, str) else []
    return f" (did you mean `{prefix}{close[0]}`?)" if close else ""
