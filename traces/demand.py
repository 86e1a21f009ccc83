"""Bit demand for traces that have none: drawn by given shares, synthetic, and marked as such.

Legend: L routing sites, T tokens, K top-k.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from placer.core.device.ladder import BitLadder
from placer.core.errors import UsageError
from traces.trace import RoutingTrace

__all__ = ["drawn_demand"]

ROUNDING = 1e-6


def drawn_demand(
    trace: RoutingTrace, ladder: BitLadder, shares: Sequence[float], rng: np.random.Generator
) -> RoutingTrace:
    """The trace with `bits_LTK`: every use of an expert demands a width of the ladder, drawn with these shares.

    Draws are independent of token and expert, which real demand is not: good for times, not for quality. A note in the
    trace says so. Unset entries and null experts have 0 bits. Raises UsageError for shares that do not fit the ladder
    or do not add up to 1.
    """
    share_K = np.asarray(shares, dtype=np.float64)
    if share_K.shape != (ladder.levels,) or not np.isfinite(share_K).all() or share_K.min() < 0:
        raise UsageError(f"shares are {tuple(shares)}; give one, 0 or more, for each of {ladder.bits_K} bits")
    if abs(share_K.sum() - 1) > ROUNDING:
        raise UsageError(f"shares are {tuple(shares)} and add up to {share_K.sum():g}; they must add up to 1")
    bits_LTK = np.zeros(trace.expert_LTK.shape, dtype=np.uint8)
    width_K = np.array(ladder.bits_K, dtype=np.uint8)
    # one draw of float32 for a layer at a time keeps memory at one layer's
    edge_K = np.cumsum(share_K)[:-1]
    for row, site in enumerate(trace.model.sites):
        level_TK = np.searchsorted(edge_K, rng.random(bits_LTK.shape[1:], dtype=np.float32), side="right")
        bits_LTK[row] = np.where(trace.expert_LTK[row] < site.num_experts, width_K[level_TK], 0)
    text = ", ".join(f"{bits} bits {share:g}" for bits, share in zip(ladder.bits_K, share_K.tolist(), strict=True))
    note = f"synthetic bit demand, drawn without regard to token or expert: {text}"
    return replace(trace, bits_LTK=bits_LTK, notes=(*trace.notes, note), checked=True, known_sha256="")
