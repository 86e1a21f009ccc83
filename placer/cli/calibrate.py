"""`placer calibrate`: measures this machine, or a lab on it, into a cluster file."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli.common import ConfigFlag, JsonFlag, OutFlag, emit, require_distinct, require_parent, status_line

if TYPE_CHECKING:
    from placer.report.tables import DataTable

__all__ = ["register"]


def calibrate(
    output: OutFlag,
    ranks: Annotated[int | None, typer.Option(help="Ranks to measure on this machine.")] = None,
    lab: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="Measure a shaped cluster instead: 2x2@200mbit (needs root).")
    ] = None,
    config: ConfigFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Measures links, experts and software costs on real ranks; writes the YAML that --cluster reads.

    Exit code 10, and nothing written, where the measurements do not fit the cost model.
    """
    from placer.config import load_settings, save_cluster
    from placer.pipeline import calibrate_cluster

    require_parent(output)
    require_distinct(output, inputs=(config,))
    settings = load_settings(config)
    found = calibrate_cluster(ranks=ranks, lab=lab, settings=settings.calibrate, run=settings.run, progress=status_line)
    save_cluster(found.cluster, output, calibration=found.about)
    data = {"output": str(output), "cluster": found.cluster.to_dict(), "calibration": found.about}
    emit(as_json, data, _tables(data), (f"wrote {output}",))


def _tables(data: dict[str, Any]) -> "tuple[DataTable, ...]":
    from placer.report.tables import DataTable, format_cell

    cluster, about = data["cluster"], data["calibration"]
    parts = [name for name in ("intra", "inter", "uplink", "compute", "software") if cluster.get(name)]
    found = tuple((f"{part}.{key}", format_cell(value)) for part in parts for key, value in cluster[part].items())
    judged = {"packing per_expert": about["packing"]["per_expert"], "packing per_rank": about["packing"]["per_rank"]}
    judged |= {name: about[name] for name in ("intra", "inter", "uplink", "experts") if name in about}
    keys = ("r2", "max_residual", "spread")
    fits = tuple((name, *(format_cell(fit[key]) for key in keys)) for name, fit in judged.items())
    return (
        DataTable(title="Measured", columns=("what", "value"), rows=found),
        DataTable(title="How well it fits", columns=("what", "R2", "largest residual", "spread"), rows=fits),
    )


def register(app: typer.Typer) -> None:
    """Adds the verb to `app`."""
    app.command(no_args_is_help=True)(calibrate)
