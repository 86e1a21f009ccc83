"""CalibrationJob: what the ranks of a calibration measure, as a JSON file; and the patterns of messages they send.

Legend: R ranks, N sizes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_text_atomically
from placer.core.errors import UsageError
from placer.execute.job import BACKENDS, DTYPES, Backend, DType

__all__ = ["CalibrationJob", "Part"]

MOST_WEIGHTS_BYTES = 1 << 28


Part = Literal["all", "links", "software"]
"""What a launch measures. A lab's links are measured shaped, what runs on processors on unshaped ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationJob:
    """Shapes and sizes to calibrate at; those of the run that is to be predicted.

    message_bytes    sizes of messages; they are sent as whole rows of `row_bytes`
    rows             rows of each expert in the GEMM curve; experts_per_rank  as the plan will have
    tokens_per_rank  of one iteration; top_k  choices of each
    repetitions      of each size, after one that is not recorded
    realtime         ask the kernel for realtime priority (root only): much less noise, but everything else waits
    """

    nodes: int
    ranks_per_node: int
    hidden_size: int = 256
    moe_intermediate_size: int = 512
    dtype: DType = "float32"
    message_bytes: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576, 2_097_152)
    rows: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    experts_per_rank: int = 8
    tokens_per_rank: int = 128
    top_k: int = 2
    repetitions: int = 9
    realtime: bool = False
    backend: Backend = "auto"
    seed: int = 0
    timeout_s: float = 120.0
    part: Part = "all"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"calibrate.dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}")
        for name in ("nodes", "ranks_per_node", "hidden_size", "moe_intermediate_size", "experts_per_rank", "top_k"):
            self._integer(name, getattr(self, name), 1)
        self._integer("tokens_per_rank", self.tokens_per_rank, 4)
        self._integer("repetitions", self.repetitions, 1)
        for name, least in (("message_bytes", self.row_bytes), ("rows", 1)):
            values = getattr(self, name)
            for value in values:
                self._integer(name, value, least)
            if len(values) < 4 or list(values) != sorted(set(values)):
                raise UsageError(f"calibrate.{name} is {list(values)}; give four or more numbers, each above the last")
        if self.backend not in BACKENDS:
            raise UsageError(f"calibrate.backend is {self.backend!r}; use one of {', '.join(BACKENDS)}")
        if self.num_ranks < 2:
            raise UsageError("calibrate needs two ranks or more, as one has nobody to send to")
        if self.row_bytes % 4:
            raise UsageError(f"calibrate.hidden_size is {self.hidden_size} in {self.dtype}; the executor needs it even")
        if self.experts_per_rank * self.expert_bytes > MOST_WEIGHTS_BYTES:
            raise UsageError(
                f"calibrate: {self.experts_per_rank} experts of {self.expert_bytes} bytes are more than a rank keeps, "
                f"{MOST_WEIGHTS_BYTES}; lower calibrate.experts_per_rank"
            )

    def _integer(self, name: str, value: object, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"calibrate.{name} is {value!r}; give an integer of at least {least}")

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.nodes * self.ranks_per_node

    @property
    def row_bytes(self) -> int:
        """Bytes of one hidden state."""
        return self.hidden_size * {"float32": 4, "bfloat16": 2}[self.dtype]

    @property
    def expert_params(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        return self.expert_params * self.row_bytes // self.hidden_size

    def copies_N(self, name: str) -> tuple[int, ...]:
        """Rows of each message of a pattern; inside a node also larger ones, as small ones are all fixed cost there."""
        copies = tuple(size // self.row_bytes for size in self.message_bytes)
        return (*copies, 2 * copies[-1], 4 * copies[-1]) if name == "intra" else copies

    def patterns(self) -> dict[str, npt.NDArray[np.int64]]:
        """Who sends a message to whom in each measurement of links, (R, R) of 0 and 1.

        empty          no message: what the exchange itself costs
        intra, inter   one message inside a node, one between nodes
        uplink         two nodes, each of whose ranks sends one message to its counterpart, both ways at once
        intra_all, all every rank to every other rank of its node; every rank to every other rank
        """
        ranks, per_node = self.num_ranks, self.ranks_per_node
        node_R = np.arange(ranks) // per_node
        same_RR = node_R[:, None] == node_R[None, :]
        other_RR = ~np.eye(ranks, dtype=bool)
        found = {"empty": np.zeros((ranks, ranks), dtype=np.int64)}
        for name, receiver, wanted in (("intra", 1, per_node > 1), ("inter", per_node, self.nodes > 1)):
            if wanted:
                found[name] = np.zeros((ranks, ranks), dtype=np.int64)
                found[name][0, receiver] = 1
        if self.nodes > 1 and per_node > 1:
            local = np.arange(per_node)
            found["uplink"] = np.zeros((ranks, ranks), dtype=np.int64)
            found["uplink"][local, local + per_node] = 1
            found["uplink"][local + per_node, local] = 1
        if per_node > 2:
            found["intra_all"] = (same_RR & other_RR).astype(np.int64)
        if self.nodes > 1 and ranks > 2:
            found["all"] = other_RR.astype(np.int64)
        return found

    def save(self, path: Path) -> None:
        """Writes the job as JSON, whole or not at all."""
        write_text_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "CalibrationJob":
        """Inverts `save`."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**data | {name: tuple(data[name]) for name in ("message_bytes", "rows")})

    def slots_TK(self, rank: int, tokens: int) -> npt.NDArray[np.int64]:
        """Slots of a rank's own tokens when exchanges are measured: even random routing, (T, K)."""
        rng = np.random.default_rng([self.seed, rank, tokens])
        slots = self.num_ranks * self.experts_per_rank
        return rng.random((tokens, slots)).argsort(axis=1)[:, : min(self.top_k, slots)]
