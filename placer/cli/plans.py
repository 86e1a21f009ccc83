"""`placer profile`, `solve`, `check` and `export`: from a trace to a plan an engine can load."""

import json
from dataclasses import asdict
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
    load_model,
    parse_share,
    parse_time,
    progress_line,
    read_source,
    require_distinct,
    require_parent,
    status_line,
    warn,
)

__all__ = ["register"]

PlanArgument = Annotated[Path, typer.Argument(help="A plan that `placer solve` wrote.")]
ModeFlag = Annotated[
    str, typer.Option("--mode", help="How tokens travel: per_expert, per_rank, per_node, coherent or allgather.")
]


def profile(
    trace: Annotated[Path, typer.Argument(help="A trace in any format placer reads.")],
    output: OutFlag,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Counts a trace into a small profile without prompts, which can be shared and solved elsewhere."""
    from placer.config import load_settings
    from placer.pipeline import profile_of
    from traces.profile_store import save_profile

    require_parent(output)
    require_distinct(output, inputs=(trace,))
    settings = load_settings(config)
    source = read_source(trace, model)
    counted = profile_of(source, settings.profile, progress_line("counting"))
    save_profile(counted, output)
    data = {"output": str(output), "tokens": counted.num_tokens, "bytes": output.stat().st_size}
    emit(as_json, data, (), (f"wrote {output}: {counted.num_tokens:,} tokens in {data['bytes']:,} bytes",))


def solve(
    source: Annotated[Path, typer.Argument(metavar="TRACE|PROFILE", help="What was routed; all of it is planned on.")],
    cluster: ClusterFlag,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the plan goes (JSON).")] = None,
    mode: ModeFlag = "per_rank",
    redundant: Annotated[int, typer.Option(help="Slots beyond one per expert, filled with replicas.")] = 0,
    max_par: Annotated[
        float | None,
        typer.Option(
            help="Cap on max / mean rank load, mean over layers, on unseen requests; inf for none. "
            "Left out: 1.10, or 5 % above the proven least if that is more."
        ),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="auto; load: linear, round_robin, eplb, eplb_hierarchical, lpt, risk, lplb; ranks touched: "
            "coactivation, replicated, blocks, cpsat; transitions kept: affinity, chain; papers: moetuner, exflow, "
            "exflow_staged, sem_moe."
        ),
    ] = "auto",
    time: Annotated[str, typer.Option(help="Time limit: 60s, 5m, 1h.")] = "60s",
    gap: Annotated[str, typer.Option(help="Stop when proven within this share of the best: 1%.")] = "0%",
    seed: Annotated[int, typer.Option(help="Same seed, same plan (unless the time limit stops the search).")] = 0,
    current: Annotated[Path | None, typer.Option("--from", help="A plan to start from.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Also write what proves the bound, for `placer check --certificate`.")
    ] = None,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Finds a placement, a lower bound and the gap to it. Ctrl-C keeps the best so far. Exit code 5: none possible."""
    from placer.config import load_cluster, load_settings
    from placer.core.plan import Plan
    from placer.pipeline import certificate_of, stored_certificate
    from placer.pipeline import solve as run
    from traces.certificate_store import save_certificate

    for path in (output, certificate):
        if path is not None:
            require_parent(path)
    require_distinct(output, certificate, inputs=(source, current))
    settings = load_settings(config)
    solved = run(
        read_source(source, model),
        load_cluster(cluster),
        mode=mode,  # type: ignore[arg-type]  # validated by PlacementProblem
        redundant=redundant,
        max_par="auto" if max_par is None else max_par,
        solver=solver,
        time_limit_s=parse_time(time),
        gap=parse_share(gap, "--gap"),
        seed=seed,
        current=None if current is None else Plan.load(current),
        profile_settings=settings.profile,
        solve_settings=settings.solve,
        progress=progress_line("solving"),
        note=lambda line: status_line(f"note: {line}"),
    )
    result, judged = solved.result, asdict(solved.evaluation)
    if output is not None:
        solved.plan.save(output)
    warn(solved.warnings)
    written = [output] if output else []
    if certificate is not None:
        proof, weaker = certificate_of(solved.problem, result)
        warn(weaker)
        if proof is not None:
            save_certificate(stored_certificate(solved.problem, proof), certificate)
            written.append(certificate)
    data: dict[str, Any] = {
        "solver": result.solver,
        "status": result.status,
        "stopped_by": result.stopped_by,
        "objective_name": result.objective_name,
        "objective": result.objective,
        "bound": result.bound,
        "bound_by": result.bound_by,
        "gap": result.gap,
        "seconds": round(result.seconds, 3),
        "mode": mode,
        "max_par": solved.problem.max_par,
        "moved_experts": solved.moved_experts,
        "moved_bytes": solved.moved_bytes,
        "moved_layers": solved.moved_layers,
        **judged,
        "seed": seed,
        "plan": None if output is None else str(output),
        "certificate": str(certificate) if certificate in written else None,
        "trail": list(result.trail),
        "message": result.message,
    }
    if output is None:
        data["plan"] = json.loads(solved.plan.to_json())
    emit(as_json, data, _solved_tables(data), tuple(f"wrote {path}" for path in written))


JUDGED = ("ranks_touched", "nodes_touched", "copies_sent", "par", "par_window_mean", "par_window_p99", "kept")


def _judged_rows(judged: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a plan does to the requests it was judged on, one figure a row."""
    rows = [(key, judged[key]) for key in JUDGED if judged.get(key) is not None]
    return rows + [(f"iteration_us ({mode})", value) for mode, value in (judged.get("iteration_us") or {}).items()]


def _judged_table(title: str, judged: dict[str, Any]) -> Any:
    from placer.report.tables import DataTable, format_cell

    rows = tuple((key, format_cell(value)) for key, value in _judged_rows(judged))
    return DataTable(title=f"{title}, judged on this trace", columns=("what", "value"), rows=rows)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.3g} %"


def _proof_table(title: str, proof: dict[str, Any]) -> Any:
    from placer.report.tables import DataTable, format_cell

    keys = ("objective_name", "objective", "bound", "gap", "max_par", "proof")
    rows = tuple((key, format_cell(_percent(proof[key]) if key == "gap" else proof[key])) for key in keys)
    return DataTable(title=f"{title}, verified on this trace", columns=("what", "value"), rows=rows)


def _solved_tables(data: dict[str, Any]) -> Any:
    from placer.report.tables import DataTable, format_cell

    keys = ("solver", "status", "stopped_by", "objective_name", "objective", "bound", "bound_by", "gap", "seconds")
    rows = [(key, data[key]) for key in keys]
    rows[keys.index("gap")] = ("gap", _percent(data["gap"]))
    if data["moved_experts"] is not None:
        moved = (
            f"{data['moved_experts']} experts in {data['moved_layers']} layers, {data['moved_bytes'] / 2**30:.3g} GiB"
        )
        rows.append(("moved from the plan given", moved))
    rows += _judged_rows(data)
    cells = tuple((key, format_cell(value)) for key, value in rows)
    notes = (data["message"],) if data["message"] else ()
    return (DataTable(title="Solved; judged on the same requests", columns=("what", "value"), rows=cells, notes=notes),)


def check(
    plan: PlanArgument,
    trace: Annotated[Path, typer.Option("--trace", help="Trace or profile to judge the plan on.")],
    cluster: ClusterFlag,
    max_par: Annotated[float | None, typer.Option(help="Also refuse a plan whose PAR is above this.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="A plan that this one may not be worse than.")] = None,
    max_regression: Annotated[str, typer.Option(help="How much worse it may be: 2%.")] = "2%",
    certificate: Annotated[
        Path | None, typer.Option(help="What `placer solve --certificate` wrote: verified, and the gap shown.")
    ] = None,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Says whether a plan is legal and, with --baseline, no worse. Exit code 6: illegal, unproven; 7: a regression."""
    from placer.config import load_cluster, load_settings
    from placer.core.plan import Plan
    from placer.pipeline import check_plan
    from traces.certificate_store import load_certificate

    settings = load_settings(config)
    report = check_plan(
        Plan.load(plan),
        read_source(trace, model),
        load_cluster(cluster),
        max_par=max_par,
        baseline=None if baseline is None else Plan.load(baseline),
        max_regression=parse_share(max_regression, "--max-regression"),
        profile_settings=settings.profile,
        solve_settings=settings.solve,
        certificate=None if certificate is None else load_certificate(certificate),
    )
    warn(report.warnings)
    data = {
        "plan": str(plan),
        "legal": not report.violations,
        "violations": [asdict(violation) for violation in report.violations],
        "regressions": list(report.regressions),
        "warnings": list(report.warnings),
        "evaluation": None if report.evaluation is None else asdict(report.evaluation),
        "certificate": None if report.proof is None else asdict(report.proof),
    }
    tables = () if report.evaluation is None else (_judged_table(str(plan), asdict(report.evaluation)),)
    if report.proof is not None:
        tables += (_proof_table(str(certificate), asdict(report.proof)),)
    emit(as_json, data, tables, () if report.violations else (f"{plan}: legal",))
    report.raise_for_status()


def export(
    plan: PlanArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="sglang, vllm, vllm-initial-mapping, vllm-expert-map, vllm-placement-file, trtllm, ascend or eplb.",
        ),
    ],
    output: OutFlag,
    model: ModelFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Writes the plan in an engine's own format, reads it back, and prints the flags that load it."""
    from placer.core.plan import Plan
    from placer.export import export_plan
    from placer.pipeline import model_of_plan

    require_parent(output)
    require_distinct(output, inputs=(plan,))
    read = Plan.load(plan)
    flags = export_plan(read, model_of_plan(read, load_model(model)), to, output)
    emit(
        as_json,
        {"output": str(output), "to": to, "load_with": flags},
        (),
        (f"wrote {output}", f"load it with: {flags}"),
    )


def register(app: typer.Typer) -> None:
    """Adds the verbs of this module to `app`."""
    for verb in (profile, solve, check, export):
        app.command(no_args_is_help=True)(verb)
