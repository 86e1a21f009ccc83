"""Laws of schedules: algorithms and pipeline degrees on random deployments, at fidelities `port` and `phase`."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from port_oracle import leave_by_definition
from schedule_cases import Scheduled, priced_clusters, scheduled, scheduled_work
from simcases import alike_case, clusters, relabel, tiny_cluster
from test_sim_by_hand import run

from placer.core.cost import leg_times
from placer.core.evaluate import window_index
from placer.core.modes import DispatchMode
from placer.core.schedule import Algorithm, Rounds, Schedule
from placer.core.timeline import PHASES
from placer.report.compare import compare
from sim.phase import phase_times
from sim.port import port_times
from sim.stages import COMPUTE, INSIDE, NETWORK, Stage, StageTimes, needs_of, stages_of
from sim.traffic import Leg, Work

FIDELITIES = {"port": port_times, "phase": phase_times}


def both(work: Work, stages: list[Stage]) -> dict[str, StageTimes]:
    return {name: times(work, stages) for name, times in FIDELITIES.items()}


@settings(max_examples=60, deadline=None)
@given(some=scheduled())
def test_a_schedule_changes_neither_what_is_computed_nor_what_crosses_the_network(some: Scheduled) -> None:
    """Nor, but for 2dh, what is sent; 2dh sends as much from node to node and at most one copy more inside for each."""
    plain, cut = some.work(Schedule.uniform(len(some.case.expert_LTK))), some.work()
    away_RR = some.case.cluster.node_R[:, None] != some.case.cluster.node_R[None, :]
    nodes, per_node = some.case.cluster.nodes, some.case.cluster.ranks_per_node

    def by_node(legs: list[Leg]) -> np.ndarray:
        copies_WRR = sum(leg.copies_WRR.astype(np.int64) for leg in legs) * away_RR
        return copies_WRR.reshape(len(copies_WRR), nodes, per_node, nodes, per_node).sum(axis=(2, 4))

    window_T, windows = window_index(some.case.expert_LTK.shape[1], some.case.batch_tokens)
    for layer, (before, after) in enumerate(zip(plain.layers, cut.layers, strict=True)):
        assert len(after.chunks) == some.schedule.degree_L[layer]
        pairs_W = sum(chunk.pairs_WR for chunk in after.chunks).sum(axis=1)
        chosen_W = np.bincount(window_T, (some.case.expert_LTK[layer] >= 0).sum(axis=1), windows)
        assert pairs_W.tolist() == chosen_W.tolist() == before.chunks[0].pairs_WR.sum(axis=1).tolist()
        for way in ("dispatch", "combine"):
            old = list(getattr(before.chunks[0], way))
            new = [leg for chunk in after.chunks for leg in getattr(chunk, way)]
            if not new:
                continue  # one rank in rounds
            if some.schedule.algorithm_L[layer] == "2dh":
                assert sum(leg.sent_WR for leg in new).sum() <= 2 * sum(leg.sent_WR for leg in old).sum()
            else:
                sent_WRR = sum(leg.copies_WRR for leg in new)
                np.testing.assert_array_equal(sent_WRR, sum(leg.copies_WRR for leg in old))
            np.testing.assert_array_equal(by_node(new), by_node(old))


@settings(max_examples=60, deadline=None)
@given(some=scheduled(), fidelity=st.sampled_from(sorted(FIDELITIES)))
def test_every_byte_sent_is_received(some: Scheduled, fidelity: str) -> None:
    timeline = some.simulate(fidelity)
    for layer in range(-1, len(some.case.expert_LTK)):
        for phase in ("dispatch", "combine", "gather"):
            mine = (timeline.layer == layer) & (timeline.phase == PHASES.index(phase))
            assert timeline.sent_bytes[mine].sum() == timeline.received_bytes[mine].sum()
            assert timeline.sent_bytes[mine].sum() == timeline.tokens[mine].sum() * some.case.model.token_bytes


@settings(max_examples=60, deadline=None)
@given(some=scheduled())
def test_streams_are_exclusive_and_never_idle_without_need(some: Scheduled) -> None:
    """A stage begins the very moment the last of what it waits for is done: on that rank, or (port) on all."""
    work = some.work()
    stages = stages_of(work)
    for fidelity, times in both(work, stages).items():
        assert (times.end_WGR >= times.start_WGR).all()
        last: dict[int, int] = {}
        for index, needs in enumerate(needs_of(stages)):
            ends_WGR = times.end_WGR[:, list(needs)]
            if fidelity == "port":
                ends_WGR = np.broadcast_to(ends_WGR.max(axis=2, keepdims=True), ends_WGR.shape)
            np.testing.assert_array_equal(times.start_WGR[:, index], ends_WGR.max(axis=1, initial=0))
            before = last.setdefault(stages[index].stream, index)
            if before != index:
                assert (times.start_WGR[:, index] >= times.end_WGR[:, before]).all()
            last[stages[index].stream] = index


@settings(max_examples=60, deadline=None)
@given(some=scheduled())
def test_streams_share_no_port(some: Scheduled) -> None:
    """What lets two streams run beside each other: legs of the one keep inside nodes, legs of the other cross."""
    cluster = some.case.cluster
    away_RR = cluster.node_R[:, None] != cluster.node_R[None, :]
    stages = stages_of(some.work())
    for layer in {stage.layer for stage in stages if stage.stream == INSIDE}:
        for stage in stages:
            for leg in stage.legs if stage.layer == layer else ():
                assert not leg.copies_WRR[:, away_RR if stage.stream == INSIDE else ~away_RR].any()
    assert all(not stage.legs for stage in stages if stage.stream == COMPUTE)


@settings(max_examples=60, deadline=None)
@given(some=scheduled())
def test_phase_is_never_later_than_port_and_never_below_what_has_to_be_done(some: Scheduled) -> None:
    work, cluster = some.work(), some.case.cluster
    stages = stages_of(work)
    times = both(work, stages)
    assert (times["phase"].end_WGR <= times["port"].end_WGR.max(axis=2, keepdims=True)).all()
    took_W = times["phase"].total_W
    for stream in (COMPUTE, NETWORK, INSIDE):
        own_WR = np.zeros_like(work.layers[0].home_WR)
        for stage in stages:
            if stage.stream == stream:
                own_WR = own_WR + sum(leg.times.out_WR for leg in stage.legs)
                own_WR += 0 if stage.work_WR is None else stage.work_WR
        assert (took_W[:, None] >= own_WR).all()
    legs = [leg for stage in stages for leg in stage.legs]
    if not legs:
        return
    same_RR = cluster.node_R[:, None] == cluster.node_R[None, :]
    for pick_RR in (same_RR, ~same_RR):
        through = [leg_times(cluster, leg.copies_WRR.astype(np.int64) * pick_RR, leg.copy_bytes) for leg in legs]
        for field in ("out_WR", "in_WR"):
            assert (took_W[:, None] >= sum(getattr(one, field) for one in through)).all()
    for field in ("uplink_out_WN", "uplink_in_WN"):
        assert (took_W[:, None] >= sum(getattr(leg.times, field) for leg in legs)).all()


@settings(max_examples=80, deadline=None)
@given(some=scheduled())
def test_phase_is_what_its_definition_says_on_every_stream(some: Scheduled) -> None:
    """Stage by stage, leg by leg, in an order in which all that a stage waits for comes first; no event at all."""
    work, cluster = some.work(), some.case.cluster
    stages = stages_of(work)
    times = phase_times(work, stages)
    for window in range(work.windows):
        free: dict[tuple[str, int], int] = {}
        ends_GR: list[np.ndarray] = []
        for index, (stage, needs) in enumerate(zip(stages, needs_of(stages), strict=True)):
            clock_R = np.max([np.zeros(cluster.num_ranks, dtype=np.int64), *(ends_GR[at] for at in needs)], axis=0)
            if stage.work_WR is not None:
                clock_R = clock_R + stage.work_WR[window]
            for leg in stage.legs:
                copies_RR = leg.copies_WRR[window].astype(np.int64)
                clock_R = leave_by_definition(cluster, leg.copy_bytes, copies_RR, clock_R, free)
            ends_GR.append(clock_R)
            assert times.end_WGR[window, index].tolist() == clock_R.tolist()


def symmetric_rounds(nodes: int, per_node: int) -> Rounds:
    """In each round every rank sends so many nodes and so many ranks further on."""
    rank = np.arange(nodes * per_node)
    node, local = rank // per_node, rank % per_node
    hops = [(far, near) for far in range(nodes) for near in range(per_node) if far or near]
    to_GR = [(node + far) % nodes * per_node + (local + near) % per_node for far, near in hops]
    shape = (len(hops), len(rank))
    return Rounds(to_GR=np.array(to_GR, dtype=np.int64).reshape(shape), share_GR=np.ones(shape))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    plain=clusters(alike=True),
    mode=st.sampled_from(["per_expert", "per_rank", "coherent", "per_node"]),
    algorithm=st.sampled_from(["linear", "2dh", "rounds"]),
    degree=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_phase_is_port_when_all_ranks_are_alike(
    data: st.DataObject, plain: object, mode: DispatchMode, algorithm: Algorithm, degree: int, seed: int
) -> None:
    cluster = data.draw(priced_clusters(plain))
    algorithm = "linear" if mode == "per_node" else algorithm
    case = alike_case(cluster, mode, seed, layers=2, top_k=2, tokens_per_rank=5)
    rounds = symmetric_rounds(cluster.nodes, cluster.ranks_per_node) if algorithm == "rounds" else None
    schedule = Schedule.uniform(2, algorithm=algorithm, degree=degree, rounds=rounds)
    if mode == "coherent":  # tokens that have moved are cut in the order of the ranks they came from: not alike
        schedule = dataclasses.replace(schedule, degree_L=(degree, 1))
    some = Scheduled(case, schedule)
    work = some.work()
    times = both(work, stages_of(work))
    assert times["phase"].total_W.tolist() == times["port"].total_W.tolist()


@settings(max_examples=40, deadline=None)
@given(some=scheduled(), fidelity=st.sampled_from(sorted(FIDELITIES)), iterations=st.integers(1, 2))
def test_same_bytes_and_the_first_iterations_stand_alone(some: Scheduled, fidelity: str, iterations: int) -> None:
    whole = some.simulate(fidelity)
    assert whole.to_json() == some.simulate(fidelity).to_json()
    part = some.simulate(fidelity, iterations=iterations)
    for name in ("start_ns", "duration_ns", "rank", "layer", "phase", "sent_bytes"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[whole.iteration < iterations])


@settings(max_examples=40, deadline=None)
@given(some=scheduled(), fidelity=st.sampled_from(sorted(FIDELITIES)))
def test_linear_and_unpipelined_is_what_no_schedule_is(some: Scheduled, fidelity: str) -> None:
    plain = Schedule.uniform(len(some.case.expert_LTK))
    assert some.simulate(fidelity, schedule=plain).to_json() == some.simulate(fidelity, schedule=None).to_json()


@settings(max_examples=50, deadline=None)
@given(some=scheduled(replicas=False), seed=st.integers(0, 2**32 - 1), fidelity=st.sampled_from(sorted(FIDELITIES)))
def test_names_do_not_matter(some: Scheduled, seed: int, fidelity: str) -> None:
    """Where exchanges have two levels, the ranks of all nodes permute alike (2dh and per_node go by local numbers)."""
    cluster = some.case.cluster
    if cluster.software is not None:  # sums of floats over ranks depend on their order in the last digit
        quiet = dataclasses.replace(cluster.software, shared_cores=None)
        some = dataclasses.replace(
            some, case=dataclasses.replace(some.case, cluster=dataclasses.replace(cluster, software=quiet))
        )
    two_level = some.case.plan.mode == "per_node" or "2dh" in some.schedule.algorithm_L
    case, new_rank_R = relabel(some.case, seed, local_alike=two_level)

    def renamed(rounds: Rounds | None) -> Rounds | None:
        if rounds is None:
            return None
        to_GR, share_GR = np.full_like(rounds.to_GR, -1), np.zeros_like(rounds.share_GR)
        to_GR[:, new_rank_R] = np.where(rounds.to_GR >= 0, new_rank_R[rounds.to_GR], -1)
        share_GR[:, new_rank_R] = rounds.share_GR
        return Rounds(to_GR=to_GR, share_GR=share_GR)

    schedule = dataclasses.replace(some.schedule, rounds_L=tuple(map(renamed, some.schedule.rounds_L)))
    after = dataclasses.replace(some, case=case, schedule=schedule)
    assert some.simulate(fidelity).iteration_ns().tolist() == after.simulate(fidelity).iteration_ns().tolist()


@pytest.mark.parametrize("fidelity", sorted(FIDELITIES))
def test_two_chunks_by_hand(fidelity: str) -> None:
    """Two ranks, two tokens each for the other rank's expert: a copy takes 1000 ns, a pair 2000.

    Sent at 1000 and 2000; computed from 1000 to 3000 and to 5000; back at 4000 and 6000. Unpipelined: 2 + 4 + 2.
    """
    inputs = (tiny_cluster(1, 2), [[1, 1, 0, 0]], [0, 0, 1, 1], fidelity)
    assert run(*inputs).iteration_ns().tolist() == [8000]
    timeline = run(*inputs, schedule=Schedule.uniform(1, degree=2))
    assert timeline.iteration_ns().tolist() == [6000]
    mine = timeline.rank == 0
    spans = {
        name: [
            (int(start), int(start + lasts))
            for phase, start, lasts in zip(
                timeline.phase[mine], timeline.start_ns[mine], timeline.duration_ns[mine], strict=True
            )
            if PHASES[phase] == name
        ]
        for name in ("dispatch", "experts", "combine")
    }
    assert spans == {
        "dispatch": [(0, 1000), (1000, 2000)],
        "experts": [(1000, 3000), (3000, 5000)],
        "combine": [(3000, 4000), (5000, 6000)],
    }
    assert {name: ns.tolist() for name, ns in timeline.phase_ns().items()} == {
        "dispatch": [2000],
        "experts": [4000],
        "combine": [2000],
    }
    summary = compare([run(*inputs), timeline], ["plain", "piped"]).timelines[1]
    assert (summary.ratio, summary.phase_ratio["experts"]) == (0.75, 1.0)


def test_pipelining_gains_where_ranks_are_busy_and_phase_gains_on_port() -> None:
    """The laws could not fail if schedules changed nothing."""
    gains, gaps = [], []
    for seed in range(6):
        took = {}
        for degree in (1, 2):
            work = scheduled_work(
                tiny_cluster(2, 2), "per_node", Schedule.uniform(1, degree=degree), seed=seed, tokens=24
            )
            times = both(work, stages_of(work))
            took[degree] = int(times["phase"].total_W[0])
            gaps.append(int((times["port"].total_W - times["phase"].total_W)[0]))
        gains.append(took[1] - took[2])
    assert max(gains) > 0
    assert max(gaps) > 0
