"""`placer schedule`: which all-to-all algorithm and pipeline degree every layer of a plan uses."""

from pathlib import Path
from typing import Annotated, Any

import typer

from placer.cli.common import (
    ClusterFlag,
    ConfigFlag,
    JsonFlag,
    ModelFlag,
    OutFlag,
    emit,
    progress_line,
    read_source,
    require_distinct,
    require_parent,
    warn,
)
from placer.cli.plans import PlanArgument
from placer.core.errors import UsageError

__all__ = ["register"]

BOTH = "both"


def schedule(
    plan: PlanArgument,
    trace: Annotated[Path, typer.Option("--trace", help="The routed tokens to price candidates on.")],
    cluster: ClusterFlag,
    output: OutFlag,
    kinds: Annotated[str, typer.Option("--for", help="prefill, decode or both.")] = BOTH,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Picks all-to-all algorithm (linear, 2dh, rounds) and pipeline degree of each layer, for prefill and decode."""
    from placer.config import load_cluster, load_settings
    from placer.core.plan import Plan
    from placer.core.schedule import KINDS
    from placer.pipeline.scheduling import schedule_plan

    require_parent(output)
    require_distinct(output, inputs=(plan, trace))
    if kinds not in (BOTH, *KINDS):
        raise UsageError(f"--for {kinds!r} is no kind of iteration; use {', '.join(KINDS)} or {BOTH}")
    settings = load_settings(config)
    sizes = {"prefill": settings.solve.batch_tokens, "decode": settings.schedule.decode_tokens}
    planned, found, warnings = schedule_plan(
        Plan.load(plan),
        read_source(trace, model, tokens=True),
        load_cluster(cluster),
        batch_tokens={kind: sizes[kind] for kind in KINDS if kinds in (BOTH, kind)},
        settings=settings.schedule,
        progress=progress_line("scheduling"),
    )
    warn(warnings)
    planned.save(output)
    data: dict[str, Any] = {"output": str(output), "mode": planned.mode, "kinds": {}}
    for one in found:
        data["kinds"][one.kind] = {
            "batch_tokens": one.batch_tokens,
            "iterations": one.iterations,
            "layers": one.layers_by_choice,
            "before_us": one.before_us,
            "after_us": one.after_us,
            "gain": one.before_us / one.after_us if one.after_us else 1.0,
            "rounds_gap": one.rounds_gap,
        }
    emit(as_json, data, _tables(data), (f"wrote {output}",))


def _tables(data: dict[str, Any]) -> Any:
    from placer.report.tables import DataTable

    rows = tuple(
        (
            kind,
            one["batch_tokens"],
            ", ".join(f"{count} {name}" for name, count in one["layers"].items()),
            one["before_us"],
            one["after_us"],
            one["gain"],
        )
        for kind, one in data["kinds"].items()
    )
    return (
        DataTable(
            title=f"Schedules, mode {data['mode']}",
            columns=("kind", "tokens", "layers by choice", "us before", "us after", "gain"),
            rows=rows,
            notes=(
                "us: predicted iteration (fidelity port) on the tokens planned on; before: all linear x1.",
                "linear x2: algorithm linear in two pipeline chunks.",
            ),
        ),
    )


def register(app: typer.Typer) -> None:
    """Adds the verb of this module to `app`."""
    app.command(no_args_is_help=True)(schedule)
