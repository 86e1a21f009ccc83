"""Expert weights: read lazily from a checkpoint's safetensors, and the SwiGLU feed-forward that uses them.

Legend: H hidden size, I inner width of an expert, F = 2 I (gate rows, then up rows), P slots of one rank, X rows.
"""

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from placer.core.errors import InputFileError

__all__ = ["ExpertFile", "ExpertWeights", "grouped_ffn", "swiglu"]

EXPERTS = r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*experts\."
SPLIT_KEY = re.compile(EXPERTS + r"(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.weight$")
FUSED_KEY = re.compile(EXPERTS + r"(gate_up_proj|down_proj)(?:\.weight)?$")
BIAS_KEY = re.compile(EXPERTS + r"(?:\d+\.)?\w+[._]bias$")
ROLE = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
PLAIN_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: `gate_up_FH` (2 I, H), gate above up, and `down_HI` (H, I), both contiguous."""

    gate_up_FH: Tensor
    down_HI: Tensor


def swiglu(x_XH: Tensor, expert: ExpertWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)), (X, H)."""
    gate_XI, up_XI = functional.linear(x_XH, expert.gate_up_FH).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_XI) * up_XI, expert.down_HI)


def grouped_ffn(x_XH: Tensor, rows_P: Sequence[int], experts_P: Sequence[ExpertWeights | None]) -> Tensor:
    """Outputs (X, H) of slot p's expert for its `rows_P[p]` rows, slots one after the other; rows beyond are zero.

    An expert without rows is not touched; an empty slot (None) must have none.
    """
    out_XH = torch.zeros_like(x_XH)
    start = 0
    for rows, expert in zip(rows_P, experts_P, strict=True):
        if rows:
            assert expert is not None, "a token was sent to an empty slot"
            out_XH[start : start + rows] = swiglu(x_XH[start : start + rows], expert)
        start += rows
    return out_XH


class ExpertFile:
    """The experts of a checkpoint folder (or of one .safetensors file), each read when asked for and not before.

    Layouts, recognised by key: one tensor per matrix (Qwen, OLMoE, DeepSeek `gate_proj / up_proj / down_proj`; Mixtral
    `w1 / w3 / w2`), and fused `gate_up_proj` (E, 2 I, H) with `down_proj` (E, H, I), or both transposed.
    A folder's `model.safetensors.index.json` says which file holds what; without one every .safetensors file is opened.
    Use it as a context manager. Raises InputFileError naming layer, expert and file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._open = ExitStack()
        self._handles: dict[Path, Any] = {}
        self._file: dict[str, Path] = {}
        self._split: dict[tuple[int, int], dict[str, str]] = {}
        self._fused: dict[int, dict[str, str]] = {}
        self._biased: set[int] = set()
        try:
            for key, file in self._keys():
                self._note(key, file)
            if not self._split and not self._fused:
                raise InputFileError(f"{self.path}: has no expert weights that placer knows; give an MoE checkpoint")
            self.hidden_size, self.moe_intermediate_size = self._shape()
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

    def load(self, layer: int, expert: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> ExpertWeights:
        """One expert's weights in `dtype` on `device`; only its own bytes are read."""
        if layer in self._biased:
            raise InputFileError(
                f"{self.path}: the experts of layer {layer} have biases; placer runs plain SwiGLU experts only, so "
                "replay the trace with random experts instead"
            )
        if layer in self._fused:
            gate_up, down = self._load_fused(layer, expert)
        else:
            gate_up, down = self._load_split(layer, expert)
        if gate_up.shape != (2 * down.shape[1], down.shape[0]):
            raise InputFileError(
                f"{self.path}: layer {layer} expert {expert} has gate and up {tuple(gate_up.shape)} and down "
                f"{tuple(down.shape)}, which do not fit together; the checkpoint is damaged"
            )
        place = {"dtype": dtype, "device": device}
        return ExpertWeights(gate_up.to(**place).contiguous(), down.to(**place).contiguous())

    def _load_split(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        keys = self._split.get((layer, expert), {})
        for role in ("gate", "up", "down"):
            if role not in keys:
                known = sorted(e for (at, e) in self._split if at == layer)
                has = f"experts {known[0]} to {known[-1]}" if known else f"no layer {layer}"
                raise InputFileError(
                    f"{self.path}: layer {layer} expert {expert} has no {role} matrix (the file has {has}); "
                    "give the checkpoint of the model that the plan is for"
                )
        gate, up, down = (self._slice(keys[role])[:] for role in ("gate", "up", "down"))
        if gate.shape != up.shape:
            raise InputFileError(
                f"{self.path}: layer {layer} expert {expert} has gate {tuple(gate.shape)} and up {tuple(up.shape)}; "
                "the checkpoint is damaged"
            )
        return torch.cat([gate, up]), down

    def _load_fused(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        gate_up_slice, down_slice, transposed = self._fused_slices(layer)
        count = min(gate_up_slice.get_shape()[0], down_slice.get_shape()[0])
        if not 0 <= expert < count:
            raise InputFileError(
                f"{self.path}: layer {layer} has no expert {expert} (the file has experts 0 to {count - 1}); "
                "give the checkpoint of the model that the plan is for"
            )
        gate_up, down = gate_up_slice[expert], down_slice[expert]
        return (gate_up.T, down.T) if transposed else (gate_up, down)

    def _fused_slices(self, layer: int) -> tuple[Any, Any, bool]:
        keys = self._fused[layer]
        for name in ("gate_up_proj", "down_proj"):
            if name not in keys:
                raise InputFileError(f"{self.path}: layer {layer} has fused experts without {name}; it is incomplete")
        gate_up, down = self._slice(keys["gate_up_proj"]), self._slice(keys["down_proj"])
        (_, a, b), (_, c, d) = gate_up.get_shape(), down.get_shape()
        # (2I, H), (H, I) against (H, 2I), (I, H): the two can never both fit, whatever H and I are
        if (a, b) == (2 * d, c):
            return gate_up, down, False
        if (b, a) == (2 * c, d):
            return gate_up, down, True
        raise InputFileError(
            f"{self.path}: layer {layer} has gate_up_proj {gate_up.get_shape()} and down_proj {down.get_shape()}, "
            "which do not fit together; the checkpoint is damaged"
        )

    def _shape(self) -> tuple[int, int]:
        if self._fused:
            _, down, transposed = self._fused_slices(min(self._fused))
            inner, hidden = down.get_shape()[1:] if transposed else down.get_shape()[:0:-1]
            return int(hidden), int(inner)
        keys = next((keys for _, keys in sorted(self._split.items()) if "down" in keys), None)
        if keys is None:
            raise InputFileError(f"{self.path}: no expert has a down matrix; the checkpoint is incomplete")
        hidden, inner = self._slice(keys["down"]).get_shape()
        return int(hidden), int(inner)

    def _slice(self, key: str) -> Any:
        file = self._file[key]
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

    def _keys(self) -> list[tuple[str, Path]]:
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

    def _note(self, key: str, file: Path) -> None:
        if match := SPLIT_KEY.search(key):
            slot = self._split.setdefault((int(match[1]), int(match[2])), {})
            role = ROLE[match[3]]
        elif match := FUSED_KEY.search(key):
            slot = self._fused.setdefault(int(match[1]), {})
            role = match[2]
        else:
            if match := BIAS_KEY.search(key):
                self._biased.add(int(match[1]))
            return
        if role in slot:
            raise InputFileError(f"{self.path}: both {slot[role]} and {key} could be the same expert matrix")
        slot[role] = key
        self._file[key] = file
