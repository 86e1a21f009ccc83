"""In which order to load and compute a layer's planes: rules against the proven optimum, and where orders matter.

    python examples/device/order_study.py [--seed 0] [--instances 1000] [--json OUT]

Times are computed, not measured; a minute on one core. `x` is a rule's time over the optimum (1.000: none better).
Any order takes at most twice the optimum: disk and processor are never both idle, and the optimum needs each in full.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from order_families import (
    FAMILIES,
    Draw,
    build,
    draw,
    makespan,
    mutated,
    paper_cost,
    ratio,
    routed_counts,
    runtime_cost,
    whole_experts,
)

from placer.core.device.flowshop import run_in_order
from placer.core.device.items import OrderRule, order_items
from solvers.io_order.cpsat import solve_by_cpsat, solve_layers_by_cpsat
from solvers.io_order.exhaustive import number_of_orders, solve_exhaustively
from solvers.io_order.layers import LayerLoad, most_from_reading_ahead
from solvers.io_order.rule import solve_by_rule
from solvers.io_order.table import solve_by_table

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0, 10.0)
RULES: tuple[OrderRule, ...] = ("by_id", "hebf", "hebf_exact", "resident_first")
KINDS = ("copies", "whole experts", *RULES)
FEW_ORDERS = 5000


def agreement(rng: np.random.Generator, instances: int) -> dict[str, Any]:
    """Chain-Johnson against the table, CP-SAT and every order tried, over all families."""
    tried = equal = 0
    seconds = dict.fromkeys(("johnson", "table", "cpsat", "exhaustive"), 0.0)
    for number in range(instances):
        family = list(FAMILIES)[number % len(FAMILIES)]
        items, times = build(draw(family, rng, int(rng.integers(1, 5)), int(rng.integers(1, 4))))
        results = [
            solve_by_rule(items, times), solve_by_table(items, times), solve_by_cpsat(items, times, isolated=False)
        ]  # fmt: skip
        if number_of_orders(items) <= FEW_ORDERS:
            tried += 1
            results.append(solve_exhaustively(items, times))
        equal += len({result.objective for result in results}) == 1 and all(r.stopped_by == "optimal" for r in results)
        for result in results:
            seconds[result.solver] += result.seconds
    print(
        f"{equal} of {instances} layers: chain-Johnson = dynamic program = CP-SAT, and on {tried} = every order tried"
    )
    print("wall seconds: " + ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items()), file=sys.stderr)
    return {"instances": instances, "equal": equal, "exhaustive": tried}


def climb(rule: OrderRule, start: Draw, rng: np.random.Generator, starts: int, steps: int) -> tuple[float, Draw]:
    """The layer on which a rule does worst, by hill climbing from a given one and from random ones."""
    best, worst = ratio(start, rule), start
    for number in range(starts):
        now = draw(start.family, rng, int(rng.integers(2, 6)), int(rng.integers(1, 4))) if number else start
        value = ratio(now, rule)
        for _ in range(steps):
            other = mutated(now, rng)
            if (found := ratio(other, rule)) >= value:
                now, value = other, found
        if value > best:
            best, worst = value, now
    return best, worst


def worst_ratios(rng: np.random.Generator, instances: int) -> list[dict[str, Any]]:
    """Per family and rule: mean and largest ratio of random layers, and the worst that a search finds."""
    rows = []
    for family, about in FAMILIES.items():
        print(f"{family}: {about}")
        layers = [draw(family, rng, int(rng.integers(2, 9)), int(rng.integers(1, 4))) for _ in range(instances)]
        for rule in ("hebf", "hebf_exact", "resident_first"):
            ratios = np.array([ratio(one, rule) for one in layers])
            found, layer = climb(rule, layers[int(ratios.argmax())], rng, starts=8, steps=instances)
            row = {
                "family": family, "rule": rule, "optimal": float((ratios == 1).mean()), "mean": float(ratios.mean()),
                "max": float(ratios.max()), "worst found": found, "instance": layer.shown(),
            }  # fmt: skip
            rows.append(row)
            print(
                f"  {rule:14s} optimal in {row['optimal']:6.1%}, mean {row['mean']:.4f} x, max {row['max']:.3f} x, "
                f"worst found {found:.3f} x"
            )
            if found > 1:
                print(f"    at {layer.shown()}")
    return rows


def gains(rng: np.random.Generator, layers: int, cost: str, resident: float) -> list[dict[str, Any]]:
    """Mean ratio of each rule to the optimum, over compute / I/O; copies and whole experts are by id."""
    counts = [routed_counts(rng, 8, 32, 2) for _ in range(layers)]
    present = [np.zeros(count_EK.shape, dtype=np.bool_) for count_EK in counts]
    for present_EK in present:
        present_EK[:, 0] = rng.random(len(present_EK)) < resident
    print(f"8 experts, 32 tokens, top-2, 2-3-4 bits, {cost}'s cost, {resident:.0%} of base planes in memory:")
    print("  compute/IO" + "".join(f"  {name:>14s}" for name in KINDS) + "  by_id max  hebf max")
    rows = []
    for share in SHARES:
        found: dict[str, list[float]] = {name: [] for name in KINDS}
        for count_EK, present_EK in zip(counts, present, strict=True):
            items, times = (runtime_cost if cost == "runtime" else paper_cost)(count_EK, present_EK, share)
            best = makespan(items, times, "johnson")
            for rule in RULES:
                found[rule].append(makespan(items, times, rule) / best)
            found["whole experts"].append(makespan(*whole_experts(items, times), "by_id") / best)
            if cost == "runtime" and not resident:
                copies = runtime_cost(count_EK, present_EK, share, nested=False)
                found["copies"].append(makespan(*copies, "by_id") / best)
        two = {name: _two(values) for name, values in found.items() if values}
        rows.append({"cost": cost, "resident": resident, "compute/io": share, "over the optimum": two})
        shown = "".join(f"  {two[name]['mean']:14.4f}" if name in two else f"  {'-':>14s}" for name in KINDS)
        print(f"  {share:10.2f}{shown}  {two['by_id']['max']:9.3f}  {two['hebf']['max']:8.3f}")
    return rows


def buffers(rng: np.random.Generator, layers: int) -> list[dict[str, Any]]:
    """What a limited buffer costs, and how far a rule's fitting order is from the optimum with that limit.

    `johnson whole` is Johnson's rule on whole experts, which a buffer for one expert asks for.
    """
    rows = []
    print(f"{layers} layers of 4 experts, runtime cost, buffer in largest experts (optimum by CP-SAT):")
    for room in (1.0, 1.5, 2.0, 3.0):
        cost: list[float] = []
        proven = 0
        above: dict[str, list[float]] = {name: [] for name in ("by_id", "hebf", "johnson", "johnson whole", "better")}
        for number in range(layers):
            items, times = build(draw(("runtime", "runtime resident")[number % 2], rng, 4, 3))
            largest = int(np.bincount(items.expert_I, weights=times.bytes_I).max())
            if not largest:
                continue
            limit = int(room * largest)
            exact = solve_by_cpsat(items, times, buffer_bytes=limit, time_limit_s=10.0, isolated=False)
            proven += exact.stopped_by == "optimal"
            assert exact.objective is not None
            cost.append(exact.objective / makespan(items, times, "johnson"))
            for rule in ("by_id", "hebf", "johnson"):
                above[rule].append(solve_by_rule(items, times, rule, buffer_bytes=limit).objective / exact.objective)
            merged, sums = whole_experts(items, times)
            turn_I = np.argsort(order_items(merged, "johnson", sums))
            order_I = np.lexsort([items.plane_I, turn_I[np.searchsorted(merged.expert_I, items.expert_I)]])
            spans = run_in_order(items.taken(order_I), times.taken(order_I), limit)
            above["johnson whole"].append(spans.makespan_ns / exact.objective)
            above["better"].append(min(above["johnson"][-1], above["johnson whole"][-1]))
        assert min(cost) >= 1
        row = {"experts that fit": room, "proven": proven, "layers": len(cost), "optimum/unlimited": _two(cost)}
        rows.append(row | {"over the optimum": {name: _two(values) for name, values in above.items()}})
        print(f"  {room:.1f}: the limit costs {_shown(cost)}; {proven} of {len(cost)} proven; over the optimum:")
        print("       " + ", ".join(f"{name} {_shown(values)}" for name, values in above.items()))
    return rows


def ahead(rng: np.random.Generator, layers: int) -> list[dict[str, Any]]:
    """The most that reading ahead can gain with the demand known: 6 layers of 32 experts, 32 tokens, top-2."""
    rows = []
    print(f"reading ahead, 6 layers of 32 experts, unlimited buffers, optimal orders, {layers} iterations:")
    for share in SHARES:
        one, everything = [], []
        for _ in range(layers):
            loads = []
            for _ in range(6):
                count_EK = routed_counts(rng, 32, 32, 2)
                items, times = runtime_cost(count_EK, np.zeros(count_EK.shape, dtype=np.bool_), share)
                loads.append(LayerLoad(items=items, times=times, attention_ns=100_000))
            most = most_from_reading_ahead(loads)
            one.append(most.most_gain)
            everything.append(most.none_ns / most.everything_ns)
        rows.append({"compute/io": share, "one layer": _two(one), "everything": _two(everything)})
        print(f"  compute/IO {share:5.2f}: one layer ahead {_shown(one)}, everything {_shown(everything)}")
    return rows


def ahead_in_a_buffer(rng: np.random.Generator, cases: int) -> list[dict[str, Any]]:
    """Two layers of three experts in a small buffer, one layer ahead against none, both optimal by CP-SAT."""
    rows = []
    for room in (1.0, 2.0, 4.0):
        gain, proven = [], 0
        for _ in range(cases):
            built = [build(draw("runtime", rng, 3, 2)) for _ in range(2)]
            whole = max(int(np.bincount(i.expert_I, weights=t.bytes_I).max()) for i, t in built)
            loads = [LayerLoad(items=i, times=t, attention_ns=30) for i, t in built]
            limit = int(room * whole)
            none, one = (
                solve_layers_by_cpsat(loads, ahead=far, buffer_bytes=limit, time_limit_s=10.0, isolated=False)
                for far in (0, 1)
            )
            proven += none.proven and one.proven
            gain.append(none.objective / one.objective)
        rows.append({"experts that fit": room, "gain": _two(gain), "proven": proven, "cases": cases})
        print(
            f"  2 small layers, room for {room:.1f} experts: one layer ahead {_shown(gain)}, {proven} of {cases} proven"
        )
    return rows


def _two(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "max": float(np.max(values))}


def _shown(values: list[float]) -> str:
    return f"{np.mean(values):.3f} x (max {np.max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    rngs = np.random.default_rng(given.seed).spawn(7)
    few = max(2, given.instances // 20)
    started = time.process_time()
    found: dict[str, Any] = {"seed": given.seed, "instances": given.instances}
    found["agreement"] = agreement(rngs[0], given.instances)
    found["worst"] = worst_ratios(rngs[1], given.instances)
    tables = zip(rngs[2].spawn(4), (("D2MoE", 0.0), ("D2MoE", 0.5), ("runtime", 0.0), ("runtime", 0.5)), strict=True)
    found["gains"] = [row for rng, (cost, resident) in tables for row in gains(rng, 4 * few, cost, resident)]
    found["buffers"] = buffers(rngs[4], few)
    found["ahead"] = ahead(rngs[5], few // 5 + 1)
    found["ahead in a buffer"] = ahead_in_a_buffer(rngs[6], few // 2)
    print(f"{time.process_time() - started:.0f} processor seconds", file=sys.stderr)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
