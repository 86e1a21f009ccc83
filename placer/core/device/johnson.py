"""Chain-Johnson: the order of items that ends soonest on two machines, where every expert is a chain of planes.

A block of items that run one after another is one item as far as the others can see: with a the time on the first
machine and b on the second, (a, b) then (c, d) is (a + max(0, c - b), d + max(0, b - c)). Each chain is cut into blocks
that Johnson's rule puts in the chain's own order (an item that the rule would put before its forerunner joins the
forerunner's block), and the blocks of all chains are then sorted by the rule. Legend: I items.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["johnson_order"]

IntArray = npt.NDArray[np.int64]

Key = tuple[int, int]


def johnson_order(expert_I: IntArray, plane_I: IntArray, first_ns_I: IntArray, second_ns_I: IntArray) -> IntArray:
    """The order (I,) of the items; planes of an expert ascend; ties: lower plane, then lower expert id.

    Notes
    -----
    Guarantee: no order of the two machines ends sooner, as long as nothing limits what is between them.
    Complexity: O(I log I).
    Reference: S. M. Johnson 1954 (the rule); C. L. Monma and J. B. Sidney 1979, "Sequencing with series-parallel
    precedence constraints" (its blocks).
    """
    by_id = np.lexsort([plane_I, expert_I])
    expert, plane = expert_I[by_id].tolist(), plane_I[by_id].tolist()
    first, second = first_ns_I[by_id].tolist(), second_ns_I[by_id].tolist()
    found: list[tuple[Key, int, int, int]] = []
    start = 0
    for item, (a, b) in enumerate(zip(first, second, strict=True)):
        begin = item
        key = _key(a, b)
        if item and expert[item] != expert[item - 1]:
            start = item
        # a chain's blocks are the last ones, from the chain's first item on
        while found and found[-1][1] >= start and key < found[-1][0]:
            _, begin, before_a, before_b = found.pop()
            a, b = before_a + max(0, a - before_b), b + max(0, before_b - a)
            key = _key(a, b)
        found.append((key, begin, a, b))
    ends = [*(begin for _, begin, _, _ in found), len(expert)][1:]
    blocks = [(key, plane[at], expert[at], at, end) for (key, at, _, _), end in zip(found, ends, strict=True)]
    blocks.sort()
    return by_id[np.array([item for *_, at, end in blocks for item in range(at, end)], dtype=np.int64)]


def _key(a: int, b: int) -> Key:
    """Johnson's rule as a sort: first what feeds the second machine, short a first; then the rest, long b first."""
    return (0, a) if a <= b else (1, -b)
