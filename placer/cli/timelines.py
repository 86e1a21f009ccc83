"""`placer simulate`, `run` and `compare`: a plan's predicted and measured Timelines."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli.common import (
    ConfigFlag,
    JsonFlag,
    ModelFlag,
    OutFlag,
    emit,
    progress_line,
    read_source,
    require_distinct,
    require_parent,
    status_line,
    warn,
)
from placer.cli.plans import PlanArgument
from placer.core.errors import UsageError

if TYPE_CHECKING:
    from placer.core.timeline import Timeline
    from placer.report.paired import PairedRatio

__all__ = ["ChromeFlag", "finish", "register"]

ChromeFlag = Annotated[
    Path | None, typer.Option("--chrome", help="Also write a Chrome trace (open it in Perfetto or chrome://tracing).")
]
KindFlag = Annotated[
    str,
    typer.Option("--for", help="prefill or decode: which of the plan's two schedules holds (see `placer schedule`)."),
]
ModeFlag = Annotated[str | None, typer.Option("--mode", help="Dispatch mode, if not the plan's own.")]


def simulate(
    output: OutFlag,
    plan: Annotated[Path | None, typer.Argument(help="Plan that solve wrote; not with --sweep.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="The routed tokens to send through the plan (or in SWEEP.yaml).")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="As for solve; not with --sweep, whose YAML names clusters.")
    ] = None,
    fidelity: Annotated[
        str,
        typer.Option(help="port (closed form), phase (ranks run on without barriers) or flow (messages share links)."),
    ] = "phase",
    mode: ModeFlag = None,
    kind: KindFlag = "prefill",
    iterations: Annotated[int | None, typer.Option(help="Simulate the first so many iterations only.")] = None,
    chrome: ChromeFlag = None,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    serve: Annotated[
        Path | None,
        typer.Option("--serve", help="YAML (arrivals, limits, slo, ...): serve requests over time, write a report."),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option(
            "--sweep", help="YAML (clusters, ep_sizes, redundant, batches, modes): solve and serve each point."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Predicts how long the plan takes on a cluster, phase by phase and rank by rank; or how it serves requests.

    With --serve the report has TTFT, TPOT, goodput, PAR, utilisation and bytes; with --sweep that of every combination,
    and a table in which the best are marked; a sweep that was stopped goes on where it was. YAML of --serve, every key
    optional: seed, requests (a Mooncake-style JSONL file), arrivals {kind: poisson|bursts, rate_per_s, requests, input:
    {kind, mean, sigma}, output}, limits {tokens_per_rank, requests_per_rank, block_tokens, blocks_per_rank, horizon_s},
    placement: round_robin|least_loaded|affinity, routing: random|in_order, slo {ttft_ms, tpot_ms}, rebalance {solver,
    window_iterations, manner: pause|overlap}, disaggregated {kv_bytes_per_token, prefill_plan, prefill_cluster}. YAML
    of --sweep: trace, clusters, ep_sizes, redundant, batches, modes (lists), solver, time_s, serve (as above).
    """
    if serve is not None or sweep is not None:
        from placer.cli.serving import serve_or_sweep

        plain = fidelity == "phase" and iterations is None and chrome is None and config is None
        return serve_or_sweep(serve, sweep, plan, trace, cluster, output, mode, model, as_json, plain=plain)
    if plan is None or trace is None or cluster is None:
        raise UsageError("simulate needs PLAN, --trace and --cluster, or --sweep SWEEP.yaml; see --help")
    from placer.config import load_cluster, load_settings
    from placer.core.plan import Plan
    from placer.pipeline import predict

    for path in (output, chrome):
        if path is not None:
            require_parent(path)
    require_distinct(output, chrome, inputs=(plan, trace))
    settings = load_settings(config)
    timeline, warnings = predict(
        Plan.load(plan),
        read_source(trace, model, tokens=True),
        load_cluster(cluster),
        fidelity=fidelity,
        mode=mode,
        kind=kind,
        batch_tokens=settings.solve.batch_tokens,
        iterations=iterations,
        progress=progress_line("simulating"),
    )
    warn(warnings)
    return finish([timeline], [str(plan)], output, chrome, as_json)


def run(
    plan: PlanArgument,
    output: OutFlag,
    trace: Annotated[Path | None, typer.Option("--trace", help="Replay these routed tokens; not with --text.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="Checkpoint folder: with --trace its experts are used (else random ones), with --text it generates.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Generate from these prompts, one a line, with the whole model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt of --text.")] = 32,
    ranks: Annotated[int | None, typer.Option(help="Processes to start; must be the plan's number of ranks.")] = None,
    mode: ModeFlag = None,
    kind: KindFlag = "prefill",
    baseline: Annotated[
        Path | None,
        typer.Option(help="Another plan to measure in the same launches, iteration by iteration in random order."),
    ] = None,
    lab: Annotated[
        str | None,
        typer.Option(help="Run in a shaped cluster of namespaces, such as 2x2@200mbit (needs root; see `placer lab`)."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            help="Also predict the very same job on this cluster: OUTPUT with .predicted before its suffix.",
        ),
    ] = None,
    chrome: ChromeFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures the plan on real torch.distributed ranks of this machine (NCCL on GPUs, gloo on CPUs).

    With --trace, routed tokens are replayed: any dispatch mode, schedule and model shape. With --model and --text the
    Hugging Face model generates greedily, attention included; the Timeline's `about` has the tokens.
    """
    if (trace is None) == (text is None) or (text is not None and model is None):
        raise UsageError("run needs either --trace TRACE, or --model DIR with --text FILE; see --help")
    if text is not None and (baseline is not None or cluster is not None or kind != "prefill"):
        raise UsageError("--baseline, --cluster and --for go with --trace; generation has prefill and decode steps")
    from placer.config import load_cluster, load_settings
    from placer.core.plan import Plan
    from placer.pipeline import generate, measure, read_prompts
    from placer.report.paired import paired_ratio

    for path in (output, chrome):
        if path is not None:
            require_parent(path)
    require_distinct(output, chrome, inputs=tuple(path for path in (plan, trace, text) if path is not None))
    settings = load_settings(config)
    if trace is None:
        assert model is not None
        assert text is not None
        timeline, completions, warnings = generate(
            Plan.load(plan),
            model,
            read_prompts(text),
            max_new_tokens=max_new_tokens,
            mode=mode,
            ranks=ranks,
            settings=settings.run,
            lab=lab,
            progress=status_line,
        )
        warn(warnings)
        said = [f"rank {one.rank}: {one.text!r}" for one in completions]
        finish([timeline], ["measured"], output, chrome, as_json, lines=said)
        return
    measured = measure(
        Plan.load(plan),
        read_source(trace, None, tokens=True),
        baseline=None if baseline is None else Plan.load(baseline),
        checkpoint=model,
        ranks=ranks,
        mode=mode,
        kind=kind,
        settings=settings.run,
        cluster=None if cluster is None else load_cluster(cluster),
        lab=lab,
        progress=status_line,
    )
    warn(list(measured.warnings))
    found = measured.timelines
    ratios = {}
    if baseline is not None:
        ratios["measured"] = paired_ratio(found["baseline measured"], found["measured"])
        if cluster is not None:
            ratios["predicted"] = paired_ratio(found["baseline predicted"], found["predicted"])
    finish(list(found.values()), list(found), output, chrome, as_json, ratios)


def compare(
    timelines: Annotated[list[Path], typer.Argument(help="Timelines that simulate or run wrote; the first is 1.00.")],
    chrome: ChromeFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Puts timelines side by side: predicted and measured, or one plan and another."""
    from placer.core.timeline import Timeline
    from placer.report.chrome import write_chrome_trace
    from placer.report.compare import compare as compare_timelines
    from placer.report.compare import comparison_tables

    if chrome is not None:
        require_parent(chrome)
    loaded = [Timeline.load(path) for path in timelines]
    names = [str(path) for path in timelines]
    comparison = compare_timelines(loaded, names)
    if chrome is not None:
        write_chrome_trace(chrome, loaded, names)
    emit(as_json, comparison.to_dict(), comparison_tables(comparison))


def finish(
    timelines: "list[Timeline]",
    names: list[str],
    output: Path,
    chrome: Path | None,
    as_json: bool,
    ratios: "dict[str, PairedRatio] | None" = None,
    lines: Sequence[str] = (),
) -> None:
    """Writes timelines (the first to `output`), a Chrome trace where one is wanted, and says how they compare."""
    from placer.report.chrome import write_chrome_trace
    from placer.report.compare import compare as compare_timelines
    from placer.report.compare import comparison_tables

    # compared first: timelines that cannot be are not worth writing
    comparison = compare_timelines(timelines, names)
    written = [output, *(output.with_suffix(f".{name.replace(' ', '-')}{output.suffix}") for name in names[1:])]
    for timeline, path in zip(timelines, written, strict=True):
        timeline.save(path)
    if chrome is not None:
        write_chrome_trace(chrome, timelines, names)
    data: dict[str, Any] = {
        "output": str(output),
        "chrome": None if chrome is None else str(chrome),
        "about": timelines[0].about,
    }
    data["timelines"] = [asdict(summary) for summary in comparison.timelines]
    data["errors"] = [asdict(error) for error in comparison.errors]
    said = [*lines, *(f"{name}: {ratio} against the baseline" for name, ratio in (ratios or {}).items())]
    if ratios:
        data["baseline_ratio"] = {name: asdict(ratio) for name, ratio in ratios.items()}
    said += [f"wrote {path}" for path in [*written, *([chrome] if chrome else [])]]
    emit(as_json, data, comparison_tables(comparison), tuple(said))


def register(app: typer.Typer) -> None:
    """Adds the verbs of this module to `app`."""
    for verb in (simulate, run, compare):
        app.command(no_args_is_help=True)(verb)
