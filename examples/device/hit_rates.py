"""Hit rates of caches of experts on a routing trace, from random replacement to the optimum and to prefetching ones.

    python examples/device/hit_rates.py TRACE [--window 16] [--requests 16] [--seed 0] [--json FILE]

A cache of size rho holds rho k experts of every layer (ExpertFlow: of all layers together, rho k a layer on average).
Two tables: the trace as one stream, token by token, and in decode batches of so many requests, where a batch needs
each of its experts once. Loads are per access, those ahead of a layer included: a prefetched hit is not a free one.
Above them SRP and the advice that follows from it.

LRU, LFU, random, SCH v2 and Belady load on demand; Belady is the most that this can hit. SCH v1 fills a new best set
for every window free of charge and ExpertFlow loads ahead, so both may be above it. ExpertFlow's predictor is the trace
itself with that share of its ids right and the others drawn at random; "fixed slots" is the same without slots that
move from layer to layer.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from placer.core.atomic import write_text_atomically
from placer.core.errors import PlacerError
from placer.pipeline import open_trace
from placer.report.tables import DataTable, render
from solvers.cache.expert_flow import expert_flow
from solvers.cache.policies import CacheRule, simulate_cache
from solvers.cache.prefetch import corrupted_prediction, hit_rate_with_prediction
from traces.accesses import trace_accesses
from traces.device_work import decode_batches
from traces.locality import offload_advice, sch_v1, segment_routing
from traces.trace import RoutingTrace

RHOS = (1, 2, 3, 4)
RULES: dict[str, CacheRule] = {
    "random": "random",
    "LRU": "lru",
    "LFU": "lfu",
    "SCH v2": "sch",
    "Belady": "belady",
}
ACCURACIES = {"1.0": 1.0, "0.9": 0.9, "0.7": 0.7, "random": 0.0}
Rows = dict[str, dict[str, list[float]]]


def hit_rates(
    trace: RoutingTrace, batches: list[np.ndarray[Any, np.dtype[np.int64]]] | None, window: int, seed: int
) -> Rows:
    """{policy: {"hit rate": by rho, "loads": loads per access by rho}}; SCH v1 has no loads."""
    accesses = trace_accesses(trace, batches)
    slots = [min(rho * trace.model.top_k, trace.model.num_experts) for rho in RHOS]
    rows: Rows = {}
    for name, rule in RULES.items():
        runs = [simulate_cache(accesses, rule, n, window=window, rng=np.random.default_rng(seed)) for n in slots]
        rows[name] = {"hit rate": [run.hit_rate for run in runs], "loads": [run.loads_per_access for run in runs]}
    rows["SCH v1"] = {"hit rate": [sch_v1(trace, window, n, batches).hit_rate for n in slots]}
    for name, accuracy in ACCURACIES.items():
        predicted_LTK = corrupted_prediction(trace, accuracy, np.random.default_rng(seed))
        for kind, replay in (("ExpertFlow", expert_flow), ("fixed slots", hit_rate_with_prediction)):
            runs = [replay(trace, predicted_LTK, n, batches) for n in slots]
            rows[f"{kind}, predictor {name}"] = {
                "hit rate": [run.hit_rate for run in runs],
                "loads": [run.loads_per_access for run in runs],
            }
    return rows


def main() -> None:
    """Reads the trace, prints the advice and both tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--window", type=int, default=16, metavar="TOKENS", help="m of SRP and SCH")
    parser.add_argument("--requests", type=int, default=16, help="requests of a decode batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    try:
        trace = open_trace(given.trace)
        advice = offload_advice(trace, given.window)
        batches = decode_batches(trace, given.requests)
    except PlacerError as error:
        parser.exit(error.exit_code, f"{error}\n")
    console = Console(width=130)
    console.print(advice.text, soft_wrap=True, highlight=False)
    tables = {"one stream": hit_rates(trace, None, given.window, given.seed)}
    tables[f"decode batches of {given.requests}"] = hit_rates(trace, batches, given.window, given.seed)
    heads = ("policy", *(f"hit %, rho {rho}" for rho in RHOS), *(f"loads, rho {rho}" for rho in RHOS))
    for name, rows in tables.items():
        cells = tuple(
            (policy, *(100 * rate for rate in row["hit rate"]), *row.get("loads", ("-",) * len(RHOS)))
            for policy, row in rows.items()
        )
        render(DataTable(title=f"{given.trace.name}, {name}, m = {given.window}", columns=heads, rows=cells), console)
    if given.json:
        routing = segment_routing(trace, given.window)
        about = {"trace": given.trace.name, "sha256": trace.sha256, "window": given.window, "seed": given.seed}
        about |= {"top_k": trace.model.top_k, "experts": trace.model.num_experts, "sites": trace.model.num_sites}
        found = {"srp": routing.model, "srp_by_layer": routing.layer_L.tolist(), "rho": routing.rho}
        found |= {"uniform_srp": advice.uniform, "advice": advice.text, "pays": advice.pays}
        text = json.dumps({"about": about, "rho": RHOS, **found, "tables": tables}, indent=1)
        write_text_atomically(given.json, text + "\n")


if __name__ == "__main__":
    main()
