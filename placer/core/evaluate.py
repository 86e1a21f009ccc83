"""Exact judgement of a plan on routed tokens: the judge of every solver and of every surrogate.

Legend: L sites, T tokens, K top-k, W windows, R ranks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import closed_form_ns, gather_copies, leg_times, rank_load
from placer.core.dispatch import LayerTraffic, assign_layer, layer_traffic
from placer.core.errors import MismatchError, UsageError
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan

__all__ = ["Evaluation", "evaluate", "iterate_layers", "par", "window_index"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a plan does to a set of tokens. PAR = max / mean rank load, a rank's load being its (token, expert) pairs.

    Where ranks differ in speed PAR is of load / speed, as `par` says.

    ranks_touched    mean over tokens and layers of distinct ranks a token's experts lie on
    nodes_touched    the same for nodes
    copies_sent      mean copies a token sends to other ranks per layer under the plan's mode
    par              pooled: all tokens together, mean over layers; par_max: the worst layer
    par_window_mean, par_window_p99   over (window, layer) pairs
    kept             share of (expert at l, expert at l + 1) pairs of a token that lie on one rank
    iteration_us     closed-form time of one window's iteration, mean over windows, per dispatch mode asked for
    """

    tokens: int
    ranks_touched: float
    nodes_touched: float
    copies_sent: float
    par: float
    par_max: float
    par_window_mean: float
    par_window_p99: float
    kept: float
    iteration_us: dict[str, float]


def window_index(num_tokens: int, window_tokens: int) -> tuple[IntArray, int]:
    """Window of each token and their number; a last window shorter than half joins the one before it."""
    if window_tokens < 1:
        raise UsageError(f"window_tokens is {window_tokens}; give 1 or more")
    windows = max(1, int(num_tokens / window_tokens + 0.5))
    return np.minimum(np.arange(num_tokens) // window_tokens, windows - 1), windows


def par(
    load_WR: npt.NDArray[np.integer] | npt.NDArray[np.floating], speed_R: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Max / mean over the last axis; 1.0 where nothing is loaded.

    With the ranks' relative speeds: the longest load / speed over total load / total speed, which is what a load in
    proportion to the speeds would take.
    """
    mean = load_WR.mean(axis=-1)
    if speed_R is not None:
        load_WR = load_WR * (speed_R.mean() / speed_R)
    return np.where(mean > 0, load_WR.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


def iterate_layers(
    plan: Plan,
    mode: DispatchMode,
    expert_LTK: npt.NDArray[np.integer],
    source_T: IntArray,
    window_T: IntArray,
    num_windows: int,
) -> "list[LayerTraffic]":
    """Traffic of every layer in order, each token's location carried from layer to layer."""
    token_T = np.arange(expert_LTK.shape[1])
    location_T = source_T
    result = []
    for layer in range(expert_LTK.shape[0]):
        home_T = location_T if mode == "coherent" else source_T
        slot_TK, slots = assign_layer(plan, layer, expert_LTK[layer], home_T, token_T)
        traffic, location_T = layer_traffic(slots, mode, slot_TK, location_T, window_T, num_windows)
        result.append(traffic)
    return result


def evaluate(
    plan: Plan,
    model: ModelSpec,
    cluster: ClusterSpec,
    expert_LTK: npt.NDArray[np.integer],
    source_T: IntArray,
    *,
    window_tokens: int = 2048,
    batch_tokens: int = 2048,
    modes: tuple[DispatchMode, ...] = (),
) -> Evaluation:
    """Replays every token through the plan. `modes` are those to predict times for (the plan's own is always there).

    Cost O(L T (K + R)) per mode. Raises MismatchError where plan, cluster and tokens do not fit together.
    """
    if expert_LTK.shape[0] != plan.slot_expert_LP.shape[0]:
        raise MismatchError(
            f"the trace has {expert_LTK.shape[0]} MoE layers, the plan {plan.slot_expert_LP.shape[0]}; "
            "use the trace that the plan was solved for, or solve again"
        )
    if (plan.num_ranks, plan.ranks_per_node) != (cluster.num_ranks, cluster.ranks_per_node):
        raise MismatchError(
            f"the plan is for {plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has "
            f"{cluster.num_ranks}, {cluster.ranks_per_node} a node; use the plan's cluster or solve again"
        )
    num_tokens = expert_LTK.shape[1]
    window_T, windows = window_index(num_tokens, window_tokens)
    batch_T, batches = window_index(num_tokens, batch_tokens)
    token_T = np.arange(num_tokens)
    wanted = tuple(dict.fromkeys((plan.mode, *modes)))
    location = dict.fromkeys(wanted, source_T)
    time_W = {mode: np.zeros(batches, dtype=np.int64) for mode in wanted}
    touched = nodes = placed = copies = kept = pairs = 0
    pooled_par: list[float] = []
    window_par: list[npt.NDArray[np.float64]] = []
    rank_before: IntArray | None = None
    for layer in range(expert_LTK.shape[0]):
        at_home = assign_layer(plan, layer, expert_LTK[layer], source_T, token_T)
        slot_TK, slots = at_home
        for mode in wanted:
            serving = at_home
            if mode == "coherent" and (at_home[1].count_E > 1).any():
                serving = assign_layer(plan, layer, expert_LTK[layer], location[mode], token_T)
            if mode == plan.mode:
                slot_TK, slots = serving
            traffic, location[mode] = layer_traffic(serving[1], mode, serving[0], location[mode], batch_T, batches)
            time_W[mode] += np.sum(list(closed_form_ns(cluster, model, traffic).values()), axis=0)
            if mode == plan.mode:
                touched += traffic.ranks_touched
                nodes += traffic.nodes_touched
                placed += traffic.placed_tokens
                copies += sum(int(leg.sum()) for leg in traffic.legs_WRR)
        used = slot_TK >= 0
        slot_key = window_T[np.nonzero(used)[0]] * len(slots.rank_P) + slot_TK[used]
        tokens_WP = np.bincount(slot_key, minlength=windows * len(slots.rank_P)).reshape(windows, -1)
        load_WR = rank_load(tokens_WP, plan.num_ranks)
        pooled_par.append(float(par(load_WR.sum(axis=0), cluster.speed_R)))
        window_par.append(par(load_WR, cluster.speed_R))
        rank_TK = np.where(used, slots.rank_P[slot_TK], -1)
        if rank_before is not None:
            both = (rank_before[:, :, None] >= 0) & (rank_TK[:, None, :] >= 0)
            kept += int(((rank_before[:, :, None] == rank_TK[:, None, :]) & both).sum())
            pairs += int(both.sum())
        rank_before = rank_TK
    if "coherent" in wanted:
        home_WR = np.bincount(batch_T * plan.num_ranks + location["coherent"], minlength=batches * plan.num_ranks)
        gather = gather_copies(home_WR.reshape(batches, plan.num_ranks).astype(np.int64))
        time_W["coherent"] += leg_times(cluster, gather, model.token_bytes).slowest_W
    windows_flat = np.concatenate(window_par)
    return Evaluation(
        tokens=num_tokens,
        ranks_touched=touched / max(1, placed),
        nodes_touched=nodes / max(1, placed),
        copies_sent=copies / max(1, placed),
        par=float(np.mean(pooled_par)),
        par_max=float(np.max(pooled_par)),
        par_window_mean=float(windows_flat.mean()),
        par_window_p99=float(np.quantile(windows_flat, 0.99)),
        kept=kept / pairs if pairs else 1.0,
        iteration_us={mode: float(time_W[mode].mean()) / 1e3 for mode in wanted},
    )
