"""Faults of one rank: stopped, alone at the rendezvous, without its interface, without the right to real time."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from placer.core.errors import ExecutionError
from placer.core.schedule import Schedule
from placer.execute import ReplayJob, run_ranks, write_random_experts
from placer.execute import worker as worker_module

pytestmark = pytest.mark.dist


@pytest.fixture
def job(tmp_path, helpers):
    """A small job for two ranks, pipelined, so that lanes are busy when something breaks."""
    folder = tmp_path / "job"
    folder.mkdir()
    rng = np.random.default_rng(0)
    plan = helpers.make_plan([[0, 1, 2, 3]] * 2, experts=4, ranks=2)
    plan.save(folder / "plan.json")
    np.save(folder / "expert.npy", helpers.random_routing(rng, 2, 16, 2, 4))
    np.save(folder / "source.npy", np.arange(16) % 2)
    write_random_experts(folder / "experts", helpers.toy_model(2, 4, 2, hidden=16, inner=8), 0)
    return ReplayJob(
        plan_path=str(folder / "plan.json"),
        expert_path=str(folder / "expert.npy"),
        source_path=str(folder / "source.npy"),
        experts_path=str(folder / "experts"),
        result_path=str(folder / "result.json"),
        stored_layers=(0, 1),
        mode="per_rank",
        tokens_per_iteration=8,
        iterations=2,
        timeout_s=180.0,
        schedule=Schedule.uniform(2, degree=2),
    )


@pytest.fixture
def nothing_left(tmp_path, monkeypatch, helpers):
    """After the test: no temporary file, no result, and no process that was started with our folder."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "job" / "result.json").exists()
    assert helpers.processes_with(str(tmp_path)) == []


STOPS = """
import os, signal, sys
from placer.execute import loop, worker
real, calls = loop.grouped_ffn, []
def grouped_ffn(*arguments, **named):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == {call}:
        print("placer-progress: stops", flush=True)
        os.kill(os.getpid(), signal.{signal})
    return real(*arguments, **named)
loop.grouped_ffn = grouped_ffn
os._exit(worker.main(sys.argv[1:]))
"""


def stopping_worker(folder, number, call):
    script = folder / "stops.py"
    script.write_text(STOPS.format(signal=number.name, call=call))
    return (str(script),)


def test_a_stopped_rank_is_named_and_ended_at_the_timeout(job, tmp_path, nothing_left):
    """SIGSTOP: the process is there and answers nothing, not even SIGTERM."""
    said = []
    job = replace(job, schedule=None)  # of two ranks whose chunks overlap none is behind the other
    with pytest.raises(ExecutionError, match=r"^2 ranks did not finish within 14 s; ") as info:
        run_ranks(
            [job], num_ranks=2, timeout_s=14, entry=stopping_worker(tmp_path, signal.SIGSTOP, 2), progress=said.append
        )
    assert "\n" not in str(info.value)
    if "stops" in said:
        assert "rank 1 is furthest behind, at: step 0, layer 1, experts;" in str(info.value)


def test_a_rank_killed_while_chunks_travel_is_named(job, tmp_path, nothing_left):
    with pytest.raises(ExecutionError, match=r"^rank 1 died \(SIGKILL; .* at: step 0, layer 1, experts$"):
        run_ranks([job], num_ranks=2, timeout_s=180, entry=stopping_worker(tmp_path, signal.SIGKILL, 3))


def start_alone(job, tmp_path, **environment):
    """One rank's worker by itself, as torchrun would start it on this machine."""
    path = tmp_path / "job" / f"job-{environment['RANK']}.json"
    job.save(path)
    return subprocess.Popen(
        [sys.executable, "-m", "placer.execute.worker", str(path)],
        env={**os.environ, "TMPDIR": str(tmp_path / "temp"), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process):
    """(exit code, its own lines on standard error); torch logs there too."""
    try:
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, [line for line in error.splitlines() if line.startswith("rank ")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_rendezvous_where_nobody_answers_ends_in_bounded_time(job, tmp_path, nothing_left):
    """Two machines of one rank each, the other never comes: rank 0 waits for it, rank 1 calls one that is not there."""
    short = replace(job, timeout_s=3.0)
    places = [
        {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} for rank in "01"
    ]
    started = [start_alone(short, tmp_path, GLOO_SOCKET_IFNAME="lo", **place) for place in places]
    for rank, (process, place) in enumerate(zip(started, places, strict=True)):
        code, said = end_of(process)
        assert code == ExecutionError.exit_code == 10
        assert len(said) == 1
        assert said[0].startswith(
            f"rank {rank}: the rendezvous at 127.0.0.1:{place['MASTER_PORT']} did not bring 2 ranks"
        )
        assert "within 3 s" in said[0]


def test_a_rank_that_cannot_bind_its_interface_says_which(job, tmp_path, nothing_left, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    with pytest.raises(ExecutionError, match=r"^rank [01]: .*absent0") as info:
        run_ranks([job], num_ranks=2, timeout_s=180)
    assert "\n" not in str(info.value)
    assert info.value.exit_code == 10


def test_realtime_is_refused_in_one_line(job, tmp_path, monkeypatch, capsys):
    path = tmp_path / "job" / "job.json"
    replace(job, realtime=True).save(path)
    assert json.loads(path.read_text())["realtime"] is True
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))

    def refuse(pid, policy, parameter):
        assert (pid, policy, parameter.sched_priority) == (0, os.SCHED_RR, 10)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert worker_module.main([str(path)]) == ExecutionError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rank 1: replay.realtime: this machine refuses SCHED_RR" in error
    assert "as root" in error


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has the devices")
def test_nccl_without_a_device_ends_before_the_rendezvous(job, tmp_path, nothing_left):
    asks = replace(job, backend="nccl")
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    code, said = end_of(start_alone(asks, tmp_path, **place))
    assert code == 10
    assert len(said) == 1
    assert said[0].startswith("rank 1: backend nccl needs a CUDA device for each of the 1 ranks")
