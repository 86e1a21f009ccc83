"""summarize: a RoutingTrace becomes the Profile a solver may see.

Legend: L routing sites, T tokens, K top-k, E experts, W windows, F request folds, S source ranks.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.profile import ExpertSets, Profile
from traces.ids import generator
from traces.kernels import add_pairs, add_transitions, count_codes, count_windows
from traces.sets import expert_sets, sample_tokens
from traces.trace import RoutingTrace

__all__ = ["Progress", "fold_of_requests", "num_windows", "summarize"]

Progress = Callable[[int, int], None]
"""progress(done, total): called as work advances, from any thread, never two at once."""

CHUNK_TOKENS = 1 << 14
MAX_PROFILE_BYTES = 4 << 30


def summarize(
    trace: RoutingTrace,
    *,
    window_tokens: int = 2048,
    folds: int = 8,
    seed: int = 0,
    max_sets_per_layer: int = 262144,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Counts of `trace`: load per window, fold and source rank, co-activation, transitions and expert sets.

    A last window of less than half of `window_tokens` is counted with the one before it, so totals are equal.
    Requests fall into `folds` folds by a hash of their id and `seed`; there are never more folds than requests.
    Loads and pairs count an id as often as a row holds it; sets hold it once. A layer of more than
    `max_sets_per_layer` distinct sets is sampled (one token drawn from every stride) and its coverage says so.
    Same trace and seed, same bytes, whatever `threads` is (None: one per core, at most 4).
    Memory beyond the result is one buffer of E x E counts per thread. Raises UsageError.
    """
    for name, value in (("window_tokens", window_tokens), ("folds", folds), ("max_sets_per_layer", max_sets_per_layer)):
        if value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    generator(seed)  # refuses a seed that is none, even where nothing is drawn
    if trace.num_tokens == 0:
        raise UsageError("the trace has no tokens; there is nothing to summarize")
    layers, experts = trace.model.num_sites, trace.model.num_experts
    windows = num_windows(trace.num_tokens, window_tokens)
    source_T = trace.source_rank_T
    sources = int(source_T.max()) + 1 if source_T is not None else 0
    _check_size("experts", experts, 16 * layers * experts**2, "check the model, or summarize fewer layers at a time")
    _check_size("source ranks", sources, 8 * layers * experts * sources, "number the source ranks from 0 without gaps")
    _check_size("windows", windows, 8 * layers * experts * windows, f"give more than {window_tokens} window_tokens")
    fold_T, num_folds = fold_of_requests(trace.request_id_T, folds, seed)
    load_WLE = np.zeros((windows, layers, experts), dtype=np.int64)
    load_FLE = np.zeros((num_folds, layers, experts), dtype=np.int64)
    load_SLE = np.zeros((sources, layers, experts), dtype=np.int64)
    coactivation_LEE = np.zeros((layers, experts, experts), dtype=np.int64)
    transition_LEE = np.zeros((max(0, layers - 1), experts, experts), dtype=np.int64)
    sample_T = sample_tokens(trace.num_tokens, max_sets_per_layer, seed)
    limits = [site.num_experts for site in trace.model.sites]
    lock, done = Lock(), [0]

    def count_layer(row: int) -> ExpertSets:
        expert_TK, limit = trace.expert_LTK[row], limits[row]
        window_WE, fold_FE = np.zeros((windows, experts), np.int64), np.zeros((num_folds, experts), np.int64)
        source_SE = np.zeros((sources, experts), np.int64)
        pairs_EE, next_EE = np.zeros((experts, experts), np.uint32), np.zeros((experts, experts), np.uint32)
        used, since = 0, 0
        for start in range(0, trace.num_tokens, CHUNK_TOKENS):
            part_TK = expert_TK[start : start + CHUNK_TOKENS]
            part = slice(start, start + len(part_TK))
            used += count_windows(part_TK, limit, start, window_tokens, window_WE)
            count_codes(part_TK, limit, fold_T[part], fold_FE)
            if source_T is not None:
                count_codes(part_TK, limit, source_T[part], source_SE)
            add_pairs(part_TK, limit, pairs_EE)
            if row + 1 < layers:
                add_transitions(part_TK, limit, trace.expert_LTK[row + 1, part], limits[row + 1], next_EE)
            since += part_TK.shape[0] * part_TK.shape[1] ** 2
            if since >= 1 << 31:
                _flush(pairs_EE, coactivation_LEE[row])
                if row + 1 < layers:
                    _flush(next_EE, transition_LEE[row])
                since = 0
        _flush(pairs_EE, coactivation_LEE[row])
        coactivation_LEE[row] += coactivation_LEE[row].T.copy()
        np.fill_diagonal(coactivation_LEE[row], 0)
        if row + 1 < layers:
            _flush(next_EE, transition_LEE[row])
        load_WLE[:, row], load_FLE[:, row], load_SLE[:, row] = window_WE, fold_FE, source_SE
        sets = expert_sets(expert_TK, limit, max_sets=max_sets_per_layer, sample_T=sample_T, used_tokens=used)
        with lock:
            done[0] += 1
            if progress is not None:
                progress(done[0], layers)
        return sets

    workers = threads or min(4, os.cpu_count() or 1)
    if workers == 1:
        sets = tuple(count_layer(row) for row in range(layers))
    else:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            sets = tuple(pool.map(count_layer, range(layers)))
    return Profile(
        model=trace.model,
        trace_sha256=trace.sha256,
        num_tokens=trace.num_tokens,
        num_requests=trace.num_requests,
        window_tokens=window_tokens,
        load_WLE=load_WLE,
        load_FLE=load_FLE,
        coactivation_LEE=coactivation_LEE,
        transition_LEE=transition_LEE,
        load_SLE=load_SLE if source_T is not None else None,
        sets=sets,
    )


def num_windows(num_tokens: int, window_tokens: int) -> int:
    """W: whole windows, and the rest as one of its own where it is half a window or the only one."""
    whole, rest = divmod(num_tokens, window_tokens)
    return max(1, whole + (2 * rest >= window_tokens))


def fold_of_requests(request_id_T: npt.NDArray[np.int32], folds: int, seed: int) -> tuple[npt.NDArray[np.int32], int]:
    """Fold of each token, (T,), and their number min(folds, requests): equal shares of the requests in hash order."""
    ids, index_T = np.unique(request_id_T, return_inverse=True)
    count = min(folds, len(ids))
    fold = np.empty(len(ids), dtype=np.int32)
    fold[np.argsort(_mix(ids.astype(np.uint64), seed), kind="stable")] = np.arange(len(ids)) % max(1, count)
    return fold[index_T], count


def _check_size(what: str, count: int, nbytes: int, mend: str) -> None:
    if nbytes > MAX_PROFILE_BYTES:
        raise UsageError(
            f"the counts of {count} {what} would take {nbytes / 2**30:.1f} GiB, the most is "
            f"{MAX_PROFILE_BYTES / 2**30:.0f} GiB; {mend}"
        )


def _flush(counts_EE: npt.NDArray[np.uint32], total_EE: npt.NDArray[np.int64]) -> None:
    total_EE += counts_EE
    counts_EE[:] = 0


def _mix(values: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    # splitmix64: well mixed, the same on every machine and numpy version
    mixed = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
