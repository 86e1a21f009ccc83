"""Schedules for the simulator's tests: at random for any deployment, and work of one layer on a given cluster."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from simcases import Case, cases, linear_plan, random_experts, tiny_model

from placer.core.cluster import ClusterSpec, ExchangeCost, LinkClass, Software
from placer.core.evaluate import window_index
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.schedule import SCHEDULED_MODES, Rounds, Schedule
from placer.core.timeline import Timeline
from sim.traffic import Work, work_of


def random_rounds(rng: np.random.Generator, ranks: int) -> Rounds:
    """Every shift of the ranks once or, cut at random, twice; ranks and rounds in random order."""
    order = rng.permutation(ranks)
    to_GR, share_GR = [], []
    for shift in range(1, ranks):
        to_R = np.empty(ranks, dtype=np.int64)
        to_R[order] = order[(np.arange(ranks) + shift) % ranks]
        cut_R = rng.integers(0, 5, ranks) / 4
        for share_R in (cut_R, 1 - cut_R):
            to_GR.append(np.where(share_R > 0, to_R, -1))
            share_GR.append(share_R)
    turn = rng.permutation(len(to_GR))
    if not len(turn):
        return Rounds(to_GR=np.zeros((0, ranks), dtype=np.int64), share_GR=np.zeros((0, ranks)))
    return Rounds(to_GR=np.array(to_GR)[turn], share_GR=np.array(share_GR)[turn])


def random_schedule(rng: np.random.Generator, mode: DispatchMode, layers: int, ranks: int) -> Schedule:
    algorithms = ("linear", "2dh", "rounds") if mode in SCHEDULED_MODES else ("linear",)
    algorithm_L = tuple(str(name) for name in rng.choice(algorithms, layers))
    degree_L = tuple(1 if mode == "allgather" else int(degree) for degree in rng.integers(1, 5, layers))
    rounds_L = tuple(random_rounds(rng, ranks) if name == "rounds" else None for name in algorithm_L)
    return Schedule(algorithm_L=algorithm_L, degree_L=degree_L, rounds_L=rounds_L)


@dataclass(frozen=True)
class Scheduled:
    case: Case
    schedule: Schedule
    metadata_bytes: int = 0

    def simulate(self, fidelity: str, **rest: object) -> Timeline:
        rest = {"schedule": self.schedule, "metadata_bytes": self.metadata_bytes} | rest
        return self.case.simulate(fidelity, **rest)

    def work(self, schedule: Schedule | None = None) -> Work:
        case = self.case
        window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
        inputs = (case.plan, case.model, case.cluster, case.plan.mode, case.expert_LTK, case.source_T)
        schedule = schedule or self.schedule
        return work_of(*inputs, window_T, windows, schedule=schedule, metadata_bytes=self.metadata_bytes)


@st.composite
def priced_clusters(draw: st.DrawFn, cluster: ClusterSpec) -> ClusterSpec:
    """The cluster with a tail on any of its links and, mostly, software costs."""

    def tailed(link: LinkClass | None) -> LinkClass | None:
        return None if link is None else dataclasses.replace(link, tail=draw(st.sampled_from([1.0, 1.37, 4.0])))

    software = Software(
        layer_us=draw(st.sampled_from([0.0, 0.7])),
        exchanges={
            mode: ExchangeCost(
                fixed_us=draw(st.sampled_from([0.0, 0.31])), token_us=draw(st.sampled_from([0.0, 0.023]))
            )
            for mode in draw(st.sets(st.sampled_from(DISPATCH_MODES)))
        },
        shared_cores=draw(st.sampled_from([None, 1, 3])),
    )
    links = {"intra": tailed(cluster.intra), "inter": tailed(cluster.inter), "uplink": tailed(cluster.uplink)}
    return dataclasses.replace(cluster, software=draw(st.sampled_from([software, None, software])), **links)


@st.composite
def scheduled(draw: st.DrawFn, *, replicas: bool = True) -> Scheduled:
    case = draw(cases(replicas=replicas))
    case = dataclasses.replace(case, cluster=draw(priced_clusters(case.cluster)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    schedule = random_schedule(rng, case.plan.mode, len(case.expert_LTK), case.cluster.num_ranks)
    return Scheduled(case, schedule, draw(st.sampled_from([0, 16])))


def scheduled_work(cluster: ClusterSpec, mode: DispatchMode, schedule: Schedule, *, seed: int, tokens: int) -> Work:
    """One layer, one iteration, two experts a rank, random top-2."""
    rng = np.random.default_rng(seed)
    experts, ranks = 2 * cluster.num_ranks, cluster.num_ranks
    plan = linear_plan(cluster, 1, experts, mode)
    case = Case(
        plan, tiny_model(1, experts), cluster, random_experts(rng, 1, tokens, 2, experts),
        rng.integers(0, ranks, tokens), tokens,
    )  # fmt: skip
    return Scheduled(case, schedule).work()
