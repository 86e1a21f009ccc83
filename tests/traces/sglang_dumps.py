"""Files as SGLang's recorder writes them, made by the same torch.save."""

import numpy as np

LAYERS, EXPERTS, PHYSICAL, WIDTH = 4, 8, 12, 8
DENSE = 0
"""Layer 0 is dense: blank in every dump."""


def physical_map(seed=0):
    """(L, P): every expert once, then replicas of some, in an order of its own in each layer."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.concatenate([np.arange(EXPERTS), rng.permutation(EXPERTS)[:4]])) for _ in range(LAYERS)]
    return np.stack(rows)


def logical_ids(tokens, top_k=2, seed=0):
    """(L, T, K) logical ids, -1 in the dense layer."""
    rng = np.random.default_rng(seed)
    ids = rng.random((LAYERS, tokens, EXPERTS)).argsort(axis=2)[:, :, :top_k]
    ids[DENSE] = -1
    return ids


def physical_ids(logical_LTK, map_LP, seed=0):
    """One of each expert's slots, at random, padded with -1 to the recorder's eight columns."""
    rng = np.random.default_rng(seed)
    padded = np.full((*logical_LTK.shape[:2], WIDTH), -1)
    for place in np.ndindex(logical_LTK.shape):
        if logical_LTK[place] >= 0:
            slots = np.flatnonzero(map_LP[place[0]] == logical_LTK[place])
            padded[place] = rng.choice(slots)
    return padded


def token_record(torch, forward_pass, rank, logical_LTK, map_LP, positions, lengths, mode, seed=0):
    """One record of a per_token dump."""
    physical = physical_ids(logical_LTK, map_LP, seed)
    counts = np.zeros((LAYERS, PHYSICAL), dtype=np.int32)
    for layer in range(LAYERS):
        counts[layer] = np.bincount(physical[layer][physical[layer] >= 0], minlength=PHYSICAL)
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [100 * rank + position for position in positions],
        "positions": list(positions),
        "extend_seq_lens": lengths,
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(physical, dtype=torch.int32),
        "global_physical_count": torch.tensor(counts),
        "misc_objects": [],
    }


def pass_record(torch, forward_pass, rank, counts_LP):
    """One record of a per_pass dump."""
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": torch.tensor(counts_LP, dtype=torch.int32),
    }


def save(torch, path, records, map_LP):
    """A per_pass or per_token file."""
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(map_LP)}, path)
