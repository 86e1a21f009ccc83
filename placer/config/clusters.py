"""Clusters by name or YAML file."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from placer.config.strict import from_mapping, read_yaml
from placer.core.atomic import write_text_atomically
from placer.core.cluster import ClusterSpec
from placer.core.errors import InputFileError, UsageError

__all__ = ["cluster_names", "load_cluster", "save_cluster"]

CALIBRATION = "calibration"
GENERIC = re.compile(r"node(?P<flat>[1-9]\d{0,4})|(?P<nodes>[1-9]\d{0,4})x(?P<ranks>[1-9]\d{0,4})")


def cluster_names() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("placer.config") / "clusters"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_cluster(name: str) -> ClusterSpec:
    """A cluster from a preset name, a generic shape or a YAML file.

    `node8` is one node of 8 ranks and `4x8` four nodes of 8, with the speeds of the h100 preset.
    Raises UsageError for an unknown name, InputFileError for a bad file.
    """
    if name in cluster_names():
        return _read(Path(str(resources.files("placer.config") / "clusters" / f"{name}.yaml")))
    if match := GENERIC.fullmatch(name):
        nodes, ranks = (1, match["flat"]) if match["flat"] else (match["nodes"], match["ranks"])
        base = load_cluster("h100")
        return replace(base, name=name, nodes=int(nodes), ranks_per_node=int(ranks))
    path = Path(name)
    # os.path.exists is False for a name too long, where pathlib raises
    if path.suffix in (".yaml", ".yml") or os.path.exists(path):  # noqa: PTH110
        return _read(path)
    raise UsageError(
        f"cluster {name!r} is not known; use nodeN (one node of N ranks), NxM (N nodes of M ranks), a YAML file, "
        f"or one of {', '.join(cluster_names())}"
    )


def _read(path: Path) -> ClusterSpec:
    data = read_yaml(path)
    if data is None:
        raise InputFileError(f"{path}: is empty; give {', '.join(field.name for field in fields(ClusterSpec))}")
    # how good the numbers are is for people
    if isinstance(data, dict) and not isinstance(about := data.pop(CALIBRATION, {}), Mapping):
        raise InputFileError(f"{path}: {CALIBRATION} must be a mapping, got a {type(about).__name__}")
    return from_mapping(ClusterSpec, data, where=str(path))


def save_cluster(cluster: ClusterSpec, path: Path, *, calibration: Mapping[str, Any] | None = None) -> None:
    """Writes the YAML form that `load_cluster` reads, whole or not at all; it ignores the block `calibration`."""
    data = {key: value for key, value in cluster.to_dict().items() if value is not None}
    for field in [name for name, value in data.items() if isinstance(value, dict)]:
        data[field] = {key: value for key, value in data[field].items() if value is not None}
    if calibration is not None:
        data[CALIBRATION] = dict(calibration)
    write_text_atomically(Path(path), yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None))
