"""Clusters by name or YAML file."""

import os
import re
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

from placer.config.strict import from_mapping, read_yaml
from placer.core.cluster import ClusterSpec
from placer.core.errors import InputFileError, UsageError

__all__ = ["cluster_names", "load_cluster"]

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
    return from_mapping(ClusterSpec, data, where=str(path))
