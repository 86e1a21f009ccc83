"""Gates: predicted against measured over many runs. A claim about predictions holds only while these pass.

Legend: C combinations (placement, mode, homes) measured together on one cluster.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placer.core.errors import UsageError
from placer.report.tables import Cell, DataTable

__all__ = ["LIMITS", "GateRow", "GateVerdict", "gate_tables", "judge_gates", "kendall_tau"]

LIMITS = {"median error": 0.10, "p90 error": 0.25, "Kendall tau": 0.9}
"""The first two are most, the last is least. tau is judged over pairs that the measurement itself can rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """One combination on one cluster. Times are microseconds of an iteration; ratios are baseline / this.

    group          what was measured together: rows of a group are ranked with each other, one is the baseline
    measured_us    median over launches of the launch's median; low and high: smallest and largest launch's
    predicted_us   made before the measurement
    ratio          paired ratio to the group's baseline, with the range over launches; 1 for the baseline itself
    """

    group: str
    name: str
    placement: str
    mode: str
    homes: str
    measured_us: float
    measured_low_us: float
    measured_high_us: float
    predicted_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    predicted_ratio: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_us / self.measured_us - 1

    def is_resolved(self, noise: float) -> bool:
        """Whether the measured gain or loss is above the noise floor, and on one side of 1 in every launch."""
        above = abs(np.log(self.ratio)) > np.log1p(noise)
        return bool(above and (self.ratio_low - 1) * (self.ratio_high - 1) > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """What the rows say together; `passed` by gate. Wrong signs are named.

    tau       mean over groups of Kendall's tau over pairs whose measured times differ by more than the noise
    tau_all   the same over all pairs, those included that the measurement cannot tell apart
    """

    rows: int
    noise: float
    median_error: float
    p90_error: float
    tau: float
    tau_by_group: dict[str, float]
    tau_all: float
    resolved: int
    wrong_signs: tuple[str, ...]

    @property
    def passed(self) -> dict[str, bool]:
        """Gate by gate."""
        return {
            "median error": self.median_error <= LIMITS["median error"],
            "p90 error": self.p90_error <= LIMITS["p90 error"],
            "Kendall tau": self.tau >= LIMITS["Kendall tau"],
            "sign of every resolved gain": not self.wrong_signs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "wrong_signs": list(self.wrong_signs), "passed": self.passed}


def kendall_tau(first_C: Sequence[float], second_C: Sequence[float], *, noise: float = 0.0) -> float:
    """Kendall's tau-b of two rankings, 1 where they agree, -1 where one is the other reversed; nan if one is constant.

    Pairs whose first values (positive) differ by no more than the share `noise` count as ties and are left out.
    Complexity: O(C^2).
    """
    upper = np.triu_indices(len(first_C), 1)
    first, second = (np.sign(np.subtract.outer(x, x))[upper] for x in (np.asarray(first_C), np.asarray(second_C)))
    if noise:
        apart = np.abs(np.subtract.outer(np.log(first_C), np.log(first_C)))[upper] > np.log1p(noise)
        first, second = first[apart], second[apart]
    weight = np.sqrt(float((first != 0).sum()) * float((second != 0).sum()))
    return float((first * second).sum() / weight) if weight else float("nan")


def judge_gates(rows: Sequence[GateRow], noise: float) -> GateVerdict:
    """The gates over all rows; `noise` is the floor under which a gain counts as none.

    tau is the mean over groups: times of different clusters rank themselves. Raises UsageError without rows.
    """
    if not rows:
        raise UsageError("gates: no rows; measure at least one combination")
    error_C = np.abs([row.error for row in rows])
    tau, tau_all = {}, {}
    for group in dict.fromkeys(row.group for row in rows):
        times = [[row.measured_us for row in rows if row.group == group]]
        times.append([row.predicted_us for row in rows if row.group == group])
        tau[group], tau_all[group] = kendall_tau(*times, noise=noise), kendall_tau(*times)
    resolved = [row for row in rows if row.is_resolved(noise)]
    wrong = [row for row in resolved if (row.ratio - 1) * (row.predicted_ratio - 1) <= 0]
    return GateVerdict(
        rows=len(rows),
        noise=noise,
        median_error=float(np.median(error_C)),
        p90_error=float(np.quantile(error_C, 0.9)),
        tau=_mean(tau),
        tau_by_group=tau,
        tau_all=_mean(tau_all),
        resolved=len(resolved),
        wrong_signs=tuple(f"{row.group}: {row.name}" for row in wrong),
    )


def gate_tables(rows: Sequence[GateRow], verdict: GateVerdict) -> tuple[DataTable, ...]:
    """The gates, then a table for every group."""
    limits: list[tuple[Cell, ...]] = [
        ("median error %", 100 * verdict.median_error, "<= 10", _word(verdict, "median error")),
        ("p90 error %", 100 * verdict.p90_error, "<= 25", _word(verdict, "p90 error")),
        ("Kendall tau over pairs apart by more than the noise", verdict.tau, ">= 0.9", _word(verdict, "Kendall tau")),
        ("Kendall tau over all pairs", verdict.tau_all, None, None),
        (
            f"wrong signs of {verdict.resolved} resolved gains",
            len(verdict.wrong_signs),
            "0",
            _word(verdict, "sign of every resolved gain"),
        ),
    ]
    note = (f"a gain counts above the noise floor of {100 * verdict.noise:.1f} % and with one sign in every launch",)
    tables = [
        DataTable(
            title=f"Gates over {verdict.rows} combinations",
            columns=("gate", "seen", "limit", "verdict"),
            rows=tuple(limits),
            notes=note,
        )
    ]
    columns = (
        "combination",
        "measured us",
        "low",
        "high",
        "predicted us",
        "error %",
        "gain",
        "low",
        "high",
        "predicted",
    )
    for group in dict.fromkeys(row.group for row in rows):
        lines: list[tuple[Cell, ...]] = [
            (
                row.name,
                row.measured_us,
                row.measured_low_us,
                row.measured_high_us,
                row.predicted_us,
                100 * row.error,
                row.ratio,
                row.ratio_low,
                row.ratio_high,
                row.predicted_ratio,
            )
            for row in rows
            if row.group == group
        ]
        tables.append(DataTable(title=group, columns=columns, rows=tuple(lines)))
    return tuple(tables)


def _mean(by_group: dict[str, float]) -> float:
    """Of the groups that can be ranked at all."""
    known = [value for value in by_group.values() if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _word(verdict: GateVerdict, gate: str) -> str:
    return "pass" if verdict.passed[gate] else "FAIL"
