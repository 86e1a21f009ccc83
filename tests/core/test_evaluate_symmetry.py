"""Names do not matter: permuting expert ids, or ranks and nodes with the source ranks, leaves every number as it is.

Legend: E experts, P slots, R ranks.
"""

import dataclasses

import numpy as np
import pytest
from core_cases import UNSET, Case, cases, count_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.evaluate import evaluate
from placer.core.evaluate_profile import evaluate_profile
from placer.core.modes import DISPATCH_MODES


def figures(case: Case, modes: tuple = DISPATCH_MODES) -> dict:
    result = evaluate(
        case.plan,
        case.model,
        case.cluster,
        case.expert_LTK,
        case.source_T,
        window_tokens=case.window_tokens,
        batch_tokens=case.batch_tokens,
        modes=modes,
    )
    return dataclasses.asdict(result)


def rename_experts(case: Case, seed: int) -> Case:
    new_E = np.random.default_rng(seed).permutation(case.plan.num_experts)
    expert_LTK = case.expert_LTK.copy()
    used = expert_LTK != UNSET
    expert_LTK[used] = new_E[expert_LTK[used]]
    plan = dataclasses.replace(case.plan, slot_expert_LP=new_E[case.plan.slot_expert_LP])
    return dataclasses.replace(case, plan=plan, expert_LTK=expert_LTK)


def rename_ranks(case: Case, new_R: np.ndarray) -> Case:
    """Rank r of `case` is rank new_R[r] of the result."""
    layers, ranks = len(case.plan.slot_expert_LP), case.plan.num_ranks
    blocks_LRC = case.plan.slot_expert_LP.reshape(layers, ranks, -1)
    renamed = np.empty_like(blocks_LRC)
    renamed[:, new_R] = blocks_LRC
    plan = dataclasses.replace(case.plan, slot_expert_LP=renamed.reshape(layers, -1))
    return dataclasses.replace(case, plan=plan, source_T=new_R[case.source_T])


@settings(max_examples=40, deadline=None)
@given(case=cases(replicas=False), seed=st.integers(0, 2**32 - 1))
def test_expert_ids_do_not_matter(case: Case, seed: int) -> None:
    renamed = rename_experts(case, seed)
    assert figures(renamed) == figures(case)
    one, other = (evaluate_profile(c.plan, count_profile(c)) for c in (case, renamed))
    assert one == other


@pytest.mark.parametrize("choice", ["token_hash", "fixed_source", "round_robin"])
@settings(max_examples=30, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_expert_ids_do_not_matter_to_choices_that_do_not_hash_them(choice: str, case: Case, seed: int) -> None:
    case = dataclasses.replace(case, plan=dataclasses.replace(case.plan, replica_choice=choice))
    assert figures(rename_experts(case, seed)) == figures(case)


@settings(max_examples=40, deadline=None)
@given(case=cases(replicas=False), seed=st.integers(0, 2**32 - 1))
def test_rank_labels_do_not_matter(case: Case, seed: int) -> None:
    """Nodes change places, and ranks inside each node, each node in its own way.

    per_node enters a node at the rank of the sender's own number there, so its ranks move alike in all nodes.
    """
    rng = np.random.default_rng(seed)
    nodes, per_node = case.cluster.nodes, case.cluster.ranks_per_node
    node_N = rng.permutation(nodes)
    free = np.concatenate([node * per_node + rng.permutation(per_node) for node in node_N])
    alike_R = rng.permutation(per_node)
    same = np.concatenate([node * per_node + alike_R for node in node_N])
    plan = dataclasses.replace(case.plan, mode="per_rank")
    case = dataclasses.replace(case, plan=plan)
    others = tuple(mode for mode in DISPATCH_MODES if mode != "per_node")
    assert figures(rename_ranks(case, free), others) == figures(case, others)
    assert figures(rename_ranks(case, same)) == figures(case)
    assert evaluate_profile(rename_ranks(case, free).plan, count_profile(case)) == evaluate_profile(
        case.plan, count_profile(case)
    )


@settings(max_examples=30, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_order_of_slots_on_a_rank_does_not_matter_without_replicas(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, ranks = len(case.plan.slot_expert_LP), case.plan.num_ranks
    if case.plan.num_slots != case.plan.num_experts:
        return
    blocks_LRC = rng.permuted(case.plan.slot_expert_LP.reshape(layers, ranks, -1), axis=2)
    plan = dataclasses.replace(case.plan, slot_expert_LP=blocks_LRC.reshape(layers, -1))
    assert figures(dataclasses.replace(case, plan=plan)) == figures(case)


@settings(max_examples=30, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_order_inside_a_row_does_not_matter_to_counts(case: Case, seed: int) -> None:
    """Which expert the router names first matters to `coherent` and visit_first only."""
    plan = dataclasses.replace(case.plan, mode="per_rank", replica_choice="token_hash")
    case = dataclasses.replace(case, plan=plan)
    shuffled = np.random.default_rng(seed).permuted(case.expert_LTK, axis=2)
    others = tuple(mode for mode in DISPATCH_MODES if mode != "coherent")
    assert figures(dataclasses.replace(case, expert_LTK=shuffled), others) == figures(case, others)
