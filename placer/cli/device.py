"""`placer device`: one machine whose experts do not all fit: quantise, calibrate, plan, simulate, run, export."""

from pathlib import Path
from typing import Annotated

import typer

from placer.cli.common import (
    ConfigFlag,
    JsonFlag,
    ModelFlag,
    OutFlag,
    emit,
    parse_bytes,
    progress_line,
    read_source,
    require_distinct,
    require_parent,
    status_line,
    warn,
)
from placer.cli.device_tables import plan_data, plan_tables, plane_tables, summary_lines
from placer.cli.timelines import ChromeFlag
from placer.core.errors import UsageError

__all__ = ["app"]

app = typer.Typer(
    help="One machine whose experts do not all fit into memory: bit planes, their order, caches, real reads.",
    epilog="Start: placer device quantize MODEL --text calibration.txt -o planes.safetensors; placer device calibrate "
    "planes.safetensors --memory 512MiB -o device.yaml; placer device plan trace.safetensors --planes "
    "planes.safetensors --device device.yaml -o plan.json; placer device run plan.json --planes planes.safetensors "
    "--device device.yaml --trace test.safetensors -o timeline.json",
    no_args_is_help=True,
    rich_markup_mode=None,
)

PlanesFlag = Annotated[Path, typer.Option("--planes", help="Plane file that `placer device quantize` wrote.")]
DeviceFlag = Annotated[
    Path, typer.Option("--device", help="YAML of the machine: `placer device calibrate` measures it.")
]
PlanArgument = Annotated[Path, typer.Argument(help="Plan that `placer device plan` wrote.")]
LearnFlag = Annotated[
    Path | None,
    typer.Option("--learn", help="Trace from which the predictor that prefetches learns; other requests than TRACE's."),
]


@app.command(no_args_is_help=True)
def quantize(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    text: Annotated[Path, typer.Option("--text", help="Calibration text, one request a line.")],
    output: OutFlag,
    bits: Annotated[str, typer.Option(help="v1 (2, 3, 4), v2 (5 to 8), or widths such as 3,4.")] = "v1",
    copies: Annotated[
        bool, typer.Option("--copies", help="A whole copy at every width instead of nested planes.")
    ] = False,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Turns the experts of a model into bit planes: Matryoshka quantisation, or GPTQ copies with --copies."""
    from placer.config import load_settings
    from placer.pipeline.device_files import quantize_checkpoint

    require_parent(output)
    require_distinct(output, inputs=(text, *model.glob("*.safetensors")))
    index = quantize_checkpoint(
        model,
        text,
        output,
        bits=bits,
        copies=copies,
        settings=load_settings(config).device,
        progress=progress_line("quantising"),
    )
    data = {
        "output": str(output),
        "ladder": index.ladder.to_dict(),
        "plane_bytes": list(index.plane_bytes_K),
        "total_bytes": index.total_bytes,
        "error_by_level": None if index.error_LEK is None else index.error_LEK.mean(axis=(0, 1)).tolist(),
        "about": index.about,
    }
    emit(as_json, data, plane_tables(data), (f"wrote {output}: {index.total_bytes:,} bytes of planes",))


@app.command(no_args_is_help=True)
def demand(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    planes: PlanesFlag,
    train: Annotated[Path, typer.Option("--train", help="Text to train the bit routers on, one request a line.")],
    text: Annotated[Path, typer.Option("--text", help="Other text, whose routing and bits are recorded.")],
    output: OutFlag,
    routers: Annotated[Path | None, typer.Option(help="Also write the trained bit routers here.")] = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Trains a bit router for every expert (D2MoE's second router) and records which bits the text demands."""
    from placer.config import load_settings
    from placer.pipeline.device_files import record_bits

    for path in (output, routers):
        if path is not None:
            require_parent(path)
    require_distinct(output, routers, inputs=(train, text, planes))
    found = record_bits(
        model, planes, train, text, output, routers, settings=load_settings(config).device, progress=status_line
    )
    emit(as_json, found, (), (f"wrote {output}: {found['tokens']:,} tokens, shares of levels {found['shares']}",))


@app.command(no_args_is_help=True)
def calibrate(
    planes: Annotated[Path, typer.Argument(help="Plane file that `placer device quantize` wrote.")],
    memory: Annotated[str, typer.Option(help="What planes may fill: 512MiB, 4GiB.")],
    output: OutFlag,
    limit: Annotated[str | None, typer.Option(help="Hold the disk to a bandwidth, such as 200MB/s.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Checkpoint folder: measure its own attention layers too.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures disk, unpacking, feed-forward and layers at the sizes of PLANES into the YAML that --device reads.

    Exit code 10, and nothing written, where the times of the disk, or of nested experts, do not fit the cost model.
    """
    from placer.config.devices import save_device
    from placer.pipeline.device_files import measure_device

    require_parent(output)
    require_distinct(output, inputs=(planes,))
    device, about = measure_device(
        planes,
        memory_mib=parse_bytes(memory, "--memory") / 2**20,
        limit_mbytes_per_s=None if limit is None else parse_bytes(limit.removesuffix("/s"), "--limit") / 1e6,
        model=model,
        progress=status_line,
    )
    save_device(output, device, tuple(f"{key}: {value}" for key, value in about.items()))
    emit(
        as_json,
        {"output": str(output), "device": device.to_dict(), "calibration": about},
        (),
        (f"wrote {output}",),
    )


@app.command(no_args_is_help=True)
def plan(
    trace: Annotated[Path, typer.Argument(help="The routed tokens to plan on, with bits where they were recorded.")],
    planes: PlanesFlag,
    device: DeviceFlag,
    output: OutFlag,
    memory: Annotated[str | None, typer.Option(help="Another budget than the device's: 64MiB.")] = None,
    max_quality_cost: Annotated[
        float | None,
        typer.Option(help="Clip demand where that is faster, up to this mean rise of the experts' squared error."),
    ] = None,
    learn: LearnFlag = None,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Decides which planes stay in memory, how high bits may go, and in which order the rest is read.

    Batches are section `device` of --config: batching (decode or prefill), batch, iterations, bits, bit_shares,
    predictor. Exit code 5 where the budget is below the smallest legal plan, which is named.
    """
    from placer.config import load_settings
    from placer.pipeline.device_runs import plan_for_device

    require_parent(output)
    require_distinct(output, inputs=(trace, planes, device, learn))
    planned, about, warnings = plan_for_device(
        read_source(trace, model, tokens=True),
        planes,
        device,
        memory_bytes=None if memory is None else parse_bytes(memory, "--memory"),
        max_quality_cost=max_quality_cost,
        learn=None if learn is None else read_source(learn, model, tokens=True),
        settings=load_settings(config).device,
    )
    warn(warnings)
    planned.save(output)
    data = {"output": str(output), **plan_data(planned), **about}
    emit(as_json, data, plan_tables(data), (f"wrote {output}",))


@app.command(no_args_is_help=True)
def simulate(
    plan: PlanArgument,
    trace: Annotated[Path, typer.Option("--trace", help="The routed tokens to run.")],
    device: DeviceFlag,
    output: OutFlag,
    learn: LearnFlag = None,
    fidelity: Annotated[
        str,
        typer.Option(help="flow (disk, copy engine and processor as processes) or port (closed form, no prefetch)."),
    ] = "flow",
    chrome: ChromeFlag = None,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Predicts how long the plan takes: reads beside computing, buffer, caches and prefetch."""
    from placer.cli.timelines import finish
    from placer.config import load_settings
    from placer.core.device.plan import DevicePlan
    from placer.pipeline.device_runs import predict_device

    _require(output, chrome, tuple(path for path in (plan, trace, device, learn) if path is not None))
    timeline, warnings = predict_device(
        DevicePlan.load(plan),
        read_source(trace, model, tokens=True),
        device,
        learn=None if learn is None else read_source(learn, model, tokens=True),
        fidelity=fidelity,
        settings=load_settings(config).device,
        progress=progress_line("simulating"),
    )
    warn(warnings)
    finish([timeline], [str(plan)], output, chrome, as_json, lines=summary_lines([timeline]))


@app.command(no_args_is_help=True)
def run(
    plan: PlanArgument,
    planes: PlanesFlag,
    device: DeviceFlag,
    output: OutFlag,
    trace: Annotated[Path | None, typer.Option("--trace", help="Replay these routed tokens; not with --text.")] = None,
    learn: LearnFlag = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Checkpoint folder: with --text the whole model generates.")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Generate from these prompts, one a line.")] = None,
    routers: Annotated[
        Path | None, typer.Option(help="Bit routers that `placer device demand` wrote; else the highest bits.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt of --text.")] = 32,
    chrome: ChromeFlag = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures the plan on this machine: experts' planes are read from the disk while others are computed.

    With --trace the very same job is also predicted: OUTPUT with .predicted before its suffix. The order of reading and
    a bandwidth limit are those of --device. Reads go around the page cache where the file system can; `about` of the
    Timeline has the bytes that the kernel says came from the disk, and the peak memory that it saw.
    """
    from placer.cli.timelines import finish
    from placer.config import load_settings
    from placer.core.device.plan import DevicePlan
    from placer.pipeline.device_runs import generate_with_device, measure_plan

    if (trace is None) == (text is None) or (text is not None and model is None):
        raise UsageError("run needs either --trace TRACE, or --model DIR with --text FILE; see --help")
    if trace is not None and (model is not None or routers is not None):
        raise UsageError("--model and --routers go with --text; experts and bits of --trace are in PLANES and TRACE")
    if text is not None and learn is not None:
        raise UsageError("--learn goes with --trace; generation does not read ahead")
    given = (plan, planes, device, trace, text, routers, learn)
    predicted = output.with_suffix(f".predicted{output.suffix}") if trace is not None else None
    _require(output, chrome, tuple(path for path in given if path is not None), predicted)
    settings = load_settings(config).device
    loaded = DevicePlan.load(plan)
    if trace is None:
        assert model is not None
        assert text is not None
        timeline, said, warnings = generate_with_device(
            loaded,
            planes,
            model,
            text,
            routers,
            device,
            max_new_tokens=max_new_tokens,
            settings=settings,
            progress=status_line,
        )
        timelines, names = [timeline], ["measured"]
    else:
        timelines, names, warnings = measure_plan(
            loaded,
            planes,
            read_source(trace, None, tokens=True),
            device,
            learn=None if learn is None else read_source(learn, None, tokens=True),
            settings=settings,
            progress=status_line,
        )
        said = []
    warn(warnings)
    finish(timelines, names, output, chrome, as_json, lines=[*said, *summary_lines(timelines)])


@app.command(no_args_is_help=True)
def export(
    plan: PlanArgument,
    to: Annotated[
        str, typer.Option("--to", help="ktransformers, llamacpp or planes (a manifest any loader can read).")
    ],
    output: OutFlag,
    planes: Annotated[Path | None, typer.Option("--planes", help="The plane file, for --to planes.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Writes the plan for an engine, and says what the engine cannot express."""
    from placer.core.device.plan import DevicePlan
    from placer.pipeline.device_runs import export_device

    require_parent(output)
    require_distinct(output, inputs=tuple(path for path in (plan, planes) if path is not None))
    launch, warnings = export_device(DevicePlan.load(plan), to, output, planes)
    warn(warnings)
    emit(
        as_json,
        {"output": str(output), "to": to, "launch": launch, "warnings": warnings},
        (),
        (
            f"wrote {output}",
            launch,
        ),
    )


def _require(output: Path, chrome: Path | None, inputs: tuple[Path, ...], more: Path | None = None) -> None:
    for path in (output, chrome):
        if path is not None:
            require_parent(path)
    require_distinct(output, chrome, more, inputs=inputs)
