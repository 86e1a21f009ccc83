"""How well routing is foretold, and the experts that batches touch, first come first served and expert-aware.

    python examples/device/batching.py TRACE [--batch 16] [--queue 128] [--wait 24] [--seed 0] [--json OUT]

Predictors are fitted to one half of the requests; everything is judged on the other half, decoding: a batch takes the
next token of some of the requests that are waiting. Four tables:

1. predictors: share of (token, expert) pairs foretold, experts of a batch foretold (recall) and foretold rightly
   (precision), and the hit rate of a cache of rho * k experts a layer with what is foretold loaded ahead. A transition
   predictor knows the layer before and prefetches one layer ahead; the others know all layers before the token runs.
2. expert-aware batching from a queue: by the tokens' own routes (an oracle) and by foretold ones that are known before
   the token runs, always judged by the true routes. Waits are in batches.
3. Read-ME's algorithm 1 as printed, mended: every layer by itself, each token's heaviest expert, queues of --queue.
4. ExpertFlow's re-batching: two batches of --batch requests merged and split anew; CP-SAT's bound on small ones.
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
from solvers.batching.expert_aware import Batching, aware_batches
from solvers.batching.longest_queue import fifo_batches, longest_queue_batches
from solvers.batching.routes import pack_routes, unique_experts
from solvers.batching.split import split_cost, split_tokens
from solvers.batching.split_exact import solve_split
from solvers.cache.policies import simulate_cache
from solvers.cache.prefetch import hit_rate_with_prediction
from traces.accesses import trace_accesses
from traces.device_work import decode_batches
from traces.hf_config import MODELS
from traces.predictors.fit import PREDICTORS, fit_predictor, predict
from traces.predictors.judge import judge_prediction
from traces.predictors.repeat import repeat_token
from traces.trace import RoutingTrace

RHOS = (1, 2, 3)
PAIRS = 200
EXACT_BATCH, EXACT_PAIRS, EXACT_SECONDS = 8, 6, 20.0


def predictions(train: RoutingTrace, test: RoutingTrace) -> dict[str, np.ndarray]:
    """What each predictor says of the judged half; token_id only where the trace has token ids."""
    kinds = [kind for kind in PREDICTORS if kind != "token_id" or test.token_id_T is not None]
    return {kind: predict(fit_predictor(train, kind), test) for kind in kinds} | {"token before": repeat_token(test)}


def predictor_table(test: RoutingTrace, foretold: dict[str, np.ndarray], batch: int, title: str) -> DataTable:
    """Accuracy of the predictors and hit rates with them."""
    batches = decode_batches(test, batch)
    slots = [min(rho * test.model.top_k, test.model.num_experts) for rho in RHOS]
    plain = [simulate_cache(trace_accesses(test, batches), "lru", n).hit_rate for n in slots]
    rows: list[tuple[Any, ...]] = [("none (LRU)", None, None, None, None, None, *(100 * rate for rate in plain))]
    for name, predicted_LTK in {**foretold, "oracle": np.array(test.expert_LTK)}.items():
        found = judge_prediction(predicted_LTK, test, batches)
        runs = [hit_rate_with_prediction(test, predicted_LTK, n, batches) for n in slots]
        pair_L = 100 * found.pair_L
        rows.append(
            (name, float(pair_L.mean()), float(pair_L.min()), float(pair_L.max()), 100 * float(found.recall_L.mean()),
             100 * float(found.precision_L.mean()), *(100 * run.hit_rate for run in runs))
        )  # fmt: skip
    heads = ("predictor", "pairs %", "worst layer", "best layer", "recall %", "precision %")
    notes = () if test.token_id_T is not None else ("the trace has no token ids: no token-id table",)
    columns = (*heads, *(f"hit %, rho {rho}" for rho in RHOS))
    return DataTable(title=f"1. predictors, {title}", columns=columns, rows=tuple(rows), notes=notes)


def batching_table(
    test: RoutingTrace, foretold: dict[str, np.ndarray], batch: int, queue: int, wait: int, title: str
) -> DataTable:
    """Unique experts and waits with and without expert-aware batching, with and without a guard."""
    experts, sites = test.model.num_experts, test.model.num_sites
    true_TW, requests = pack_routes(test.expert_LTK, experts), np.asarray(test.request_id_T)
    fifo = -(-queue // batch) - 1
    made: dict[str, Batching] = {
        "first come": aware_batches(true_TW, batch, queue, max_wait=fifo, request_id_T=requests),
        "aware, from the hottest, no guard": aware_batches(
            true_TW, batch, queue, start="hottest", request_id_T=requests
        ),
        f"aware, from the hottest, wait <= {wait}": aware_batches(
            true_TW, batch, queue, start="hottest", max_wait=wait, request_id_T=requests
        ),
        "aware, from the oldest, no guard": aware_batches(true_TW, batch, queue, request_id_T=requests),
        f"aware, from the oldest, wait <= {wait}": aware_batches(
            true_TW, batch, queue, max_wait=wait, request_id_T=requests
        ),
    }
    for name in ("token_id", "token before"):
        if name in foretold:
            route_TW = pack_routes(foretold[name], experts)
            made[f"  the same by {name}"] = aware_batches(route_TW, batch, queue, max_wait=wait, request_id_T=requests)
    base, rows = 0, []
    for name, batching in made.items():
        unique_B = unique_experts(true_TW, batching.batch_T)
        full_B = np.bincount(batching.batch_T) == batch
        total = int(unique_B.sum())
        base = base or total
        rows.append(
            (name, float(unique_B[full_B].mean()) / sites, total / test.num_tokens / sites, 100 * (total / base - 1),
             batching.num_batches, batching.wait_percentile(50), batching.wait_percentile(99),
             int(batching.wait_T.max()))
        )  # fmt: skip
    columns = (
        "batches", "experts, full batch", "loads per token", "loads, %", "number", "p50 wait", "p99 wait", "longest",
    )  # fmt: skip
    notes = ("experts and loads (unique experts summed over batches) are per layer",)
    return DataTable(title=f"2. batching, {title}, queue {queue}", columns=columns, rows=tuple(rows), notes=notes)


def paper_table(test: RoutingTrace, batch: int, queue: int, title: str) -> DataTable:
    """Algorithm 1 on the heaviest expert of each token, layer by layer, the queue filled and emptied again."""
    order_T = np.concatenate(decode_batches(test, queue))
    ones = np.ones(queue, dtype=np.int64)
    found = np.zeros((2, test.model.num_sites))
    waits: list[list[np.ndarray]] = [[], []]
    chunks = [order_T[at : at + queue] for at in range(0, len(order_T) - queue + 1, queue)]
    more = 0
    for site, spec in enumerate(test.model.sites):
        for index_T in chunks:
            expert_I = test.expert_LTK[site, index_T, 0].astype(np.int64)
            route_TW = pack_routes(test.expert_LTK[site : site + 1, index_T, :1], spec.num_experts)
            both = fifo_batches(ones, batch), longest_queue_batches(expert_I, ones, batch)
            unique = [int(unique_experts(route_TW, batch_I).sum()) for batch_I in both]
            more += unique[1] > unique[0]
            for way, batch_I in enumerate(both):
                found[way, site] += unique[way] / (batch_I.max() + 1) / len(chunks)
                waits[way].append(batch_I)
    rows = [
        (name, float(found[way].mean()), float(found[way].min()), float(found[way].max()),
         float(np.percentile(np.concatenate(waits[way]), 99)))
        for way, name in enumerate(("first come", "longest queue first"))
    ]  # fmt: skip
    columns = ("batches", "experts of a batch", "fewest layer", "most layer", "p99 wait")
    notes = (f"more experts than first come, first served in {more} of {len(chunks) * test.model.num_sites} queues",)
    return DataTable(title=f"3. algorithm 1, {title}, queue {queue}", columns=columns, rows=tuple(rows), notes=notes)


def split_table(test: RoutingTrace, batch: int, seed: int, title: str) -> DataTable:
    """What re-batching saves on pairs of batches, and how far it is from CP-SAT's bound on small ones."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for size, most, exact in ((batch, PAIRS, False), (EXACT_BATCH, EXACT_PAIRS, True)):
        pairs = [index_T for index_T in decode_batches(test, 2 * size) if len(index_T) == 2 * size]
        total = np.zeros(4, dtype=np.int64)
        proved = 0
        chosen = [pairs[at] for at in np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).astype(int))]
        for index_T in chosen:
            route_TW = pack_routes(test.expert_LTK[:, index_T], test.model.num_experts)
            given_T = np.arange(2 * size) >= size
            found_T = split_tokens(route_TW, rng, given_T=given_T)
            total[:2] += split_cost(route_TW, given_T), split_cost(route_TW, found_T)
            if exact:
                best = solve_split(route_TW, time_limit_s=EXACT_SECONDS, given_T=given_T, seed=seed)
                total[2:] += best.objective, best.bound
                proved += best.objective == best.bound
        given, found, optimum, bound = total.tolist()
        extra = (optimum, bound, f"{proved} of {len(chosen)}") if exact else (None, None, None)
        rows.append((f"2 x {size}", len(chosen), given, found, 100 * (found / given - 1), *extra))
    columns = ("tokens", "pairs", "experts, given", "re-batched", "%", "CP-SAT", "bound", "proved optimal")
    return DataTable(title=f"4. re-batching, {title}", columns=columns, rows=tuple(rows))


def main() -> None:
    """Reads the trace, prints the four tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--queue", type=int, default=128)
    parser.add_argument("--wait", type=int, default=24, help="the guard: batches that a token waits at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    try:
        trace = open_trace(given.trace, MODELS.get(given.model))
        train, test = trace.split_by_request(0.5, given.seed)
        title = f"{given.trace.name}, batches of {given.batch}"
        foretold = predictions(train, test)
        tables = [
            predictor_table(test, foretold, given.batch, title),
            batching_table(test, foretold, given.batch, given.queue, given.wait, title),
            paper_table(test, given.batch, given.queue, title),
            split_table(test, given.batch, given.seed, title),
        ]
    except PlacerError as error:
        parser.exit(error.exit_code, f"{error}\n")
    console = Console(width=140)
    for table in tables:
        render(table, console)
    if given.json:
        about = {"trace": given.trace.name, "sha256": trace.sha256, "seed": given.seed, "batch": given.batch}
        about |= {"queue": given.queue, "wait": given.wait, "judged_requests": test.num_requests}
        found = {"about": about, "tables": [table.to_dict() for table in tables]}
        write_text_atomically(given.json, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
