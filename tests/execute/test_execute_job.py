"""Everything of a measured run that needs no rank: job files, checks before launch, devices, clocks, blame."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from placer.core.errors import ExecutionError, InputFileError, MismatchError, UsageError
from placer.core.schedule import Rounds, Schedule
from placer.core.timeline import PHASES
from placer.execute import ReplayJob, measure, replay, replay_plans, run_ranks, worker
from placer.execute.collect import align_clocks, build_timeline
from placer.execute.heartbeat import Heartbeat, create_heartbeats, read_heartbeats, stage
from placer.execute.launch import _diagnose, _hanging
from placer.execute.protocol import RunFolder
from placer.execute.routing import load_routing
from placer.execute.worker import RankEnvironment, choose_device

JOB = ReplayJob(
    plan_path="plan.json",
    expert_path="expert_LTK.npy",
    source_path="source_T.npy",
    experts_path="/elsewhere/experts.safetensors",
    result_path="result.json",
    stored_layers=(0, 1),
    mode="per_rank",
    tokens_per_iteration=8,
    iterations=2,
)


def test_a_job_file_keeps_everything_and_moves_with_its_folder(tmp_path):
    rounds = Rounds(to_GR=np.array([[1, 0]]), share_GR=np.ones((1, 2)))
    schedule = Schedule(algorithm_L=("rounds", "2dh"), degree_L=(1, 3), rounds_L=(rounds, None))
    job = replace(
        JOB, seed=3, about={"model": "toy"}, weight_path="w.npy", dtype="bfloat16", kind="decode", schedule=schedule
    )
    job.save(tmp_path / "job.json")
    read = ReplayJob.load(tmp_path / "job.json")
    assert read.plan_path == str(tmp_path / "plan.json")
    assert read.weight_path == str(tmp_path / "w.npy")
    assert read.experts_path == "/elsewhere/experts.safetensors"
    assert read.schedule.to_dict() == schedule.to_dict()
    read = replace(read, schedule=schedule)
    assert read.num_tokens == 16
    paths = ("plan_path", "expert_path", "source_path", "weight_path", "result_path")
    assert replace(read, **{name: getattr(job, name) for name in paths}) == job


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"mode": "per_token"}, "per_node, coherent, allgather"),
        ({"kind": "training"}, "prefill, decode"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"backend": "mpi"}, "auto, gloo, nccl"),
        ({"iterations": 0}, "at least 1"),
        ({"warmup": -1}, "at least 0"),
        ({"tokens_per_iteration": 2.5}, "integer"),
        ({"timeout_s": float("nan")}, "positive number"),
    ],
)
def test_a_job_refuses_nonsense(change, match):
    with pytest.raises(UsageError, match=match):
        replace(JOB, **change)


def test_damaged_job_files_are_one_clear_error(tmp_path):
    path = tmp_path / "job.json"
    JOB.save(path)
    good = json.loads(path.read_text())
    cases = [
        ("{", "not JSON"),
        ("[]", "not a replay job"),
        (json.dumps(good | {"version": 9}), "not a replay job of version 1"),
        (json.dumps(good | {"colour": 1}), "unknown field 'colour'"),
        (json.dumps({k: v for k, v in good.items() if k != "stored_layers"}), "'stored_layers' is missing"),
        (json.dumps(good | {"iterations": "many"}), "damaged"),
        (json.dumps({k: v for k, v in good.items() if k != "mode"}), "damaged"),
    ]
    for text, match in cases:
        path.write_text(text)
        with pytest.raises(InputFileError, match=match):
            ReplayJob.load(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        ReplayJob.load(tmp_path / "absent.json")


@pytest.fixture
def replay_arguments(helpers):
    """A plan of 2 ranks that fits its model and tokens, and the tokens."""
    rng = np.random.default_rng(0)
    plan = helpers.make_plan([[0, 1, 2, 3], [3, 2, 1, 0]], experts=4, ranks=2)
    expert_LTK = helpers.random_routing(rng, 2, 32, 2, 4, empty_share=0)
    return plan, expert_LTK, {"model": helpers.toy_model(2, 4, 2), "request_id_T": np.arange(32)}


def test_what_does_not_fit_is_refused_before_anything_starts(replay_arguments, helpers, monkeypatch):
    monkeypatch.setattr(measure, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    monkeypatch.setattr(measure, "write_random_experts", lambda *_, **__: pytest.fail("experts were written"))
    plan, expert_LTK, options = replay_arguments

    def refused(error, match, plan=plan, expert_LTK=expert_LTK, **change):
        with pytest.raises(error, match=match) as info:
            replay(plan, expert_LTK, **(options | {"tokens_per_iteration": 8} | change))
        assert "\n" not in str(info.value)

    refused(MismatchError, "for 2 ranks, not 3", num_ranks=3)
    refused(MismatchError, "3 MoE layers, model 'toy' 2", expert_LTK=np.zeros((3, 32, 2), dtype=np.uint8))
    refused(MismatchError, "4 experts, model 'toy' has 8", model=helpers.toy_model(2, 8, 2))
    refused(MismatchError, "weight_LTK is", weight_LTK=np.ones((2, 32, 3)))
    lost = replace(plan, slot_expert_LP=np.array([[0, 1, 2, 3], [0, 1, 2, 2]]))
    refused(MismatchError, r"layer 1: expert 3 has no slot .*placer check", plan=lost)
    outside = replace(plan, slot_expert_LP=np.array([[0, 1, 2, 7], [0, 1, 2, 3]]))
    refused(MismatchError, "layer 0: the plan has expert 7", plan=outside)
    uneven = replace(plan, slot_expert_LP=np.array([[0, 1, 2, 3, 0]] * 2))
    refused(MismatchError, "5 slots do not divide over 2", plan=uneven)
    refused(UsageError, "has 32 tokens, 5 iterations of 8 need 40", iterations=5)
    refused(UsageError, "has 32 tokens, 1 iterations of 64", tokens_per_iteration=64)
    refused(UsageError, "0 iterations", iterations=0)
    refused(UsageError, "either request_id_T or source_T", source_T=np.zeros(32, dtype=int))
    refused(UsageError, "either request_id_T or source_T", request_id_T=None)
    refused(MismatchError, "source ranks go from 0 to 2", request_id_T=None, source_T=np.arange(32) % 3)
    refused(MismatchError, "source ranks for 32 tokens", request_id_T=None, source_T=np.arange(31) % 2)
    refused(UsageError, "'float64'", dtype="float64")
    refused(UsageError, "mode is 'per_token'", mode="per_token")
    refused(UsageError, "has 2 axes", expert_LTK=expert_LTK[0])
    with pytest.raises(UsageError, match="2 plans and 1 modes"):
        replay_plans([plan, plan], expert_LTK, modes=["per_rank"], tokens_per_iteration=8, **options)


def test_a_launch_gets_the_tokens_of_its_iterations_and_cleans_up(replay_arguments, monkeypatch):
    plan, expert_LTK, options = replay_arguments
    seen = {}

    def fake(jobs, **given_):
        (job,) = jobs
        routing = load_routing(job, plan)
        seen.update(job=job, routing=routing, folder=Path(job.plan_path).parent, **given_)
        assert Path(job.experts_path).exists()
        return ["timeline"]

    monkeypatch.setattr(measure, "run_ranks", fake)
    result = replay(
        plan, expert_LTK, tokens_per_iteration=8, iterations=3, hidden_size=8, intermediate_size=4, **options
    )
    assert result == "timeline"
    assert seen["num_ranks"] == 2
    np.testing.assert_array_equal(seen["routing"].expert_LTK, expert_LTK[:, :24])
    np.testing.assert_array_equal(seen["routing"].source_T, np.arange(24) % 2)
    np.testing.assert_array_equal(seen["routing"].weight_LTK, np.full((2, 24, 2), 0.5, dtype=np.float32))
    assert seen["job"].stored_layers == (0, 1)
    assert not seen["folder"].exists()


def test_deep_models_reuse_random_layers_to_bound_the_disk(replay_arguments, monkeypatch, helpers):
    plan, expert_LTK, options = replay_arguments
    monkeypatch.setattr(measure, "RANDOM_EXPERTS_BYTES", 4 * 3 * 8 * 4 * 4 * 2)
    monkeypatch.setattr(measure, "run_ranks", lambda jobs, **_: [jobs[0]])
    five = replace(plan, slot_expert_LP=np.tile(plan.slot_expert_LP[0], (5, 1)), moe_layers=tuple(range(5)))
    options |= {"model": helpers.toy_model(5, 4, 2), "hidden_size": 8, "intermediate_size": 4}
    job = replay(five, np.concatenate([expert_LTK, expert_LTK, expert_LTK[:1]]), tokens_per_iteration=8, **options)
    assert job.stored_layers == (0, 1, 0, 1, 0)
    assert job.about["distinct_expert_layers"] == 2


def write_inputs(folder, plan, expert_LTK, source_T):
    plan.save(folder / "plan.json")
    np.save(folder / "expert_LTK.npy", expert_LTK)
    np.save(folder / "source_T.npy", source_T)
    JOB.save(folder / "job.json")
    return ReplayJob.load(folder / "job.json")


@pytest.mark.parametrize("choice", ["visit_first", "nearest", "local_or_uniform", "token_hash", "round_robin"])
def test_each_rank_alone_finds_the_slots_that_all_tokens_together_get(tmp_path, helpers, choice):
    rng = np.random.default_rng(2)
    plan = helpers.make_plan(
        [helpers.random_slots(rng, 5, 3, 4) for _ in range(2)], experts=5, ranks=3, replica_choice=choice
    )
    expert_LTK = helpers.random_routing(rng, 2, 20, 3, 5)
    job = write_inputs(tmp_path, plan, expert_LTK, rng.integers(3, size=20))
    whole = load_routing(job, plan)
    assert whole.expert_LTK.shape == (2, 16, 3)
    for rank in range(3):
        own = load_routing(job, plan, rank)
        np.testing.assert_array_equal(own.slot_LTK, whole.slot_LTK[:, whole.source_T == rank])
        np.testing.assert_array_equal(own.token_T, np.flatnonzero(whole.source_T == rank))
    placed_LT = (whole.slot_LTK >= 0).sum(axis=2)
    expected = np.where(whole.slot_LTK >= 0, 1, 0) / np.maximum(1, placed_LT)[:, :, None]
    np.testing.assert_allclose(whole.weight_LTK[whole.slot_LTK >= 0], expected[whole.slot_LTK >= 0])


def test_arrays_that_do_not_fit_their_job(tmp_path, helpers):
    plan = helpers.make_plan([[0, 1], [1, 0]], experts=2, ranks=2)
    ids = np.zeros((2, 16, 1), dtype=np.uint8)
    for expert_LTK, source_T, match in [
        (ids[:1], np.zeros(16, dtype=int), "1 MoE layers, the plan 2"),
        (ids[:, :9], np.zeros(9, dtype=int), "the job replays 16"),
        (ids, np.zeros(15, dtype=int), "15 sources"),
        (ids, np.full(16, 2), "source ranks go from 2 to 2"),
    ]:
        job = write_inputs(tmp_path, plan, expert_LTK, source_T)
        with pytest.raises(MismatchError, match=match):
            load_routing(job, plan)
    (tmp_path / "expert_LTK.npy").write_bytes(b"x")
    with pytest.raises(InputFileError, match=r"cannot be read as \.npy"):
        load_routing(job, plan)
    np.save(tmp_path / "expert_LTK.npy", ids[0])
    with pytest.raises(InputFileError, match="2 axes"):
        load_routing(job, plan)


def test_nccl_without_devices_is_one_clear_line():
    environment = RankEnvironment(rank=5, num_ranks=8, local_rank=1, local_ranks=4, folder=None)
    for devices in (0, 3):
        with pytest.raises(ExecutionError, match=rf"each of the 4 ranks .* has {devices}; use backend gloo"):
            choose_device("nccl", environment, devices)
        assert choose_device("auto", environment, devices) == torch.device("cpu")
    assert choose_device("auto", environment, 4) == torch.device("cuda", 1)
    assert choose_device("nccl", environment, 8) == torch.device("cuda", 1)
    assert choose_device("gloo", environment, 8) == torch.device("cpu")


def test_a_rank_without_torchrun_says_so(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert worker.main(["job.json"]) == UsageError.exit_code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "torchrun" in error


def test_a_rank_leaves_its_reason_in_the_folder(monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv(RunFolder.VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert worker.main([str(tmp_path / "absent.json")]) == InputFileError.exit_code
    assert "rank 1: " in capsys.readouterr().err
    (report,) = RunFolder(tmp_path).reports()
    assert (report.rank, report.error, report.lost_contact) == (1, "InputFileError", False)
    sys.excepthook(KeyError, KeyError("wat"), None)
    (report,) = RunFolder(tmp_path).reports()
    assert (report.error, report.message) == ("ExecutionError", "KeyError: 'wat'")
    RunFolder(tmp_path / "gone").report(0, "ExecutionError", "x", lost_contact=False)


TORCHRUN_ENDS = """
E1122 22:25:48.572000 7734 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9)
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 7739)  (SIGTERM)
[2]:
  rank      : 2 (local_rank: 2)
  exitcode  : 10 (pid: 7741)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 7740)  (SIGKILL)
"""


@pytest.fixture
def run_folder(tmp_path):
    folder = RunFolder(tmp_path)
    create_heartbeats(folder.heartbeats, 3)
    return folder


def test_the_first_cause_is_blamed_and_not_its_victims(run_folder):
    lines = TORCHRUN_ENDS.split("\n")
    Heartbeat(run_folder.heartbeats, 1).beat(4, 2, PHASES.index("experts"))
    run_folder.report(2, "ExecutionError", "Connection closed by peer", lost_contact=True)
    error = _diagnose(run_folder, 1, lines)
    assert isinstance(error, ExecutionError)
    assert str(error).startswith("rank 1 died (SIGKILL; ")
    assert str(error).endswith("at: step 4, layer 2, experts")
    run_folder.report(0, "InputFileError", "model: no expert 3", lost_contact=False)
    error = _diagnose(run_folder, 1, lines)
    assert isinstance(error, InputFileError)
    assert str(error) == "rank 0: model: no expert 3"


def test_ends_without_a_dead_rank_are_explained_too(run_folder):
    run_folder.report(2, "ExecutionError", "timed out", lost_contact=True)
    assert "rank 2 lost contact with the others: timed out" in str(_diagnose(run_folder, 1, []))
    (run_folder.path / "rank-2.json").unlink()
    Heartbeat(run_folder.heartbeats, 0)
    text = str(_diagnose(run_folder, 3, ["ImportError: no torch", "======"]))
    assert text == "torchrun ended with code 3, rank 1 never started: ImportError: no torch"


def test_a_hanging_rank_is_the_one_furthest_behind(run_folder):
    beats = [Heartbeat(run_folder.heartbeats, rank) for rank in range(3)]
    assert "every rank is at: loading experts" in _hanging(run_folder, 3, 5)
    for beat, phase in zip(beats, (3, 2, 3), strict=True):
        beat.beat(1, 6, phase)
    assert "rank 1 is furthest behind, at: step 1, layer 6, experts;" in _hanging(run_folder, 3, 5)
    beats[1].finish()
    assert stage(read_heartbeats(run_folder.heartbeats)[1]) == "writing results"
    create_heartbeats(run_folder.heartbeats, 3)
    Heartbeat(run_folder.heartbeats, 0)
    assert "rank 1 is furthest behind, at: not started;" in _hanging(run_folder, 3, 5)
    assert _hanging(run_folder, 3, 2.5).startswith("3 ranks did not finish within 2.5 s")


def test_a_heartbeat_without_a_file_goes_nowhere():
    Heartbeat(None, 7).beat(1, 2, 3)


@given(
    skew=st.lists(st.integers(-(10**12), 10**12), min_size=4, max_size=4),
    hosts=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_clocks_of_other_hosts_are_set_by_the_barrier(skew, hosts):
    """Three iterations in which all ranks leave the barrier together; each host's clock has its own zero."""
    true_RIG2 = (
        np.arange(3)[:, None, None] * 10_000
        + np.arange(10).reshape(5, 2) * 100
        + np.zeros((4, 1, 1, 1), dtype=np.int64)
    )
    true_RIG2[:, :, 1:] += np.arange(4)[:, None, None, None]
    offset_R = np.array([skew[host] for host in hosts])
    aligned = align_clocks(true_RIG2 + offset_R[:, None, None, None], np.array(hosts))
    np.testing.assert_array_equal(aligned, true_RIG2 + offset_R[0])


def test_a_timeline_has_every_span_its_bytes_and_its_tokens():
    mark_RM = np.array([[0, 10, 20, 30, 40, 50, 60, 70, 80], [1, 11, 22, 33, 44, 55, 66, 77, 88]])
    time_RIG2 = np.stack([mark_RM[:, :-1], mark_RM[:, 1:]], axis=-1)[:, None]
    count_RIG3 = np.zeros((2, 1, 8, 3), dtype=np.int64)
    count_RIG3[0, 0, :4] = [(0, 0, 12), (3, 5, 3), (0, 0, 9), (5, 3, 5)]
    count_RIG3[1, 0, 2] = (0, 0, 7)
    count_RIG3[1, 0, 7] = (4, 6, 4)
    about = {"source": "measured", "mode": "per_rank", "num_ranks": 2}
    attention, send, experts, back = (PHASES.index(p) for p in ("attention", "dispatch", "experts", "combine"))
    layers, phases = np.repeat([0, 1], 4), np.tile([attention, send, experts, back], 2)
    timeline = build_timeline(time_RIG2, count_RIG3, layers, phases, 100, about)
    assert timeline.start_ns.tolist() == sorted(timeline.start_ns.tolist())
    spans = list(
        zip(
            *(
                getattr(timeline, name).tolist()
                for name in (
                    "layer",
                    "phase",
                    "rank",
                    "start_ns",
                    "duration_ns",
                    "sent_bytes",
                    "received_bytes",
                    "tokens",
                )
            ),
            strict=True,
        )
    )
    assert len(spans) == 16
    assert (0, attention, 0, 0, 10, 0, 0, 12) in spans
    assert (0, send, 0, 10, 10, 300, 500, 3) in spans
    assert (0, experts, 1, 22, 11, 0, 0, 7) in spans
    assert (1, back, 1, 77, 11, 400, 600, 4) in spans
    assert timeline.iteration_ns().tolist() == [88]


def test_run_ranks_refuses_nonsense():
    with pytest.raises(UsageError, match="num_ranks is 0"):
        run_ranks([JOB], num_ranks=0, timeout_s=1)
    with pytest.raises(UsageError, match="timeout_s 0"):
        run_ranks([JOB], num_ranks=1, timeout_s=0)


def in_fresh_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, placer.execute; sys.exit('torch' in sys.modules)"
    assert in_fresh_python(code).returncode == 0


def test_without_torch_a_measurement_names_the_extra():
    code = """
import sys
sys.modules["torch"] = None
import placer.execute
from placer.core.errors import DependencyError
try:
    placer.execute.replay_plans([], None, model=None)
except DependencyError as error:
    print(error)
"""
    result = in_fresh_python(code)
    assert "pip install 'placer[torch]'" in result.stdout, result.stderr
