"""Files of examples, read strictly: each row is what its lines say, or an error names the line."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Imported for real where files are read: it takes a second, and a run whose tokens are in the cache reads none.
    import datasets
    import pyarrow as pa

FORMATS = ".csv, .tsv, .jsonl, .json or .parquet, or a folder of datasets.save_to_disk"
SUFFIXES = {".csv", ".tsv", ".jsonl", ".json", ".parquet"}

_NEWLINE = re.compile("\r\n|\r|\n")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Table:
    """Rows of one split as its source has them, by column.

    Attributes
    ----------
    columns : Mapping[str, Callable]
        Reads a column; values may be of any type.
    rows : int
    lines : sequence of int, optional
        The line of the file on which each row begins, from 1; None where rows have no lines.
    typed : bool
        Whether the source tells numbers from text; the cells of a CSV file are all text.
    classes : Mapping[str, list of str]
        Names of the classes of columns that are a ``ClassLabel``, or lists of these.
    repeated : frozenset of str
        Names that several columns have.
    notes : list of str
        What the user may want to know of how the file was read.
    """

    columns: Mapping[str, Callable[[], list[Any]]]
    rows: int
    lines: Sequence[int] | None = None
    typed: bool = True
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Say where a row is, as an editor counts."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"

    @classmethod
    def of_dataset(cls, source: datasets.Dataset) -> Table:
        """Wrap a data set; a format that it was saved with changes nothing but which columns it has."""
        plain = without_format(source)
        classes = _classes(plain.features)
        columns = {name: lambda name=name: plain[name][:] for name in plain.column_names}
        return cls(columns, len(plain), classes=classes)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Table:
        """Make a table that knows its columns' names alone."""
        return cls(dict.fromkeys(names, list), 0, repeated=_repeated(names))


def _classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    import datasets

    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: list(kind.names) for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}


def without_format(source: datasets.Dataset) -> datasets.Dataset:
    """Return a data set that gives plain values, with the columns that its format has."""
    chosen = source.format["columns"]
    return source.with_format(None).select_columns([name for name in source.column_names if name in chosen])


def read_file(path: Path, file_format: str | None = None, *, any_text: bool = False) -> Table:
    """Read a file of examples.

    Text is UTF-8, or UTF-16 with a byte-order mark; it may be compressed with gzip. Lines end with LF, CR LF or CR.
    CSV and TSV are read as RFC 4180 has them: quotes enclose a whole cell, and a quote within is doubled. An empty cell
    is missing; all others are text. Blank lines are skipped, and so are columns without a name.

    Parameters
    ----------
    path : Path
    file_format : str, optional
        One of csv, tsv, jsonl, json and parquet; by the name's suffix unless told.
    any_text : bool
        Mark bytes that are no text instead of refusing them.

    Raises
    ------
    ValueError
        If the format is unknown, a line is not what the format says, or rows do not match the lines.
    Exception
        Whatever a damaged Parquet or gzip file makes its reader raise.
    """
    kind = _kind(path, file_format)
    if kind == ".parquet":
        return _read_parquet(path, any_text)
    text = _decoded(path.read_bytes(), any_text)
    if kind in (".jsonl", ".json"):
        return _read_json(text)
    return _read_cells(text, _delimiter(kind))


def read_header(path: Path, file_format: str | None = None, wanted: Collection[str] = ()) -> Table:
    """Read which columns a file has, and as little else as that takes.

    The first line of a CSV or TSV file and the metadata of a Parquet file say it. Objects of JSON are read until every
    wanted column has occurred; later ones may have further columns.

    Parameters
    ----------
    path, file_format
        As for :func:`read_file`.
    wanted : Collection of str

    Returns
    -------
    Table
        With the names of the columns alone.

    Raises
    ------
    ValueError, Exception
        As :func:`read_file`, of what is read.
    """
    kind = _kind(path, file_format)
    if kind == ".parquet":
        import pyarrow.parquet as pq

        return Table.of_names(pq.ParquetFile(path).schema_arrow.names)
    try:
        with path.open("rb") as file, _text_of(file) as lines:
            if kind in (".csv", ".tsv"):
                _, names = _header(lines, _delimiter(kind))
                return Table.of_names([name for name in names if name])
            found: dict[str, None] = {}
            for _, row in _json_rows(lines):
                found |= dict.fromkeys(row)
                if found.keys() >= set(wanted):
                    break
            return Table.of_names(list(found))
    except UnicodeError:
        return read_file(path, file_format)  # says in which line


def read_folder_header(path: Path) -> dict[str, Table] | None:
    """Read which splits and columns a folder of ``save_to_disk`` has; None where that is not said as expected."""

    def content(file: str) -> Any:
        return json.loads((path / file).read_text(encoding="utf-8"))

    found = {}
    try:
        whole = not (path / "dataset_dict.json").is_file()
        for split in ["train"] if whole else content("dataset_dict.json")["splits"]:
            folder = "." if whole else split
            names = list(content(f"{folder}/dataset_info.json")["features"])
            chosen = content(f"{folder}/state.json")["_format_columns"]
            found[split] = Table.of_names([name for name in names if chosen is None or name in chosen])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading it says what is wrong
    return found


def _kind(path: Path, file_format: str | None) -> str:
    """Return the suffix of a file's format."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    kind = f".{file_format}" if file_format else suffix
    if kind not in SUFFIXES:
        raise ValueError(f"its format is unknown: give {FORMATS}, or set data.format")
    return kind


def _delimiter(kind: str) -> str:
    return "," if kind == ".csv" else "\t"


_GZIP = b"\x1f\x8b"


def _encoding(start: bytes) -> str:
    return "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def _text_of(file: io.BufferedReader) -> io.TextIOWrapper:
    """Open a file's text as a stream; lines keep their ends."""
    stream: Any = gzip.open(file) if file.peek(2).startswith(_GZIP) else file  # noqa: SIM115
    return io.TextIOWrapper(stream, encoding=_encoding(stream.peek(2)), newline="")


def _decoded(content: bytes, any_text: bool = False) -> str:
    if content.startswith(_GZIP):
        content = gzip.decompress(content)
    encoding = _encoding(content)
    if any_text:
        return content.decode(encoding, "replace")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + len(_NEWLINE.findall(content[: error.start].decode("latin-1")))
        byte = content[error.start]
        raise ValueError(
            f"line {line}: byte 0x{byte:02x} is not {encoding.upper()[:6].rstrip('-')} text; save it as UTF-8"
        ) from None
    if "\0" in text:
        line = 1 + len(_NEWLINE.findall(text[: text.index("\0")]))
        raise ValueError(f"line {line}: a NUL character is no text; save it as UTF-8")
    return text


def first_line(error: Exception) -> str:
    """Return the first line that an error says, for a message of one line."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)


# CSV and TSV.


def _read_cells(text: str, delimiter: str) -> Table:
    used, names = _header(io.StringIO(text, newline=""), delimiter)
    records = _records(io.StringIO(text, newline=""), used)
    if next(records, None) is None:
        return Table({}, 0)
    notes = [] if used == delimiter else [f"cells are separated by {_DELIMITERS[used]}"]
    rows, lines, spanning = [], [], []
    for record in records:
        if len(record.cells) != len(names):
            raise ValueError(f"{record.place} has {_count(len(record.cells), 'cell')}, the header has {len(names)}")
        if len(record.physical) > 1:
            spanning.append(record)
        rows.append(record.cells)
        lines.append(record.line)
    if spanning:
        _check_spanning(spanning, rows, used)
        notes.append(
            f"{_count(len(spanning), 'row')} over several lines, as the quotes say (first: {spanning[0].place})"
        )
    named = [(place, name) for place, name in enumerate(names) if name]
    columns = {name: lambda place=place: [row[place] or None for row in rows] for place, name in named}
    return Table(columns, len(rows), lines, typed=False, repeated=_repeated(name for _, name in named), notes=notes)


def _header(lines: Iterator[str], delimiter: str) -> tuple[str, list[str]]:
    """Return the delimiter that the first record has, and its cells as names of columns."""
    header = next(_records(lines, delimiter), None)
    if header is None:
        return delimiter, []
    other = [d for d in _DELIMITERS if d != delimiter and len(_split(header.physical[0], d)) > 1]
    if len(header.cells) == 1 and len(other) == 1:
        # Spreadsheets write semicolons where a comma is the decimal sign, and tabs whatever the file's name is.
        (delimiter,) = other
        header = next(_records(itertools.chain(header.physical, lines), delimiter))
    return delimiter, [name.strip() for name in header.cells]


@dataclass(frozen=True)
class _Record:
    """A row of cells, and the lines of the file that it was made from."""

    cells: list[str]
    line: int
    physical: list[str]

    @property
    def place(self) -> str:
        return _lines(self.line, self.line + len(self.physical) - 1)


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _records(lines: Iterable[str], delimiter: str) -> Iterator[_Record]:
    physical: list[str] = []

    def kept() -> Iterator[str]:
        for line in lines:
            physical.append(line)
            yield line

    reader = csv.reader(kept(), delimiter=delimiter, strict=True)
    while True:
        physical.clear()
        first = reader.line_num + 1
        # A cell may be as long as the file; the limit is the module's, so it is put back at once.
        limit = csv.field_size_limit(sys.maxsize)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "end of data" in str(error)
            why = "a quote is opened and never closed" if unclosed else "text follows a closing quote"
            remedy = "enclose the whole cell in quotes and double those within, or save the rows as JSON lines"
            raise ValueError(f"{_lines(first, reader.line_num)}: {why}; {remedy}") from None
        finally:
            csv.field_size_limit(limit)
        if len(cells) > 1 or (cells and cells[0].strip()):
            yield _Record(cells, first, list(physical))


def _split(line: str, delimiter: str) -> list[str]:
    """Split one line, with quotes as plain characters."""
    return line.rstrip("\r\n").split(delimiter)


def _check_spanning(spanning: list[_Record], rows: list[list[str]], delimiter: str) -> None:
    """Refuse cells over several lines of which each is a whole row by itself: two stray quotes swallow what is between.

    A text over two or more lines that happen to have the right number of delimiters is told from that by a column of
    few values, such as the labels: in swallowed rows it holds the values that it holds elsewhere.
    """
    width = len(rows[0])
    if width == 1:
        return
    single = [row for row in rows if not any("\n" in cell or "\r" in cell for cell in row)]
    values = [Counter(row[column] for row in single) for column in range(width)]
    few = [column for column in range(width) if 0 < len(values[column]) <= len(single) / 2]
    for record in spanning:
        parts = [_split(line, delimiter) for line in record.physical]
        if any(len(part) != width for part in parts):
            continue
        if few:
            swallowed = any(all(part[column] in values[column] for part in parts) for column in few)
        else:
            swallowed = len(parts) > 2
        if swallowed:
            raise ValueError(
                f"{record.place}: quotes make one row of these lines, of which each is a row by itself; "
                "remove the stray quotes, or double them and enclose the cell in quotes"
            )


def _repeated(names: Any) -> frozenset[str]:
    return frozenset(name for name, times in Counter(names).items() if times > 1)


# JSON and Parquet.


class _Twice(dict[str, Any]):
    """An object that names a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    kind = dict if len({name for name, _ in pairs}) == len(pairs) else _Twice
    return kind(pairs)


def _read_json(text: str) -> Table:
    names: dict[str, None] = {}
    rows, lines = [], []
    for line, row in _json_rows(io.StringIO(text, newline="")):
        rows.append(row)
        lines.append(line)
        names |= dict.fromkeys(row)
    columns = {name: lambda name=name: [row.get(name) for row in rows] for name in names}
    numbers = [line for line in lines if line is not None]
    return Table(columns, len(rows), numbers if len(numbers) == len(rows) else None)


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield the objects of JSON lines, each with its line, or those of one array, which have no lines."""
    for place, (line, row) in enumerate(_json_values(lines), 1):
        where = f"row {place}" if line is None else f"line {line}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no object of columns")
        if isinstance(row, _Twice):
            raise ValueError(f"{where} names a column twice")
        yield line, row


def _json_values(lines: Iterable[str]) -> Iterator[tuple[int | None, Any]]:
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    numbered, first = enumerate(lines, 1), True
    for number, line in numbered:
        if first and line.lstrip().startswith("["):
            text = "".join([line, *(rest for _, rest in numbered)])
            yield from ((None, row) for row in decoder.decode("\n" * (number - 1) + text))
            return
        if line.strip():
            first = False
            try:
                yield number, decoder.decode(line.rstrip("\r\n"))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _read_parquet(path: Path, any_text: bool = False) -> Table:
    import datasets
    import pyarrow.parquet as pq

    # Of the file alone: names of folders above it, such as label=1, are no columns.
    content = pq.ParquetFile(path).read()
    names = content.schema.names
    classes = {}
    if b"huggingface" in (content.schema.metadata or {}):
        known = datasets.Features.from_arrow_schema(content.schema)
        classes = _classes(known)
    columns = {name: lambda place=place: _values(content.column(place), any_text) for place, name in enumerate(names)}
    return Table(columns, content.num_rows, classes=classes, repeated=_repeated(names))


def _values(column: pa.ChunkedArray, any_text: bool = False) -> list[Any]:
    import pyarrow as pa

    if any_text and pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if any_text and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        # The column's type says text; its bytes may say otherwise.
        cells = column.cast(pa.large_binary()).to_pylist()
        return [None if cell is None else cell.decode("utf-8", "replace") for cell in cells]
    values: list[Any] = column.to_pylist()
    return values
