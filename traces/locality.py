"""How local routing is in time: segment routing (SRP) and segment caches (SCH) of MoE-LRC, and whether offloading pays.

All of MoE-LRC (arXiv 2505.16056). Windows are all runs of m consecutive tokens of one request. A cache holds `slots`
experts of each layer; MoE-LRC's cache of size rho has slots = rho k.
Legend: L routing sites, E experts, F counts from 0 to m, Q requests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from traces.accesses import Accesses, trace_accesses
from traces.locality_kernels import fixed_set_hits, lookahead_hits, window_counts
from traces.trace import RoutingTrace

__all__ = [
    "LEAST_SRP",
    "OffloadAdvice",
    "SegmentCache",
    "SegmentRouting",
    "offload_advice",
    "sch_v1",
    "sch_v2",
    "segment_routing",
    "uniform_srp",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Batches = Sequence[npt.NDArray[np.integer]]

LEAST_SRP = 0.35
"""Below this SRP at m = 16 the gains of a cache of experts are small."""

SMALL_EXCESS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentRouting:
    """SRP: the best F1 with which one decision for a window tells which of its tokens use an expert.

    expert_LE  each expert by itself, with its own threshold; nan for one that no window uses
    layer_L    the experts of a layer together (MoE-LRC's group)      model   all experts of all layers together
    rho_L, rho mean experts that this segment router switches on in a layer, over k: for layer_L, and for the model
    windows    how many windows there are
    """

    window: int
    windows: int
    expert_LE: FloatArray
    layer_L: FloatArray
    model: float
    rho_L: FloatArray
    rho: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentCache:
    """Hits of a cache of `slots` experts a layer, of all accesses, (L,) each."""

    window: int
    slots: int
    hits_L: IntArray
    accesses_L: IntArray

    @property
    def hit_rate(self) -> float:
        """SCH: hits over accesses, all layers together; 1.0 where nothing was needed."""
        accesses = int(self.accesses_L.sum())
        return int(self.hits_L.sum()) / accesses if accesses else 1.0


def segment_routing(trace: RoutingTrace, window: int = 16) -> SegmentRouting:
    """SRP and rho^ of a trace.

    With f the tokens of a window that use an expert, n_f the windows with that count, and "on" where f >= a:
    SRP = max over a of 2 M / (P + A), M = sum over f >= a of f n_f, P = m sum over f >= a of n_f, A = sum of f n_f.
    A group adds up M, P and A of its experts, and one common threshold is then the best choice of a threshold for each:
    F1 reaches x where the sum of 2 f - x m over all windows that are on reaches x A, so the best x has exactly those
    with f >= x m / 2 on, whichever expert they are of. Complexity: O(L (T k + Q E + E m)). Raises UsageError where no
    request has a window.
    """
    accesses, cut_Q = _by_request(trace)
    counts_LEF = np.zeros((accesses.num_sites, accesses.num_experts, _checked(window) + 1), dtype=np.int64)
    windows = 0
    for site, counts_EF in enumerate(counts_LEF):
        windows = window_counts(accesses.start_LS[site], accesses.expert_A, cut_Q, window, counts_EF)
    if not windows:
        longest = int(np.diff(cut_Q).max(initial=0))
        raise UsageError(f"window is {window}; the longest request has {longest} tokens, give no more than that")
    top_k = trace.model.top_k
    expert_LE, _ = _best_f1(counts_LEF)
    layer_L, on_L = _best_f1(counts_LEF.sum(axis=1))
    model, on = _best_f1(counts_LEF.sum(axis=(0, 1)))
    return SegmentRouting(
        window=window,
        windows=windows,
        expert_LE=expert_LE,
        layer_L=layer_L,
        model=float(model),
        rho_L=on_L / (windows * top_k),
        rho=float(on) / (windows * top_k * accesses.num_sites),
    )


def uniform_srp(window: int, top_k: int, num_experts: int) -> float:
    """SRP of routing without any locality: every token's k experts drawn uniformly, so f is binomial(m, k / E)."""
    share = top_k / num_experts
    weight_F = [math.comb(window, f) * share**f * (1 - share) ** (window - f) for f in range(window + 1)]
    return float(_best_f1(np.array(weight_F))[0])


def sch_v1(trace: RoutingTrace, window: int, slots: int, batches: Batches | None = None) -> SegmentCache:
    """SCH as first defined: each window has its own best fixed set, the `slots` experts that it uses most.

    Filling the set costs nothing, so no cache need reach it, and it is not bounded by Belady. With batches, windows are
    of m consecutive batches and each needs an expert once. Complexity: O(L (T k + T m)).
    """
    accesses, cut_Q = _by_request(trace) if batches is None else _batched(trace, batches)
    pairs_L2 = [
        fixed_set_hits(start_S, accesses.expert_A, cut_Q, _checked(window), _slots(slots), accesses.num_experts)
        for start_S in accesses.start_LS
    ]
    hits_L, accesses_L = np.array(pairs_L2, dtype=np.int64).T
    return SegmentCache(window=window, slots=slots, hits_L=hits_L, accesses_L=accesses_L)


def sch_v2(trace: RoutingTrace, window: int, slots: int, batches: Batches | None = None) -> SegmentCache:
    """SCH of the later paper: a cache that loads what is missing and drops what the next m tokens use least.

    It runs over the whole trace as one stream and starts empty; among equals the least recently used goes. What a token
    needs is loaded and may be dropped right after it. With batches, over the next m batches. Never above Belady.
    Complexity: O(L T k) list scans of `slots`.
    """
    accesses = trace_accesses(trace, batches)
    hits_L = [
        lookahead_hits(start_S, accesses.expert_A, _checked(window), _slots(slots), accesses.num_experts)[0]
        for start_S in accesses.start_LS
    ]
    return SegmentCache(
        window=window, slots=slots, hits_L=np.array(hits_L, dtype=np.int64), accesses_L=accesses.accesses_L
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadAdvice:
    """Whether keeping some experts of each layer in fast memory will pay, and the figures that say so.

    srp, layer_least, layer_most, rho   SRP of the model, of its least and its most local layer, and rho^
    uniform      SRP that routing without locality shows at the same m, k and E
    slots, sch   a cache of 2 k experts a layer and its SCH v2        share   slots over experts: what chance hits
    """

    window: int
    srp: float
    layer_least: float
    layer_most: float
    rho: float
    uniform: float
    slots: int
    sch: float
    share: float

    @property
    def pays(self) -> bool:
        """Whether SRP reaches 0.35."""
        return self.srp >= LEAST_SRP

    @property
    def text(self) -> str:
        """The advice with its evidence, one line."""
        verdict = (
            f"SRP {self.srp:.3f} at m = {self.window} reaches {LEAST_SRP}: a cache of experts pays"
            if self.pays
            else f"SRP {self.srp:.3f} at m = {self.window} is below {LEAST_SRP}: the gains of a cache of experts will "
            "be small, look to placement and batching first"
        )
        if self.pays and self.srp < self.uniform + SMALL_EXCESS:
            verdict += ", but only because it holds much of a layer: routing without locality shows as much"
        return (
            f"{verdict} (layers {self.layer_least:.3f} to {self.layer_most:.3f}; uniform routing {self.uniform:.3f}; "
            f"rho^ {self.rho:.2f}; {self.slots} slots a layer are {100 * self.share:.0f} % of its experts and "
            f"hit {100 * self.sch:.0f} %, SCH v2)"
        )


def offload_advice(trace: RoutingTrace, window: int = 16) -> OffloadAdvice:
    """Will offloading experts pay? The rule is SRP (m = 16) of 0.35 or more; the text gives what stands beside it."""
    found = segment_routing(trace, window)
    model = trace.model
    slots = min(2 * model.top_k, model.num_experts)
    return OffloadAdvice(
        window=window,
        srp=found.model,
        layer_least=float(np.nanmin(found.layer_L)),
        layer_most=float(np.nanmax(found.layer_L)),
        rho=found.rho,
        uniform=uniform_srp(window, model.top_k, model.num_experts),
        slots=slots,
        sch=sch_v2(trace, window, slots).hit_rate,
        share=slots / model.num_experts,
    )


def _best_f1(weight_XF: npt.NDArray[np.number]) -> tuple[FloatArray, FloatArray]:
    """The best F1 of a threshold on the count, and the windows that are then on, for every row of windows by count."""
    count_F = np.arange(weight_XF.shape[-1], dtype=np.float64)
    windows_XF = _from_the_end(weight_XF)[..., 1:]
    hits_XF = _from_the_end(weight_XF * count_F)[..., 1:]
    window = weight_XF.shape[-1] - 1
    uses_X1 = hits_XF[..., :1]
    below_XF = window * windows_XF + uses_X1
    f1_XF = np.divide(2.0 * hits_XF, below_XF, out=np.full(hits_XF.shape, np.nan), where=uses_X1 > 0)
    best_X1 = np.argmax(f1_XF, axis=-1)[..., None]
    f1_X = np.take_along_axis(f1_XF, best_X1, axis=-1)[..., 0]
    on_X = np.take_along_axis(windows_XF, best_X1, axis=-1)[..., 0]
    return f1_X, np.where(np.isnan(f1_X), 0.0, on_X)


def _from_the_end(array_XF: npt.NDArray[np.number]) -> FloatArray:
    return np.flip(np.cumsum(np.flip(array_XF, -1), axis=-1), -1).astype(np.float64)


def _by_request(trace: RoutingTrace) -> tuple[Accesses, IntArray]:
    request_id_T = trace.request_id_T
    if (np.diff(request_id_T) < 0).any():
        order_T = np.argsort(request_id_T, kind="stable")
        trace = trace.select_tokens(order_T)
        request_id_T = trace.request_id_T
    cut_Q = np.concatenate([[0], np.flatnonzero(np.diff(request_id_T)) + 1, [len(request_id_T)]]).astype(np.int64)
    return trace_accesses(trace), cut_Q


def _batched(trace: RoutingTrace, batches: Batches) -> tuple[Accesses, IntArray]:
    return trace_accesses(trace, batches), np.array([0, len(batches)], dtype=np.int64)


def _checked(window: int) -> int:
    if window < 1:
        raise UsageError(f"window is {window}; give the tokens of a window, 1 or more")
    return window


def _slots(slots: int) -> int:
    if slots < 0:
        raise UsageError(f"slots is {slots}; give the experts that one layer's cache holds, 0 or more")
    return slots
