"""The compiled counts give the closed form's time to the nanosecond, in every mode and for every replica choice."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simcases import Case, cases, linear_plan, tiny_cluster, tiny_model

from placer.core.cluster import ExchangeCost, Software
from placer.core.errors import MismatchError
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode, ReplicaChoice
from placer.core.schedule import Schedule
from sim.port import port_times
from sim.serving import Batch, PlanPricer, Price
from sim.stages import stages_of
from sim.traffic import Work, work_of

SOFTWARE = Software(
    layer_us=1.3,
    exchanges={mode: ExchangeCost(fixed_us=0.7, token_us=0.021) for mode in DISPATCH_MODES},
    shared_cores=2,
)


def priced(case: Case, mode: DispatchMode, kind: str = "decode") -> Price:
    tokens = np.arange(case.expert_LTK.shape[1])
    pricer = PlanPricer(case.plan, case.model, case.cluster, case.expert_LTK, mode)
    return pricer.price(Batch(tokens, case.source_T.astype(np.int64), kind))


def work(case: Case, mode: DispatchMode, schedule: Schedule | None = None) -> Work:
    window_T = np.zeros(case.expert_LTK.shape[1], dtype=np.int64)
    inputs = (case.plan, case.model, case.cluster, mode, case.expert_LTK, case.source_T, window_T, 1)
    return work_of(*inputs, schedule=schedule)


def total_ns(done: Work) -> int:
    return int(port_times(done, stages_of(done)).total_W[0])


@given(cases(), st.sampled_from(DISPATCH_MODES), st.sampled_from(REPLICA_CHOICES), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_iteration_costs_what_fidelity_port_says(
    case: Case, mode: DispatchMode, choice: ReplicaChoice, software: bool, tail: bool
) -> None:
    cluster = replace(case.cluster, software=SOFTWARE if software else None)
    if tail:
        cluster = replace(cluster, inter=replace(cluster.inter, tail=1.37))
    case = replace(case, cluster=cluster, plan=replace(case.plan, replica_choice=choice))
    price, done = priced(case, mode), work(case, mode)
    assert price.duration_ns == total_ns(done)
    chunks = [layer.chunks[0] for layer in done.layers]
    assert np.array_equal(price.load_LR, [chunk.pairs_WR[0] for chunk in chunks])
    legs = [leg for chunk in chunks for leg in (*chunk.dispatch, *chunk.combine)]
    legs += [done.gather] if done.gather is not None else []
    away_RR = cluster.node_R[:, None] != cluster.node_R[None, :]
    copies_RR = np.sum([leg.copies_WRR[0] for leg in legs], axis=0)
    sent = [copies_RR[~away_RR].sum(), copies_RR[away_RR].sum()]
    assert price.sent_bytes_C.tolist() == [int(one) * case.model.token_bytes for one in sent]
    busiest = [max(int(leg.times.out_WR[0].max()), int(leg.times.in_WR[0].max())) for leg in legs]
    assert price.link_DCR.max() <= sum(busiest), "no port is busier than the busiest of every leg"
    assert price.link_DCR.sum(axis=1).max() >= max(busiest, default=0)
    assert price.uplink_DN[0].sum() == sum(int(leg.times.uplink_out_WN.sum()) for leg in legs)
    chosen = case.expert_LTK[(case.expert_LTK >= 0) & (case.expert_LTK < case.plan.num_experts)]
    assert price.load_LE.sum() == len(chosen)
    assert np.array_equal(price.load_LE.sum(axis=0), np.bincount(chosen, minlength=case.plan.num_experts))


@given(cases(), st.sampled_from(["per_expert", "per_rank", "coherent"]), st.integers(2, 4))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_plan_s_schedule_counts_for_its_kind_of_iteration(case: Case, mode: DispatchMode, degree: int) -> None:
    schedule = Schedule.uniform(len(case.plan.slot_expert_LP), algorithm="2dh", degree=degree)
    case = replace(case, plan=replace(case.plan, mode=mode, prefill=schedule))
    assert priced(case, mode, "prefill").duration_ns == total_ns(work(case, mode, schedule))
    assert priced(case, mode, "decode").duration_ns == total_ns(work(case, mode))


def test_by_hand() -> None:
    """Two ranks; two tokens of rank 0 go to expert 1 on rank 1: 2 copies there and back at 1000 ns, 2 pairs at 2000."""
    cluster, model = tiny_cluster(1, 2), tiny_model(1, 2)
    case = Case(linear_plan(cluster, 1, 2), model, cluster, np.array([[[1], [1]]]), np.array([0, 0]), 2)
    price = priced(case, "per_rank")
    assert price.duration_ns == 2 * 1000 + 2 * 2000 + 2 * 1000
    assert price.link_DCR[:, 0].tolist() == [[2000, 2000], [2000, 2000]]
    assert price.compute_R.tolist() == [0, 4000]


def test_a_plan_of_another_shape_is_refused() -> None:
    cluster = tiny_cluster(1, 2)
    plan = linear_plan(cluster, 1, 2)
    with pytest.raises(MismatchError, match="1 layers of 2 experts, the trace 2 of 2"):
        PlanPricer(plan, tiny_model(2, 2), cluster, np.zeros((2, 1, 1), dtype=np.uint8))
    with pytest.raises(MismatchError, match="the plan is for 2 ranks"):
        PlanPricer(plan, tiny_model(1, 2), tiny_cluster(2, 1), np.zeros((1, 1, 1), dtype=np.uint8))
