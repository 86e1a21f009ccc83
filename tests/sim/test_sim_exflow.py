"""ExFlow's volumes (arXiv 2401.08383, section 4): dispatch + combine 2 G N L p, context-coherent G N (L p* + G)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from simcases import Case, cases

from placer.core.timeline import PHASES


@settings(max_examples=60, deadline=None)
@given(case=cases(replicas=False, top_k=1), fidelity=st.sampled_from(["port", "phase"]))
def test_volumes(case: Case, fidelity: str) -> None:
    """p: share of (token, layer) whose expert is off the source rank; p*: off the rank of the expert before.

    ExFlow counts a rank's gather to itself as one of G; copies that move are G - 1.
    """
    rank_of_LE = np.stack([expert_ranks(row, case) for row in case.plan.slot_expert_LP])
    layers, tokens, _ = case.expert_LTK.shape
    leaves = stays_off = 0
    for token in range(tokens):
        here = home = int(case.source_T[token])
        for layer in range(layers):
            expert = int(case.expert_LTK[layer, token, 0])
            if expert >= 0:
                leaves += rank_of_LE[layer, expert] != home
                stays_off += rank_of_LE[layer, expert] != here
                here = rank_of_LE[layer, expert]
    ranks, size = case.cluster.num_ranks, case.model.token_bytes
    p, p_star = leaves / (tokens * layers), stays_off / (tokens * layers)
    standard = case.simulate(fidelity, mode="per_expert")
    assert standard.sent_bytes.sum() == round(2 * tokens * layers * p) * size
    coherent = case.simulate(fidelity, mode="coherent")
    gather = coherent.phase == PHASES.index("gather")
    assert coherent.sent_bytes[~gather].sum() == round(tokens * layers * p_star) * size
    assert coherent.sent_bytes.sum() == round(tokens * (layers * p_star + ranks - 1)) * size


def expert_ranks(slot_expert_P: np.ndarray, case: Case) -> list[int]:
    per_rank = len(slot_expert_P) // case.cluster.num_ranks
    return [int(np.flatnonzero(slot_expert_P == expert)[0]) // per_rank for expert in range(case.plan.num_experts)]
