"""Local files to documents, in bounded memory: text, JSON and Parquet, also compressed.

Files are opened by their exact names; only the column of the text is read.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # after one of the above
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "test")  # words in names of files and folders
SPLIT_NAMES = {*HELD_OUT_NAMES, "train", "training"}
HIDDEN = re.compile(r"\.|__MACOSX$")
MISSING = object()
LONGEST = 50_000  # characters of a document; a longer one is cut


def text_files(paths: list[Path]) -> dict[Path, bool]:
    """The text files at these paths and in these folders, each once, and whether they are held out.

    Raises FileNotFoundError for one that does not exist, ValueError for a named file of another type.
    """
    found = {}  # by the file that a link points to
    for path in paths:
        root = path.parent if len(paths) > 1 and path.name.lower() in SPLIT_NAMES else path
        for file in _shown(path, set()) if path.is_dir() else [path]:
            if not os.path.exists(file):
                target = f": it points to {file.readlink()}" if file.is_symlink() else ""
                raise FileNotFoundError(f"there is no file or folder {file}{target}")
            if file.is_file() and extension(file) in READERS:
                names = [*reversed(file.relative_to(root).parts[:-1]), file.stem]
                first, held_out = found.get(file.resolve(), (file, False))
                found[file.resolve()] = first, held_out or _is_held_out(names)
            elif file == path:
                raise ValueError(f"{file} holds no text: files of type {', '.join(READERS)} are read")
    return dict(found.values())


def _is_held_out(names: list[str]) -> bool:
    """Whether the first name with a word of `SPLIT_NAMES` has one of held-out text."""
    for name in names:
        words = set(re.findall(r"[^\W\d_]+", name.lower()))
        if words & SPLIT_NAMES:
            return not words.isdisjoint(HELD_OUT_NAMES)
    return False


def _shown(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted, without hidden ones; `seen` ends loops of links."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        for path in sorted(path for path in folder.iterdir() if not HIDDEN.match(path.name)):
            yield from _shown(path, seen) if path.is_dir() else [path]


def documents(files: list[Path], column: str) -> Iterator[dict[str, str]]:
    """Yield {column: text} for each document of the files. Raises ValueError that names file, row and column."""
    for file in files:
        if READERS[extension(file)] == "text":
            texts = (piece.rstrip() for lines in _paragraphs(file) for piece in pieces(lines))
        else:
            texts = (piece for text in _column(file, column) for piece in pieces([text]))
        yield from ({column: text} for text in texts if text.strip())


def pieces(lines: Iterable[str]) -> Iterator[str]:
    """Join lines, and cut a text of more than `LONGEST` characters, at an end of a line or else between words."""
    held = ""
    for line in lines:
        held += line
        start = 0
        while len(held) - start > LONGEST:
            limits = start + LONGEST // 2, start + LONGEST
            end = max(held.rfind("\n", *limits), 0) or max(held.rfind(" ", *limits), 0) or limits[1]
            yield held[start:end]
            start = end
        held = held[start:]
    yield held


def extension(file: Path) -> str:
    """The extension in lower case, without that of a compression."""
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name).suffix.lower()


def opened(file: Path) -> BinaryIO:
    """The decompressed content. Reading raises an error if the end is missing."""
    codec = COMPRESSED.get(file.suffix.lower())
    if codec in (None, "xz"):
        return (lzma.open if codec else open)(file, "rb")
    return pa.input_stream(file.open("rb"), compression=codec)


def text_of(row: dict, column: str, where: str) -> str | None:
    """The text in a row. Raises ValueError that names row and column if there is none."""
    value = _field(row, column)
    if value is MISSING:
        raise ValueError(f"{where} has no column {column!r}: set text_column to one of {list(row)}")
    try:
        if value is None or value.encode() is not None:
            return value
    except (AttributeError, UnicodeEncodeError):  # no string, or half of a surrogate pair
        found = f"the {type(value).__name__} {str(value)[:50]!a}"
        raise ValueError(f"{where}, column {column!r} holds no text but {found}: set text_column") from None


def _field(row: object, name: str) -> object:
    """The value of a column, or for "a.b" of the field b of column a; MISSING if there is none."""
    if not isinstance(row, dict):
        return MISSING
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    return None if outer in row and row[outer] is None else _field(row.get(outer), inner)


def _paragraphs(file: Path) -> Iterator[Iterable[str]]:
    """The lines of each text between blank lines; in a file without a blank line between lines of text, each line."""
    if next(islice(_between_blank_lines(file), 1, None), None):  # a second text
        yield from _between_blank_lines(file)
    else:
        yield from ([line] for line in _lines(file))


def _between_blank_lines(file: Path) -> Iterator[Iterable[str]]:
    return (lines for blank, lines in groupby(_lines(file), str.isspace) if not blank)


def _lines(file: Path) -> Iterator[str]:
    """The lines, all with the line end \\n."""
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig") as stream:
        yield from stream


def _column(file: Path, column: str) -> Iterator[str]:
    """The texts of the rows that have one. Raises ValueError if no row has the column."""
    without, found = None, False
    for number, row in _rows(file, column):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, row {number} is a {type(row).__name__}: write an object with {column!r}")
        value = _field(row, column)
        if value is MISSING:
            without = row if without is None else without
        else:
            found = found or column in row or value is not None  # a field of a missing value can have any name
            yield text_of(row, column, f"{file}, row {number}") or ""
    if without is not None and not found:
        text_of(without, column, str(file))


def _rows(file: Path, column: str) -> Iterator[tuple[int, object]]:
    """(number, row) with at least this column, if there is one; of JSON lines, the number of the line."""
    kind = READERS[extension(file)]
    try:
        yield from enumerate(_parquet(file, column), 1) if kind == "parquet" else _json(file)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} could not be read as {kind}: {error}") from error


def _parquet(file: Path, column: str) -> Iterator[dict]:
    with opened(file) as stream:
        table = pq.ParquetFile(stream)
        names = table.schema_arrow.names
        wanted = [name for name in names if column == name or column.startswith(f"{name}.")] or names
        for batch in table.iter_batches(1000, columns=wanted):
            yield from batch.to_pylist()


def _json(file: Path) -> Iterator[tuple[int, object]]:
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig") as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        first = next(lines, (1, ""))
        if first[1].lstrip().startswith("["):
            yield from enumerate(json.loads(first[1] + stream.read(), strict=False), 1)
            return
        for number, line in chain([first], lines):
            try:
                yield number, json.loads(line, strict=False)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}; write one object a line, or one array") from error
