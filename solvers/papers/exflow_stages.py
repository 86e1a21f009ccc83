"""ExFlow's order of solving: parts of parts, and tokens in increments that start from the answer before.

Factors (R,) solve for the ranks at once. (nodes, ranks of a node) solve for the nodes first and then inside each node;
(2, 2, ...) halve again and again. A part of a part sees only the transitions that stayed inside its part: those that
left it are lost whatever follows. The sub-problems are independent. Each starts from a placement that it can only
improve: the one given, or experts by index as engines place them, so that there is an answer at any time limit.

Legend: L layers, E logical experts, N members of a part, R ranks, T tokens.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solvers.papers.exflow_model import Form, Parts, Settings, Terms, count_rows, search_parts

__all__ = ["StagesAnswer", "increments_of", "largest_program", "mean_hops", "search_paths", "search_stages"]

IntArray = npt.NDArray[np.int64]

LEAST_SHARE_S = 0.05


@dataclass(frozen=True, slots=True)
class StagesAnswer:
    """`rank_LE` int64, and how many of the sub-problems were proven.

    `bound`: tokens that cross the first stage's parts in any placement, hence ranks too.
    """

    rank_LE: IntArray
    bound: int
    proven: int
    subproblems: int


def search_stages(
    chunks: list[Terms],
    layers: int,
    experts: int,
    factors: tuple[int, ...],
    settings: Settings,
    time_limit_s: float,
    start_LE: IntArray | None = None,
) -> StagesAnswer:
    """Ranks stage by stage, each sub-problem through all `chunks` (each holds those before it).

    The stages share the time equally, and so do the sub-problems of a stage; what one leaves goes to the next.
    `start_LE` serves a sub-problem as long as the parts above it are the start's.
    """
    started = time.perf_counter()
    groups = [np.tile(np.arange(experts), (layers, 1))]
    rank_LE = np.zeros((layers, experts), dtype=np.int64)
    bound, proven, count = 0, 0, 0
    for stage, factor in enumerate(factors):
        below = int(np.prod(factors[stage + 1 :]))
        stage_s = (time_limit_s - (time.perf_counter() - started)) / (len(factors) - stage)
        stage_ends = time.perf_counter() + stage_s
        split: list[IntArray] = []
        for number, member_LN in enumerate(groups):
            left_s = (stage_ends - time.perf_counter()) / (len(groups) - number)
            inside = [chunk.within(member_LN, experts) for chunk in chunks]
            part_LN = None
            if start_LE is not None:
                part_LN = _parts_of_start(np.take_along_axis(start_LE, member_LN, axis=1) // below % factor, factor)
            found = _search_increments(inside, member_LN.shape, factor, settings, left_s, part_LN)
            bound = found.bound if stage == 0 else bound
            proven += found.state == "optimal"
            count += 1
            assert found.part_LE is not None
            ranks_LN = np.take_along_axis(rank_LE, member_LN, axis=1) + found.part_LE * below
            np.put_along_axis(rank_LE, member_LN, ranks_LN, axis=1)
            split += [member_LN[found.part_LE == part].reshape(layers, -1) for part in range(factor)]
        groups = split
    return StagesAnswer(rank_LE, bound, proven, count)


def search_paths(
    chunks: list[npt.NDArray[np.integer]],
    num_experts: int,
    parts: int,
    settings: Settings,
    time_limit_s: float,
    start_LE: IntArray | None = None,
) -> Parts:
    """The program on top-1 token paths, each chunk int (T, L): solved with one more chunk of tokens at a time.

    Each run starts from the answer before it, as the authors' code does with 5,000 tokens a time; the last run's answer
    is for all tokens. -1 stands for a token without an expert in a layer.
    """
    paths = [np.concatenate(chunks[: number + 1]) for number in range(len(chunks))]
    shape = (paths[0].shape[1], num_experts)
    terms = [Terms.of_paths(path_TL) for path_TL in paths]
    return _search_increments(terms, shape, parts, settings, time_limit_s, start_LE)


def increments_of(weight_LEE: npt.NDArray[np.int64], increments: int, seed: int) -> list[Terms]:
    """The counts dealt at random into equal lots, cumulated: what adding tokens in lots does to counts of pairs."""
    rng = np.random.default_rng(seed)
    lots = rng.multinomial(weight_LEE, np.full(increments, 1.0 / increments))
    sums = np.cumsum(np.moveaxis(lots, -1, 0), axis=0)
    return [Terms.of_weights(sum_LEE) for sum_LEE in sums]


def largest_program(terms: Terms, layers: int, experts: int, factors: tuple[int, ...], form: Form) -> int:
    """Most rows that a sub-problem of these stages can have."""
    above = [int(np.prod(factors[:stage])) for stage in range(len(factors))]
    return max(
        (count_rows(terms, layers, experts // n, factor, form) for n, factor in zip(above, factors, strict=True)),
        default=0,
    )


def mean_hops(weight_LEE: npt.NDArray[np.int64], rank_LE: IntArray, node_R: npt.NDArray[np.int64]) -> float:
    """ExFlow's score, hops a transition: 0 on one rank, 1 to another rank of the node, 2 to another node."""
    step, before, after = np.nonzero(weight_LEE)
    here, there = rank_LE[step, before], rank_LE[step + 1, after]
    hops = (here != there).astype(np.int64) + (node_R[here] != node_R[there])
    weight = weight_LEE[step, before, after]
    return float(weight @ hops / max(1, int(weight.sum())))


def _search_increments(
    chunks: list[Terms],
    shape: tuple[int, ...],
    parts: int,
    settings: Settings,
    time_limit_s: float,
    start_LE: IntArray | None,
) -> Parts:
    ends = time.perf_counter() + time_limit_s
    layers, experts = shape
    if start_LE is None:
        start_LE = np.tile(np.arange(experts) * parts // experts, (layers, 1))
    found = Parts("feasible", start_LE)
    for number, terms in enumerate(chunks):
        share_s = max(LEAST_SHARE_S, (ends - time.perf_counter()) / (len(chunks) - number))
        found = search_parts(terms, layers, experts, parts, settings, share_s, found.part_LE)
    return found


def _parts_of_start(part_LN: IntArray, factor: int) -> IntArray | None:
    """The start's parts, where they are equal within this group."""
    size_LP = (part_LN[:, :, None] == np.arange(factor)).sum(axis=1)
    return part_LN if (size_LP == part_LN.shape[1] // factor).all() else None
