"""How near to the best possible the affinity search comes at serving scale: 58 layers of 256 experts, on one core.

    python examples/04_affinity_gap.py [--family planted|synthetic] [--strength 0.4] [--cluster 8x8]
                                       [--cap none|lpt|1.10] [--time 120] [--gap 0]

Families: `planted` has a latent topic per token (stays with 0.9, else one of three successors), 32 clusters of uneven
size per layer, lognormal popularity, and takes each pick from everybody with probability `strength`; `synthetic` is
traces.synthetic with affinity = `strength`. The cap `lpt` is the mean over layers of max(1.05, PAR of balance alone).
Seconds are processor seconds after a warm-up that compiles the kernels. The load cap is on the tokens planned on.
"""

import argparse
import resource
import time
from dataclasses import replace

import numpy as np
from numba import njit

from placer.config import load_cluster
from placer.core.certificates import verify
from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from solvers.affinity.affinity import solve_affinity
from solvers.affinity.chain_start import kept_flow
from solvers.balance.load import mean_par, rank_load_LR
from solvers.balance.lpt import lpt_slots
from traces.summarize import summarize
from traces.synthetic import synthesize
from traces.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K, TOPICS, TOKENS = 58, 256, 8, 32, 100_000


@njit
def draw(topic_LT, everybody_LE, cluster_LCE, strength, seed):  # type: ignore[no-untyped-def]
    """Distinct picks of each token, (L, T, K), from cumulative popularities."""
    np.random.seed(seed)  # noqa: NPY002
    layers, tokens = topic_LT.shape
    expert_LTK = np.zeros((layers, tokens, TOP_K), np.int16)
    for layer in range(layers):
        for token in range(tokens):
            near = cluster_LCE[layer, topic_LT[layer, token]]
            for k in range(TOP_K):
                while True:
                    popular = everybody_LE[layer] if np.random.random() < strength else near  # noqa: NPY002
                    expert = np.searchsorted(popular, np.random.random() * popular[-1], side="right")  # noqa: NPY002
                    expert = min(expert, EXPERTS - 1)
                    if not (expert_LTK[layer, token, :k] == expert).any():
                        break
                expert_LTK[layer, token, k] = expert
    return expert_LTK


def planted(strength: float, seed: int = 0) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    topic_LT = np.zeros((LAYERS, TOKENS), np.int64)
    topic_LT[0] = rng.integers(0, TOPICS, TOKENS)
    for layer in range(1, LAYERS):
        after = rng.integers(0, TOPICS, (TOPICS, 3))
        moves = rng.random(TOKENS) >= 0.9
        last_T = topic_LT[layer - 1]
        topic_LT[layer] = np.where(moves, after[last_T, rng.integers(0, 3, TOKENS)], last_T)
    popular_LE = rng.lognormal(0.0, 0.7, (LAYERS, EXPERTS))
    cluster_LCE = np.zeros((LAYERS, TOPICS, EXPERTS))
    for layer in range(LAYERS):
        size_C = rng.dirichlet(np.full(TOPICS, 4.0))
        order = rng.permutation(EXPERTS)
        count_C = np.maximum(TOP_K, np.floor(size_C * EXPERTS)).astype(int)
        while count_C.sum() > EXPERTS:
            count_C[np.argmax(count_C)] -= 1
        while count_C.sum() < EXPERTS:
            count_C[np.argmin(count_C)] += 1
        for topic, members in enumerate(np.split(order, np.cumsum(count_C)[:-1])):
            cluster_LCE[layer, topic, members] = popular_LE[layer, members]
    ids = draw(topic_LT, np.cumsum(popular_LE, axis=1), np.cumsum(cluster_LCE, axis=2), strength, seed)
    model = ModelSpec.uniform(
        "planted", num_experts=EXPERTS, top_k=TOP_K, num_hidden_layers=LAYERS, hidden_size=64
    )  # fmt: skip
    return RoutingTrace(model=model, expert_LTK=ids.astype(np.uint16), request_id_T=np.arange(TOKENS, dtype=np.int32))


def profile_of(family: str, strength: float) -> Profile:
    if family == "planted":
        trace = planted(strength)
    else:
        trace = synthesize(
            num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, num_tokens=TOKENS, num_requests=500, seed=0,
            affinity=strength, coactivation=0.5 if strength < 0.75 else 0.85,
        )  # fmt: skip
    profile = summarize(trace, window_tokens=2048)
    return replace(profile, sets=(), coactivation_LEE=None, load_FLE=profile.load_FLE.sum(axis=0)[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("planted", "synthetic"), default="planted")
    parser.add_argument("--strength", type=float, default=0.4)
    parser.add_argument("--cluster", default="8x8")
    parser.add_argument("--cap", default="none")
    parser.add_argument("--time", type=float, default=120.0)
    parser.add_argument("--gap", type=float, default=0.0)
    given = parser.parse_args()
    profile, cluster = profile_of(given.family, given.strength), load_cluster(given.cluster)
    ranks, flow_LEE = cluster.num_ranks, profile.transition_LEE.astype(np.float64)  # type: ignore[union-attr]
    load_LR = rank_load_LR(profile.load_LE, lpt_slots(profile.load_LE, EXPERTS, ranks), ranks)
    balanced_L = load_LR.max(axis=1) / load_LR.mean(axis=1)
    caps = {"none": None, "lpt": float(np.maximum(1.05, balanced_L).mean())}
    cap = caps[given.cap] if given.cap in caps else float(given.cap)
    problem = PlacementProblem(profile=profile, cluster=cluster, mode="coherent", max_par=cap)
    solve_affinity(problem, time_limit_s=1e-3)
    started = time.process_time()
    result = solve_affinity(problem, time_limit_s=given.time, gap=given.gap)
    seconds = time.process_time() - started
    assert result.slot_expert_LP is not None
    assert result.certificate is not None
    rank_LE = np.argsort(result.slot_expert_LP, axis=1) // problem.slots_per_rank
    kept = kept_flow(flow_LEE, rank_LE) / flow_LEE.sum()
    numbers = result.certificate.numbers | {"node_weight": 0.0}
    least = verify(problem, replace(result.certificate, bound=-np.inf, numbers=numbers))
    print(f"{given.family} {given.strength:g}, {given.cluster}, cap {cap}: {seconds:.1f} s, {result.stopped_by}")
    print(f"  {result.objective_name}: {result.objective:.5f}, bound {result.bound:.5f} ({result.bound_by})")
    print(f"  ranks: cut {1 - kept:.5f}, bound {least:.5f}; gap of cut {(1 - kept - least) / (1 - kept):.2%}", end="")
    par = mean_par(rank_load_LR(profile.load_LE, result.slot_expert_LP, ranks))
    print(f", of kept {(1 - least - kept) / (1 - least):.2%}; PAR {par:.4f}")
    if cluster.nodes > 1:
        print(f"  nodes: cut {1 - kept_flow(flow_LEE, cluster.node_R[rank_LE]) / flow_LEE.sum():.5f}", end="")
        print(f", bound {(result.bound or 0) - least:.5f}")
    print(f"  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB; {'; '.join(result.trail)}")


if __name__ == "__main__":
    main()
