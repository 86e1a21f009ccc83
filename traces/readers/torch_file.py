"""Plain data from a torch.save file: tensors become arrays, nothing in it is executed.

torch is imported when a file is read, and only then.
"""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from placer.core.errors import DependencyError, InputFileError
from traces.readers.npy import DAMAGE
from traces.readers.text import first_line

__all__ = ["load_torch_file"]

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")
MEND = "give a file that SGLang's recorder wrote"


def load_torch_file(path: Path) -> dict[str, Any]:
    """The table in a torch.save file, with numpy arrays in place of tensors.

    Only tensors, numbers, texts, lists and tables are loaded (weights_only). Raises DependencyError without torch and
    InputFileError for anything else, before memory is taken that the file could not fill.
    """
    path = Path(path)
    try:
        import torch
    except ImportError as error:
        raise DependencyError(f"{path}: reading .pt files needs torch; install placer[torch]") from error
    total = _archive_bytes(path)
    try:
        with warnings.catch_warnings():
            # an odd file may be warned about before it is refused; the refusal says enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, AssertionError, ImportError, *DAMAGE) as error:
        raise InputFileError(f"{path}: is not a plain torch.save file ({first_line(error)}); {MEND}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputFileError(f"{path}: holds a {type(content).__name__} in place of a table; {MEND}")
    return {name: _plain(value, f"{path}: {name}", total) for name, value in content.items()}


def _archive_bytes(path: Path) -> int:
    """Bytes of the archive's members, whose checksums are all right."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if not any(info.filename.endswith("data.pkl") for info in infos):
                raise InputFileError(f"{path}: is an archive without data.pkl; {MEND}")
            total = sum(info.file_size for info in infos)
            if total > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise InputFileError(f"{path}: claims {total} bytes of {size}, or is compressed; {MEND}")
            if (damaged := archive.testzip()) is not None:
                raise InputFileError(f"{path}: member {damaged} has a wrong checksum; copy the file again")
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except DAMAGE as error:
        raise InputFileError(f"{path}: is not a torch.save file ({first_line(error)}); {MEND}") from error
    return total


def _plain(value: Any, where: str, total: int) -> Any:
    """`value` with arrays for tensors, to any depth that a recorder uses."""
    if isinstance(value, dict):
        return {name: _plain(item, where, total) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, total) for item in value]
    if not hasattr(value, "untyped_storage"):
        return value
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES or value.layout.__str__() != "torch.strided":
        raise InputFileError(f"{where}: is a {name} tensor; {MEND}")
    # an expanded tensor claims more elements than it has
    if value.numel() * value.element_size() > total:
        raise InputFileError(f"{where}: claims {value.numel()} elements, more than the file holds; {MEND}")
    return np.asarray(value.contiguous().numpy())
