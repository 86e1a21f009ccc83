"""The best placement that a limited migration can reach: which moves towards a better plan are worth their bytes.

For every layer, paths of legal placements lead from the current one to the target (`path.py`), at several prices of
PAR; every placement on them is judged exactly (`judge.py`); one is chosen per layer under the budget (`knapsack.py`).
In `coherent` mode the cost is of pairs of layers, and a chain of them is chosen (`chain.py`).

Legend: L layers, P slots, E experts, R ranks, C slots per rank, H expert sets, Q steps of a path.
"""

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError, UsageError
from placer.core.migration import Moves, moves
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from solvers.migration.chain import choose_chain, cut_share, flow_benefit
from solvers.migration.judge import LayerJudge, Verdict, judges_of, rewards_locality
from solvers.migration.knapsack import Option, choose_options
from solvers.migration.path import greedy_path
from solvers.touch.anneal import incidence
from solvers.touch.objective import touch_objective

__all__ = ["objective_name", "solve_under_budget"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PATH_PRICES = (0.3, 3.0, 30.0)
"""Copies per token that one unit of PAR is worth: one path from the current placement to the target for each."""

ORDER_SETS = 8192
MOST_PLACES = 48
MOST_PLACES_CHAIN = 14


def solve_under_budget(
    problem: PlacementProblem,
    current_LP: IntArray,
    target_LP: IntArray,
    *,
    max_moved_bytes: int | None = None,
    max_layers: int | None = None,
    seed: int = 0,
    load_only: bool = False,
) -> tuple[IntArray, Moves, float]:
    """A placement between `current_LP` and `target_LP` (both int64 (L, P)), the moves to it and its objective.

    Objective: mean over layers of ranks touched (+ nodes touched at the links' price) where the mode rewards locality
    and the profile has expert sets; in `coherent` mode the share of transitions that change rank; PAR otherwise and
    where `load_only`.
    PAR is kept under problem.max_par on the requests seen, and on fresh draws under what the target has; where the
    budget does not suffice for that, PAR is brought as near as it can be.
    Guarantee: within the budgets; without budgets no worse than the target; a larger budget is never worse (excess over
    the caps first, then the objective); no budget (0) gives the current placement as it is, and experts that keep their
    rank keep their slot.
    Complexity O(L paths) of greedy_path, + the knapsack. Deterministic for a seed.
    Raises MismatchError for placements of other shapes, UsageError for budgets below 0 or a target that repeats an
    expert on a rank.
    """
    for name, value in (("max_moved_bytes", max_moved_bytes), ("max_layers", max_layers)):
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}; give 0 or more")
    cluster, experts = problem.cluster, problem.profile.model.num_experts
    ranks = cluster.num_ranks
    if current_LP.shape != target_LP.shape:
        raise MismatchError(
            f"the current plan has {current_LP.shape[1]} slots in {len(current_LP)} layers, the target "
            f"{target_LP.shape[1]} in {len(target_LP)}; a budget needs plans of one shape"
        )
    judges, _ = judges_of(problem, seed, load_only=load_only)
    flow_LEE = None if load_only else _transitions(problem)
    pools, places = [], []
    for layer, judge in enumerate(judges):
        now_RC, goal_RC = _with_empties(current_LP[layer], target_LP[layer], ranks, experts, layer)
        near = None if flow_LEE is None else flow_benefit(flow_LEE, (current_LP, target_LP), layer, ranks)
        pool, place = _options(problem, judge, now_RC, goal_RC, near)
        pools.append(pool)
        places.append(place)
    most = None if max_moved_bytes is None else max_moved_bytes // problem.profile.model.expert_bytes
    cap_seen = np.inf if problem.max_par is None else problem.max_par
    goal_par = float(np.mean([pool[-1].par for pool in pools]))
    cap = np.inf if problem.max_par is None else max(problem.max_par, goal_par)
    if flow_LEE is None:
        chosen = choose_options(pools, max_moves=most, max_layers=max_layers, cap=cap, cap_seen=cap_seen)
    else:
        chosen = choose_chain(
            pools, places, flow_LEE, max_moves=most, max_layers=max_layers, cap=cap, cap_seen=cap_seen
        )
    goal = [len(pool) - 1 for pool in pools]
    affordable = (most is None or sum(pool[-1].moves for pool in pools) <= most) and (
        max_layers is None or sum(pool[-1].moves > 0 for pool in pools) <= max_layers
    )
    if affordable and _rank_of(pools, places, goal, flow_LEE, cap, cap_seen) < _rank_of(
        pools, places, chosen, flow_LEE, cap, cap_seen
    ):
        chosen = goal
    rows = []
    for layer, option in enumerate(chosen):
        now_P = current_LP[layer]
        rows.append(now_P if pools[layer][option].moves == 0 else _settled(now_P, places[layer][option], experts))
    found_LP = np.stack(rows)
    objective = _rank_of(pools, places, chosen, flow_LEE, cap, cap_seen)[1]
    return found_LP, moves(current_LP, found_LP, ranks, cluster.ranks_per_node), objective


def objective_name(problem: PlacementProblem, *, load_only: bool = False) -> str:
    """Name of what `solve_under_budget` minimises."""
    if not load_only and _transitions(problem) is not None:
        return "cut"
    return touch_objective(problem)[0] if not load_only and rewards_locality(problem) else "par"


def _transitions(problem: PlacementProblem) -> FloatArray | None:
    flow_LEE = problem.profile.transition_LEE
    if problem.mode != "coherent" or flow_LEE is None or not flow_LEE.sum():
        return None
    return flow_LEE.astype(np.float64)


def _rank_of(
    pools: list[list[Option]],
    places: list[list[IntArray]],
    chosen: list[int],
    flow_LEE: FloatArray | None,
    cap: float,
    cap_seen: float,
) -> tuple[float, float]:
    """Excess of mean PAR over the caps, and the objective: smaller is better, in this order."""
    options = [pool[at] for pool, at in zip(pools, chosen, strict=True)]
    over = max(0.0, float(np.mean([o.par for o in options])) - cap)
    over += max(0.0, float(np.mean([o.par_seen for o in options])) - cap_seen)
    cost = float(np.mean([o.cost for o in options]))
    if flow_LEE is not None:
        cost = cut_share([place[at] for place, at in zip(places, chosen, strict=True)], flow_LEE)
    return (0.0 if over < 1e-9 else over), cost


def _options(
    problem: PlacementProblem, judge: LayerJudge, now_RC: IntArray, goal_RC: IntArray, near_ER: FloatArray | None
) -> tuple[list[Option], list[IntArray]]:
    """Judged placements of one layer: the current one first, the target last, each reached in its number of moves."""
    cluster, experts = problem.cluster, problem.profile.model.num_experts
    ranks, total = cluster.num_ranks, int(max(now_RC.max(), goal_RC.max())) + 1
    total = max(total, experts)
    goal_RE = np.zeros((ranks, total), dtype=bool)
    goal_RE[np.arange(ranks)[:, None], goal_RC] = True
    sets = _heaviest(judge.sets) if judge.locality and judge.sets is not None and near_ER is None else None
    if sets is None:
        top_k = problem.profile.model.top_k
        sets = ExpertSets(np.zeros((0, top_k), dtype=np.int16), np.zeros(0, dtype=np.int64))
    first_E, set_I = incidence(sets.expert_HK, experts)
    load_E = np.concatenate((judge.load_E, np.zeros(total - experts)))
    speed_R = np.ones(ranks) if cluster.speed_R is None else cluster.speed_R
    scale_R = speed_R.sum() / speed_R / max(1.0, float(load_E.sum()))
    benefit_ER = np.zeros((total, ranks))
    unit = max(1.0, float(sets.weight_H.sum()))
    if near_ER is not None:
        benefit_ER[:experts] = near_ER
        unit = float(near_ER.max(axis=1).sum()) or 1.0
    start_RE = np.zeros((ranks, total), dtype=bool)
    start_RE[np.arange(ranks)[:, None], now_RC] = True
    found: dict[bytes, tuple[Option, IntArray]] = {}
    limit = MOST_PLACES if near_ER is None else MOST_PLACES_CHAIN
    prices = PATH_PRICES if problem.max_par is not None and (judge.locality or near_ER is not None) else PATH_PRICES[:1]
    for price in prices:
        path_QRC = greedy_path(
            now_RC, goal_RE, experts, load_E, scale_R, benefit_ER, sets.expert_HK, sets.weight_H, first_E, set_I,
            cluster.node_R, judge.node_weight, price * unit,
        )  # fmt: skip
        few = np.unique(np.rint(np.linspace(0, len(path_QRC) - 1, min(len(path_QRC), limit))).astype(np.int64))
        for held_RC in path_QRC[few]:
            ordered_RC = np.sort(held_RC, axis=1)
            if ordered_RC.tobytes() not in found:
                seats = np.take_along_axis(start_RE, ordered_RC, axis=1)
                copies = int((~seats & (ordered_RC < experts)).sum())
                row_P = np.where(ordered_RC < experts, ordered_RC, -1).reshape(-1)
                found[ordered_RC.tobytes()] = (_option(copies, judge.judge(row_P)), ordered_RC)
    # every path ends at the target: it goes last
    last = found.pop(np.sort(path_QRC[-1], axis=1).tobytes())
    entries = [*found.values(), last]
    return [option for option, _ in entries], [held_RC for _, held_RC in entries]


def _option(copies: int, verdict: Verdict) -> Option:
    return Option(moves=copies, cost=verdict.cost, par=verdict.par, par_seen=verdict.par_seen)


def _heaviest(sets: ExpertSets) -> ExpertSets:
    """The sets that most tokens chose: enough to say which step of a path comes first."""
    if len(sets.weight_H) <= ORDER_SETS:
        return sets
    kept = np.sort(np.argsort(-sets.weight_H, kind="stable")[:ORDER_SETS])
    return ExpertSets(sets.expert_HK[kept], sets.weight_H[kept])


def _with_empties(now_P: IntArray, goal_P: IntArray, ranks: int, experts: int, layer: int) -> tuple[IntArray, IntArray]:
    """Both rows as (R, C) with a number from `experts` on for every empty slot; an empty slot that stays keeps its."""
    now_RC, goal_RC = now_P.reshape(ranks, -1).copy(), goal_P.reshape(ranks, -1).copy()
    for name, rows in (("current", now_RC), ("target", goal_RC)):
        for rank, row in enumerate(rows):
            real = row[row >= 0]
            if len(np.unique(real)) < len(real):
                raise UsageError(
                    f"the {name} placement holds an expert twice on rank {rank} of layer {layer}; a migration budget "
                    "needs replicas on distinct ranks"
                )
    following, spare = experts, []
    for rank in range(ranks):
        empty, wanted = np.flatnonzero(now_RC[rank] < 0), np.flatnonzero(goal_RC[rank] < 0)
        names = np.arange(following, following + len(empty))
        following += len(empty)
        now_RC[rank, empty] = names
        stay = min(len(empty), len(wanted))
        goal_RC[rank, wanted[:stay]] = names[:stay]
        spare += names[stay:].tolist()
    for rank in range(ranks):
        wanted = np.flatnonzero(goal_RC[rank] < 0)
        for slot in wanted:
            if not spare:
                spare.append(following)
                following += 1
            goal_RC[rank, slot] = spare.pop(0)
    return now_RC, goal_RC


def _settled(now_P: IntArray, held_RC: IntArray, experts: int) -> IntArray:
    """A row that holds `held_RC`, every expert that stays on its rank in the slot it has."""
    now_RC = now_P.reshape(held_RC.shape)
    row_RC = np.full(held_RC.shape, -1, dtype=np.int64)
    for rank, (now_C, held_C) in enumerate(zip(now_RC, held_RC, strict=True)):
        real = held_C[held_C < experts]
        stays = np.isin(now_C, real)
        row_RC[rank, stays] = now_C[stays]
        fresh = np.setdiff1d(real, now_C)
        row_RC[rank, np.flatnonzero(~stays)[: len(fresh)]] = fresh
    return row_RC.reshape(-1)
