"""Real ranks in every mode, algorithm and pipeline degree: equal to the reference, with the simulator's spans.

Each launch measures all of them, in float32 and bfloat16; every layer has an algorithm and a degree of its own.
"""

import numpy as np
import pytest
import torch

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.modes import DISPATCH_MODES
from placer.core.schedule import ALGORITHMS, SCHEDULED_MODES, Schedule
from placer.core.timeline import PHASES
from placer.execute import ReplayJob, replay_plans, replayed_model, run_ranks, write_random_experts
from sim.stages import stages_of
from sim.traffic import work_of

pytestmark = pytest.mark.dist

LAYERS, EXPERTS, TOP_K, TOKENS, PER_ITERATION = 3, 12, 3, 96, 48
HIDDEN, INNER, SEED = 32, 24, 5
GENEROUS_S = 240.0
ATTENTION, DISPATCH, EXPERT, COMBINE, GATHER = range(5)


def schedules(mode, rounds):
    """What to run under a mode: all algorithms and degrees 1, 2 and 3, each pair of them in some layer."""
    if mode == "allgather":
        return [Schedule.uniform(LAYERS)]
    if mode not in SCHEDULED_MODES:
        return [Schedule(algorithm_L=("linear",) * 3, degree_L=(3, 1, 2), rounds_L=(None,) * 3)]
    found = []
    for turn in range(3):
        algorithm_L = tuple(ALGORITHMS[(layer + turn) % 3] for layer in range(LAYERS))
        rounds_L = tuple(rounds if algorithm == "rounds" else None for algorithm in algorithm_L)
        found.append(Schedule(algorithm_L=algorithm_L, degree_L=(1, 2, 3), rounds_L=rounds_L))
    return found


def expected_spans(job, plan, schedule, expert_LTK, source_T, model):
    """Sorted (iteration, rank, layer, phase, sent bytes, received bytes, tokens), as the simulator prices the job."""
    cluster = ClusterSpec(
        name="any",
        nodes=plan.num_ranks // plan.ranks_per_node,
        ranks_per_node=plan.ranks_per_node,
        memory_gib=1.0,
        intra=LinkClass(gbytes_per_s=10.0),
        inter=LinkClass(gbytes_per_s=1.0),
        compute=Compute(tflops=1.0, weight_read_gbytes_per_s=10.0),
    )
    window_T = np.arange(TOKENS) // PER_ITERATION
    work = work_of(plan, model, cluster, job.mode, expert_LTK, source_T, window_T, 2, schedule=schedule)
    none_WR = np.zeros((2, plan.num_ranks), dtype=np.int64)
    spans = [[index, ATTENTION, none_WR, none_WR, layer.home_WR] for index, layer in enumerate(work.layers)]
    stages = stages_of(work)
    for index, stage in enumerate(stages):
        sent_WR = sum((leg.sent_WR for leg in stage.legs), none_WR) * model.token_bytes
        received_WR = sum((leg.received_WR for leg in stage.legs), none_WR) * model.token_bytes
        in_rounds = stage.layer >= 0 and schedule.algorithm_L[stage.layer] == "rounds"
        if in_rounds and stage.after == (index - 1,) and stages[index - 1].phase == stage.phase:
            # rounds are one span, also where some of them stay within nodes
            for column, more_WR in ((2, sent_WR), (3, received_WR), (4, stage.units_WR)):
                spans[-1][column] = spans[-1][column] + more_WR
        else:
            spans.append([stage.layer, stage.phase, sent_WR, received_WR, stage.units_WR])
    return sorted(
        (w, rank, layer, phase, *(int(count_WR[w, rank]) for count_WR in counts))
        for layer, phase, *counts in spans
        for w in range(2)
        for rank in range(plan.num_ranks)
    )


def measured_spans(timeline):
    """The same of a run."""
    names = ("iteration", "rank", "layer", "phase", "sent_bytes", "received_bytes", "tokens")
    return sorted(zip(*(getattr(timeline, name).tolist() for name in names), strict=True))


def check_times(timeline, schedule, mode):
    """Layers of degree 1 are chains without gaps; otherwise a rank computes one thing at a time and sends one."""
    end_ns = timeline.start_ns + timeline.duration_ns
    two_level = {
        layer
        for layer, (algorithm, degree) in enumerate(zip(schedule.algorithm_L, schedule.degree_L, strict=True))
        if degree > 1 and (mode == "per_node" or algorithm == "2dh")
    }
    for iteration in range(2):
        for rank in range(timeline.about["num_ranks"]):
            mine = (timeline.iteration == iteration) & (timeline.rank == rank)
            for layer, degree in enumerate(schedule.degree_L):
                at = np.flatnonzero(mine & (timeline.layer == layer))
                at = at[np.argsort(timeline.start_ns[at], kind="stable")]
                if degree == 1:
                    assert timeline.phase[at].tolist() == [ATTENTION, DISPATCH, EXPERT, COMBINE]
                    np.testing.assert_array_equal(timeline.start_ns[at][1:], end_ns[at][:-1])
                computing = np.isin(timeline.phase[at], (ATTENTION, EXPERT))
                streams = [at[computing]] if layer in two_level else [at[computing], at[~computing]]
                for stream in streams:
                    assert (timeline.start_ns[stream][1:] >= end_ns[stream][:-1]).all()
                sending, returning = (at[timeline.phase[at] == phase] for phase in (DISPATCH, COMBINE))
                assert timeline.start_ns[returning].min() >= end_ns[sending].min()


@pytest.mark.parametrize(("ranks", "per_node"), [(2, 1), (4, 2), (8, 2)])
def test_every_way_equals_the_reference_and_the_simulators_counts(tmp_path, helpers, ranks, per_node):
    rng = np.random.default_rng(ranks)
    expert_LTK = helpers.random_routing(rng, LAYERS, TOKENS, TOP_K, EXPERTS)
    expert_LTK[:, 5] = -1
    # the last rank has no tokens of its own
    source_T = rng.integers(max(1, ranks - 1), size=TOKENS)
    slots = [helpers.random_slots(rng, EXPERTS, ranks, -(-EXPERTS // ranks) + 2) for _ in range(LAYERS)]
    rounds = helpers.random_rounds(rng, ranks)
    model = helpers.toy_model(LAYERS, EXPERTS, TOP_K, hidden=HIDDEN, inner=INNER)
    for name, array in (("expert", expert_LTK), ("weight", rng.random(expert_LTK.shape)), ("source", source_T)):
        np.save(tmp_path / f"{name}.npy", array)
    cases, jobs = [], []
    for dtype in ("float32", "bfloat16"):
        write_random_experts(tmp_path / f"{dtype}.safetensors", model, SEED, dtype=dtype)
        for mode in DISPATCH_MODES:
            choice = "round_robin" if mode == "coherent" else "visit_first"
            plan = helpers.make_plan(
                slots, experts=EXPERTS, ranks=ranks, mode=mode, ranks_per_node=per_node, replica_choice=choice
            )
            plan.save(tmp_path / f"plan-{mode}.json")
            for schedule in schedules(mode, rounds):
                cases.append((plan, schedule))
                job = ReplayJob(
                    plan_path=str(tmp_path / f"plan-{mode}.json"),
                    expert_path=str(tmp_path / "expert.npy"),
                    weight_path=str(tmp_path / "weight.npy"),
                    source_path=str(tmp_path / "source.npy"),
                    experts_path=str(tmp_path / f"{dtype}.safetensors"),
                    result_path=str(tmp_path / f"result-{len(jobs)}.json"),
                    stored_layers=tuple(range(LAYERS)),
                    mode=mode,
                    tokens_per_iteration=PER_ITERATION,
                    iterations=2,
                    warmup=0,
                    seed=SEED,
                    dtype=dtype,
                    timeout_s=GENEROUS_S,
                    schedule=schedule,
                )
                jobs.append(job)
    timelines = run_ranks(jobs, num_ranks=ranks, timeout_s=GENEROUS_S)
    hashes = {}
    for (plan, schedule), job, timeline in zip(cases, jobs, timelines, strict=True):
        about = timeline.about
        what = (job.mode, schedule.algorithm_L, schedule.degree_L, job.dtype)
        assert (about["mode"], about["degrees"]) == (job.mode, list(schedule.degree_L))
        assert about["algorithms"] == list(schedule.algorithm_L)
        sized = replayed_model(model, about)
        assert measured_spans(timeline) == expected_spans(job, plan, schedule, expert_LTK, source_T, sized), what
        assert about["max_rel_error"] < (1e-5 if job.dtype == "float32" else 0.05), what
        if helpers.rows_are_independent(HIDDEN, 2 * INNER, getattr(torch, job.dtype)):
            assert about["bit_identical"], what
        hashes.setdefault((job.mode, job.dtype), set()).add(about["output_sha256"])
        check_times(timeline, schedule, job.mode)
    if helpers.rows_are_independent(HIDDEN, 2 * INNER, torch.float32):
        assert all(len(found) == 1 for found in hashes.values())
        # replicas hold the same weights, and a sum over all ranks adds zeros only
        assert hashes["per_rank", "float32"] == hashes["allgather", "float32"]


def test_a_plan_brings_its_schedule_and_an_option_replaces_it(helpers):
    rng = np.random.default_rng(0)
    degree_two, rounds = Schedule.uniform(2, degree=2), helpers.random_rounds(rng, 2)
    in_rounds = Schedule.uniform(2, algorithm="rounds", rounds=rounds)
    plan = helpers.make_plan([[0, 1, 2, 3], [3, 2, 1, 0]], experts=4, ranks=2, prefill=degree_two, decode=in_rounds)
    expert_LTK = helpers.random_routing(rng, 2, 16, 2, 4)
    timelines = replay_plans(
        [plan, plan, plan],
        expert_LTK,
        model=helpers.toy_model(2, 4, 2),
        source_T=np.arange(16) % 2,
        schedules=[None, in_rounds, None],
        modes=[None, "coherent", "per_expert"],
        tokens_per_iteration=8,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        timeout_s=GENEROUS_S,
    )
    assert [timeline.about["degrees"] for timeline in timelines] == [[2, 2], [1, 1], [2, 2]]
    assert [timeline.about["algorithms"][0] for timeline in timelines] == ["linear", "rounds", "linear"]
    assert {timeline.about["plan_sha256"] for timeline in timelines} == {plan.sha256}
    assert (timelines[1].phase == GATHER).sum() == 2 * 2
    assert PHASES.index("gather") == GATHER
