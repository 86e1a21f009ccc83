"""Online rebalancing: the solver sees finished windows only, and moving to its plan costs what the links say."""

from dataclasses import replace

import numpy as np
import pytest
from serving_cases import workload
from simcases import linear_plan, tiny_cluster, tiny_model

from placer.core.errors import UsageError
from placer.core.plan import Plan
from sim.serving import (
    Limits,
    PlanPricer,
    PoolSpec,
    Rebalancing,
    Request,
    Served,
    Streams,
    Window,
    Workload,
    by_affinity,
    migration,
    round_robin,
    serve,
)
from sim.serving.batcher import RankQueue

CLUSTER, MODEL = tiny_cluster(2, 2), tiny_model(2, 8)
PLAN = linear_plan(CLUSTER, 2, 8)
RNG = np.random.default_rng(4)
EXPERT_LTK = RNG.integers(0, 8, (2, 50, 1)).astype(np.uint8)
STREAMS = Streams.of(np.arange(50, dtype=np.int32) // 5)
SWAPPED = replace(PLAN, slot_expert_LP=np.array([[2, 1, 0, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]))


def served(work: Workload, solver: object, manner: str = "pause", window: int = 3) -> Served:
    spec = PoolSpec(
        pricer=PlanPricer(PLAN, MODEL, CLUSTER, EXPERT_LTK),
        ranks=4,
        policy=round_robin(),
        limits=Limits(tokens_per_rank=4),
        rebalancing=Rebalancing(window_iterations=window, sample_tokens=12, manner=manner),
        solver=solver,
    )
    return serve(work, STREAMS, (spec,))


WORK = workload(*((1000 * at, 5, 6) for at in range(12)))


def test_migration_is_one_leg_of_expert_weights() -> None:
    """Experts 0 and 2 change places between ranks 0 and 1 of one node: 1000 bytes each way at one byte a ns."""
    cost = migration(PLAN, SWAPPED, MODEL, CLUSTER)
    assert (cost.duration_ns, cost.experts, cost.bytes_C) == (1000, 2, (2000, 0))
    assert cost.received_bytes_R == (1000, 1000, 0, 0)
    away = replace(PLAN, slot_expert_LP=np.array([[4, 1, 2, 3, 0, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]))
    assert migration(PLAN, away, MODEL, CLUSTER).bytes_C == (0, 2000)
    assert migration(PLAN, PLAN, MODEL, CLUSTER).duration_ns == 0


def test_windows_hold_what_has_finished_and_follow_each_other() -> None:
    seen: list[Window] = []
    done = served(WORK, lambda window: seen.append(window))
    log = done.pools[0].log
    assert [(window.first, window.last) for window in seen] == [(3 * at, 3 * at + 2) for at in range(len(seen))]
    assert len(seen) == len(log.tokens) // 3
    for window in seen:
        assert window.end_ns == log.start_ns[window.last] + log.duration_ns[window.last]
        assert window.start_ns == log.start_ns[window.first]
        assert window.tokens == sum(log.tokens[window.first : window.last + 1])
        assert window.load_LE.sum() == 2 * window.tokens
        assert len(window.source_H) == len(window.request_H) == window.expert_LHK.shape[1] <= 12
        known = {r.number for r in done.requests if r.arrival_ns <= window.end_ns}
        assert set(window.request_H.tolist()) <= known
        counted = np.stack([np.bincount(row_HK.reshape(-1), minlength=8) for row_HK in window.expert_LHK])
        assert (counted <= window.load_LE).all(), "the sample is part of the window"
    assert len(done.pools[0].window_par) == len(seen)


def test_what_comes_later_changes_no_earlier_window() -> None:
    """Causality: two workloads that part at a time give the solver the same windows before it."""
    parts = 6000
    other = workload(*((1000 * at, 5, 6) for at in range(6)), *((parts + 900 * at, 9, 2) for at in range(6)))
    seen: list[list[Window]] = [[], []]
    for windows, work in zip(seen, (WORK, other), strict=True):
        served(work, lambda window, windows=windows: windows.append(window), window=1)
    early = [[window for window in windows if window.end_ns < parts] for windows in seen]
    assert len(early[0]) == len(early[1])
    for one, two in zip(*early, strict=True):
        assert (one.start_ns, one.end_ns, one.tokens) == (two.start_ns, two.end_ns, two.tokens)
        assert np.array_equal(one.load_LE, two.load_LE)
        assert np.array_equal(one.expert_LHK, two.expert_LHK)


@pytest.mark.parametrize("manner", ["pause", "overlap"])
def test_a_new_plan_serves_once_its_weights_are_there(manner: str) -> None:
    asked: list[Window] = []

    def ask(window: Window) -> Plan | None:
        asked.append(window)
        return SWAPPED if len(asked) == 1 else None

    done = served(WORK, ask, manner)
    pool = done.pools[0]
    assert asked[0].plan is PLAN
    assert len(asked) > 1
    [(at, cost)] = pool.migrations
    ends = np.add(pool.log.start_ns, pool.log.duration_ns)
    assert at == ends[2]
    assert cost.duration_ns == 1000
    gap = pool.log.start_ns[3] - ends[2]
    assert gap == (1000 if manner == "pause" else 0)
    assert pool.paused_ns == (1000 if manner == "pause" else 0)
    # nobody is asked while weights travel, and afterwards it is the new plan that serves
    for window in asked[1:]:
        assert window.plan is SWAPPED
        assert pool.log.start_ns[window.last] >= at + 1000
    assert len(done.finished) == 12


def test_a_solver_needs_settings_and_a_plan_that_it_can_change() -> None:
    with pytest.raises(UsageError, match="a solver needs rebalancing settings and a PlanPricer"):
        PoolSpec(
            pricer=PlanPricer(PLAN, MODEL, CLUSTER, EXPERT_LTK),
            ranks=4,
            policy=round_robin(),
            limits=Limits(),
            solver=lambda window: None,
        )
    with pytest.raises(UsageError, match=r"rebalance\.manner is 'soon'"):
        Rebalancing(manner="soon")


def test_affinity_prefers_the_best_rank_unless_it_has_too_much() -> None:
    policy = by_affinity(np.array([[0, 5, 3]]), slack=1)
    queues = [RankQueue(rank, Limits()) for rank in range(3)]
    chosen = []
    for number in range(5):
        request = Request(number, 0, 1, 1)
        chosen.append(policy(request, queues))
        queues[chosen[-1]].add(request)
    assert chosen == [1, 1, 2, 2, 0]
