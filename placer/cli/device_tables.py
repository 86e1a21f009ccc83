"""What `placer device` says: planes and plans as tables, Timelines in a line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placer.core.device.plan import DevicePlan
    from placer.core.timeline import Timeline
    from placer.report.tables import DataTable

__all__ = ["plan_data", "plan_tables", "plane_tables", "summary_lines"]

SHOWN = (
    ("peak_plane_bytes", "of planes held at most"),
    ("asked_bytes", "asked for"),
    ("disk_read_bytes", "read from the disk, says the kernel"),
    ("peak_rss_bytes", "peak memory of the process"),
)


def plane_tables(data: dict[str, Any]) -> "tuple[DataTable, ...]":
    """Bytes and error by level, of what `quantize` reports."""
    from placer.report.tables import DataTable

    ladder = data["ladder"]
    errors = data["error_by_level"] or [None] * len(ladder["bits"])
    rows, total = [], 0
    for bits, size, error in zip(ladder["bits"], data["plane_bytes"], errors, strict=True):
        total = total + size if ladder["nested"] else size
        rows.append((bits, size, total, None if error is None else 100 * error))
    return (
        DataTable(
            title="Planes of one expert" if ladder["nested"] else "Copies of one expert",
            columns=("bits", "bytes", "bytes needed", "output error %"),
            rows=tuple(rows),
            notes=("output error: squared, relative, mean over experts, on calibration text kept out of the fit",),
        ),
    )


def plan_data(plan: "DevicePlan") -> dict[str, Any]:
    """A device plan in plain JSON types, without its tables."""
    names: tuple[str, ...] = (
        "solver",
        "status",
        "stopped_by",
        "objective_name",
        "objective",
        "bound",
        "bound_by",
        "gap",
        "order",
        "cache",
    )
    names += (
        "resident_bytes",
        "cache_bytes",
        "buffer_bytes",
        "memory_bytes",
        "prefetch_layers",
        "quality_cost",
        "seed",
    )
    levels = range(plan.ladder.levels + 1)
    return {
        **{name: getattr(plan, name) for name in names},
        "bits": list(plan.ladder.bits_K),
        "experts_by_resident_level": [int((plan.resident_LE == level).sum()) for level in levels],
        "experts_by_ceiling": [int((plan.ceiling_LE == level).sum()) for level in levels[1:]],
    }


def plan_tables(data: dict[str, Any]) -> "tuple[DataTable, ...]":
    """A device plan for a person, of what `plan` reports."""
    from placer.report.tables import DataTable

    rows = [
        ("predicted iteration us", data["objective"] / 1e3),
        ("no plan is faster than, us", None if data["bound"] is None else data["bound"] / 1e3),
        ("left to gain at most %", None if data["gap"] is None else 100 * data["gap"]),
        ("resident MiB", data["resident_bytes"] / 2**20),
        (f"cache MiB ({data['cache']})", data["cache_bytes"] / 2**20),
        ("buffer MiB", data["buffer_bytes"] / 2**20),
        ("error added by clipping", data["quality_cost"]),
    ]
    kept = [
        (f"{bits} bits", resident, ceiling)
        for bits, resident, ceiling in zip(
            data["bits"], data["experts_by_resident_level"][1:], data["experts_by_ceiling"], strict=True
        )
    ]
    held = f"; the bound holds for {data['bound_by']}" if data["bound_by"] else ""
    notes = (f"order {data['order']}{held}", data["advice"])
    return (
        DataTable(title="Device plan", columns=("what", "value"), rows=tuple(rows), notes=notes),
        DataTable(
            title="Experts by level",
            columns=("level", "resident up to", "used at most at"),
            rows=(("nothing", data["experts_by_resident_level"][0], None), *kept),
        ),
    )


def summary_lines(timelines: "list[Timeline]") -> list[str]:
    """What each Timeline read and held, a line each."""
    from placer.core.device.summary import summarize_device

    lines = []
    for timeline in timelines:
        about, seen = timeline.about, summarize_device(timeline)
        said = [f"{seen.tokens_per_s:,.0f} tokens/s", f"processor idle {100 * seen.wait_ns / seen.total_ns:.0f} %"]
        said += [f"{about[key] / 2**20:,.2f} MiB {word}" for key, word in SHOWN if about.get(key) is not None]
        mode = f" ({about['read_mode']})" if "read_mode" in about else ""
        lines.append(f"{about['source']}: {', '.join(said)}{mode}")
    return lines
