"""The scaling study as a picture: one log-log panel per axis, a line per method, its slope in the legend."""

from pathlib import Path
from typing import Any

from placer.core.atomic import write_atomically

__all__ = ["plot"]

AXES = {"L": "layers", "E": "experts a layer", "R": "ranks", "T": "tokens"}


def plot(sweeps: dict[str, dict[str, Any]], path: Path) -> None:
    """Writes the picture to `path`, a PNG. Needs matplotlib; points that hit their limit are not drawn."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sweeps), figsize=(4 * len(sweeps), 3.6), sharey=True, squeeze=False)
    for panel, (axis, methods) in zip(panels[0], sweeps.items(), strict=True):
        for name, row in methods.items():
            points = [(x, y) for x, y in zip(row["size"], row["seconds"], strict=True) if y is not None]
            if not points:
                continue
            steep = "" if row["slope"] is None else f", slope {row['slope']:.2f}"
            panel.loglog(*zip(*points, strict=True), marker="o", label=f"{name}{steep}")
        panel.set_xlabel(AXES[axis])
        panel.set_xticks(sizes := next(iter(methods.values()))["size"], [str(size) for size in sizes])
        panel.minorticks_off()
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("processor seconds")
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot.close(figure)
