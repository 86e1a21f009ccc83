"""Small traces and slow, plain replays of caches, for the tests of this folder."""

import numpy as np

from placer.core.model import ModelSpec, Site
from traces.ids import id_dtype
from traces.trace import RoutingTrace


def trace_of(expert_LTK, experts, request_id_T=None):
    """A trace of exactly these ids."""
    expert_LTK = np.asarray(expert_LTK)
    layers, tokens, top_k = expert_LTK.shape
    sites = tuple(Site(layer=row, num_experts=experts) for row in range(layers))
    model = ModelSpec(
        name="case", num_hidden_layers=layers, sites=sites, top_k=top_k, hidden_size=16, moe_intermediate_size=8
    )
    requests = np.zeros(tokens, dtype=np.int32) if request_id_T is None else np.asarray(request_id_T, dtype=np.int32)
    return RoutingTrace(model=model, expert_LTK=expert_LTK.astype(id_dtype(experts)), request_id_T=requests)


def random_trace(seed, *, layers=2, tokens=30, experts=6, top_k=2, requests=3, stay=0.0, skew=0.0):
    """Distinct experts a token; `stay` keeps a token's experts from the one before, `skew` makes low ids popular."""
    rng = np.random.default_rng(seed)
    share_E = (np.arange(experts) + 1.0) ** -skew
    ids = np.empty((layers, tokens, top_k), dtype=np.int64)
    for layer in range(layers):
        order_E = rng.permutation(experts)
        for token in range(tokens):
            if token and rng.random() < stay:
                ids[layer, token] = ids[layer, token - 1]
            else:
                ids[layer, token] = order_E[rng.choice(experts, top_k, replace=False, p=share_E / share_E.sum())]
    return trace_of(ids, experts, np.sort(rng.integers(0, requests, tokens)))


def steps_of(accesses, site):
    """The sets of one site's steps."""
    start_S = accesses.start_LS[site]
    return [accesses.expert_A[start_S[s] : start_S[s + 1]].tolist() for s in range(accesses.num_steps)]


def lru_by_hand(steps, slots):
    """Hits of an LRU that a list of experts, oldest first, makes plain."""
    held, hits = [], 0
    for step in steps:
        hits += sum(expert in held for expert in step)
        for expert in step:
            if expert in held:
                held.remove(expert)
            held.append(expert)
        held = held[max(0, len(held) - slots) :]
    return hits
