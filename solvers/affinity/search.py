"""Cycles of annealing along the chain, under a load cap whose price rises while the chain cools.

Legend: L layers, E experts, R ranks.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from solvers.affinity.anneal_chain import anneal_block, near_flow, rank_loads
from solvers.affinity.chain import Chain
from solvers.affinity.chain_start import forward, sweep

__all__ = ["BLOCKS", "Incumbent", "anneal_cycle", "start_chain"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BLOCKS = 100
MOST_STEPS = 30_000
STEPS_PER_PAIR = 60
COLD = 0.005
"""Last temperature, in kept flow per layer and expert; the first is the caller's."""

LAST_PRICE = 3.0
"""Price of a rank's overload (in mean rank loads), in kept flow per layer."""

RAMP = 0.85
RELABEL_EVERY = 5
OFFER_FROM = 0.5
TRACK = 0.3
MOST_SLACK = 0.05


class Incumbent:
    """The cheapest placement that meets the caps; until there is one, the nearest to them."""

    def __init__(self, chain: Chain, rank_LE: IntArray) -> None:
        self.chain, self.rank_LE = chain, rank_LE.copy()
        self.excess, self.cut = max(0.0, chain.excess(rank_LE)), chain.cut(rank_LE)

    def offer(self, rank_LE: IntArray) -> bool:
        """Takes the placement if it is better."""
        cut, excess = self.chain.cut(rank_LE), max(0.0, self.chain.excess(rank_LE))
        if (excess, cut) >= (self.excess, self.cut - 1e-12):
            return False
        self.rank_LE, self.excess, self.cut = rank_LE.copy(), excess, cut
        return True


def start_chain(chain: Chain, deadline: float) -> IntArray:
    """Forward assignment and sweeps, load not looked at."""
    layers, experts = len(chain.flow_LEE) + 1, chain.flow_LEE.shape[1]
    price_LR = np.zeros((layers, chain.ranks))
    first_E = np.arange(experts) // (experts // chain.ranks)
    rank_LE = forward(chain.flow_LEE, first_E, chain.node_R, chain.node_weight, price_LR)
    return sweep(chain.flow_LEE, rank_LE, chain.node_R, chain.node_weight, price_LR, deadline)


def anneal_cycle(
    chain: Chain,
    begin_LE: IntArray,
    best: Incumbent,
    hot: float,
    first_price: float,
    blocks: int,
    rng: np.random.Generator,
    deadline: float,
    tick: Callable[[], None],
) -> None:
    """Anneals from `begin_LE` in `blocks` blocks from temperature `hot` down and offers what it finds to `best`.

    With caps, each layer gets its own (`Chain.caps`) of a mean that is moved until the measured PAR fits, and what a
    rank carries above it costs more and more, from `first_price` on; the last blocks let no overload grow. Without,
    sweeps end the cycle. O(blocks * L * steps) tries of O(1).
    """
    flow_LEE, back_LEE, node_R = chain.flow_LEE, chain.back_LEE, chain.node_R
    layers, experts = begin_LE.shape
    rank_LE = begin_LE.copy()
    capped = np.isfinite(chain.cap_seen)
    steps = min(MOST_STEPS, STEPS_PER_PAIR * experts * experts // 2)
    layer_kept = max(chain.kept(rank_LE), chain.kept(best.rank_LE)) / max(1, layers - 1)
    floor, slack = float(chain.floor_L.mean()), 0.0
    seen, expected = chain.par(chain.balanced_LE)
    unseen = expected - seen
    cap_L = np.full(layers, np.inf)
    if capped:
        cap_L = chain.caps(max(floor, min(chain.cap_seen, chain.cap_expected - unseen)))
    nodes = int(node_R.max()) + 1
    for block in range(blocks):
        if block % RELABEL_EVERY == 0:
            rank_LE = chain.relabel(rank_LE)
            near_LRE = near_flow(flow_LEE, back_LEE, rank_LE, chain.ranks)
            near_LNE = near_flow(flow_LEE, back_LEE, node_R[rank_LE], nodes) if chain.node_weight else near_LRE
            load_LR = rank_loads(chain.share_LE, rank_LE, chain.ranks)
        done = block / blocks
        temperature = layer_kept / experts * hot * (COLD / hot) ** done
        price = 0.0
        if capped:
            price = first_price * (LAST_PRICE / first_price) ** min(1.0, done / RAMP) * layer_kept
        if capped and done >= RAMP + 0.02:
            price = np.inf
        anneal_block(
            flow_LEE, back_LEE, near_LRE, near_LNE, rank_LE, node_R, chain.node_weight, chain.share_LE, load_LR,
            cap_L, price, steps, temperature, rng,
        )  # fmt: skip
        if capped and done >= OFFER_FROM:
            seen, expected = chain.par(rank_LE)
            best.offer(rank_LE)
            # unseen requests are busier by about the same whatever the cap; what is left over is used or saved slowly
            unseen += TRACK * (expected - seen - unseen)
            if done >= RAMP - 0.15:
                spare = min(chain.cap_seen - seen, chain.cap_expected - expected)
                slack = float(np.clip(slack + (TRACK if spare > 0 else 1.0) * spare, -MOST_SLACK, MOST_SLACK))
            cap_L = chain.caps(max(floor, min(chain.cap_seen, chain.cap_expected - unseen) + slack))
        tick()
        if time.perf_counter() > deadline:
            break
    rank_LE = chain.relabel(rank_LE)
    if not capped:
        price_LR = np.zeros((layers, chain.ranks))
        rank_LE = sweep(flow_LEE, rank_LE, node_R, chain.node_weight, price_LR, deadline)
    best.offer(rank_LE)
