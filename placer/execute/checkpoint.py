"""The tensors of a Hugging Face checkpoint by name: which file holds which, each read when asked for."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open

from placer.core.errors import InputFileError

__all__ = ["CheckpointFiles"]

PLAIN_DTYPES = ("F32", "F16", "BF16", "F64")


class CheckpointFiles:
    """A checkpoint folder, or one .safetensors file. Use it as a context manager.

    A folder's `model.safetensors.index.json` says which file holds what; without one every .safetensors file is opened.
    Raises InputFileError naming the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._open = ExitStack()
        self._handles: dict[Path, Any] = {}
        try:
            self.keys: list[tuple[str, Path]] = self._read_keys()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes every file that was opened."""
        self._handles.clear()
        self._open.close()

    def slice(self, key: str, file: Path) -> Any:
        """The tensor's lazy slice (`[:]` reads it, `[i]` a part). Refuses quantised types."""
        try:
            part = self._handle(file).get_slice(key)
        except SafetensorError as error:
            raise InputFileError(f"{file}: lacks {key}, which the index promises ({error})") from error
        if part.get_dtype() not in PLAIN_DTYPES:
            raise InputFileError(
                f"{file}: {key} is stored as {part.get_dtype()}; placer runs unquantised experts, so give a "
                "float32, float16 or bfloat16 checkpoint"
            )
        return part

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._open.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputFileError(f"{file}: cannot be read as safetensors ({error})") from error
        return self._handles[file]

    def _read_keys(self) -> list[tuple[str, Path]]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return [(str(key), self.path / str(file)) for key, file in names.items()]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputFileError(f"{index}: is not an index of safetensors ({error})") from error
        files = sorted(self.path.glob("*.safetensors")) if self.path.is_dir() else [self.path]
        if not files:
            raise InputFileError(f"{self.path}: has no .safetensors file; give a Hugging Face checkpoint folder")
        return [(key, file) for file in files for key in self._handle(file).keys()]  # noqa: SIM118 (no mapping)
