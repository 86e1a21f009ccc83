"""Exchanges for the tests of fidelity flow, a reference allocation, and what a recorder has to see."""

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from sim.flow.collectives import exchange
from sim.flow.ranks import Recorder, Snapshot, flow_times
from sim.flow.topology import Topology
from sim.phase import phase_times
from sim.port import port_times
from sim.stages import NETWORK, Stage, StageTimes
from sim.traffic import Leg, Work

FIDELITIES = {"port": port_times, "phase": phase_times, "flow": flow_times}


def cluster_of(nodes: int, per_node: int, **links: LinkClass) -> ClusterSpec:
    link = LinkClass(gbytes_per_s=1.0)
    return ClusterSpec(
        name="flow",
        nodes=nodes,
        ranks_per_node=per_node,
        memory_gib=1.0,
        intra=links.get("intra", link),
        inter=links.get("inter", link),
        uplink=links.get("uplink"),
        compute=Compute(tflops=1.0, weight_read_gbytes_per_s=1.0),
    )


@st.composite
def clusters(draw: st.DrawFn, *, tails: bool = True) -> ClusterSpec:
    def link() -> LinkClass:
        return LinkClass(
            gbytes_per_s=draw(st.sampled_from([0.7, 1.0, 13.0])),
            alpha_us=draw(st.sampled_from([0.0, 0.3333, 2.0])),
            tail=draw(st.sampled_from([1.0, 1.0, 1.3])) if tails else 1.0,
        )

    links = {"intra": link(), "inter": link()}
    if draw(st.booleans()):
        links["uplink"] = link()
    return cluster_of(draw(st.integers(1, 3)), draw(st.integers(1, 3)), **links)


def work_on(cluster: ClusterSpec) -> Work:
    return Work(cluster, 1, np.zeros(1, dtype=np.int64), (), None)


def stage_of(cluster: ClusterSpec, legs: tuple[Leg, ...], work_R: npt.ArrayLike | None = None) -> Stage:
    none = np.zeros((1, cluster.num_ranks), dtype=np.int64)
    work = None if work_R is None else np.array([work_R], dtype=np.int64)
    return Stage(0, 1, none, work_WR=work, legs=legs, stream=NETWORK)


def times(
    fidelity: str,
    cluster: ClusterSpec,
    bytes_XRR: npt.ArrayLike,
    ready_R: npt.ArrayLike | None = None,
    **rest: Recorder | Topology,
) -> StageTimes:
    """One stage: the ranks' local work `ready_R`, then an exchange for each of bytes_XRR."""
    legs = tuple(exchange(cluster, np.array(one, dtype=np.int64)) for one in bytes_XRR)
    return FIDELITIES[fidelity](work_on(cluster), [stage_of(cluster, legs, ready_R)], **rest)


def random_bytes(rng: np.random.Generator, legs: int, ranks: int, *, partial: bool = False) -> np.ndarray:
    """Sizes (X, R, R), many of them zero; `partial`: each rank sends to one other and hears from one, at most."""
    sizes = rng.integers(1, 5000, (legs, ranks, ranks)) * (rng.random((legs, ranks, ranks)) < 0.6)
    if partial:
        keep = np.stack([np.eye(ranks, dtype=np.int64)[rng.permutation(ranks)] for _ in range(legs)])
        sizes = sizes * keep
    sizes[:, np.arange(ranks), np.arange(ranks)] = 0
    return sizes


class Film:
    """A recorder that keeps all it is shown."""

    def __init__(self) -> None:
        self.shots: list[Snapshot] = []

    def __call__(self, shot: Snapshot) -> None:
        self.shots.append(shot)

    @property
    def contended(self) -> bool:
        """Whether two flows were ever on one link."""
        return any(np.bincount(shot.path_FP[shot.cost_FP > 0], minlength=1).max(initial=0) > 1 for shot in self.shots)

    @property
    def overtaken(self) -> bool:
        """Whether a message of a later leg ever used a link before one of an earlier leg."""
        latest: dict[int, int] = {}
        seen: set[tuple[int, ...]] = set()
        for shot in self.shots:
            for who, path, cost in zip(map(tuple, shot.who_F3.tolist()), shot.path_FP, shot.cost_FP, strict=True):
                for link in path[cost > 0].tolist() if who not in seen else ():
                    if latest.get(link, 0) > who[0]:
                        return True
                    latest[link] = who[0]
                seen.add(who)
        return False


def fair_speeds(path_FP: np.ndarray, cost_FP: np.ndarray) -> np.ndarray:
    """Max-min fair speeds by progressive filling: all speeds rise together, a full link stops its flows."""
    flows = len(path_FP)
    links = int(path_FP.max(initial=0)) + 1
    use = np.zeros((links, flows))
    for place in range(path_FP.shape[1]):
        use[path_FP[:, place], np.arange(flows)] += cost_FP[:, place]
    speed, rising = np.zeros(flows), np.ones(flows, dtype=bool)
    while rising.any():
        left, demand = 1 - use @ speed, use @ rising
        step = min(left[link] / demand[link] for link in range(links) if demand[link] > 1e-12)
        speed = speed + max(step, 0.0) * rising
        full = (use @ speed >= 1 - 1e-11) & (demand > 1e-12)
        rising = rising & ~(use[full] > 0).any(axis=0)
    return speed
