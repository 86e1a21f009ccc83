"""Bad files written into the current folder, and the calls that read them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from placer.config import load_cluster

TRACE, CLUSTER = "trace.safetensors", ("--cluster", "node4")
ON_TRACE = ("--trace", TRACE, *CLUSTER)


def write(path: str, content: bytes | str) -> str:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_json(path: str, data: Any) -> str:
    return write(path, json.dumps(data))


def write_cluster(path: str = "c.yaml", **changes: Any) -> str:
    return write(path, yaml.safe_dump(load_cluster("node4").to_dict() | changes))


def write_npz(path: str, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return path


def write_config(path: str, **changes: Any) -> str:
    """A Hugging Face config of a model with 2 layers of 8 experts."""
    config = {
        "model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    return write_json(path, config | changes)


def change_plan(target: str = "bad.json", **changes: Any) -> str:
    return write_json(target, json.loads(Path("plan.json").read_text()) | changes)


def rows() -> list[list[int]]:
    return json.loads(Path("plan.json").read_text())["slot_expert_LP"]


def readers_of(path: str) -> list[tuple[object, ...]]:
    """Calls that open `path` as what is routed."""
    return [
        ("trace", "info", path),
        ("trace", "import", path, "-o", "new.out"),
        ("profile", path, "-o", "new.out"),
        ("solve", path, *CLUSTER, "-o", "new.out"),
        ("check", "plan.json", "--trace", path, *CLUSTER),
        ("simulate", "plan.json", "--trace", path, *CLUSTER, "-o", "new.out"),
    ]


PLAN_READERS: list[Callable[[str], tuple[object, ...]]] = [
    lambda path: ("check", path, *ON_TRACE),
    lambda path: ("check", "plan.json", *ON_TRACE, "--baseline", path),
    lambda path: ("simulate", path, *ON_TRACE, "-o", "new.out"),
    lambda path: ("export", path, "--to", "sglang", "-o", "new.json"),
    lambda path: ("solve", TRACE, *CLUSTER, "--from", path, "-o", "new.out"),
]
