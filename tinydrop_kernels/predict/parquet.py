"""Parquet files of rows, written from a journal of JSON lines with pyarrow."""

import importlib.util
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinydrop_kernels.predict.row_format import JsonLines, Row
from tinydrop_kernels.predict.whole_file import replacing

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_GROUP = 10_000  # rows of a row group, which are in memory at once


def check_installed() -> None:
    """Raise an error if pyarrow is not installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("format: parquet needs pyarrow: pip install 'tinydrop_kernels[parquet]'")


def schema() -> "pyarrow.Schema":
    """Return the columns. All except the path are null in some rows."""
    import pyarrow as pa

    candidate = pa.struct([("class", pa.int32()), ("name", pa.string()), ("probability", pa.float64())])
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            ("error", pa.string()),
            ("exit", pa.bool_()),
            ("confidence", pa.float64()),
            ("kept", pa.int32()),
            ("of", pa.int32()),
            ("grid", pa.list_(pa.int32())),
            ("second_look", pa.bool_()),
            ("top", pa.list_(candidate)),
            ("guidance", candidate),
            ("dense", candidate),
        ]
    )


def write_table(journal: Path, path: Path) -> None:
    """Write the rows of a journal to a Parquet file, which appears when it is complete.

    Raises:
        OSError: a file cannot be read or written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = schema()
    with replacing(path) as part, journal.open("rb") as lines, pq.ParquetWriter(part, columns) as writer:
        while rows := [json.loads(line) for line in islice(lines, ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, columns))


def write_journal(path: Path, journal: Path) -> None:
    """Write the rows of a Parquet file to a journal, which appears when it is complete.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the file is no Parquet file, or has other columns.
    """
    with replacing(journal) as part, part.open("wb") as file:
        file.writelines(map(JsonLines().encode, _rows_of(path)))


def _rows_of(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        if table.schema_arrow != schema():
            raise ValueError("it has other columns than rows of `tinydrop classify`")
        for batch in table.iter_batches(ROWS_PER_GROUP):
            row: dict[str, Any]
            for row in batch.to_pylist():
                yield {name: value for name, value in row.items() if value is not None}
