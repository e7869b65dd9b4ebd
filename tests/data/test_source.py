"""What a user may point at, and the one line that answers each way of getting it wrong."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from finetrainers.data.source import read_source
from finetrainers.errors import UserError


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files by name; reading a source never looks into a clip, so clips are empty."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet(folder: Path, **columns: list) -> Path:
    path = folder / "metadata.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").table(columns), path)
    return path


def listing(path: Path | str) -> list[tuple[str, str]]:
    return [(record.name, record.caption) for record in read_source(path)]


CLIPS: dict[str, str | bytes] = {"a.mp4": "", "sub/b.webm": "", "c.png": ""}
CAPTIONS = [("a.mp4", "first, with a comma"), ("sub/b.webm", 'a "second"'), ("c.png", "")]
CSV = 'file_name,caption\na.mp4,"first, with a comma"\nsub/b.webm,"a ""second"""\nc.png,\n'
JSONL = (
    '{"file_name": "a.mp4", "caption": "first, with a comma"}\n\n'
    '{"file_name": "sub/b.webm", "caption": "a \\"second\\""}\n{"file_name": "c.png", "caption": ""}'
)


@pytest.mark.parametrize(
    "content", [CSV, "\ufeff" + CSV, CSV.replace("\n", "\r\n"), CSV.replace(",", ", ", 1) + "\n\n"]
)
def test_a_csv(tmp_path: Path, content: str) -> None:
    fill(tmp_path, CLIPS | {"metadata.csv": content})
    assert listing(tmp_path) == listing(tmp_path / "metadata.csv") == CAPTIONS
    assert [record.path for record in read_source(tmp_path)] == [tmp_path / name for name, _ in CAPTIONS]


def test_a_jsonl(tmp_path: Path) -> None:
    fill(tmp_path, CLIPS | {"metadata.jsonl": JSONL})
    assert listing(tmp_path) == listing(str(tmp_path / "metadata.jsonl")) == CAPTIONS


def test_a_parquet(tmp_path: Path) -> None:
    names, captions = (list(column) for column in zip(*CAPTIONS, strict=True))
    path = parquet(fill(tmp_path, CLIPS), number=[1, 2, 3], file_name=names, caption=captions)
    assert listing(tmp_path) == listing(path) == CAPTIONS


@pytest.mark.parametrize("file_column", ["file_name", "video", "path", "media_path", "file"])
@pytest.mark.parametrize("caption_column", ["caption", "text", "prompt"])
def test_columns_go_by_several_names(tmp_path: Path, file_column: str, caption_column: str) -> None:
    fill(tmp_path, {"a.mp4": "", "metadata.csv": f"id,{caption_column},{file_column}\n7,words,a.mp4\n"})
    assert listing(tmp_path) == [("a.mp4", "words")]


def test_a_long_caption_with_unicode_line_separators(tmp_path: Path) -> None:
    caption = "word " * 100_000 + "one\u2028two\x0bthree"
    fill(tmp_path, {"a.mp4": "", "metadata.csv": f"file_name,caption\na.mp4,{caption}\n"})
    assert listing(tmp_path) == [("a.mp4", caption)]


def test_a_folder_with_text_files(tmp_path: Path) -> None:
    files = {"b.mp4": "", "b.txt": " second \n", "A/z.MOV": "", "A/z.txt": "first", "c.png": "", "c.txt": ""}
    fill(tmp_path, files | {".hidden.mp4": "", ".cache/d.mp4": "", "notes.md": "", "A/thumbs.db": ""})
    assert listing(tmp_path) == [("A/z.MOV", "first"), ("b.mp4", "second"), ("c.png", "")]


def test_the_old_layout(tmp_path: Path) -> None:
    fill(tmp_path, CLIPS | {"videos.txt": "sub/b.webm\na.mp4\n", "prompts.txt": "of b\nof a\n"})
    assert listing(tmp_path / "videos.txt") == [("sub/b.webm", "of b"), ("a.mp4", "of a")]
    assert listing(tmp_path) == listing(tmp_path / "videos.txt")


@pytest.mark.parametrize("table", ["metadata.csv", "videos.txt"])
def test_clips_that_a_table_leaves_out_are_counted_and_named(
    tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    lists = {"metadata.csv": "file_name,caption\n./x0.mp4,words\n", "videos.txt": "x0.mp4\n", "prompts.txt": "words\n"}
    if table == "videos.txt":
        del lists["metadata.csv"]
    fill(tmp_path, {f"x{number}.mp4": "" for number in range(6)} | lists)
    with caplog.at_level(logging.WARNING):
        assert len(read_source(tmp_path)) == 1
    assert len(caplog.records) == 1
    assert "5 clips (x1.mp4, x2.mp4, x3.mp4, ...)" in caplog.text and table in caplog.text


def test_a_table_may_name_files_anywhere(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", {"a.mp4": "", "b.mp4": ""})
    rows = f"file_name,caption\n{elsewhere / 'a.mp4'},one\n../elsewhere/b.mp4,two\n"
    records = read_source(fill(tmp_path / "tables", {"t.csv": rows}) / "t.csv")
    assert [record.path.resolve() for record in records] == [elsewhere / "a.mp4", elsewhere / "b.mp4"]
    assert [record.name for record in records] == ["../elsewhere/a.mp4", "../elsewhere/b.mp4"]


def test_links_do_not_go_round_in_circles(tmp_path: Path) -> None:
    fill(tmp_path, {"sub/a.mp4": "", "sub/a.txt": "words"})
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.mp4").symlink_to("sub/a.mp4")
    (tmp_path / "link.txt").write_text("linked")
    assert listing(tmp_path) == [("link.mp4", "linked"), ("sub/a.mp4", "words")]


HEAD = "file_name,caption\n"


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "absent", ["absent", "no such file or folder"]),
        ({}, "", ["no clip", ".mp4", ".png"]),
        ({"notes.md": ""}, "", ["no clip"]),
        ({"a.mp4": ""}, "a.mp4", ["a.mp4", "neither a folder nor a table", ".parquet"]),
        (
            {f"{n}.mp4": "" for n in range(5)} | {"0.txt": ""},
            "",
            ["4 clips (1.mp4, 2.mp4, 3.mp4, ...)", "metadata.csv"],
        ),
        (
            {"a.mp4": "", "metadata.csv": HEAD, "metadata.jsonl": "{}"},
            "",
            ["metadata.csv and metadata.jsonl", "keep one"],
        ),
        ({"metadata.csv": HEAD}, "", ["no clip"]),
        ({"metadata.csv": ""}, "", ["metadata.csv", "no column names a file", "none"]),
        ({"metadata.csv": "name,words\na.mp4,x\n"}, "", ["no column names a file", "file_name", "it has: name, words"]),
        ({"metadata.csv": "file_name,words\na.mp4,x\n"}, "", ["no column names a caption", "it has: file_name, words"]),
        ({"metadata.csv": HEAD + "gone.mp4,x\n"}, "", ["metadata.csv", "line 2", "gone.mp4", "not there"]),
        ({"metadata.csv": HEAD + ".,x\n"}, "", ["line 2", "not there"]),
        ({"metadata.csv": HEAD + ",x\n"}, "", ["line 2", "names no file"]),
        ({"a.mp4": "", "metadata.csv": HEAD + "a.mp4\n"}, "", ["line 2", "a.mp4", "no text"]),
        ({"a.mp4": "", "metadata.csv": HEAD + "a.mp4,one, two\n"}, "", ["line 2", "more fields", "quotes"]),
        ({"a.mp4": "", "metadata.csv": HEAD + 'a.mp4,"open\n'}, "", ["metadata.csv", "not csv"]),
        ({"metadata.csv": HEAD.encode() + b"a\x00.mp4,x\n"}, "", ["metadata.csv", "NUL"]),
        ({"metadata.csv": HEAD.encode("utf-16")}, "", ["metadata.csv", "UTF-8"]),
        ({"metadata.csv": HEAD.encode() + b"a.mp4,\xe9t\xe9\n"}, "", ["metadata.csv", "UTF-8"]),
        ({"metadata.jsonl": '{"file_name": "a.mp4"'}, "", ["line 1", "not json"]),
        ({"metadata.jsonl": "[1, 2]"}, "", ["line 1", "not an object", "file_name"]),
        ({"metadata.jsonl": "[" * 100_000}, "", ["line 1", "not json"]),
        ({"a.mp4": "", "metadata.jsonl": '{"file_name": "a.mp4", "caption": 3}'}, "", ["line 1", "a.mp4", "no text"]),
        ({"metadata.jsonl": '{"file_name": "a\\u0000.mp4", "caption": ""}'}, "", ["line 1", "not there"]),
        ({"metadata.jsonl": '{"file_name": ["a.mp4"], "caption": ""}'}, "", ["line 1", "names no file"]),
        ({"metadata.parquet": b"PAR1 not really"}, "", ["metadata.parquet", "cannot be read as parquet"]),
        ({"a.mp4": "", "videos.txt": "a.mp4\n"}, "", ["videos.txt", "prompts.txt"]),
        ({"a.mp4": "", "videos.txt": "a.mp4\n", "prompts.txt": "x\ny\nz\n"}, "", ["has 1 lines", "prompts.txt has 3"]),
        ({"videos.txt": "b.mp4\n", "prompts.txt": "x\n"}, "", ["videos.txt", "line 1", "b.mp4", "not there"]),
    ],
)
def test_wrong_input_gets_one_line(
    tmp_path: Path, files: dict[str, str | bytes], source: str, words: list[str]
) -> None:
    if "metadata.parquet" in files:
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError) as caught:
        read_source(fill(tmp_path, files) / source)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and str(tmp_path) in message
    for word in words:
        assert word in message, message


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"metadata.parquet": b""})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install finetrainers\[parquet\]"):
        read_source(tmp_path)


def test_reading_a_source_imports_nothing_heavy() -> None:
    program = "import finetrainers.data.source, sys; assert not {'torch', 'av', 'PIL', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_real_clips(real_clips: Path) -> None:
    records = read_source(real_clips)
    assert len(records) == 7
    assert all(record.caption and record.path.is_file() for record in records)
