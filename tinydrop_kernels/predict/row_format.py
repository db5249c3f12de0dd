"""The encodings of rows as JSON lines and as CSV, and the rule by which a reader knows a complete row."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]  # as Prediction.as_dict and unreadable_row return it


class JsonLines:
    """One JSON object per line, in ASCII. A row holds only the fields that it has."""

    header = b""
    start = b'{"path": '  # how every file begins

    def encode(self, row: Row) -> bytes:
        """Return the bytes of a row."""
        return f"{json.dumps(row, allow_nan=False)}\n".encode()

    def is_whole(self, record: bytes) -> bool:
        """Return True if lines of a file are a complete row."""
        return record.endswith(b"\n")

    def path_of(self, record: bytes) -> str:
        """Return the path of a complete row.

        Raises:
            ValueError: the record is not such a row.
        """
        row = json.loads(record)
        if not (isinstance(row, dict) and isinstance(row.get("path"), str)):
            raise ValueError("expected an object with a path")
        return str(row["path"])


class Csv:
    """Comma-separated values in UTF-8, as RFC 4180 defines them, with a header. Fields without a value are empty.

    Args:
        top: number of classes in a row. The columns depend on it alone, so that a file can be continued.
    """

    def __init__(self, top: int):
        self.columns = ["path", "error", "exit", "confidence", "kept", "of", "grid_rows", "grid_columns", "second_look"]
        for ending in (*range(1, top + 1), "guidance", "dense"):
            self.columns += [f"class_{ending}", f"name_{ending}", f"probability_{ending}"]
        self.header = self.start = _line(self.columns)

    def encode(self, row: Row) -> bytes:
        """Return the bytes of a row."""
        fields = dict(_flat(row))
        return _line([fields.get(column) for column in self.columns])

    def is_whole(self, record: bytes) -> bool:
        """Return True if lines of a file are a complete row. A field may hold line ends, but then it is in quotes."""
        return record.endswith(b"\r\n") and record.count(b'"') % 2 == 0

    def path_of(self, record: bytes) -> str:
        """Return the path of a complete row.

        Raises:
            ValueError: the record is not such a row.
        """
        (fields,) = csv.reader(io.StringIO(record.decode(), newline=""))
        if len(fields) != len(self.columns):
            raise ValueError(f"got {len(fields)} columns, expected {len(self.columns)}")
        return fields[0]


def _line(values: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow([str(value).lower() if isinstance(value, bool) else value for value in values])
    return text.getvalue().encode()


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name == "grid":
            yield from zip(("grid_rows", "grid_columns"), value, strict=True)
        elif name == "top":
            for rank, candidate in enumerate(value, 1):
                yield from _columns_of(candidate, rank)
        elif name in ("guidance", "dense"):
            yield from _columns_of(value, name)
        else:
            yield name, value


def _columns_of(candidate: dict[str, Any], ending: int | str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}_{ending}", value) for name, value in candidate.items())
