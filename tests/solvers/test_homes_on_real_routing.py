"""Homes on recorded routing: the anchors of example 05, with experts in contiguous blocks so that nothing is solved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.core.dispatch import source_ranks
from placer.core.homes import first_tokens, request_tokens, request_touch
from placer.core.plan import Plan
from solvers.affinity.align_homes import align_for_homes
from solvers.affinity.homes import assign_homes
from solvers.affinity.predict import touch_from_prefix
from solvers.affinity.prefix_model import fit_prefix_model
from solvers.ranks import relabel_ranks
from traces.readers import read_any

TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gptoss20b" / "mmlu.npz"
RANKS = 8


@pytest.mark.data
@pytest.mark.skipif(not TRACE.exists(), reason="the developers' real traces are not here")
def test_eight_tokens_of_unseen_requests_keep_most_of_what_knowing_them_gives() -> None:
    halves = read_any(TRACE).split_by_request(0.5, 0)
    layers, experts = halves[0].model.num_sites, halves[0].model.num_experts
    plan = Plan(
        model="gpt-oss-20b",
        num_experts=experts,
        num_ranks=RANKS,
        ranks_per_node=RANKS,
        moe_layers=tuple(range(layers)),
        slot_expert_LP=np.tile(np.arange(experts), (layers, 1)),
        mode="per_rank",
    )
    index = [np.unique(half.request_id_T, return_inverse=True)[1] for half in halves]
    tokens = [request_tokens(index_T, int(index_T.max()) + 1) for index_T in index]
    touch_LQR = request_touch(plan, halves[0].expert_LTK, index[0], len(tokens[0]))
    labels = align_for_homes(touch_LQR, tokens[0], ranks_per_node=RANKS, slack=0.05)
    plan = replace(plan, slot_expert_LP=relabel_ranks(plan.slot_expert_LP, labels.order_LR))
    whole, seen, known = [], [], []
    for half, index_T, tokens_Q in zip(halves, index, tokens, strict=True):
        first_T = first_tokens(index_T, 8)
        whole.append(request_touch(plan, half.expert_LTK, index_T, len(tokens_Q)).sum(axis=0))
        seen.append(request_touch(plan, half.expert_LTK[:, first_T], index_T[first_T], len(tokens_Q)))
        known.append(request_tokens(index_T[first_T], len(tokens_Q)))
    dealt_Q = np.zeros(len(tokens[1]), dtype=np.int64)
    dealt_Q[index[1]] = source_ranks(halves[1].request_id_T, RANKS)
    learnt = fit_prefix_model(seen[0], known[0], whole[0], tokens[0]).predict(seen[1], known[1], tokens[1])
    plain = touch_from_prefix(seen[1].sum(axis=0), known[1], tokens[1])
    homes = [dealt_Q, *(assign_homes(touch_QR, tokens[1], RANKS, 0.05) for touch_QR in (plain, learnt, whole[1]))]
    at_home = [whole[1][np.arange(len(home_Q)), home_Q].sum() / (tokens[1].sum() * layers) for home_Q in homes]
    assert at_home[3] > at_home[0] + 0.1
    assert at_home[0] < at_home[1] < at_home[2] - 0.01
    assert at_home[2] - at_home[0] > 0.7 * (at_home[3] - at_home[0])
