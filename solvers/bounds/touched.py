"""Lower bound on ranks (and nodes) touched per token, with a certificate that proves it.

For every layer multipliers are searched that prove much (`touch_layer.py`); what they prove is then recomputed by
`placer.core.certificates.touched`, and that figure is the bound. Where the problem caps PAR, one price of PAR joins the
layers: the bound is concave in it, and its slope is the relaxed placement's mean PAR minus the cap.

Legend: L layers, E experts, H expert sets, K members, Q pairs of members, N triangles.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.certificates.touched import touched_bound
from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from solvers.bounds.touch_layer import LayerSearch, Multipliers

__all__ = ["bound_touched"]

FloatArray = npt.NDArray[np.float64]

SEARCH_SHARE = 0.9
"""Of the time limit; the rest is for the last evaluations and the verification."""
ROUND = 20
"""Iterations of one layer before the next has its turn."""
EVALUATE_EVERY = 50
FREE_ROUNDS = 3
"""Rounds without a price, to see whether the cap binds at all."""
COLUMN_S = {6: 4e-6, 7: 9e-6, 8: 20e-6}
COLUMN_ITERATIONS = 300
"""Slopes per pair of larger sets: seconds per set and iteration, by members, and iterations until they pay."""
FIRST_PRICE, LEAST_PRICE = 0.5, 0.01
PRICE_ROUNDS, PRICE_STEP, PRICE_CALM = 10, 2.0, 6.0


def bound_touched(
    problem: PlacementProblem,
    *,
    price: float | None = None,
    node_weight: float = 0.0,
    time_limit_s: float = 30.0,
    iterations: int = 800,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Certificate that no legal placement touches fewer ranks (+ node_weight * nodes) per token of the profile.

    `price` is what one unit of PAR is worth in ranks touched; None finds it where the problem has a cap, without
    replicas. `progress(done, total)` counts rounds over all layers. The time limit or Ctrl-C end the search with what
    is proven by then: at least the capacity bound, ceil(k / slots of a rank).

    Guarantee: verified before it is returned; deterministic unless the time limit or Ctrl-C stops it.
    Complexity: an iteration of a layer is O(H Bell(K) K^2) up to 5 members, O(H K^2) beyond (O(H 3^K) for 6 to 8
    members where the time allows 300 such iterations, which prove more), and O(E^3) up to 128 experts, O(E^2) beyond;
    every 50 iterations O(E^3) more for triangles.
    Raises UsageError without expert sets, or where ranks may hold unequal numbers of experts.
    Reference: Chambolle and Pock (2011), algorithm 1; Donath and Hoffman (1973) for the spectrum.
    """
    deadline = time.perf_counter() + SEARCH_SHARE * time_limit_s
    _refuse(problem, price, node_weight, iterations)
    cluster = problem.cluster
    capped = problem.max_par is not None and not problem.redundant
    cap = problem.max_par if problem.max_par is not None else np.inf
    searched = price is None and capped
    now = price or 0.0
    columns = _time_for_columns(problem, time_limit_s, iterations)
    ranks = _searches(problem, cluster.num_ranks, columns)
    nodes = _searches(problem, cluster.nodes, columns) if node_weight > 0 else []
    free = [layer.best for layer in ranks]
    rounds = -(-iterations // ROUND)
    try:
        for turn in range(1, rounds + 1):
            for layer in ranks:
                _advance(layer, now, min(turn * ROUND, iterations), deadline)
            for layer in nodes:
                _advance(layer, 0.0, min(turn * ROUND, iterations), deadline)
            if time.perf_counter() >= deadline:
                break
            if progress:
                progress(turn, rounds)
            if searched and turn == FREE_ROUNDS:
                for layer in ranks:
                    layer.evaluate(0.0)
                free = [layer.best for layer in ranks]
            # the rest is for the multipliers alone
            if searched and FREE_ROUNDS <= turn <= min(PRICE_ROUNDS, rounds // 2):
                over = float(np.mean([layer.par() for layer in ranks])) - cap
                now = _next_price(now, over, turn - FREE_ROUNDS)
        for layer in ranks:
            layer.evaluate(now)
        for layer in nodes:
            layer.evaluate(0.0)
    except KeyboardInterrupt:
        pass
    points, now = _best_of(free, [layer.best for layer in ranks], now, cap)
    arrays = _arrays(problem, "rank", points)
    numbers = {"node_weight": float(node_weight), "price": now}
    name = "ranks_touched"
    if node_weight > 0:
        arrays |= _arrays(problem, "node", [layer.best for layer in nodes])
        name = f"ranks_touched + {node_weight:.3g} * nodes_touched"
    relaxation = "eigenvalues and triangles" if ranks[0].spectral else "rows and triangles"
    if problem.redundant:
        relaxation = "rows with replicas"
    return Certificate(
        kind="touched",
        objective_name=name,
        bound=touched_bound(problem, arrays, numbers),
        proof=f"co-activation: partitions of every expert set, {relaxation}" + (", load cap" if now > 0 else ""),
        arrays=arrays,
        numbers=numbers,
    )


def _refuse(problem: PlacementProblem, price: float | None, node_weight: float, iterations: int) -> None:
    if not problem.profile.sets:
        raise UsageError("the profile has load counts only, no expert sets; a bound on ranks touched needs them")
    if problem.allow_empty_slots:
        raise UsageError("the bound on ranks touched is for equal slots per rank; this problem allows empty ones")
    if price and (problem.max_par is None or problem.redundant):
        raise UsageError(f"price is {price:g}; PAR has a price only under a load cap and without redundant slots")
    for name, value in (("price", price), ("node_weight", node_weight)):
        if value is not None and not 0 <= value < np.inf:
            raise UsageError(f"{name} is {value}; give a finite number, 0 or more")
    if iterations < 1:
        raise UsageError(f"iterations is {iterations}; give 1 or more")


def _time_for_columns(problem: PlacementProblem, time_limit_s: float, iterations: int) -> bool:
    """Whether slopes per pair of sets of 6 to 8 members can be expected to pay within the time."""
    sets = problem.profile.sets
    cost_s = COLUMN_S.get(sets[0].expert_HK.shape[1], np.inf)
    total_s = COLUMN_ITERATIONS * cost_s * sum(len(layer.weight_H) for layer in sets)
    return iterations >= COLUMN_ITERATIONS and total_s <= SEARCH_SHARE * time_limit_s


def _searches(problem: PlacementProblem, groups: int, columns: bool) -> list[LayerSearch]:
    profile = problem.profile
    return [
        LayerSearch(
            sets,
            profile.load_LE[layer].astype(np.float64),
            groups=groups,
            capacity=problem.num_slots // groups,
            redundant=problem.redundant,
            ranks=problem.cluster.num_ranks,
            columns=columns,
        )
        for layer, sets in enumerate(profile.sets)
    ]


def _advance(layer: LayerSearch, price: float, until: int, deadline: float) -> None:
    while layer.done < until and time.perf_counter() < deadline:
        layer.advance(price)
        if layer.done % EVALUATE_EVERY == 0:
            layer.evaluate(price)


def _next_price(price: float, over: float, turn: int) -> float:
    """Up where the relaxed placement is above the cap, down where it is below; calmer with every turn."""
    if price == 0.0:
        return FIRST_PRICE if over > 0 else 0.0
    moved = price * float(np.exp(np.clip(PRICE_STEP * over, -1.0, 1.0) * PRICE_CALM / (PRICE_CALM + turn)))
    return moved if moved > LEAST_PRICE else 0.0


def _best_of(
    free: list[Multipliers], priced: list[Multipliers], price: float, cap: float
) -> tuple[list[Multipliers], float]:
    """The dual points and the price that prove most: without a price, at the last one, or at what the points need."""
    options = [(free, 0.0), (priced, price), (priced, max(float(point.load_E.sum()) for point in priced))]
    worth = [
        float(np.mean([point.proves(at) for point in points])) - (at * cap if at > 0 else 0.0) for points, at in options
    ]
    return options[int(np.argmax(worth))]


def _arrays(problem: PlacementProblem, level: str, points: list[Multipliers]) -> dict[str, FloatArray]:
    """Multipliers in the verifier's names and units: slopes and load as they are, all else times the layer's tokens."""
    tokens_L = [max(1.0, float(sets.weight_H.sum())) for sets in problem.profile.sets]
    form = "HQ" if points[0].paired else "HK"
    arrays = {
        f"{level}_slope_{form}": np.concatenate([point.slopes for point in points]),
        f"{level}_u_LE": np.stack([point.rows_E * tokens for point, tokens in zip(points, tokens_L, strict=True)]),
    }
    if points[0].spectrum_EE is not None:
        arrays[f"{level}_spectrum_LEE"] = np.stack(
            [
                point.spectrum_EE * tokens
                for point, tokens in zip(points, tokens_L, strict=True)
                if point.spectrum_EE is not None
            ]
        )
    if any(len(point.tau_N) for point in points):
        arrays[f"{level}_tau_N"] = np.concatenate(
            [point.tau_N * tokens for point, tokens in zip(points, tokens_L, strict=True)]
        )
        arrays[f"{level}_triangle_N4"] = np.concatenate(
            [np.insert(point.at_N3, 0, layer, axis=1) for layer, point in enumerate(points)]
        ).astype(np.float64)
    if level == "rank" and any(point.load_E.any() for point in points):
        arrays["load_q_LE"] = np.stack([point.load_E for point in points])
    return arrays
