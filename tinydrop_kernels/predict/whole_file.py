"""Files that are replaced as a whole, so that a reader sees either the earlier file or the complete new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces ``path`` if the block ends without an error.

    The file is on the disk before it replaces the earlier one. A symbolic link stays a link.

    Raises:
        OSError: the file cannot be replaced. The earlier one then stays as it is.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from tinydrop_kernels.predict.whole_file import replacing
        >>> path = Path(tempfile.mkdtemp()) / "page.html"
        >>> with replacing(path) as part:
        ...     characters = part.write_text("a page")
        >>> path.read_text()
        'a page'
    """
    target = path.resolve()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
