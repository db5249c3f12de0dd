"""Where rows of text go: to standard output, or to a file that is never left half written."""

import os
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class RowFileError(RuntimeError):
    """The file cannot be written."""


class RowFile:
    """A context that takes lines and puts them in place at its end.

    They are written to a file beside the one that was asked for, which replaces it when the context ends without an
    error. After an error, or without a line, an earlier file of that name is as it was. Devices and pipes are written
    to as the lines come.

    Args:
        path: the file, or None for standard output, clear of a progress bar.

    Attributes:
        written: the number of lines so far.

    Raises:
        RowFileError: the file cannot be opened or written, upon entering, :meth:`write` or leaving.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.written = 0
        self._target = Path() if path is None else path.resolve()  # a link is to stay one
        self._part: Path | None = None
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """Take a line, without its end."""
        if self._file is None:
            tqdm.write(line, file=sys.stdout)
        else:
            try:
                self._file.write(f"{line}\n")
            except OSError as error:
                raise self._failure(error) from None
        self.written += 1

    def __enter__(self) -> "RowFile":
        if self.path is None:
            return self
        if not self._target.exists() or self._target.is_file():
            self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
        try:
            self._file = (self._part or self._target).open("w", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        part = self._part
        try:
            self._file.close()  # what was buffered is written here, which may fail as well
            if part and self.written and kind is None:
                part = None  # from here on it is worth keeping, whatever happens
                self._put_in_place()
        except OSError as failure:
            if kind is None:
                raise self._failure(failure) from None
        finally:
            if part:
                part.unlink(missing_ok=True)

    def _put_in_place(self) -> None:
        assert self._part
        if self._target.exists():
            shutil.copymode(self._target, self._part)
        try:
            self._part.replace(self._target)
        except OSError as error:  # such as a file that is a mount of its own
            raise RowFileError(f"{self._failure(error)}; the rows are in {str(self._part)!r}") from None

    def _failure(self, error: OSError) -> RowFileError:
        return RowFileError(f"out: {str(self.path)!r} cannot be written: {error.strerror or error}")
