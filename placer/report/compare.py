"""Timelines side by side: how long, in which phase, how far a prediction is from its measurement.

Legend: I iterations.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placer.core.errors import UsageError
from placer.core.timeline import PHASES, Timeline
from placer.report.tables import Cell, DataTable

__all__ = ["Comparison", "PredictionError", "TimelineSummary", "compare", "comparison_tables"]

ALIKE = (
    ("mode", "dispatch modes", "a gain holds for one mode only"),
    ("plan_sha256", "plans", "ratios compare the plans"),
    ("tokens_per_iteration", "token counts", "times of different batches do not compare"),
    ("num_ranks", "numbers of ranks", "times on different clusters do not compare"),
    ("ranks_per_node", "ranks per node", "times on different clusters do not compare"),
    ("cluster", "clusters", "times on different clusters do not compare"),
    ("device", "devices", "times on different devices do not compare"),
    ("model", "models", "times of different models do not compare"),
    ("trace_sha256", "traces", "the tokens were not the same"),
)
"""Fields of `about` that should agree, what they are, and what a difference means."""

PAIRED = ("mode", "plan_sha256", "num_ranks", "ranks_per_node", "tokens_per_iteration", "trace_sha256", "model")
"""A prediction and a measurement belong together where none of these differs; a field that one lacks does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSummary:
    """One timeline in microseconds per iteration: mean, spread over iterations, mean of each phase.

    A phase is the sum over layers of the slowest rank's span, waiting included, so phases need not add up to the mean.
    `ratio` and `phase_ratio` are to the first timeline (None where that has no such phase).
    """

    name: str
    source: str
    mode: str
    iterations: int
    mean_us: float
    p10_us: float
    p50_us: float
    p90_us: float
    ratio: float | None
    phase_us: dict[str, float]
    phase_ratio: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionError:
    """(predicted - measured) / measured of the mean iteration and of each phase that both have."""

    predicted: str
    measured: str
    total: float
    phases: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Summaries in the order given, errors of each prediction against each measurement of the same, warnings."""

    timelines: tuple[TimelineSummary, ...]
    errors: tuple[PredictionError, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = asdict(self)
        return {key: list(value) for key, value in data.items()}


def compare(timelines: Sequence[Timeline], names: Sequence[str]) -> Comparison:
    """Puts timelines side by side; the first is the baseline of the ratios.

    Raises UsageError where there are no timelines, not one distinct name for each, or one without spans.
    """
    if not timelines:
        raise UsageError("compare: no timelines; give at least one")
    if len(timelines) != len(names) or len(set(names)) != len(names):
        raise UsageError(f"compare: {len(timelines)} timelines, names {list(names)}; give one distinct name for each")
    for timeline, name in zip(timelines, names, strict=True):
        if not len(timeline.start_ns) or not timeline.iteration_ns().mean() > 0:
            raise UsageError(f"compare: timeline {name!r} lasts 0 ns; simulate or run at least one iteration")
    first = _means(timelines[0])
    summaries = tuple(_summary(t, name, first) for t, name in zip(timelines, names, strict=True))
    pairs = list(zip(timelines, summaries, strict=True))
    errors = [_error(p, m) for predicted, p in pairs for measured, m in pairs if _belong_together(predicted, measured)]
    return Comparison(timelines=summaries, errors=tuple(errors), warnings=tuple(_warnings(timelines, names, errors)))


def comparison_tables(comparison: Comparison) -> tuple[DataTable, ...]:
    """The comparison for a terminal: totals, phases and, where there are any, prediction errors in percent."""
    totals: list[tuple[Cell, ...]] = [
        (t.name, t.source, t.mode, t.iterations, t.mean_us, t.ratio, t.p10_us, t.p50_us, t.p90_us)
        for t in comparison.timelines
    ]
    columns = ("timeline", "source", "mode", "iterations", "mean us", "ratio", "p10 us", "p50 us", "p90 us")
    notes = tuple(f"warning: {warning}" for warning in comparison.warnings)
    tables = [DataTable(title="Iteration time", columns=columns, rows=tuple(totals), notes=notes)]
    phases = [phase for phase in PHASES if any(phase in t.phase_us for t in comparison.timelines)]
    by_phase: list[tuple[Cell, ...]] = []
    for t in comparison.timelines:
        cells = [cell for phase in phases for cell in (t.phase_us.get(phase), t.phase_ratio.get(phase))]
        by_phase.append((t.name, *cells))
    heads = [head for phase in phases for head in (f"{phase} us", "ratio")]
    phase_notes = ["a phase is the sum over layers of its slowest rank, waiting included"]
    if {"load", "copy"} & set(phases):
        phase_notes.append("load and copy: how long disk and copy engine were busy, beside the processor's phases")
    table = DataTable(title="Phases", columns=("timeline", *heads), rows=tuple(by_phase), notes=tuple(phase_notes))
    tables.append(table)
    if comparison.errors:
        shown = [phase for phase in phases if any(phase in error.phases for error in comparison.errors)]
        errors: list[tuple[Cell, ...]] = []
        for error in comparison.errors:
            by = [None if phase not in error.phases else 100 * error.phases[phase] for phase in shown]
            errors.append((error.predicted, error.measured, 100 * error.total, *by))
        heads = ["predicted", "measured", "total %", *(f"{phase} %" for phase in shown)]
        tables.append(DataTable(title="Prediction error", columns=tuple(heads), rows=tuple(errors)))
    return tuple(tables)


def _means(timeline: Timeline) -> dict[str, float]:
    """Mean microseconds of an iteration under "total", and of each phase."""
    means = {"total": float(timeline.iteration_ns().mean()) / 1e3}
    return means | {phase: float(ns_I.mean()) / 1e3 for phase, ns_I in timeline.phase_ns().items()}


def _summary(timeline: Timeline, name: str, first: dict[str, float]) -> TimelineSummary:
    means = _means(timeline)
    p10, p50, p90 = (float(value) / 1e3 for value in np.quantile(timeline.iteration_ns(), (0.1, 0.5, 0.9)))
    ratios = {key: value / first[key] if first.get(key, 0) > 0 else None for key, value in means.items()}
    return TimelineSummary(
        name=name,
        source=str(timeline.about["source"]),
        mode=str(timeline.about["mode"]),
        iterations=timeline.num_iterations,
        mean_us=means.pop("total"),
        p10_us=p10,
        p50_us=p50,
        p90_us=p90,
        ratio=ratios.pop("total"),
        phase_us=means,
        phase_ratio=ratios,
    )


def _error(predicted: TimelineSummary, measured: TimelineSummary) -> PredictionError:
    both = [phase for phase, value in measured.phase_us.items() if value > 0 and phase in predicted.phase_us]
    return PredictionError(
        predicted=predicted.name,
        measured=measured.name,
        total=predicted.mean_us / measured.mean_us - 1,
        phases={phase: predicted.phase_us[phase] / measured.phase_us[phase] - 1 for phase in both},
    )


def _belong_together(predicted: Timeline, measured: Timeline) -> bool:
    if predicted.about["source"] != "simulated" or measured.about["source"] != "measured":
        return False
    return all(
        predicted.about[field] == measured.about[field]
        for field in PAIRED
        if field in predicted.about and field in measured.about
    )


def _warnings(timelines: Sequence[Timeline], names: Sequence[str], errors: Sequence[PredictionError]) -> list[str]:
    found = []
    for field, what, meaning in ALIKE:
        values = {n: str(t.about[field]) for n, t in zip(names, timelines, strict=True) if field in t.about}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value[:12] if 'sha256' in field else value}" for name, value in values.items())
            found.append(f"different {what} ({shown}); {meaning}")
    counts = {name: timeline.num_iterations for name, timeline in zip(names, timelines, strict=True)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name}: {count}" for name, count in counts.items())
        found.append(f"different numbers of iterations ({shown}); means are over different tokens")
    sources = {str(timeline.about["source"]) for timeline in timelines}
    if sources == {"simulated", "measured"} and not errors:
        found.append(
            "no prediction belongs to a measurement here (mode, plan, trace or tokens differ); no errors shown"
        )
    return found
