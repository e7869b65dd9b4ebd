"""The kinds of plain values that options take, and the short ways in which they may be written."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from finetrainers.errors import UserError
from finetrainers.types import Bucket, Condition


def _plain_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _on_one_line(path: str) -> str:
    if not path.strip() or any(ord(char) < 32 for char in path):
        raise ValueError("it must be a path or a hub id on one line")
    return path


def _bucket(text: str) -> str:
    try:
        return str(Bucket.parse(text))
    except UserError:
        raise ValueError("it must be FRAMESxHEIGHTxWIDTH in positive whole numbers, such as 49x512x768") from None


def _condition(text: str) -> str:
    try:
        return str(Condition.parse(text))
    except UserError as error:
        raise ValueError(str(error)) from None


def _checkpointing(value: bool | str) -> str:
    word = {True: "full", False: "none"}[value] if isinstance(value, bool) else value
    if not re.fullmatch(r"full|none|attention|feed_forward|every-[1-9]\d{0,3}", word):
        raise ValueError("it must be full (or true), none (or false), attention, feed_forward or every-N, as every-2")
    return word


def _compiling(value: bool | str) -> str:
    # YAML reads off as false.
    word = {True: "blocks", False: "off"}[value] if isinstance(value, bool) else value
    if word not in ("auto", "off", "blocks"):
        raise ValueError("it must be auto, off (or false) or blocks (or true)")
    return word


def _budget(value: Any) -> Any:
    if value is None:
        return None
    text = f"{value}GB" if isinstance(value, (int, float)) else str(value).replace(" ", "").replace("GiB", "GB")
    if not re.fullmatch(r"auto|\d+(\.\d+)?GB", text):
        raise ValueError("it must be a size such as 24GB, or auto")
    return text


def as_shares(value: Any) -> Any:
    """`first` or `{first: 0.5}`."""
    return {value: 1.0} if isinstance(value, str) else value


def as_list(value: Any) -> Any:
    """`a` or `[a, b]`."""
    return [value] if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    """`./clips`, `{path: ./clips}` or a list of either."""
    entries = value if isinstance(value, list) else [value]
    return [{"path": entry} if isinstance(entry, (str, os.PathLike)) else entry for entry in entries]


def without_repeats(entries: list[str]) -> list[str]:
    """Each entry once, in the order given."""
    return list(dict.fromkeys(entries))


Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# The upper bound keeps a slip of the finger from becoming a number that no loop and no file can hold.
Count = Annotated[int, Field(ge=0, le=10**9)]
PositiveCount = Annotated[int, Field(ge=1, le=10**9)]
PathText = Annotated[str, BeforeValidator(_plain_path), AfterValidator(_on_one_line)]
ConditionText = Annotated[str, AfterValidator(_condition)]
BucketText = Annotated[str, AfterValidator(_bucket)]
BudgetText = Annotated[str, BeforeValidator(_budget)]
CheckpointingText = Annotated[bool | str, AfterValidator(_checkpointing)]
CompileText = Annotated[bool | str, AfterValidator(_compiling)]
