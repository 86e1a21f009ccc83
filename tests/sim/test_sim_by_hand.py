"""Times that can be done in the head: a copy takes 1000 ns, a (token, expert) pair 2000 ns, nothing else takes any."""

import numpy as np
import pytest
from simcases import linear_plan, tiny_cluster, tiny_model

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.timeline import PHASES, Timeline
from sim import simulate


def run(
    cluster: ClusterSpec, expert_LT: list[list[int]], source_T: list[int], fidelity: str, **rest: object
) -> Timeline:
    expert_LTK = np.array(expert_LT, dtype=np.int16)[:, :, None]
    layers, experts = len(expert_LT), cluster.num_ranks
    plan, model = linear_plan(cluster, layers, experts), tiny_model(layers, experts)
    return simulate(plan, model, cluster, expert_LTK, np.array(source_T), fidelity=fidelity, **rest)


def spans(timeline: Timeline) -> dict[tuple[int, str, int], tuple[int, int]]:
    """(layer, phase, rank) -> (start, end)."""
    rows = zip(timeline.layer, timeline.phase, timeline.rank, timeline.start_ns, timeline.duration_ns, strict=True)
    return {(int(la), PHASES[p], int(r)): (int(s), int(s + d)) for la, p, r, s, d in rows}


@pytest.mark.parametrize("fidelity", ["port", "phase"])
def test_two_ranks_two_tokens(fidelity: str) -> None:
    """Both tokens want rank 1's expert: one copy there, two pairs, one copy back."""
    timeline = run(tiny_cluster(1, 2), [[1, 1]], [0, 1], fidelity)
    assert timeline.iteration_ns().tolist() == [1000 + 4000 + 1000]
    at = spans(timeline)
    assert at[0, "dispatch", 0] == at[0, "dispatch", 1] == (0, 1000)
    assert at[0, "experts", 0] == (1000, 1000)
    assert at[0, "experts", 1] == (1000, 5000)
    assert at[0, "combine", 1] == (5000, 6000)
    assert at[0, "combine", 0] == ((5000, 6000) if fidelity == "port" else (1000, 6000))
    dispatch = timeline.phase == PHASES.index("dispatch")
    assert timeline.sent_bytes[dispatch].tolist() == [1000, 0]
    assert timeline.received_bytes[dispatch].tolist() == [0, 1000]
    assert timeline.tokens[timeline.phase == PHASES.index("experts")].tolist() == [0, 2]
    assert {phase: ns.tolist() for phase, ns in timeline.phase_ns().items() if fidelity == "port"} == (
        {"dispatch": [1000], "experts": [4000], "combine": [1000]} if fidelity == "port" else {}
    )


def test_without_barrier_opposite_imbalances_cancel() -> None:
    """Layer 0 loads rank 1 twice, layer 1 rank 0 twice; no copies, so only a barrier would make them wait."""
    routed = [[0, -1, 1, 1], [0, 0, 1, -1]]
    barrier = run(tiny_cluster(1, 2), routed, [0, 0, 1, 1], "port")
    free = run(tiny_cluster(1, 2), routed, [0, 0, 1, 1], "phase")
    assert barrier.iteration_ns().tolist() == [8000]
    assert free.iteration_ns().tolist() == [6000]


def test_a_late_sender_delays_only_its_own_copy() -> None:
    """Rank 0's copy reaches rank 2 at 1000, rank 1 is busy until 2000 and its copy takes until 3000, not 4000."""
    timeline = run(tiny_cluster(1, 3), [[1, -1, -1], [-1, 2, 2]], [1, 0, 1], "phase")
    at = spans(timeline)
    assert at[1, "dispatch", 0] == (0, 1000)
    assert at[1, "dispatch", 1] == (2000, 3000)
    assert at[1, "dispatch", 2] == (0, 3000)
    assert at[1, "experts", 2] == (3000, 7000)
    assert at[1, "combine", 0] == (1000, 9000)  # rank 2 sends both results back through one port


def test_a_receiving_port_takes_copies_one_after_another() -> None:
    """Two senders that start together fill rank 2's port for 2000 ns; each is done sending at 1000."""
    at = spans(run(tiny_cluster(1, 3), [[2, 2]], [0, 1], "phase"))
    assert at[0, "dispatch", 0] == at[0, "dispatch", 1] == (0, 1000)
    assert at[0, "dispatch", 2] == (0, 2000)


def test_a_node_shares_its_uplink() -> None:
    """NICs take 100 ns a copy, the uplink 1000: two copies from node 0 to node 1 last 2000 ns for all four ranks."""
    fast, slow = LinkClass(gbytes_per_s=10.0), LinkClass(gbytes_per_s=1.0)
    cluster = tiny_cluster(2, 2, inter=fast, uplink=slow)
    at = spans(run(cluster, [[2, 3]], [0, 1], "phase"))
    assert [at[0, "dispatch", rank] for rank in range(4)] == [(0, 2000)] * 4
    late = spans(run(cluster, [[1, -1, -1], [-1, 2, 3]], [1, 0, 1], "phase"))
    assert late[1, "dispatch", 2] == (0, 3000)  # rank 1 is busy until 2000, then its copy passes
    alone = spans(run(tiny_cluster(2, 2, inter=fast), [[2, 3]], [0, 1], "phase"))
    assert alone[0, "dispatch", 2] == (0, 100)


def test_an_uplink_sends_one_message_per_node_pair() -> None:
    """With 500 ns a message and 1000 ns a copy, two copies to one node take 2500 ns, to two nodes 3000 ns."""
    fast, slow = LinkClass(gbytes_per_s=1e6), LinkClass(gbytes_per_s=1.0, alpha_us=0.5)
    cluster = tiny_cluster(3, 2, inter=fast, uplink=slow)
    together = spans(run(cluster, [[2, 3]], [0, 1], "phase"))
    apart = spans(run(cluster, [[2, 4]], [0, 1], "phase"))
    assert together[0, "dispatch", 0] == (0, 2500)
    assert apart[0, "dispatch", 0] == (0, 3000)


@pytest.mark.parametrize("fidelity", ["port", "phase"])
def test_iterations_follow_each_other(fidelity: str) -> None:
    """One token an iteration: the first stays at home (2000 ns), the second travels (1000 + 2000 + 1000 ns)."""
    timeline = run(tiny_cluster(1, 2), [[0, 1]], [0, 0], fidelity, batch_tokens=1)
    assert timeline.iteration_ns().tolist() == [2000, 4000]
    assert int(timeline.start_ns[timeline.iteration == 1].min()) == 2000


@pytest.mark.parametrize("fidelity", ["port", "phase"])
def test_coherent_token_stays_and_is_gathered(fidelity: str) -> None:
    """One token: to rank 1 (1000), expert (2000), stays for layer 1 (2000); then rank 0 tells ranks 1 and 2 (2000)."""
    timeline = run(tiny_cluster(1, 3), [[1], [1]], [0], fidelity, mode="coherent")
    assert timeline.iteration_ns().tolist() == [1000 + 2000 + 2000 + 2000]
    gather = timeline.phase == PHASES.index("gather")
    assert set(timeline.layer[gather].tolist()) == {-1}
    assert int(timeline.sent_bytes[gather].sum()) == 2000


def test_no_context_is_announced_before_it_is_known() -> None:
    """Rank 0's own part ends at 1000, when its token has left; its gather waits for rank 1's experts until 5000."""
    at = spans(run(tiny_cluster(1, 3), [[1], [1]], [0], "phase", mode="coherent"))
    assert at[-1, "gather", 0] == (1000, 7000)


def test_allgather_sends_every_token_everywhere() -> None:
    timeline = run(tiny_cluster(1, 3), [[0, 0]], [0, 0], "port", mode="allgather")
    assert timeline.phase_ns()["dispatch"].tolist() == [4000]  # two tokens to each of two ranks through one port
    assert timeline.phase_ns()["experts"].tolist() == [4000]


def test_attention_is_drawn_only_where_the_model_has_it() -> None:
    cluster = tiny_cluster(1, 2)
    inputs = (cluster, np.array([[[0]]], dtype=np.int16), np.array([0]))
    plain = simulate(linear_plan(cluster, 1, 2), tiny_model(1, 2), *inputs)
    assert PHASES.index("attention") not in plain.phase
    heavy = simulate(linear_plan(cluster, 1, 2), tiny_model(1, 2, attention_params=3000), *inputs)
    assert spans(heavy)[0, "attention", 0] == (0, 6000)
    assert heavy.iteration_ns().tolist() == [6000 + 2000]
