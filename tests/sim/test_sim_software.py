"""Software costs and tails of a calibrated cluster: port is the closed form with them; a tail needs a shared port."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import priced_clusters
from simcases import Case, alike_case, cases, clusters, tiny_cluster
from test_sim_by_hand import run, spans

from placer.core.cluster import ExchangeCost, LinkClass, Software
from placer.core.cost import closed_form_ns
from placer.core.evaluate import iterate_layers, window_index
from placer.core.schedule import Rounds, Schedule


@settings(max_examples=60, deadline=None)
@given(data=st.data(), case=cases())
def test_port_is_the_closed_form_with_software_and_tails(data: st.DataObject, case: Case) -> None:
    case = dataclasses.replace(case, cluster=data.draw(priced_clusters(case.cluster)))
    window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
    expected: dict[str, np.ndarray] = {}
    for traffic in iterate_layers(case.plan, case.plan.mode, case.expert_LTK, case.source_T, window_T, windows):
        for phase, ns_W in closed_form_ns(case.cluster, case.model, traffic).items():
            expected[phase] = expected.get(phase, 0) + ns_W
    timeline = case.simulate("port")
    drawn = timeline.phase_ns()
    for phase, ns_W in expected.items():
        np.testing.assert_array_equal(drawn.get(phase, np.zeros(windows)), ns_W, err_msg=phase)
    total_W = sum(expected.values()) + drawn.get("gather", np.zeros(windows, dtype=np.int64))
    np.testing.assert_array_equal(timeline.iteration_ns(), total_W)


def test_software_by_hand() -> None:
    """Rank 0's token goes to rank 1 and back: each exchange costs 100 ns and each own token 500, each layer 1000."""
    software = Software(layer_us=1.0, exchanges={"per_rank": ExchangeCost(fixed_us=0.1, token_us=0.5)})
    cluster = dataclasses.replace(tiny_cluster(1, 2), software=software)
    # on the way back rank 1, which has no token of its own, is ready to send after 100: port lets it wait for rank 0
    for fidelity, back in (("port", 600), ("phase", 100)):
        timeline = run(cluster, [[1]], [0], fidelity)
        assert timeline.iteration_ns().tolist() == [1000 + (600 + 1000) + 2000 + (back + 1000)]
        at = spans(timeline)
        assert at[0, "attention", 0] == at[0, "attention", 1] == (0, 1000)
        assert at[0, "dispatch", 1] == (1000, 2600)


def test_ranks_that_share_cores_take_as_long_as_all_their_work() -> None:
    """Three pairs of 2000 ns on two ranks and one core: both are done at 6000."""
    cluster = dataclasses.replace(tiny_cluster(1, 2), software=Software(shared_cores=1))
    at = spans(run(cluster, [[0, 0, 1]], [0, 0, 1], "phase"))
    assert at[0, "experts", 0] == at[0, "experts", 1] == (0, 6000)


def test_a_tail_is_paid_only_on_a_port_that_several_messages_share() -> None:
    """Two senders, one receiver: its port takes twice as long; in rounds each message has the port to itself."""
    tailed = LinkClass(gbytes_per_s=1.0, tail=2.0)
    cluster = dataclasses.replace(tiny_cluster(1, 3), intra=tailed)
    for fidelity in ("port", "phase"):
        assert spans(run(cluster, [[2, 2]], [0, 1], fidelity))[0, "dispatch", 2] == (0, 4000)
        assert spans(run(cluster, [[2]], [0], fidelity))[0, "dispatch", 2] == (0, 1000)
        shifts = Rounds(to_GR=np.array([[1, 2, 0], [2, 0, 1]]), share_GR=np.ones((2, 3)))
        rounds = Schedule.uniform(1, algorithm="rounds", rounds=shifts)
        assert spans(run(cluster, [[2, 2]], [0, 1], fidelity, schedule=rounds))[0, "dispatch", 2] == (0, 2000)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), cluster=clusters(alike=True), seed=st.integers(0, 2**32 - 1))
def test_a_tail_changes_nothing_where_every_port_has_one_message(
    data: st.DataObject, cluster: object, seed: int
) -> None:
    """One token a rank, all going equally far: one message out and one in; node pairs are the uplinks' messages."""
    tailed = dataclasses.replace(data.draw(priced_clusters(cluster)), software=None, uplink=None)
    plain = dataclasses.replace(cluster, uplink=None)
    for fidelity in ("port", "phase"):
        ns = [
            alike_case(one, "per_expert", seed, layers=2, top_k=1, tokens_per_rank=1).simulate(fidelity).iteration_ns()
            for one in (plain, tailed)
        ]
        assert ns[0].tolist() == ns[1].tolist()
