"""The table that says what each plan does to the same tokens."""

from collections.abc import Mapping

from placer.core.errors import UsageError
from placer.core.evaluate import Evaluation
from placer.report.tables import Cell, DataTable

__all__ = ["plan_table"]

MEASURES = (
    ("ranks touched", "ranks_touched"),
    ("nodes touched", "nodes_touched"),
    ("copies sent", "copies_sent"),
    ("PAR pooled", "par"),
    ("PAR window mean", "par_window_mean"),
    ("PAR window p99", "par_window_p99"),
    ("kept", "kept"),
)
"""Column title and the Evaluation's field."""


def plan_table(evaluations: Mapping[str, Evaluation]) -> DataTable:
    """One row per plan in the order given (usually linear, eplb, placer); times in microseconds per dispatch mode.

    A mode that a plan was not timed under shows as unknown. Raises UsageError where there is no plan, or where the
    plans were judged on different numbers of tokens.
    """
    if not evaluations:
        raise UsageError("plan table: no evaluations; give at least one plan")
    counts = {name: evaluation.tokens for name, evaluation in evaluations.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(f"plan table: plans judged on different token counts {counts}; judge all on the same tokens")
    modes = list(dict.fromkeys(mode for evaluation in evaluations.values() for mode in evaluation.iteration_us))
    rows: list[tuple[Cell, ...]] = []
    for name, evaluation in evaluations.items():
        measures = [getattr(evaluation, field) for _, field in MEASURES]
        rows.append((name, *measures, *(evaluation.iteration_us.get(mode) for mode in modes)))
    return DataTable(
        title=f"Plans on {next(iter(counts.values())):,} tokens",
        columns=("plan", *(title for title, _ in MEASURES), *(f"{mode} us" for mode in modes)),
        rows=tuple(rows),
        notes=(
            "ranks, nodes, copies: mean per token and layer. PAR: max / mean rank load. kept: transitions that stay.",
            "us: predicted iteration (closed form) in microseconds under each dispatch mode.",
        ),
    )
