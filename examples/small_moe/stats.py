"""Print how uneven, how predictable and how steady the routing in a trace is, one table row per trace.

    python examples/small_moe/stats.py examples/small_moe/trace.safetensors other.npz

A trace is a file of any format that placer reads. Half of the requests, chosen at random, are for
fitting; everything is measured on the other half, except drift, which needs the trace's order and reads all of it.

Shapes: T token, L layer, K top-k, E expert, G group of experts (one rank's share), W window, P pair of adjacent layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from placer.pipeline import open_trace

__all__ = ["affinity_ratio", "align", "drift", "imbalance", "kept", "loads", "main", "transitions"]

Counts = NDArray[np.float64]
Groups = NDArray[np.int64]

WINDOW_TOKENS = 2048
RESTARTS = 8
SEED = 0


def loads(expert_TLK: NDArray[np.uint8], experts: int) -> Counts:
    """Return how often each expert was chosen (L, E)."""
    load_LE = np.zeros((expert_TLK.shape[1], experts))
    for layer in range(len(load_LE)):
        load_LE[layer] = np.bincount(expert_TLK[:, layer].ravel(), minlength=experts)
    return load_LE


def transitions(expert_TLK: NDArray[np.uint8], experts: int) -> Counts:
    """Return how often expert i of a layer was followed by expert j of the next, over all K times K pairs (P, E, E)."""
    pair_PEE = np.zeros((expert_TLK.shape[1] - 1, experts, experts))
    for layer in range(len(pair_PEE)):
        first_TK, second_TK = expert_TLK[:, layer].astype(np.int64), expert_TLK[:, layer + 1]
        code = (first_TK[:, :, None] * experts + second_TK[:, None, :]).ravel()
        pair_PEE[layer] = np.bincount(code, minlength=experts * experts).reshape(experts, experts)
    return pair_PEE


def affinity_ratio(fit_PEE: Counts, test_PEE: Counts) -> float:
    """Return how much better the next expert is guessed from the present one than from the layer's load alone.

    The guess is the most frequent successor on the fitting half; its hit rate on the other half is divided by the load
    share of the layer's busiest expert, and the mean over pairs of layers is returned. 1 means no affinity.
    """
    guess_PE = fit_PEE.argmax(axis=2)
    hits_P = np.take_along_axis(test_PEE, guess_PE[:, :, None], axis=2).sum(axis=(1, 2))
    busiest_P = test_PEE.sum(axis=1).max(axis=1)
    return float((hits_P / busiest_P).mean())


def kept(pair_PEE: Counts, group_LE: Groups) -> float:
    """Return the share of pairs whose two experts are in the same group."""
    same_PEE = group_LE[:-1, :, None] == group_LE[1:, None, :]
    return float((pair_PEE * same_PEE).sum() / pair_PEE.sum())


def _improve_layer(score_EG: Counts, group_E: Groups) -> bool:
    """Swap experts between groups while that raises the layer's score, in place; return whether anything moved."""
    moved = False
    while True:
        here_E = score_EG[np.arange(len(group_E)), group_E]
        there_EE = score_EG[:, group_E]
        gain_EE = there_EE + there_EE.T - here_E[:, None] - here_E[None, :]
        a, b = np.unravel_index(gain_EE.argmax(), gain_EE.shape)
        if gain_EE[a, b] <= 1e-9:
            return moved
        group_E[[a, b]] = group_E[[b, a]]
        moved = True


def align(pair_PEE: Counts, groups: int, rng: np.random.Generator) -> Groups:
    """Return equal groups (L, E) that keep many pairs together: swaps layer by layer, the best of RESTARTS starts."""
    experts = pair_PEE.shape[1]
    if experts % groups:
        raise ValueError(f"{experts} experts cannot be shared equally by {groups} groups")
    best_LE: Groups = np.zeros((0, 0), dtype=np.int64)
    best_kept = -1.0
    for _ in range(RESTARTS):
        contiguous_E = np.arange(experts, dtype=np.int64) // (experts // groups)
        group_LE = np.stack([rng.permutation(contiguous_E) for _ in range(len(pair_PEE) + 1)])
        moved = True
        while moved:
            moved = False
            for layer in range(len(group_LE)):
                score_EG = np.zeros((experts, groups))
                if layer > 0:
                    score_EG += pair_PEE[layer - 1].T @ np.eye(groups)[group_LE[layer - 1]]
                if layer < len(pair_PEE):
                    score_EG += pair_PEE[layer] @ np.eye(groups)[group_LE[layer + 1]]
                moved |= _improve_layer(score_EG, group_LE[layer])
        share = kept(pair_PEE, group_LE)
        if share > best_kept:
            best_LE, best_kept = group_LE, share
    return best_LE


def imbalance(load_LE: Counts, group_LE: Groups) -> float:
    """Return the busiest group's load over the mean group's, averaged over layers."""
    groups = int(group_LE.max()) + 1
    load_LG = np.stack([np.bincount(group, load, groups) for group, load in zip(group_LE, load_LE, strict=True)])
    return float((load_LG.max(axis=1) / load_LG.mean(axis=1)).mean())


def drift(expert_TLK: NDArray[np.uint8], experts: int) -> float:
    """Return the mean total variation distance between the load of consecutive windows of WINDOW_TOKENS."""
    starts = range(0, len(expert_TLK) - WINDOW_TOKENS + 1, WINDOW_TOKENS)
    share_WLE = np.stack([loads(expert_TLK[start : start + WINDOW_TOKENS], experts) for start in starts])
    share_WLE /= share_WLE.sum(axis=2, keepdims=True)
    return float(0.5 * np.abs(np.diff(share_WLE, axis=0)).sum(axis=2).mean())


def row(path: Path) -> str:
    """Return the table row of one trace."""
    trace = open_trace(path)
    expert_TLK, request_id_T = trace.expert_LTK.transpose(1, 0, 2), trace.request_id_T
    rng = np.random.default_rng(SEED)
    request_ids = rng.permutation(np.unique(request_id_T))
    fitting_T = np.isin(request_id_T, request_ids[: len(request_ids) // 2])
    experts = int(expert_TLK.max()) + 1
    fit_PEE, test_PEE = transitions(expert_TLK[fitting_T], experts), transitions(expert_TLK[~fitting_T], experts)
    load_LE = loads(expert_TLK[~fitting_T], experts)
    skew_L = load_LE.max(axis=1) / load_LE.mean(axis=1)
    aligned = {groups: align(fit_PEE, groups, rng) for groups in (4, 8)}
    contiguous_LE = np.broadcast_to(np.arange(experts) // (experts // 8), load_LE.shape)
    cells = (
        path.stem,
        f"{skew_L.min():.2f} / {np.median(skew_L):.2f} / {skew_L.max():.2f}",
        f"{affinity_ratio(fit_PEE, test_PEE):.2f}",
        f"{kept(test_PEE, aligned[4]):.3f}, {kept(test_PEE, aligned[8]):.3f}",
        f"{imbalance(load_LE, contiguous_LE):.2f} -> {imbalance(load_LE, aligned[8]):.2f}",
        f"{drift(expert_TLK, experts):.3f} ({drift(rng.permutation(expert_TLK), experts):.3f})",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print a Markdown table with a row per trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="per-token traces in any format that placer reads")
    paths: list[Path] = parser.parse_args().traces
    print("| trace | skew min / med / max | affinity ratio | kept G=4, G=8 | imbalance G=8 | drift (shuffled tokens) |")
    print("|---|---|---|---|---|---|")
    for path in paths:
        print(row(path), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
