"""From what the user points at, a folder of clips or a table, to records: a file and its caption each."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetrainers.errors import UserError
from finetrainers.types import Record

VIDEO_EXTENSIONS = (
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv",
    ".3gp", ".gif", ".h264", ".264", ".h265", ".hevc", ".265", ".ivf", ".obu", ".vob", ".mxf",
)  # fmt: skip
"""A gif is a video, though it may have one frame."""
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Of an animated picture of these kinds, the first frame is used."""
TABLE_EXTENSIONS = (".csv", ".jsonl", ".parquet")

_FILE_COLUMNS = ("file_name", "video", "path", "media_path", "file")
_CAPTION_COLUMNS = ("caption", "text", "prompt")
_TABLE_NAMES = tuple(f"metadata{extension}" for extension in TABLE_EXTENSIONS)
_EXAMPLE_ROW = '{"file_name": "cat.mp4", "caption": "a cat"}'
_VIDEO_LIST, _PROMPT_LIST = "videos.txt", "prompts.txt"

logger = logging.getLogger(__name__)


def read_source(path: str | Path) -> list[Record]:
    """The clips of a folder (with a metadata table, a `.txt` beside each clip, or `videos.txt` and `prompts.txt`) or of
    one table, in a fixed order: a folder's by name, a table's as its rows.

    Tables may name files anywhere on disk: they are only read. Raises UserError, which says how to mend it.
    """
    path = Path(path)
    if path.is_dir():
        records = _read_folder(path)
    elif not path.exists():
        raise UserError(
            f"{path}: there is no such file or folder; give a folder of clips or a csv, jsonl or parquet table"
        )
    elif path.suffix.lower() in TABLE_EXTENSIONS:
        records = _read_table(path)
    elif path.name == _VIDEO_LIST:
        records = _read_lists(path.parent)
    else:
        raise UserError(f"{path}: is neither a folder nor a table ({', '.join(TABLE_EXTENSIONS)})")
    if not records:
        raise UserError(f"{path}: lists no clip; add a row per clip")
    return records


def _read_folder(folder: Path) -> list[Record]:
    tables = [folder / name for name in _TABLE_NAMES if (folder / name).is_file()]
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        raise UserError(f"{folder}: has {names}; keep one, or give data.train the one that is meant")
    if tables:
        records = _read_table(tables[0])
        _warn_of_unlisted(folder, records, listed_in=tables[0].name)
        return records
    if (folder / _VIDEO_LIST).is_file():
        records = _read_lists(folder)
        _warn_of_unlisted(folder, records, listed_in=_VIDEO_LIST)
        return records
    clips = _clips_in(folder)
    if not clips:
        raise UserError(f"{folder}: has no clip; files of these kinds are looked for: {_kinds()}")
    uncaptioned = [clip for clip in clips if not clip.with_suffix(".txt").is_file()]
    if uncaptioned:
        raise UserError(
            f"{folder}: {_count(uncaptioned, folder)} without a caption; put a .txt of the same name beside each clip "
            "(an empty one is an empty caption), or a metadata.csv with the columns file_name and caption"
        )
    return [_record(clip, folder, _read_text(clip.with_suffix(".txt")).strip()) for clip in clips]


def _clips_in(folder: Path) -> list[Path]:
    """Videos and images under the folder, by name; hidden files and folders are passed over."""
    found = []
    # Links are followed as files, not as folders: a link back up would never end.
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_EXTENSIONS + IMAGE_EXTENSIONS
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: this folder cannot be read ({error.strerror}); make it readable, or move it away"
    )


def _warn_of_unlisted(folder: Path, records: Sequence[Record], *, listed_in: str) -> None:
    listed = {os.path.realpath(record.path) for record in records}
    unlisted = [clip for clip in _clips_in(folder) if os.path.realpath(clip) not in listed]
    if unlisted:
        logger.warning("%s: %s not used, for %s does not list them", folder, _count(unlisted, folder), listed_in)


def _read_table(table: Path) -> list[Record]:
    rows, columns = _READERS[table.suffix.lower()](table)
    file_column = _find_column(table, columns, _FILE_COLUMNS, "a file")
    caption_column = _find_column(table, columns, _CAPTION_COLUMNS, "a caption")
    records = []
    for place, row in rows:
        file, caption = row.get(file_column), row.get(caption_column)
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{table}: {place} names no file in its column {file_column}")
        if not isinstance(caption, str):
            raise UserError(f"{table}: {place} ({file}) has no text in its column {caption_column}")
        records.append(_listed(table, place, file.strip(), caption.strip()))
    return records


def _read_lists(folder: Path) -> list[Record]:
    """The layout of finetrainers 0.0: a path a line in `videos.txt`, its caption on the same line of `prompts.txt`."""
    videos, prompts = folder / _VIDEO_LIST, folder / _PROMPT_LIST
    if not prompts.is_file():
        raise UserError(f"{videos}: needs {_PROMPT_LIST} beside it, with the caption of each of its lines")
    files, captions = (_read_text(path).strip("\n").split("\n") for path in (videos, prompts))
    if len(files) != len(captions):
        raise UserError(
            f"{videos}: has {len(files)} lines, but {prompts.name} has {len(captions)}; they go line by line"
        )
    return [
        _listed(videos, f"line {number}", file.strip(), caption.strip())
        for number, (file, caption) in enumerate(zip(files, captions, strict=True), start=1)
        if file.strip() or caption.strip()
    ]


def _listed(table: Path, place: str, file: str, caption: str) -> Record:
    path = table.parent / file
    try:
        found = bool(file) and os.path.lexists(path) and not path.is_dir()
    except ValueError:  # a NUL byte in the name
        found = False
    if not found:
        raise UserError(
            f"{table}: {place} names {file!r}, which is not there; paths are relative to the table's folder"
        )
    return _record(path, table.parent, caption)


def _record(path: Path, folder: Path, caption: str) -> Record:
    return Record(name=Path(os.path.relpath(path, folder)).as_posix(), path=path, caption=caption)


Rows = tuple[list[tuple[str, dict[str, Any]]], list[str]]
"""Each row with its place in the file, as messages name it, and the columns."""


def _read_csv(table: Path) -> Rows:
    text = _read_text(table)
    usual_limit = csv.field_size_limit(len(text) + 1)  # a caption may be as long as it likes
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
        reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{table}: line {reader.line_num} is not csv ({error})") from error
    finally:
        csv.field_size_limit(usual_limit)
    for place, row in rows:
        if None in row:
            raise UserError(f"{table}: {place} has more fields than the header; put a caption with commas in quotes")
    return rows, list(reader.fieldnames)


def _read_jsonl(table: Path) -> Rows:
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(_read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{table}: line {number} is not json ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{table}: line {number} is not an object, such as {_EXAMPLE_ROW}")
        rows.append((f"line {number}", row))
    return rows, list(dict.fromkeys(column for _, row in rows for column in row))


def _read_parquet(table: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{table}: parquet is read with pyarrow; pip install finetrainers[parquet]") from error
    try:
        columns = pyarrow.parquet.read_schema(table).names
        wanted = [column for column in columns if column in _FILE_COLUMNS + _CAPTION_COLUMNS]
        rows = pyarrow.parquet.read_table(table, columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read as parquet ({str(error).splitlines()[0]})") from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)], columns


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise UserError(f"{path}: holds a NUL byte, so it is no text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _find_column(table: Path, columns: Sequence[str], wanted: Sequence[str], what: str) -> str:
    for column in wanted:
        if column in columns:
            return column
    has = ", ".join(map(str, columns)) or "none"
    raise UserError(
        f"{table}: no column names {what}; call it {wanted[0]} ({' or '.join(wanted[1:])} will do); it has: {has}"
    )


def _count(clips: Sequence[Path], folder: Path) -> str:
    names = ", ".join(clip.relative_to(folder).as_posix() for clip in clips[:3])
    more = ", ..." if len(clips) > 3 else ""
    return f"{len(clips)} clip{'s' * (len(clips) != 1)} ({names}{more})"


def _kinds() -> str:
    return " ".join(VIDEO_EXTENSIONS + IMAGE_EXTENSIONS)
