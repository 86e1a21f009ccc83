"""The bench's RESULT.json as a Markdown table: one row per case and method.

    python examples/bench/table.py RESULT.json

Needs the standard library only.
"""

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["best_bounds", "markdown"]

COLUMNS = (
    "case",
    "method",
    "objective",
    "bound",
    "gap",
    "unseen",
    "unseen PAR",
    "window PAR",
    "p99",
    "s",
    "MiB",
    "end",
)
UNSEEN = {"touched": "ranks_touched", "cut": "kept", "par": "par"}


def best_bounds(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest proven bound of each case, whoever proved it."""
    best: dict[str, float] = {}
    for row in rows.values():
        if row.get("bound") is not None:
            best[row["case"]] = max(row["bound"], best.get(row["case"], row["bound"]))
    return best


def markdown(result: dict[str, Any]) -> str:
    """The table with its legend.

    A method's bound is its own; the gap is to the best bound of the case, for plans that meet the case's load cap.
    """
    best = best_bounds(result["rows"])
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * 2 + "|---:" * (len(COLUMNS) - 3) + "|---|"]
    before = ""
    for row in result["rows"].values():
        case = row["case"] if row["case"] != before else ""
        before = row["case"]
        lines.append("| " + " | ".join([case, row["method"], *_figures(row, best.get(before)), _end(row)]) + " |")
    about = result["about"]
    lines += [
        "",
        f"{about['machine']}. Objective and bound on the planning half: mean ranks touched, cut (1 - kept) or PAR; "
        "gap to the case's best bound, for plans under its load cap; unseen: the same objective on the other half. "
        f"Wall and processor seconds: {about['clock']}. MiB: peak of the process, interpreter and libraries included.",
    ]
    return "\n".join(lines)


def _figures(row: dict[str, Any], bound: float | None) -> list[str]:
    objective = row.get("objective")
    gap = "-"
    if objective is not None and bound is not None and row["cap_met"]:
        gap = f"{100 * (0.0 if objective == 0 else max(0.0, (objective - bound) / objective)):.1f} %"
    judged = row.get("judged") or {}
    name = UNSEEN[row["job"]["case"]["objective"]]
    unseen = judged.get(name)
    if unseen is not None and name == "kept":
        unseen = 1 - unseen
    figures = [_number(objective), _number(row.get("bound")), gap, _number(unseen)]
    figures += [_number(judged.get(key)) for key in ("par", "par_window_mean", "par_window_p99")]
    memory = row.get("peak_mib")
    figures += [_seconds(row.get("seconds")), _seconds(row.get("cpu_seconds"))]
    return [*figures, "-" if memory is None else f"{memory:.0f}"]


def _end(row: dict[str, Any]) -> str:
    """How it ended, and which rules the plan does not meet."""
    words = [row["stopped_by"] if row["status"] == "solved" else row["status"]]
    if row.get("solved_by", row["method"]) not in row["method"]:
        words.append(f"by {row['solved_by']}")
    if row.get("objective") is not None and not row["cap_met"]:
        words.append("above the load cap")
    words += row.get("broken") or []
    if row["status"] != "solved":
        words.append(row["message"].split(";")[0].replace("|", "/")[:80])
    return ", ".join(word for word in words if word)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
