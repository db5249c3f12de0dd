"""Output of text rows to standard output or to a file. The file is never left half written."""

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
    """A context manager that writes lines to a file, and replaces an existing file only on success.

    Lines go to a temporary file beside the requested one. The temporary file replaces it when the context ends without
    an error. After an error, or without any line, an existing file stays unchanged. Devices and pipes are written to
    directly.

    Args:
        path: the file, or None for standard output. Output does not break a progress bar.

    Attributes:
        written: number of lines so far.

    Raises:
        RowFileError: the file cannot be opened or written. It is raised on entering, by :meth:`write` or on leaving.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.written = 0
        self._target = Path() if path is None else path.resolve()  # so that a symbolic link stays a link
        self._part: Path | None = None
        self._file: TextIO | None = None

    def write(self, line: str) -> None:
        """Write a line. ``line`` has no newline at its end."""
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
            self._file.close()  # flushes the buffer, so it can fail as a write can
            if part and self.written and kind is None:
                part = None  # complete: keep the file even if moving it fails, so that the rows are not lost
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
        except OSError as error:  # for example, the target is a mount point and cannot be replaced
            raise RowFileError(f"{self._failure(error)}; the rows are in {str(self._part)!r}") from None

    def _failure(self, error: OSError) -> RowFileError:
        return RowFileError(f"out: {str(self.path)!r} cannot be written: {error.strerror or error}")
