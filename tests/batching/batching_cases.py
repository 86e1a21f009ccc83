"""Routes and traces for the batching tests, and slow oracles that share no code with what they judge."""

from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from placer.core.model import ModelSpec
from traces.trace import RoutingTrace


def random_routes(rng, tokens, sites=2, experts=5, top_k=2):
    """expert_LTK of random distinct experts."""
    ids = rng.random((sites, tokens, experts)).argsort(axis=2)[:, :, :top_k]
    return ids.astype(np.uint8)


def touched(expert_LTK, tokens):
    """The (site, expert) pairs that some tokens use, by sets."""
    return {(site, int(e)) for site in range(len(expert_LTK)) for t in tokens for e in expert_LTK[site, t] if e != 255}


def cost_of_split(expert_LTK, second):
    tokens = range(expert_LTK.shape[1])
    return len(touched(expert_LTK, [t for t in tokens if not second[t]])) + len(
        touched(expert_LTK, [t for t in tokens if second[t]])
    )


def cheapest_split(expert_LTK, size):
    """Every split with `size` tokens in the second batch."""
    tokens = range(expert_LTK.shape[1])
    return min(cost_of_split(expert_LTK, [t in chosen for t in tokens]) for chosen in combinations(tokens, size))


def trace_of(expert_LTK, experts, request_id_T=None, **columns):
    sites, tokens, top_k = expert_LTK.shape
    model = ModelSpec.uniform("case", num_experts=experts, top_k=top_k, num_hidden_layers=sites)
    requests = np.arange(tokens) % 4 if request_id_T is None else request_id_T
    return RoutingTrace(
        model=model, expert_LTK=expert_LTK, request_id_T=np.asarray(requests, dtype=np.int32), **columns
    )


seeds = st.integers(0, 2**32 - 1)
