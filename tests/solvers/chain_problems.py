"""Small problems with transitions between layers, and brute force over all chains of placements.

Legend: L layers, E experts, R ranks, X labelled placements of one layer.
"""

import itertools

import numpy as np
from solver_problems import cluster

from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile


def chain_problem(
    seed: int,
    *,
    layers: int = 3,
    experts: int = 6,
    ranks: int = 3,
    nodes: int = 1,
    max_par: float | None = None,
    folds: int = 1,
    **limits: object,
) -> PlacementProblem:
    """Random flows, skewed so that popular experts attract each other, whose margins are the loads of the layers."""
    rng = np.random.default_rng(seed)
    hot_LE = rng.lognormal(0.0, 0.5, (layers, experts))
    taste_LEE = rng.lognormal(0.0, 1.0, (layers - 1, experts, experts))
    flow_LEE = np.rint(40 * hot_LE[:-1, :, None] * hot_LE[1:, None, :] * taste_LEE).astype(np.int64)
    load_LE = np.concatenate([flow_LEE.sum(axis=2), flow_LEE[-1:].sum(axis=1)])
    load_FLE = np.stack([load_LE // folds] * (folds - 1) + [load_LE - (folds - 1) * (load_LE // folds)])
    model = ModelSpec.uniform("chain", num_experts=experts, top_k=1, num_hidden_layers=layers, hidden_size=64)
    profile = Profile(
        model=model,
        trace_sha256="",
        num_tokens=int(load_LE[0].sum()),
        num_requests=folds,
        window_tokens=100,
        load_WLE=load_LE[None],
        load_FLE=load_FLE,
        transition_LEE=flow_LEE,
    )
    return PlacementProblem(
        profile=profile,
        cluster=cluster(ranks, nodes),
        mode="coherent",
        max_par=max_par,
        **limits,  # type: ignore[arg-type]
    )


def labelled_placements(experts: int, ranks: int) -> np.ndarray:
    """Every rank_E with equal counts, (X, E)."""
    width = experts // ranks
    rows = itertools.product(range(ranks), repeat=experts)
    return np.array([row for row in rows if (np.bincount(row, minlength=ranks) == width).all()])


def least_cut(problem: PlacementProblem, node_weight: float = 0.0) -> float:
    """The optimum of cut + node_weight * cut_nodes under the cap, over chains of at most three layers; inf: none."""
    profile, spec = problem.profile, problem.cluster
    layers, experts = profile.load_LE.shape
    place_XE = labelled_placements(experts, spec.num_ranks)
    flow_LEE = profile.transition_LEE
    assert flow_LEE is not None
    assert layers <= 3
    kept_LXX = []
    for flow_EE in flow_LEE:
        kept_XX = np.zeros((len(place_XE), len(place_XE)))
        for group_R, weight in ((np.arange(spec.num_ranks), 1.0), (spec.node_R, node_weight)):
            in_XGE = group_R[place_XE][:, None, :] == np.unique(group_R)[:, None]
            kept_XX += weight * np.einsum("xge,ef,ygf->xy", in_XGE, flow_EE, in_XGE, optimize=True)
        kept_LXX.append(kept_XX)
    share_LE = profile.load_LE * spec.num_ranks / profile.load_LE.sum(axis=1, keepdims=True)
    load_LXR = np.stack(
        [(share_LE[:, None, :] * (place_XE == rank)).sum(axis=2) for rank in range(spec.num_ranks)], axis=2
    )
    par_LX = load_LXR.max(axis=2)
    kept, par = kept_LXX[0], par_LX[0][:, None] + par_LX[1]
    if layers == 3:
        kept = kept[:, :, None] + kept_LXX[1]
        par = par[:, :, None] + par_LX[2]
    if problem.max_par is not None:
        kept = np.where(par <= layers * problem.max_par + 1e-9, kept, -np.inf)
    return float(1 + node_weight - kept.max() / flow_LEE.sum())
