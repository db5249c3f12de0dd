"""Output of rows, batch by batch: to standard output, or to a file that a later run can continue."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from tinydrop_kernels.predict import parquet
from tinydrop_kernels.predict.row_format import Csv, JsonLines, Row

if sys.platform != "win32":
    import fcntl

ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
FORMATS = ("jsonl", "csv", "parquet")


class RowFileError(RuntimeError):
    """A file of rows cannot be written or continued."""


class RowOutput:
    """An output of rows, and a context manager.

    Attributes:
        written: number of rows that were written in this run.
        done: how many rows of each path there were before.
    """

    def __init__(self) -> None:
        self.written = 0
        self.done = Counter[str]()

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of a batch."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the output, after the last row."""

    def __enter__(self) -> "RowOutput":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class PrintedRows(RowOutput):
    """Rows on standard output, as JSON lines. They do not break a progress bar."""

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of a batch."""
        for row in rows:
            tqdm.write(json.dumps(row), file=sys.stdout)
        self.written += len(rows)


class RowFile(RowOutput):
    """A file of rows that loses none.

    Each batch is appended and on the disk before :meth:`append` returns. If a run ends in any way, the file has the
    rows of all batches before, and at most one torn row at its end. The next run with ``resume`` cuts the torn row off
    and reads the paths of the others. One process at a time can write the file.

    Args:
        path: the file. It is created, and removed again if no row was written.
        rows: the encoding, :class:`JsonLines` or :class:`Csv`.
        resume: continue an existing file. Otherwise a file that is not empty is refused.

    Raises:
        RowFileError: the file cannot be opened, written or continued. It is raised on entering, by :meth:`append` or by
            :meth:`finish`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from tinydrop_kernels.predict.row_file import RowFile
        >>> from tinydrop_kernels.predict.row_format import JsonLines
        >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> with RowFile(path, JsonLines()) as rows:
        ...     rows.append([{"path": "a.png", "error": "no image"}])
        >>> with RowFile(path, JsonLines(), resume=True) as rows:
        ...     rows.append([{"path": "b.png", "error": "no image"}])
        ...     print(rows.done, rows.written)
        Counter({'a.png': 1}) 1
    """

    def __init__(self, path: Path, rows: JsonLines | Csv, resume: bool = False):
        super().__init__()
        self.path, self.rows, self.resume = path, rows, resume
        self._end = 0  # number of bytes of complete rows
        self._is_new = False  # made by this run, and so removed again if no row is written
        self._file: FileIO

    def append(self, rows: Sequence[Row]) -> None:
        """Write the rows of a batch to the disk: all of them, or none if writing fails or is interrupted."""
        if not rows:
            return
        batch = b"".join(map(self.rows.encode, rows))
        if not self._end:
            batch = self.rows.header + batch
        try:
            left = memoryview(batch)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):  # a torn row that cannot be cut off now is cut off by the next run
                self._file.truncate(self._end)
            if isinstance(error, OSError):
                raise RowFileError(
                    f"{self._failure(error)}; the rows before are kept, and --resume continues"
                ) from None
            raise
        self._end += len(batch)
        self.written += len(rows)

    def __enter__(self) -> "RowFile":
        refuse_rows(self.path, self.resume)
        self._is_new = not self.path.exists()
        try:
            self._file = FileIO(self.path, "a+")
        except OSError as error:
            raise self._failure(error) from None
        try:
            self._lock()
            self._end = self._read()
            self._file.truncate(self._end)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise self._failure(error) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._is_new and not self.written:
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        """Raise an error if another process writes the file, because both would write the same rows."""
        if sys.platform != "win32":
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a lock that loading processes do not inherit
            except (BlockingIOError, PermissionError):
                raise RowFileError(f"out: another process is writing {str(self.path)!r}") from None
            except OSError:  # a file system without locks
                pass

    def _read(self) -> int:
        """Count the complete rows by path, and return the number of their bytes.

        Raises:
            RowFileError: the file holds something else. Nothing is cut off then.
        """
        end, record = 0, b""
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            for line in lines:
                record += line
                if self.rows.is_whole(record):
                    self._count(record, end)
                    end, record = end + len(record), b""
        start = self.rows.start
        if not end and record[: len(start)] != start[: len(record)]:
            raise RowFileError(f"resume: {str(self.path)!r} does not hold rows of `tinydrop classify`")
        return end

    def _count(self, record: bytes, start: int) -> None:
        is_header = start == 0 and self.rows.header
        try:
            if is_header and record != self.rows.header:
                raise ValueError("it has other columns, which depend on --top")
            if not is_header:
                self.done[self.rows.path_of(record)] += 1
        except ValueError as error:
            raise RowFileError(
                f"resume: {str(self.path)!r} does not hold rows that can be continued, from byte {start} on: {error}"
            ) from None

    def _failure(self, error: OSError) -> RowFileError:
        return RowFileError(f"out: {str(self.path)!r} cannot be written: {error.strerror or error}")


class ParquetRows(RowFile):
    """A Parquet file that is written by :meth:`finish`. Until then its rows are in a journal of JSON lines beside it.

    The journal is ``rows.parquet.jsonl`` for ``rows.parquet``. It holds all rows, so a file that was complete before is
    copied into it first.
    """

    def __init__(self, path: Path, resume: bool = False):
        super().__init__(path.with_name(f"{path.name}.jsonl"), JsonLines(), resume)
        self.parquet = path

    def __enter__(self) -> "ParquetRows":
        refuse_rows(self.parquet, self.resume)
        is_copied = _has_content(self.parquet) and not _has_content(self.path)
        if is_copied:
            try:
                parquet.write_journal(self.parquet, self.path)
            except (OSError, ValueError) as error:
                raise RowFileError(f"resume: {str(self.parquet)!r} cannot be read: {error}") from None
        super().__enter__()
        self._is_new |= is_copied
        return self

    def finish(self) -> None:
        """Write the Parquet file from the journal, and remove the journal."""
        try:
            parquet.write_table(self.path, self.parquet)
        except OSError as error:
            raise RowFileError(
                f"out: {str(self.parquet)!r} cannot be written: {error.strerror or error}; all rows are in "
                f"{str(self.path)!r}"
            ) from None
        self.path.unlink()


def refuse_rows(path: Path, resume: bool) -> None:
    """Raise an error if a path is no regular file, or if it has content that is not to be continued."""
    if path.exists() and not path.is_file():
        raise RowFileError(f"out: {str(path)!r} is not a regular file; without --out, rows go to standard output")
    if _has_content(path) and not resume:
        raise RowFileError(f"out: {str(path)!r} exists; --resume continues it, or remove it")


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def format_of(path: Path, given: str | None = None) -> str:
    """Return the format of a file of rows: the given one, or the one that the file's ending stands for.

    Raises:
        ValueError: the ending stands for no format, or the format is Parquet and pyarrow is not installed.

    Example:
        >>> from pathlib import Path
        >>> from tinydrop_kernels.predict.row_file import format_of
        >>> format_of(Path("rows.ndjson")), format_of(Path("rows"), "csv")
        ('jsonl', 'csv')
    """
    name = given or ENDINGS.get(path.suffix.lower())
    if name is None:
        raise ValueError(f"out: got {str(path)!r}, expected a name that ends in {', '.join(ENDINGS)}, or --format")
    if name == "parquet":
        parquet.check_installed()
    return name


def file_of_rows(path: Path, form: str, top: int, resume: bool) -> RowFile:
    """Return the file of rows in a format, which is opened when its context is entered."""
    if form == "parquet":
        return ParquetRows(path, resume)
    return RowFile(path, Csv(top) if form == "csv" else JsonLines(), resume)


def remaining(names: Iterable[str], done: Counter[str]) -> list[int]:
    """Return the positions of the inputs that have no row yet. An input that is given twice has two rows.

    Example:
        >>> from collections import Counter
        >>> from tinydrop_kernels.predict.row_file import remaining
        >>> remaining(["a.png", "b.png", "a.png"], Counter({"a.png": 1}))
        [1, 2]
    """
    left = done.copy()
    positions = []
    for position, name in enumerate(names):
        if left[name]:
            left[name] -= 1
        else:
            positions.append(position)
    return positions
