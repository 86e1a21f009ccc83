"""LabSpec: the shape of a shaped cluster on one machine, and its text form."""

import re
from dataclasses import dataclass

from placer.core.errors import UsageError

__all__ = ["LabSpec"]

TEXT = re.compile(r"([1-9]\d{0,2})x([1-9]\d{0,2})(?:@(\d+(?:\.\d+)?)(mbit|gbit))?")
MOST_NODES, MOST_RANKS = 64, 256
LEAST_MBIT, MOST_MBIT = 1.0, 100_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSpec:
    """`nodes` x `ranks_per_node` ranks; `mbit` is the rate of each node's link, each direction (None: unshaped)."""

    nodes: int
    ranks_per_node: int
    mbit: float | None = None

    def __post_init__(self) -> None:
        for field, most in (("nodes", MOST_NODES), ("ranks_per_node", MOST_RANKS)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise UsageError(f"lab.{field} is {value!r}; give an integer, 1 to {most}")
        if self.num_ranks > MOST_RANKS:
            raise UsageError(f"lab has {self.num_ranks} ranks; one machine takes at most {MOST_RANKS}")
        if self.mbit is not None and not LEAST_MBIT <= self.mbit <= MOST_MBIT:
            raise UsageError(
                f"lab.mbit is {self.mbit!r}; give megabits per second, {LEAST_MBIT:g} to {MOST_MBIT:g}, or none"
            )

    @classmethod
    def parse(cls, text: str) -> "LabSpec":
        """The LabSpec that `str` wrote: `2x2@200mbit`, `4x1@1gbit`, `2x2` (unshaped). Raises UsageError."""
        match = TEXT.fullmatch(text.strip().lower())
        if not match:
            raise UsageError(
                f"lab {text[:60]!r} is not known; write NODESxRANKS@RATE such as 2x2@200mbit or 4x1@1gbit, "
                "or without @RATE for unshaped links"
            )
        nodes, ranks, rate, unit = match.groups()
        mbit = None if rate is None else float(rate) * (1000 if unit == "gbit" else 1)
        return cls(nodes=int(nodes), ranks_per_node=int(ranks), mbit=mbit)

    def __str__(self) -> str:
        shape = f"{self.nodes}x{self.ranks_per_node}"
        return shape if self.mbit is None else f"{shape}@{self.mbit:.12g}mbit"

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node
