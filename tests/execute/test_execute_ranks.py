"""Real ranks: equal to the reference, moving what the core counts, and leaving nothing behind however they end."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from placer.core.errors import ExecutionError, InputFileError
from placer.core.evaluate import iterate_layers
from placer.core.timeline import PHASES, Timeline
from placer.execute import ReplayJob, replay_plans, replayed_model, run_ranks, write_random_experts

pytestmark = pytest.mark.dist

LAYERS, EXPERTS, TOP_K, TOKENS, PER_ITERATION = 3, 8, 3, 48, 24
HIDDEN, INNER, SEED = 32, 24, 5
GENEROUS_S = 180.0


@pytest.fixture
def own_temp(tmp_path, monkeypatch):
    """A folder that takes every temporary file of this test, so that what is left in it was left behind."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def nothing_left(own_temp, helpers):
    """After the test: no temporary file, and no process that was started with one."""
    yield
    assert list(own_temp.iterdir()) == []
    assert helpers.processes_with(str(own_temp)) == []


def all_kinds_of_plans(rng, helpers):
    """Name -> (plan, mode): linear, balanced with replicas, random with replicas, empty slots and an idle rank."""
    linear = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    balanced = np.tile([0, 1, 2, 3, 4, 0, 5, 6, 1, 7, 0, 2], (LAYERS, 1))
    uneven = np.stack([helpers.random_slots(rng, EXPERTS, 4, 4, empty_ranks=(3,)) for _ in range(LAYERS)])
    random = np.stack([helpers.random_slots(rng, EXPERTS, 4, 3) for _ in range(LAYERS)])
    kinds = {
        "linear": (linear, "visit_first"),
        "balanced": (balanced, "visit_first"),
        "random": (random, "round_robin"),
        "uneven": (uneven, "nearest"),
    }
    return {
        (name, mode): helpers.make_plan(slots, experts=EXPERTS, ranks=4, mode=mode, replica_choice=choice)
        for name, (slots, choice) in kinds.items()
        for mode in ("per_expert", "per_rank")
    }


@pytest.fixture(scope="module")
def routing():
    """Tokens of variable k, some with none; their sources are ranks 0, 1 and 3, in the second half 0 and 3."""
    rng = np.random.default_rng(11)
    expert_LTK = np.argsort(rng.random((LAYERS, TOKENS, EXPERTS)), axis=2)[:, :, :TOP_K].astype(np.uint8)
    expert_LTK[rng.random(expert_LTK.shape) < 0.3] = 255
    expert_LTK[:, 5] = 255
    source_T = rng.choice([0, 1, 3], size=TOKENS)
    source_T[PER_ITERATION:][source_T[PER_ITERATION:] == 1] = 0
    weight_LTK = rng.random(expert_LTK.shape).astype(np.float16)
    return SimpleNamespace(expert_LTK=expert_LTK, source_T=source_T, weight_LTK=weight_LTK)


def options(helpers, routing, **change):
    return {
        "model": helpers.toy_model(LAYERS, EXPERTS, TOP_K),
        "source_T": routing.source_T,
        "tokens_per_iteration": PER_ITERATION,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "timeout_s": GENEROUS_S,
        "seed": SEED,
    } | change


def test_every_plan_and_mode_equals_the_reference_and_moves_what_the_core_counts(
    routing, helpers, make_job, nothing_left
):
    plans = all_kinds_of_plans(np.random.default_rng(3), helpers)
    said = []
    timelines = replay_plans(
        list(plans.values()),
        routing.expert_LTK,
        routing.weight_LTK,
        progress=said.append,
        **options(helpers, routing),
    )
    assert "checking outputs and writing results" in said
    expert_LTK = np.where(routing.expert_LTK == 255, -1, routing.expert_LTK.astype(np.int64))
    window_T = np.arange(TOKENS) // PER_ITERATION
    exact = helpers.rows_are_independent(HIDDEN, 2 * INNER, torch.float32)
    for ((name, mode), plan), timeline in zip(plans.items(), timelines, strict=True):
        about = timeline.about
        assert (about["source"], about["mode"], about["num_ranks"]) == ("measured", mode, 4), name
        assert about["plan_sha256"] == plan.sha256
        assert about["max_rel_error"] < 1e-5, name
        assert replayed_model(helpers.toy_model(LAYERS, EXPERTS, TOP_K), about).token_bytes == about["token_bytes"]
        if exact:
            assert about["bit_identical"], name
            assert mode == "per_rank" or about["max_abs_error"] == 0.0, name
        traffic = iterate_layers(plan, mode, expert_LTK, routing.source_T, window_T, 2)
        check_columns(timeline, traffic, token_bytes=HIDDEN * 4)
    hashes = {mode: {t.about["output_sha256"] for t in timelines if t.about["mode"] == mode} for _, mode in plans}
    if exact:
        assert len(hashes["per_expert"]) == 1

    again = [
        make_job(plan=plans["random", "per_expert"], warmup=0),
        make_job(plan=plans["balanced", "per_rank"], warmup=0),
        make_job(plan=plans["uneven", "per_rank"], warmup=0, dtype="bfloat16"),
    ]
    *repeated, half = run_ranks(again, num_ranks=4, timeout_s=GENEROUS_S)
    first = {timeline.about["plan_sha256"]: timeline.about["output_sha256"] for timeline in timelines}
    for job, timeline in zip(again, repeated, strict=False):
        assert timeline.about["output_sha256"] == first[timeline.about["plan_sha256"]]
        assert timeline.num_iterations == 2
        assert timeline.to_json() == Timeline.load(Path(job.result_path)).to_json()
    assert half.about["token_bytes"] == 2 * HIDDEN
    assert half.about["max_rel_error"] < 0.05
    if helpers.rows_are_independent(HIDDEN, 2 * INNER, torch.bfloat16):
        assert half.about["bit_identical"]
    plan = plans["uneven", "per_rank"]
    traffic = iterate_layers(plan, "per_rank", expert_LTK, routing.source_T, window_T, 2)
    check_columns(half, traffic, token_bytes=HIDDEN * 2)


def check_columns(timeline, traffic, token_bytes):
    """Every span's bytes and tokens against layer_traffic; every rank, layer and phase once an iteration."""
    windows, layers, ranks = 2, len(traffic), 4
    assert len(timeline.start_ns) == windows * layers * 4 * ranks
    at = {}
    columns = (
        "iteration",
        "layer",
        "phase",
        "rank",
        "sent_bytes",
        "received_bytes",
        "tokens",
        "start_ns",
        "duration_ns",
    )
    for i, layer, phase, rank, *values in zip(*(getattr(timeline, c).tolist() for c in columns), strict=True):
        at[i, layer, PHASES[phase], rank] = values
    end_of_iteration = [0, 0]
    for layer, moved in enumerate(traffic):
        for w in range(windows):
            out_R, in_R = moved.legs_WRR[0][w].sum(axis=1), moved.legs_WRR[0][w].sum(axis=0)
            pairs_R = moved.tokens_WP[w].reshape(ranks, -1).sum(axis=1)
            for rank in range(ranks):
                sent, received = int(out_R[rank]), int(in_R[rank])
                expected = {
                    "attention": [0, 0, int(moved.home_WR[w, rank])],
                    "dispatch": [sent * token_bytes, received * token_bytes, sent],
                    "experts": [0, 0, int(pairs_R[rank])],
                    "combine": [received * token_bytes, sent * token_bytes, received],
                }
                for phase, values in expected.items():
                    assert at[w, layer, phase, rank][:3] == values, (w, layer, phase, rank)
                    *_, start, duration = at[w, layer, phase, rank]
                    assert duration >= 0
                    end_of_iteration[w] = max(end_of_iteration[w], start + duration)
    second = timeline.start_ns[timeline.iteration == 1]
    assert int(timeline.start_ns.min()) >= 0
    # a barrier lies between, so no rank starts the second iteration before every rank ended the first
    assert int(second.min()) >= end_of_iteration[0]
    dispatched, returned = ((timeline.phase == PHASES.index(phase)) for phase in ("dispatch", "combine"))
    for spans in (dispatched, returned):
        assert timeline.sent_bytes[spans].sum() == timeline.received_bytes[spans].sum()


@pytest.fixture
def make_job(tmp_path, helpers, routing):
    """Hand-made jobs, as for torchrun on several machines; their files lie outside the temporary folder."""
    folder = tmp_path / "job"
    folder.mkdir()

    def make(plan=None, **change):
        if plan is None:
            plan = helpers.make_plan([range(EXPERTS)] * LAYERS, experts=EXPERTS, ranks=2)
            source_T = np.arange(TOKENS) % 2
        else:
            source_T = routing.source_T
        number = len(list(folder.glob("plan-*")))
        plan.save(folder / f"plan-{number}.json")
        for name, array in (("expert", routing.expert_LTK), ("weight", routing.weight_LTK), ("source", source_T)):
            np.save(folder / f"{name}.npy", array)
        dtype = change.get("dtype", "float32")
        model = helpers.toy_model(LAYERS, EXPERTS, TOP_K, hidden=HIDDEN, inner=INNER)
        write_random_experts(folder / f"{dtype}.safetensors", model, SEED, dtype=dtype)
        fields = {
            "plan_path": str(folder / f"plan-{number}.json"),
            "expert_path": str(folder / "expert.npy"),
            "weight_path": str(folder / "weight.npy"),
            "source_path": str(folder / "source.npy"),
            "experts_path": str(folder / f"{dtype}.safetensors"),
            "result_path": str(folder / f"result-{number}.json"),
            "stored_layers": tuple(range(LAYERS)),
            "mode": plan.mode,
            "tokens_per_iteration": PER_ITERATION,
            "iterations": 2,
            "seed": SEED,
            "timeout_s": GENEROUS_S,
        }
        return ReplayJob(**fields | change)

    return make


FAULT = """
import os, signal, sys, time
from placer.execute import loop, worker
real, calls = loop.grouped_ffn, []
def grouped_ffn(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == {call}:
        {action}
    return real(*arguments)
loop.grouped_ffn = grouped_ffn
code = worker.main(sys.argv[1:])
os._exit(code)
"""


def faulty_worker(folder, action, call=2):
    script = folder / "faulty.py"
    script.write_text(FAULT.format(action=action, call=call))
    return (str(script),)


def test_a_killed_rank_is_named_with_its_signal(make_job, tmp_path, nothing_left):
    entry = faulty_worker(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", call=5)
    with pytest.raises(ExecutionError, match=r"^rank 1 died \(SIGKILL; .* at: step 1, layer 1, experts$") as info:
        run_ranks([make_job()], num_ranks=2, timeout_s=GENEROUS_S, entry=entry)
    assert "\n" not in str(info.value)


def test_a_hanging_rank_is_named_and_ended_at_the_timeout(make_job, tmp_path, nothing_left):
    """The rank even ignores SIGTERM; a busy machine may need longer than this timeout to start, which is seen too."""
    action = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('placer-progress: hangs', flush=True); time.sleep(600)"
    )
    hung = []
    entry = faulty_worker(tmp_path, action)
    with pytest.raises(ExecutionError, match=r"^2 ranks did not finish within 14 s; ") as info:
        run_ranks([make_job()], num_ranks=2, timeout_s=14, entry=entry, progress=hung.append)
    if hung:
        assert "rank 1 is furthest behind, at: step 0, layer 1, experts;" in str(info.value)


def test_ctrl_c_ends_everything(make_job, tmp_path, nothing_left):
    """Even ranks that have not yet registered, which is as long as they import torch."""

    def interrupt(text):
        raise KeyboardInterrupt

    script = tmp_path / "slow.py"
    script.write_text("import time; print('placer-progress: imports', flush=True); time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_ranks([make_job()], num_ranks=2, timeout_s=GENEROUS_S, entry=(str(script),), progress=interrupt)


def test_an_expert_that_the_checkpoint_lacks_is_the_ranks_own_error(make_job, helpers, tmp_path, nothing_left):
    job = make_job()
    short = helpers.toy_model(LAYERS, EXPERTS - 1, TOP_K, hidden=HIDDEN, inner=INNER)
    write_random_experts(tmp_path / "job" / "float32.safetensors", short, 0)
    match = r"^rank 1: .*float32\.safetensors: layer 0 expert 7 has no gate matrix"
    with pytest.raises(InputFileError, match=match) as info:
        run_ranks([job], num_ranks=2, timeout_s=GENEROUS_S)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "job" / "result-0.json").exists()


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has the devices")
def test_nccl_without_cuda_is_refused_by_the_ranks(make_job, nothing_left):
    with pytest.raises(ExecutionError, match=r"^rank 0: backend nccl needs a CUDA device for each of the 1 ranks"):
        run_ranks([make_job(backend="nccl")], num_ranks=1, timeout_s=GENEROUS_S)


LAUNCHER = """
import sys, tempfile
from pathlib import Path
from placer.execute import ReplayJob, run_ranks
tempfile.tempdir = sys.argv[3]
say = lambda text: print(text, flush=True)
run_ranks([ReplayJob.load(Path(sys.argv[1]))], num_ranks=2, timeout_s=600, entry=(sys.argv[2],), progress=say)
"""


def test_ranks_end_when_their_launcher_is_killed(make_job, tmp_path, own_temp, helpers):
    job = make_job()
    job.save(tmp_path / "job" / "job.json")
    (script,) = faulty_worker(tmp_path, "print('placer-progress: hangs', flush=True); time.sleep(600)")
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "job" / "job.json"), script, str(own_temp)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "hangs\n"
        marker = str(own_temp / "placer-run-")
        assert len(helpers.processes_with(marker)) >= 3
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.communicate()
    deadline = time.monotonic() + 60
    while helpers.processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert helpers.processes_with(marker) == []
