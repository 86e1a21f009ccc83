"""Write a file whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from placer.core.errors import InputFileError

__all__ = ["write_atomically", "write_text_atomically"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames it over `path`.

    On any failure (Ctrl-C included) the temporary file is removed and `path` is untouched. A link is followed.
    Raises InputFileError when the folder does not exist or cannot be written, or `path` is no regular file.
    """
    path = Path(path)
    # a link keeps pointing where it did, and a rename would put a file in the place of a device such as /dev/null
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            what = "is a folder" if target.is_dir() else "is a device or pipe"
            raise InputFileError(f"{path}: {what}; give the name of a file to write")
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:32]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise InputFileError(f"{path}: cannot write there ({error.strerror}); create the folder first") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputFileError(f"{path}: could not be written ({error.strerror or error})") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
