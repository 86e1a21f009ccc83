"""Record which experts the trained model chooses for prompts it has never seen.

    python examples/small_moe/record.py --work ~/small-moe --out trace.npz

The file holds expert ids, their weights, and each token's request and domain: no text and no token ids.
Prompts are spread evenly over the domains and stand in a seeded random order, so that a window of consecutive tokens
mixes domains as served traffic does.

Shapes: Q prompt, S position, T token (Q times S), L layer, K top-k (heaviest first).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from corpus import Corpus, load_corpus
from model import SmallMoE, load_checkpoint, route
from numpy.typing import NDArray

__all__ = ["choose_prompts", "main", "record"]

BATCH = 8


def choose_prompts(corpus: Corpus, count: int, seed: int) -> NDArray[np.int64]:
    """Return indices (Q,) of held-out prompts: as many per domain as can be, in random order.

    A domain with fewer prompts than its share gives all it has, so that the result can be shorter than count.
    """
    rng = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for index in range(len(corpus.domains)):
        share = count // len(corpus.domains) + (index < count % len(corpus.domains))
        chosen.append(rng.permutation(np.flatnonzero(corpus.domain_Q == index))[:share])
    return rng.permutation(np.concatenate(chosen))


@torch.no_grad()
def record(model: SmallMoE, token_QS: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return expert ids (T, L, K) and weights (T, L, K), prompt after prompt."""
    experts: list[NDArray[np.uint8]] = []
    weights: list[NDArray[np.float16]] = []
    for token_BS in token_QS.split(BATCH):
        _, router_LTE = model(token_BS)
        weight_LTK, expert_LTK = route(router_LTE, model.config.num_experts_per_tok)
        experts.append(expert_LTK.transpose(0, 1).numpy().astype(np.uint8))
        weights.append(weight_LTK.transpose(0, 1).numpy().astype(np.float16))
        print(f"batch {len(experts)} of {-(-len(token_QS) // BATCH)}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return np.concatenate(experts), np.concatenate(weights)


def main() -> int:
    """Write the routing trace and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="trace to write (.npz)")
    parser.add_argument("--prompts", type=int, default=240, help="prompts of 512 tokens to record (default 240)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice and the order of prompts")
    options = parser.parse_args()
    if not (options.work / "checkpoint").is_dir():
        parser.error(f"{options.work} holds no checkpoint: run train.py --work {options.work} first")
    torch.set_num_threads(1)
    corpus = load_corpus(options.work)
    prompt_Q = choose_prompts(corpus, options.prompts, options.seed)
    token_QS = torch.from_numpy(corpus.prompt_QS[prompt_Q].astype(np.int64))
    expert_TLK, weight_TLK = record(load_checkpoint(options.work / "checkpoint"), token_QS)
    prompts, positions = token_QS.shape
    np.savez_compressed(
        options.out,
        expert_TLK=expert_TLK,
        weight_TLK=weight_TLK,
        request_id_T=np.repeat(np.arange(prompts, dtype=np.int32), positions),
        domain_T=np.repeat(corpus.domain_Q[prompt_Q], positions),
        domains=np.array(corpus.domains),
    )
    print(f"{options.out}: {len(expert_TLK)} tokens of {prompts} prompts, {options.out.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
