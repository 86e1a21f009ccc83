"""Expert weights: read lazily from a checkpoint's safetensors, and the gated feed-forward that uses them.

Legend: H hidden size, I inner width of an expert, F = 2 I (gate rows, then up rows), P slots of one rank, X rows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from placer.core.errors import InputFileError
from placer.execute.checkpoint import CheckpointFiles

__all__ = ["ClampedGate", "ExpertFile", "ExpertWeights", "grouped_ffn", "swiglu"]

EXPERTS = r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*experts\."
SPLIT_KEY = re.compile(EXPERTS + r"(\d+)\.(gate_proj|up_proj|down_proj|w[123])\.weight$")
FUSED_KEY = re.compile(EXPERTS + r"(gate_up_proj|down_proj)(?:\.weight)?$")
FUSED_BIAS_KEY = re.compile(EXPERTS + r"(gate_up_proj|down_proj)[._]bias$")
BIAS_KEY = re.compile(EXPERTS + r"\d+\.\w+[._]bias$")
PACKED_KEY = re.compile(EXPERTS + r"(?:\d+\.)?\w+[._](?:blocks|scales)$")
ROLE = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """gpt-oss's activation: (up + 1) * gate * sigmoid(alpha * gate), gate clamped from above, up on both sides."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_XI: Tensor, up_XI: Tensor) -> Tensor:
        """The inner activations, (X, I)."""
        gate_XI = gate_XI.clamp(max=self.limit)
        up_XI = up_XI.clamp(min=-self.limit, max=self.limit)
        return (up_XI + 1) * (gate_XI * torch.sigmoid(gate_XI * self.alpha))


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: `gate_up_FH` (2 I, H), gate above up, and `down_HI` (H, I), both contiguous.

    Experts with biases (`gate_up_bias_F`, `down_bias_H`) have the activation `clamped`; without one it is silu.
    """

    gate_up_FH: Tensor
    down_HI: Tensor
    gate_up_bias_F: Tensor | None = None
    down_bias_H: Tensor | None = None
    clamped: ClampedGate | None = None


def swiglu(x_XH: Tensor, expert: ExpertWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)), (X, H); with the expert's own activation and biases where it has some."""
    gate_XI, up_XI = functional.linear(x_XH, expert.gate_up_FH, expert.gate_up_bias_F).chunk(2, dim=-1)
    inner_XI = functional.silu(gate_XI) * up_XI if expert.clamped is None else expert.clamped(gate_XI, up_XI)
    return functional.linear(inner_XI, expert.down_HI, expert.down_bias_H)


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
    `w1 / w3 / w2`), and fused `gate_up_proj` (E, 2 I, H) with `down_proj` (E, H, I), or both transposed. Fused experts
    with biases are gpt-oss's: gate and up rows alternate, and the activation is `clamped`.
    Use it as a context manager. Raises InputFileError naming layer, expert and file.
    """

    def __init__(self, path: Path, *, clamped: ClampedGate | None = None) -> None:
        self.path = Path(path)
        self._clamped = ClampedGate() if clamped is None else clamped
        self._file: dict[str, Path] = {}
        self._split: dict[tuple[int, int], dict[str, str]] = {}
        self._fused: dict[int, dict[str, str]] = {}
        self._bias: dict[int, dict[str, str]] = {}
        self._split_biased: set[int] = set()
        packed = ""
        self._files = CheckpointFiles(path)
        try:
            for key, file in self._files.keys:
                self._note(key, file)
                packed = packed or (key if PACKED_KEY.search(key) else "")
            if packed:
                raise InputFileError(
                    f"{self.path}: {packed} belongs to experts quantised in blocks (MXFP4); placer runs unquantised "
                    "experts, so give a float32, float16 or bfloat16 checkpoint"
                )
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
        self._files.close()

    def load(self, layer: int, expert: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> ExpertWeights:
        """One expert's weights in `dtype` on `device`; only its own bytes are read."""
        if layer in self._split_biased or not self._bias.get(layer, {}).keys() <= self._fused.get(layer, {}).keys():
            raise InputFileError(
                f"{self.path}: the experts of layer {layer} have biases in a layout that placer does not know; it runs "
                "plain SwiGLU experts and gpt-oss's, so replay the trace with random experts instead"
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
        if layer not in self._bias:
            return ExpertWeights(gate_up.to(**place).contiguous(), down.to(**place).contiguous())
        gate_up_bias, down_bias = self._load_bias(layer, expert, (len(gate_up), len(down)))
        return ExpertWeights(
            _gate_above_up(gate_up).to(**place).contiguous(),
            down.to(**place).contiguous(),
            _gate_above_up(gate_up_bias).to(**place),
            down_bias.to(**place),
            self._clamped,
        )

    def _load_bias(self, layer: int, expert: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
        keys, found = self._bias[layer], []
        for name, length in zip(("gate_up_proj", "down_proj"), lengths, strict=True):
            if name not in keys:
                raise InputFileError(f"{self.path}: the experts of layer {layer} have biases, but none for {name}")
            part = self._slice(keys[name])
            if len(part.get_shape()) != 2 or part.get_shape()[1] != length or expert >= part.get_shape()[0]:
                raise InputFileError(
                    f"{self.path}: layer {layer} expert {expert} needs a bias of {length} values for {name}; the "
                    f"file has {part.get_shape()}; the checkpoint is damaged"
                )
            found.append(part[expert])
        return found[0], found[1]

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
        return self._files.slice(key, self._file[key])

    def _note(self, key: str, file: Path) -> None:
        if match := SPLIT_KEY.search(key):
            slot = self._split.setdefault((int(match[1]), int(match[2])), {})
            role = ROLE[match[3]]
        elif match := FUSED_KEY.search(key):
            slot = self._fused.setdefault(int(match[1]), {})
            role = match[2]
        elif match := FUSED_BIAS_KEY.search(key):
            slot = self._bias.setdefault(int(match[1]), {})
            role = match[2]
        else:
            if match := BIAS_KEY.search(key):
                self._split_biased.add(int(match[1]))
            return
        if role in slot:
            raise InputFileError(f"{self.path}: both {slot[role]} and {key} could be the same expert matrix")
        slot[role] = key
        self._file[key] = file


def _gate_above_up(rows: Tensor) -> Tensor:
    """Alternating gate and up rows, sorted: all gate rows, then all up rows."""
    return torch.cat([rows[0::2], rows[1::2]])
