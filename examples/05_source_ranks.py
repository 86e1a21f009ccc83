"""Which rank should run a request's attention: copies saved by homes near the experts, known or predicted.

    python examples/05_source_ranks.py TRACE [--model PRESET] [--cluster node8] [--plan PLAN | --solver coactivation]

Labels of ranks are aligned over layers on the planning half of the requests; homes are given to the other half and
judged there, by replay. "rates" takes the first tokens' touches as they are, "learnt" by a regression on the planning
half. "then moved": the first tokens are counted where they ran, on the rank dealt in turn. The
balance of homes knows each request's length, also where its routing is predicted.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from placer.config import load_cluster
from placer.core.dispatch import source_ranks
from placer.core.evaluate import Evaluation
from placer.core.homes import first_tokens, request_tokens, request_touch
from placer.core.plan import Plan
from placer.pipeline import judge, open_trace, solve
from placer.report.tables import DataTable, render
from solvers.affinity.align_homes import align_for_homes
from solvers.affinity.homes import assign_homes
from solvers.affinity.predict import touch_from_prefix, touch_from_tag
from solvers.affinity.prefix_model import fit_prefix_model
from solvers.ranks import relabel_ranks
from traces.hf_config import MODELS
from traces.trace import RoutingTrace

PREFIXES = (8, 16, 32, 64)
COLUMNS = ("labels", "homes by", "at home %", "copies sent", "saved %", "of oracle %", "fullest / mean")


def index_of(trace: RoutingTrace) -> tuple[np.ndarray, int]:
    """Request of each token, counted from 0, and how many there are."""
    ids, index_T = np.unique(trace.request_id_T, return_inverse=True)
    return index_T, len(ids)


def touch_of_first(plan: Plan, trace: RoutingTrace, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Touches (L, Q, R) and number of each request's first `count` tokens, and which tokens those are."""
    index_T, requests = index_of(trace)
    first_T = first_tokens(index_T, count)
    seen_LQR = request_touch(plan, trace.expert_LTK[:, first_T], index_T[first_T], requests)
    return seen_LQR, request_tokens(index_T[first_T], requests), first_T


def aligned(plan: Plan, train: RoutingTrace, slack: float) -> Plan:
    """The plan with its ranks relabelled for the planning half's requests."""
    index_T, requests = index_of(train)
    touch_LQR = request_touch(plan, train.expert_LTK, index_T, requests)
    tokens_Q = request_tokens(index_T, requests)
    labels = align_for_homes(touch_LQR, tokens_Q, ranks_per_node=plan.ranks_per_node, slack=slack)
    share = plan.replica_share_LP
    return replace(
        plan,
        slot_expert_LP=relabel_ranks(plan.slot_expert_LP, labels.order_LR),
        replica_share_LP=None if share is None else relabel_ranks(share, labels.order_LR),
    )


def homes(plan: Plan, train: RoutingTrace, test: RoutingTrace, slack: float) -> dict[str, np.ndarray]:
    """Source rank of each token of the judged half under every way to choose it."""
    index_T, requests = index_of(test)
    tokens_Q, ranks = request_tokens(index_T, requests), plan.num_ranks
    dealt_T = source_ranks(test.request_id_T, ranks)
    touch_QR = request_touch(plan, test.expert_LTK, index_T, requests).sum(axis=0)
    ways = {"turn": dealt_T, "own routing (oracle)": assign_homes(touch_QR, tokens_Q, ranks, slack)[index_T]}
    train_T, train_requests = index_of(train)
    train_QR = request_touch(plan, train.expert_LTK, train_T, train_requests).sum(axis=0)
    known_Q = request_tokens(train_T, train_requests)
    for count in PREFIXES:
        seen_LQR, seen_Q, first_T = touch_of_first(plan, test, count)
        model = fit_prefix_model(*touch_of_first(plan, train, count)[:2], train_QR, known_Q)
        predictions = {
            "rates": touch_from_prefix(seen_LQR.sum(axis=0), seen_Q, tokens_Q),
            "learnt": model.predict(seen_LQR, seen_Q, tokens_Q),
        }
        for name, predicted_QR in predictions.items():
            home_T = assign_homes(predicted_QR, tokens_Q, ranks, slack)[index_T]
            ways[f"first {count} tokens, {name}"] = home_T
            ways[f"first {count} tokens, {name}, then moved"] = np.where(first_T, dealt_T, home_T)
    for name, tag in test.tags.items():
        new_tag_Q, tag_Q = np.zeros(requests, np.int64), np.zeros(train_requests, np.int64)
        new_tag_Q[index_T], tag_Q[train_T] = tag.codes_T, train.tags[name].codes_T
        predicted_QR = touch_from_tag(train_QR, known_Q, tag_Q, new_tag_Q, tokens_Q)
        ways[f"tag: {name}"] = assign_homes(predicted_QR, tokens_Q, ranks, slack)[index_T]
    return ways


def main() -> None:
    """Parses the arguments, judges every way on both labellings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS))
    parser.add_argument("--cluster", default="node8")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--solver", default="coactivation")
    parser.add_argument("--slack", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    trace = open_trace(given.trace, MODELS.get(given.model))
    train, test = trace.split_by_request(0.5, given.seed)
    cluster = load_cluster(given.cluster)
    plan = Plan.load(given.plan) if given.plan else solve(train, cluster, solver=given.solver, time_limit_s=600).plan
    rows = []
    for label, labelled in (("planned", plan), ("aligned", aligned(plan, train, given.slack))):
        ways = homes(labelled, train, test, given.slack)
        if label == "planned":
            # what alignment is worth; predictions are for aligned labels
            ways = dict(list(ways.items())[:2])
        results = {}
        for way, home_T in ways.items():
            results[way] = judge(labelled, replace(test, source_rank_T=home_T.astype(np.int32)), cluster)
            assert isinstance(results[way], Evaluation)
        dealt, oracle = (results[way].copies_sent for way in list(ways)[:2])
        for way, result in results.items():
            load_R = np.bincount(ways[way], minlength=cluster.num_ranks)
            saved = dealt - result.copies_sent
            at_home = 100 * (result.ranks_touched - result.copies_sent)
            kept = 100 * saved / (dealt - oracle) if dealt > oracle else 0.0
            rows.append((label, way, at_home, result.copies_sent, 100 * saved / dealt, kept,
                         float(load_R.max() / load_R.mean())))  # fmt: skip
    title = f"{given.trace.name}, {given.cluster}, per_rank, {plan.solver}: {test.num_requests} judged requests"
    render(DataTable(title=title, columns=COLUMNS, rows=tuple(rows)), Console(width=120))


if __name__ == "__main__":
    main()
