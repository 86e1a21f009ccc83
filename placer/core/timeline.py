"""Timeline: what happened when on which rank; simulated or measured, the same type.

Legend: I spans (one phase of one layer on one rank), R ranks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_text_atomically
from placer.core.errors import InputFileError, UsageError

__all__ = ["PHASES", "Timeline"]

PHASES = ("attention", "dispatch", "experts", "combine", "gather", "load", "copy")
"""Phase codes are indices into this tuple. `gather` is the all-gather of contexts or tokens between iterations. `load`
and `copy` are a device's: planes read from the disk, and copied to the accelerator."""

COLUMNS = ("iteration", "layer", "phase", "rank", "start_ns", "duration_ns", "sent_bytes", "received_bytes", "tokens")
FORMAT = "placer-timeline"
VERSION = 1
MAX_LAYERS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Columns of equal length I, ordered by (iteration, start_ns, rank), and what they describe.

    Iterations count from 0 without gaps; ranks lie below about["num_ranks"]; counts and times are 0 or more.
    `layer` is the routing site's index (-1 where a span belongs to no layer). `tokens` counts (token, expert) pairs
    computed in `experts` spans, token copies sent in `dispatch` and `combine`. `about` says how it was made: at least
    source ("simulated" or "measured"), mode, num_ranks, ranks_per_node, plan_sha256, trace_sha256,
    tokens_per_iteration.
    """

    about: dict[str, Any]
    iteration: npt.NDArray[np.int32]
    layer: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    rank: npt.NDArray[np.int32]
    start_ns: npt.NDArray[np.int64]
    duration_ns: npt.NDArray[np.int64]
    sent_bytes: npt.NDArray[np.int64]
    received_bytes: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        length = len(self.start_ns)
        for name in COLUMNS:
            if getattr(self, name).shape != (length,):
                raise UsageError(f"timeline.{name} has shape {getattr(self, name).shape}; start_ns has ({length},)")
        for name in ("source", "mode", "num_ranks"):
            if name not in self.about:
                raise UsageError(f"timeline.about lacks {name!r}")
        ranks = self.about["num_ranks"]
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise UsageError(f"timeline.about['num_ranks'] is {ranks!r}; give a positive integer")
        if not length:
            return
        if int(self.duration_ns.min()) < 0 or int(self.start_ns.min()) < 0:
            raise UsageError("timeline: a span starts before 0 or lasts less than 0 ns")
        if int((self.start_ns + self.duration_ns).min()) < 0:
            raise UsageError("timeline: a span ends after 2**63 ns; give nanoseconds since the start")
        for name, low, high in (("phase", 0, len(PHASES)), ("rank", 0, ranks), ("layer", -1, MAX_LAYERS)):
            column = getattr(self, name)
            if int(column.min()) < low or int(column.max()) >= high:
                raise UsageError(
                    f"timeline.{name} has {column.min()} to {column.max()}; it goes from {low} to {high - 1}"
                )
        for name in ("sent_bytes", "received_bytes", "tokens"):
            if int(getattr(self, name).min()) < 0:
                raise UsageError(f"timeline.{name} has {int(getattr(self, name).min())}; counts are 0 or more")
        present = np.unique(self.iteration)
        if not np.array_equal(present, np.arange(len(present))):
            raise UsageError("timeline.iteration has gaps; iterations count from 0, each with at least one span")

    @property
    def num_iterations(self) -> int:
        """How many iterations the spans cover."""
        return int(self.iteration.max()) + 1 if len(self.iteration) else 0

    def iteration_ns(self) -> npt.NDArray[np.int64]:
        """Length of each iteration: last end minus first start over all ranks."""
        count = self.num_iterations
        first = np.full(count, np.iinfo(np.int64).max, dtype=np.int64)
        last = np.zeros(count, dtype=np.int64)
        np.minimum.at(first, self.iteration, self.start_ns)
        np.maximum.at(last, self.iteration, self.start_ns + self.duration_ns)
        return last - first

    def phase_ns(self) -> dict[str, npt.NDArray[np.int64]]:
        """Per phase and iteration, the sum over layers of the slowest rank's spans, (iterations,) each.

        A rank has several spans of one phase where the layer is pipelined: they are added up before ranks are compared.
        """
        result: dict[str, npt.NDArray[np.int64]] = {}
        layers = int(self.layer.max()) + 2 if len(self.layer) else 1
        for code, name in enumerate(PHASES):
            pick = self.phase == code
            if not pick.any():
                continue
            owner = np.stack([self.rank[pick], self.layer[pick] + 1, self.iteration[pick]])
            order = np.lexsort(owner)
            owner, duration_ns = owner[:, order], self.duration_ns[pick][order]
            first = np.flatnonzero(np.append(True, (np.diff(owner) != 0).any(axis=0)))
            slowest = np.zeros((self.num_iterations, layers), dtype=np.int64)
            np.maximum.at(slowest, (owner[2, first], owner[1, first]), np.add.reduceat(duration_ns, first))
            result[name] = slowest.sum(axis=1)
        return result

    @classmethod
    def join(cls, parts: Sequence["Timeline"]) -> "Timeline":
        """The iterations of several launches of the same job, one launch after the other.

        `about` is the first's, with `launch_iterations`: how many iterations each launch has. Raises UsageError.
        """
        if not parts:
            raise UsageError("timeline: no parts to join; give at least one")
        counts = [part.num_iterations for part in parts]
        first = np.cumsum([0, *counts[:-1]])
        ends = [int((part.start_ns + part.duration_ns).max(initial=0)) for part in parts]
        shift = np.cumsum([0, *ends[:-1]])
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        lengths = [len(part.start_ns) for part in parts]
        columns["iteration"] = columns["iteration"] + np.repeat(first, lengths).astype(np.int32)
        columns["start_ns"] = columns["start_ns"] + np.repeat(shift, lengths)
        return cls(about={**parts[0].about, "launch_iterations": counts}, **columns)

    def to_json(self) -> str:
        """Canonical text: same Timeline, same bytes."""
        head = {"format": FORMAT, "version": VERSION, "about": self.about}
        lines = [f"  {json.dumps(name)}: {json.dumps(getattr(self, name).tolist())}" for name in COLUMNS]
        return json.dumps(head, sort_keys=True)[:-1] + ',\n "columns": {\n' + ",\n".join(lines) + "\n }}\n"

    def save(self, path: Path) -> None:
        """Writes the Timeline as JSON, whole or not at all."""
        write_text_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Timeline":
        """Reads what `save` wrote. Raises InputFileError."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputFileError(f"{path}: is not JSON ({error}); give a Timeline that placer wrote") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputFileError(f"{path}: is not a placer Timeline; give what simulate or run wrote")
        if data.get("version") != VERSION:
            raise InputFileError(f"{path}: Timeline version {data.get('version')!r}; this placer reads {VERSION}")
        types = {"iteration": np.int32, "layer": np.int32, "phase": np.int8, "rank": np.int32}
        try:
            columns = {n: _column(data["columns"][n], types.get(n, np.int64), n) for n in COLUMNS}
            return cls(about=dict(data["about"]), **columns)
        except (KeyError, TypeError, ValueError, OverflowError, UsageError) as error:
            raise InputFileError(f"{path}: damaged Timeline ({error})") from error


def _column(values: Any, dtype: Any, name: str) -> npt.NDArray[Any]:
    # numpy would take 1.5 for 1, "3" for 3 and a list of lists for one list
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} is not a list of whole numbers")
    return np.array(values, dtype=dtype)
