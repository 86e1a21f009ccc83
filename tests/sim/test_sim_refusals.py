"""What simulate refuses, what it says about itself, and what it imports."""

import subprocess
import sys

import numpy as np
import pytest
from simcases import linear_plan, tiny_cluster, tiny_model

import sim
from placer.core.errors import MismatchError, UsageError

CLUSTER = tiny_cluster(1, 2)
EXPERT_LTK = np.array([[[0], [1], [1]]], dtype=np.int16)
SOURCE_T = np.array([0, 1, 0])


def call(**change: object) -> object:
    inputs = {
        "plan": linear_plan(CLUSTER, 1, 2),
        "model": tiny_model(1, 2),
        "cluster": CLUSTER,
        "expert_LTK": EXPERT_LTK,
        "source_T": SOURCE_T,
    }
    return sim.simulate(**(inputs | change))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"fidelity": "fluid"}, UsageError, "fidelity is 'fluid'; use one of port, phase, flow"),
        ({"mode": "broadcast"}, UsageError, "mode is 'broadcast'"),
        ({"batch_tokens": 0}, UsageError, "batch_tokens is 0"),
        ({"iterations": 0}, UsageError, "iterations is 0"),
        ({"expert_LTK": EXPERT_LTK[0]}, UsageError, "expert_LTK has 2 axes"),
        ({"expert_LTK": EXPERT_LTK[:, :0], "source_T": SOURCE_T[:0]}, UsageError, "0 tokens"),
        ({"expert_LTK": np.repeat(EXPERT_LTK, 2, axis=0)}, MismatchError, "the trace has 2 MoE layers, the plan 1"),
        ({"cluster": tiny_cluster(2, 1)}, MismatchError, "the plan is for 2 ranks, 2 a node; cluster 'tiny' has 2, 1"),
        ({"model": tiny_model(1, 4)}, MismatchError, "the plan places 2 experts, model 'tiny' has 4"),
        ({"source_T": SOURCE_T[:2]}, MismatchError, "source_T has shape (2,); the trace has 3 tokens"),
        ({"source_T": SOURCE_T + 1}, UsageError, "source_T has ranks 1 to 2; the cluster has 0 to 1"),
        ({"source_T": SOURCE_T - 1}, UsageError, "source_T has ranks -1 to 0"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call(**change)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_says_how_it_was_made() -> None:
    timeline = call(fidelity="port", mode="allgather", trace_sha256="abc")
    assert timeline.about == {
        "source": "simulated",
        "fidelity": "port",
        "mode": "allgather",
        "num_ranks": 2,
        "ranks_per_node": 2,
        "plan_sha256": linear_plan(CLUSTER, 1, 2).sha256,
        "trace_sha256": "abc",
        "tokens_per_iteration": 3,
        "model": "tiny",
        "cluster": "tiny",
    }


def test_reports_progress_over_layers_and_then_over_iterations() -> None:
    seen: list[tuple[int, int]] = []
    call(batch_tokens=1, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 1), (1, 3), (2, 3), (3, 3)]


def test_public_names() -> None:
    assert sim.__all__ == sorted(sim.__all__)
    assert all(hasattr(sim, name) for name in sim.__all__)


def test_port_needs_neither_simpy_nor_numba() -> None:
    code = "import sys, sim; sys.exit(sum(name in sys.modules for name in ('simpy', 'numba', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
