"""Laws of the simulator on random deployments, plans, modes and replica choices."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from port_oracle import leave_by_definition
from simcases import (
    Case,
    alike_case,
    cases,
    clusters,
    linear_plan,
    random_experts,
    relabel,
    tiny_cluster,
    tiny_model,
)

from placer.core.cost import closed_form_ns, gather_copies, leg_times
from placer.core.dispatch import assign_layer
from placer.core.evaluate import evaluate, iterate_layers, window_index
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.timeline import PHASES, Timeline
from sim.stages import stages_of
from sim.traffic import Work, work_of

FIDELITIES = ("port", "phase")
EXCHANGES = [PHASES.index(name) for name in ("dispatch", "combine", "gather")]


def work(case: Case) -> Work:
    window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
    inputs = (case.plan, case.model, case.cluster, case.plan.mode, case.expert_LTK, case.source_T)
    return work_of(*inputs, window_T, windows)


def where_tokens_end(case: Case) -> np.ndarray:
    """The rank of each token's first expert in the last layer where it has one, else its source rank."""
    end_T = case.source_T.copy()
    for layer, expert_TK in enumerate(case.expert_LTK):
        slot_TK, slots = assign_layer(case.plan, layer, expert_TK, end_T, np.arange(len(end_T)))
        for token, slot_K in enumerate(slot_TK):
            placed = slot_K[slot_K >= 0]
            if len(placed):
                end_T[token] = slots.rank_P[placed[0]]
    return end_T


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_port_is_the_closed_form(case: Case) -> None:
    timeline = case.simulate("port")
    window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
    expected: dict[str, np.ndarray] = {}
    for traffic in iterate_layers(case.plan, case.plan.mode, case.expert_LTK, case.source_T, window_T, windows):
        for phase, ns_W in closed_form_ns(case.cluster, case.model, traffic).items():
            expected[phase] = expected.get(phase, 0) + ns_W
    drawn = timeline.phase_ns()
    if case.plan.mode == "coherent":
        end_T = where_tokens_end(case)
        home_WR = [np.bincount(end_T[window_T == w], minlength=case.cluster.num_ranks) for w in range(windows)]
        gather = gather_copies(np.array(home_WR))
        expected["gather"] = leg_times(case.cluster, gather, case.model.token_bytes).slowest_W
    for phase, ns_W in expected.items():
        np.testing.assert_array_equal(drawn.get(phase, np.zeros(windows)), ns_W, err_msg=phase)
    np.testing.assert_array_equal(timeline.iteration_ns(), sum(expected.values()))
    judged = evaluate(
        case.plan, case.model, case.cluster, case.expert_LTK, case.source_T, batch_tokens=case.batch_tokens
    )
    assert float(timeline.iteration_ns().mean()) / 1e3 == judged.iteration_us[case.plan.mode]


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_phase_lies_between_its_bounds(case: Case) -> None:
    """At most the closed form; at least every rank's own work and every port's total work."""
    took_W = case.simulate("phase").iteration_ns()
    assert (took_W <= case.simulate("port").iteration_ns()).all()
    done = work(case)
    stages = stages_of(done)
    own_WR = sum(stage.work_WR for stage in stages if stage.work_WR is not None)
    own_WR = own_WR + sum(leg.times.out_WR for stage in stages for leg in stage.legs)
    assert (took_W[:, None] >= own_WR).all()
    legs = [leg for stage in stages for leg in stage.legs]
    node_R = case.cluster.node_R
    for same in (True, False):
        pick_RR = (node_R[:, None] == node_R[None, :]) == same
        in_WR = sum(
            leg_times(case.cluster, leg.copies_WRR.astype(np.int64) * pick_RR, done.token_bytes).in_WR for leg in legs
        )
        assert (took_W[:, None] >= in_WR).all()
    for field in ("uplink_out_WN", "uplink_in_WN"):
        assert (took_W[:, None] >= sum(getattr(leg.times, field) for leg in legs)).all()


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_phase_is_what_its_definition_says(case: Case) -> None:
    """The event-driven ports against the definition in sim.ports, evaluated leg by leg with no event at all."""
    timeline = case.simulate("phase")
    done = work(case)
    for window in range(done.windows):
        clock_R = np.zeros(case.cluster.num_ranks, dtype=np.int64)
        free: dict[tuple[str, int], int] = {}
        expected = []
        for stage in stages_of(done):
            if stage.work_WR is not None:
                clock_R = clock_R + stage.work_WR[window]
            for leg in stage.legs:
                copies_RR = leg.copies_WRR[window].astype(np.int64)
                clock_R = leave_by_definition(case.cluster, leg.copy_bytes, copies_RR, clock_R, free)
            expected.append(clock_R)
        pick = timeline.iteration == window
        start = int(timeline.start_ns[pick].min())
        ends = (timeline.start_ns + timeline.duration_ns)[pick] - start
        for index, stage in enumerate(stages_of(done)):
            mine = (timeline.layer[pick] == stage.layer) & (timeline.phase[pick] == stage.phase)
            got_R = np.zeros_like(clock_R)
            got_R[timeline.rank[pick][mine]] = ends[mine]
            assert got_R.tolist() == expected[index].tolist()


@settings(max_examples=60, deadline=None)
@given(case=cases(), fidelity=st.sampled_from(FIDELITIES))
def test_tokens_and_bytes_are_conserved(case: Case, fidelity: str) -> None:
    timeline = case.simulate(fidelity)
    window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
    for window in range(windows):
        for layer in range(len(case.expert_LTK)):
            mine = (timeline.iteration == window) & (timeline.layer == layer)
            computed = timeline.tokens[mine & (timeline.phase == PHASES.index("experts"))].sum()
            assert computed == (case.expert_LTK[layer, window_T == window] >= 0).sum()
        for layer in range(-1, len(case.expert_LTK)):
            for phase in EXCHANGES:
                mine = (timeline.iteration == window) & (timeline.layer == layer) & (timeline.phase == phase)
                assert timeline.sent_bytes[mine].sum() == timeline.received_bytes[mine].sum()
                assert timeline.sent_bytes[mine].sum() == timeline.tokens[mine].sum() * case.model.token_bytes


@settings(max_examples=60, deadline=None)
@given(case=cases(), fidelity=st.sampled_from(FIDELITIES))
def test_a_rank_does_one_thing_at_a_time_and_the_clock_runs_forward(case: Case, fidelity: str) -> None:
    timeline = case.simulate(fidelity)
    order = list(zip(timeline.iteration.tolist(), timeline.start_ns.tolist(), timeline.rank.tolist(), strict=True))
    assert order == sorted(order)
    end = timeline.start_ns + timeline.duration_ns
    for rank in range(case.cluster.num_ranks):
        mine = timeline.rank == rank
        assert (timeline.start_ns[mine][1:] >= end[mine][:-1]).all()
        at = list(zip(timeline.iteration[mine], timeline.layer[mine] % 99, timeline.phase[mine], strict=True))
        assert at == sorted(at), "stages pass in the model's order (the gather, layer -1, comes last)"
    for window in range(1, timeline.num_iterations):
        assert timeline.start_ns[timeline.iteration == window].min() == end[timeline.iteration == window - 1].max()


@settings(max_examples=25, deadline=None)
@given(case=cases(), fidelity=st.sampled_from(FIDELITIES))
def test_same_input_same_bytes(case: Case, fidelity: str) -> None:
    assert case.simulate(fidelity).to_json() == case.simulate(fidelity).to_json()


@settings(max_examples=40, deadline=None)
@given(case=cases(), fidelity=st.sampled_from(FIDELITIES), iterations=st.integers(1, 3))
def test_the_first_iterations_do_not_depend_on_how_many_follow(case: Case, fidelity: str, iterations: int) -> None:
    whole = case.simulate(fidelity)
    part = case.simulate(fidelity, iterations=iterations)
    keep = whole.iteration < iterations
    assert part.num_iterations == min(iterations, whole.num_iterations)
    for name in ("layer", "phase", "rank", "start_ns", "duration_ns", "sent_bytes", "received_bytes", "tokens"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[keep], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(case=cases(replicas=False), seed=st.integers(0, 2**32 - 1), fidelity=st.sampled_from(FIDELITIES))
def test_names_of_ranks_nodes_and_experts_do_not_matter(case: Case, seed: int, fidelity: str) -> None:
    """per_node enters a node through the rank with the sender's local number: there all nodes permute alike."""
    relabelled, new_rank_R = relabel(case, seed, local_alike=case.plan.mode == "per_node")
    before, after = case.simulate(fidelity), relabelled.simulate(fidelity)
    assert before.iteration_ns().tolist() == after.iteration_ns().tolist()
    assert per_rank_busy(before, new_rank_R) == per_rank_busy(after, np.arange(len(new_rank_R)))


def per_rank_busy(timeline: Timeline, name_R: np.ndarray) -> list[int]:
    busy_R = np.zeros(len(name_R), dtype=np.int64)
    np.add.at(busy_R, name_R[timeline.rank], timeline.duration_ns)
    return busy_R.tolist()


@settings(max_examples=60, deadline=None)
@given(
    cluster=clusters(alike=True),
    mode=st.sampled_from(DISPATCH_MODES),
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    top_k=st.integers(1, 3),
    tokens_per_rank=st.integers(1, 4),
)
def test_phase_is_port_when_all_ranks_are_alike(
    cluster: object, mode: DispatchMode, seed: int, layers: int, top_k: int, tokens_per_rank: int
) -> None:
    """Every rank's tokens go to the same relative places (so many nodes and so many ranks further on)."""
    case = alike_case(cluster, mode, seed, layers=layers, top_k=top_k, tokens_per_rank=tokens_per_rank)
    assert case.simulate("phase").iteration_ns().tolist() == case.simulate("port").iteration_ns().tolist()


def unequal(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    cluster = tiny_cluster(2, 2)
    expert_LTK = random_experts(rng, 4, 16, 1, 4)
    return Case(linear_plan(cluster, 4, 4), tiny_model(4, 4), cluster, expert_LTK, rng.integers(0, 4, 16), 16)


def test_unequal_ranks_do_make_a_difference() -> None:
    """The law above could not fail if phase were port by another name."""
    gaps = [
        unequal(seed).simulate("port").iteration_ns() - unequal(seed).simulate("phase").iteration_ns()
        for seed in range(5)
    ]
    assert max(int(gap.max()) for gap in gaps) > 0


@pytest.mark.parametrize("mode", DISPATCH_MODES)
def test_mode_argument_overrides_the_plan(mode: DispatchMode) -> None:
    case = unequal(3)
    other = dataclasses.replace(case, plan=dataclasses.replace(case.plan, mode=mode))
    ours, theirs = case.simulate("port", mode=mode), other.simulate("port")
    assert ours.about["mode"] == theirs.about["mode"] == mode
    assert ours.iteration_ns().tolist() == theirs.iteration_ns().tolist()
