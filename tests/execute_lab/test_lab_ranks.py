"""Ranks on the nodes of a lab: one launch, judged and ended as on one machine."""

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.core.errors import ExecutionError, UsageError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.execute import ReplayJob, run_ranks, write_random_experts
from placer.execute.lab import Lab, LabSpec
from placer.execute.launch import launch

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch"),
]
GENEROUS_S = 180.0
LAYERS, EXPERTS, TOKENS = 2, 8, 32

SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
sys.stdout.write(f"placer-progress: {os.environ['RANK']} of {int(one)} on {os.environ['GLOO_SOCKET_IFNAME']}\\n")
sys.stdout.flush()
if os.environ["RANK"] == "3":
    time.sleep(1)
    ACTION
try:
    dist.all_reduce(one)
except RuntimeError:
    time.sleep(LATE)
    raise
os._exit(0)
"""


@pytest.fixture(scope="module")
def lab(lab_machine):
    with Lab.open(LabSpec(nodes=2, ranks_per_node=2, mbit=200)) as lab:
        yield lab


def script(folder: Path, action: str, late: float = 0) -> list[str]:
    path = folder / "ranks.py"
    path.write_text(SCRIPT.replace("ACTION", action).replace("LATE", str(late)))
    return [str(path)]


def test_a_launch_on_two_nodes_numbers_ranks_node_by_node(lab, tmp_path):
    said: list[str] = []
    launch(script(tmp_path, "pass"), num_ranks=4, timeout_s=GENEROUS_S, hosts=lab.hosts, progress=said.append)
    assert sorted(said) == [f"{rank} of 4 on eth0" for rank in range(4)]


@pytest.mark.parametrize("late", [0, 300], ids=["others notice", "others do not"])
def test_a_killed_rank_of_the_second_node_is_named(lab, tmp_path, late):
    command = script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", late)
    with pytest.raises(ExecutionError, match=r"^rank 3 died \(SIGKILL; ") as info:
        launch(command, num_ranks=4, timeout_s=GENEROUS_S, hosts=lab.hosts)
    assert "\n" not in str(info.value)
    assert not running(tmp_path)


def test_a_hang_ends_at_the_timeout_on_every_node(lab, tmp_path):
    with pytest.raises(ExecutionError, match=r"^4 ranks did not finish within 9 s"):
        launch(script(tmp_path, "time.sleep(600)"), num_ranks=4, timeout_s=9, hosts=lab.hosts)
    assert not running(tmp_path)


def test_an_interface_that_cannot_be_bound_is_told(lab, tmp_path):
    hosts = [lab.hosts[0], replace(lab.hosts[1], interface="nosuch0")]
    with pytest.raises(ExecutionError, match=r"^rank [23] died \(exit code 1\)"):
        launch(script(tmp_path, "pass"), num_ranks=4, timeout_s=GENEROUS_S, hosts=hosts)
    assert not running(tmp_path)


def test_an_address_that_nobody_has_is_told(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("placer.execute.launch.RENDEZVOUS_S", 3)
    hosts = [replace(lab.hosts[0], address="10.77.0.77"), lab.hosts[1]]
    with pytest.raises(ExecutionError, match=r"^torchrun ended with code 1, rank 0 never started: \S") as info:
        launch(script(tmp_path, "pass"), num_ranks=4, timeout_s=GENEROUS_S, hosts=hosts)
    assert "\n" not in str(info.value)
    assert not running(tmp_path)


def test_hosts_must_have_as_many_ranks(lab, tmp_path):
    with pytest.raises(UsageError, match="num_ranks is 3, the hosts have 4"):
        launch(script(tmp_path, "pass"), num_ranks=3, timeout_s=GENEROUS_S, hosts=lab.hosts)


def test_a_replay_over_the_lab_equals_the_reference(lab, tmp_path):
    """The very job of one machine: only what carries its bytes is another."""
    rng = np.random.default_rng(3)
    model = ModelSpec.uniform(
        "toy", num_experts=EXPERTS, top_k=2, num_hidden_layers=LAYERS, hidden_size=16, moe_intermediate_size=8
    )
    slots = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    plan = Plan(
        model="toy",
        num_experts=EXPERTS,
        num_ranks=4,
        ranks_per_node=2,
        moe_layers=tuple(range(LAYERS)),
        slot_expert_LP=slots,
        mode="per_rank",
    )
    plan.save(tmp_path / "plan.json")
    expert_LTK = np.argsort(rng.random((LAYERS, TOKENS, EXPERTS)), axis=2)[:, :, :2]
    np.save(tmp_path / "expert.npy", expert_LTK)
    np.save(tmp_path / "source.npy", np.arange(TOKENS) % 4)
    write_random_experts(tmp_path / "experts.safetensors", model, 0)
    job = ReplayJob(
        plan_path=str(tmp_path / "plan.json"),
        expert_path=str(tmp_path / "expert.npy"),
        source_path=str(tmp_path / "source.npy"),
        experts_path=str(tmp_path / "experts.safetensors"),
        result_path=str(tmp_path / "result.json"),
        stored_layers=tuple(range(LAYERS)),
        mode="per_rank",
        tokens_per_iteration=TOKENS // 2,
        iterations=2,
        backend="gloo",
        timeout_s=GENEROUS_S,
    )
    (timeline,) = run_ranks([job], num_ranks=4, timeout_s=GENEROUS_S, hosts=lab.hosts)
    assert timeline.about["bit_identical"]
    assert timeline.about["num_ranks"] == 4


def running(folder: Path) -> list[str]:
    """Command lines with this folder in them, once what was killed has had a moment to vanish."""
    deadline = time.monotonic() + 5
    while (found := _running(str(folder))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _running(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
