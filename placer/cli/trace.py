"""`placer trace`: look at, import, split and record routing traces."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.common import (
    JsonFlag,
    ModelFlag,
    OutFlag,
    emit,
    load_model,
    progress_line,
    read_source,
    require_distinct,
    require_parent,
    warn,
)
from placer.core.errors import InputFileError

__all__ = ["app"]

app = typer.Typer(help="Look at, import, split and record routing traces.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def info(
    trace: Annotated[Path, typer.Argument(help="A trace, counts or profile in any format placer reads.")],
    model: ModelFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Says what a file holds, its statistics, and every trap found in it."""
    from placer.pipeline import open_source
    from placer.report.tables import DataTable
    from traces.counts import LoadCounts
    from traces.stats import load_statistics, trace_statistics
    from traces.trace import RoutingTrace

    source = open_source(trace, load_model(model), progress_line("reading"))
    spec = source.model
    data = {
        "file": str(trace),
        "kind": type(source).__name__,
        "model": spec.name,
        "moe_layers": list(spec.moe_layers),
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
    }
    if isinstance(source, RoutingTrace):
        data |= {"tokens": source.num_tokens, "requests": source.num_requests, "sha256": source.sha256}
        data |= {"tags": {name: list(tag.names) for name, tag in source.tags.items()}, "notes": list(source.notes)}
        data["statistics"] = trace_statistics(source)
    elif isinstance(source, LoadCounts):
        data |= {"windows": len(source.load_WLE), "notes": list(source.notes), "statistics": load_statistics(source)}
    else:
        data |= {"tokens": source.num_tokens, "requests": source.num_requests, "windows": len(source.load_WLE)}
        data |= {"notes": [], "statistics": {}}
    shown = {key: value for key, value in data.items() if key not in ("statistics", "notes", "moe_layers")}
    shown["MoE layers"] = len(spec.moe_layers)
    statistics = data["statistics"]
    assert isinstance(statistics, dict)
    rows = tuple((key, _short(value)) for key, value in shown.items() if value != {})
    rows += tuple((key, _short(value)) for key, value in statistics.items() if key not in shown)
    notes = data["notes"]
    assert isinstance(notes, list)
    table = DataTable(title=str(trace), columns=("what", "value"), rows=rows, notes=tuple(f"note: {n}" for n in notes))
    emit(as_json, data, (table,))


@app.command("import")
def import_(
    src: Annotated[Path, typer.Argument(help="File (or folder of dumps) to read.")],
    output: OutFlag,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", help="npz, jsonl, sglang, vllm, logical_count, imatrix, ktransformers; recognised if left out."
        ),
    ] = None,
    model: ModelFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Turns a recording of any source into one trace file; repairs what is unambiguous and says so.

    Counts without tokens (SGLang's stat dumps, logical_count) become a profile, which `solve` takes as well.
    """
    from traces.profile_store import save_profile
    from traces.readers import load_counts_profile, read_any
    from traces.store import save_trace
    from traces.trace import RoutingTrace

    require_parent(output)
    require_distinct(output, inputs=(src,))
    read = read_any(src, source, load_model(model), progress_line("reading"))
    warn(read.notes)
    if isinstance(read, RoutingTrace):
        save_trace(read, output)
        size = {"tokens": read.num_tokens, "requests": read.num_requests}
    else:
        save_profile(load_counts_profile(read), output)
        size = {"windows": len(read.load_WLE)}
    data = {"output": str(output), "kind": type(read).__name__, **size, "notes": list(read.notes)}
    counted = ", ".join(f"{value:,} {key}" for key, value in size.items())
    emit(as_json, data, (), (f"wrote {output}: {counted}, {read.model.num_sites} MoE layers",))


@app.command()
def split(
    trace: Annotated[Path, typer.Argument(help="A per-token trace.")],
    train: Annotated[Path, typer.Option("--train", help="Where the requests to plan on go.")],
    test: Annotated[Path, typer.Option("--test", help="Where the requests to judge on go.")],
    fraction: Annotated[float, typer.Option(help="Share of the requests that goes to --train.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Which requests.")] = 0,
    model: ModelFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Splits a trace by request, never by token, so that a plan can be judged on requests it was not planned on."""
    import numpy as np

    from traces.store import save_trace

    require_parent(train)
    require_parent(test)
    require_distinct(train, test, inputs=(trace,))
    source = read_source(trace, model, tokens=True)
    mask_T = source.request_mask(fraction, seed)
    data = {}
    for name, path, part_T in (("train", train, mask_T), ("test", test, ~mask_T)):
        save_trace(source, path, tokens=part_T)
        requests = len(np.unique(source.request_id_T[part_T]))
        data[name] = {"file": str(path), "tokens": int(part_T.sum()), "requests": requests}
    lines = tuple(
        f"wrote {part['file']}: {part['tokens']:,} tokens, {part['requests']:,} requests" for part in data.values()
    )
    emit(as_json, data, (), lines)


@app.command()
def record(
    model: Annotated[
        Path, typer.Argument(help="Folder of a Hugging Face checkpoint (config, safetensors, tokenizer).")
    ],
    text: Annotated[Path, typer.Option("--text", help="Text file, one request per line.")],
    output: OutFlag,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Runs a local Hugging Face MoE model over prompts and records which experts every token chose."""
    from traces.recorder import record_prompts
    from traces.store import save_trace

    require_parent(output)
    require_distinct(output, inputs=(text,))
    try:
        prompts = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{text}: cannot be read as text ({error})") from error
    if not prompts:
        raise InputFileError(f"{text}: holds no prompts; write one request per line")
    trace = record_prompts(model, prompts, max_new_tokens=max_new_tokens, progress=progress_line("recording"))
    save_trace(trace, output)
    data = {"output": str(output), "tokens": trace.num_tokens, "requests": trace.num_requests}
    emit(as_json, data, (), (f"wrote {output}: {trace.num_tokens:,} tokens of {trace.num_requests:,} requests",))


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
