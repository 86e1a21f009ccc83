"""One MoE layer: all chunks out, each computed as it arrives, all back; with the time and the copies of every span.

Legend: T tokens, K top-k, H hidden size, P slots of one rank, D chunks.

Order on the lanes: all dispatches, in order, then all combines. A span of an exchange lasts from when the lane was free
for it (and its input there) to when its rows are where they are used: packing, transfer and unpacking. The first
dispatch begins with the exchange of counts, one for all chunks. With one chunk nothing runs on lanes: dispatch, experts
and combine follow each other, and a two-level exchange is one span; with more, each of its levels is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from placer.execute.dispatch.fabric import Hop
from placer.execute.dispatch.lanes import Lanes, Ticket, stamp
from placer.execute.dispatch.shipment import Shipment, agree_on_counts

__all__ = ["Span", "chunk_bounds", "run_layer"]

Experts = Callable[[Tensor, Sequence[int]], Tensor]
DISPATCH, EXPERTS, COMBINE = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Span:
    """What a rank did from `begin` to `end` (stamps): phase code, copies sent and received, and Timeline's `tokens`."""

    phase: int
    begin: Any
    end: Any
    sent: int = 0
    received: int = 0
    tokens: int = 0


def chunk_bounds(tokens: int, degree: int) -> list[int]:
    """Where the chunks of a rank's tokens begin and end, (D + 1): the cuts of `placer.core.schedule.chunk_index`."""
    return [-(-chunk * tokens // degree) for chunk in range(degree + 1)]


def run_layer(
    shipments: Sequence[Shipment],
    experts: Experts,
    lanes: Lanes,
    begin: Any,
    beat: Callable[[int], None] = lambda phase: None,
) -> tuple[list[Tensor], list[Span]]:
    """Sums of each chunk's tokens, and the spans; `experts` maps rows and rows per slot to outputs. Collective.

    `begin` is the stamp at which the layer's first dispatch begins; `beat` is told each phase that the rank enters.
    """
    beat(DISPATCH)
    agree_on_counts(shipments)
    if len(shipments) == 1:
        return _in_turn(shipments[0], experts, lanes, begin, beat)
    arriving = [list(_submit(lanes, one.pack, one.outward, one.unpack)) for one in shipments]
    computed, returning = [], []
    for one, tickets in zip(shipments, arriving, strict=True):
        tickets[-1].join()
        beat(EXPERTS)
        start = stamp(lanes.device)
        out_XH = experts(one.rows_XH, one.rows_P)
        computed.append(Span(EXPERTS, start, stamp(lanes.device), tokens=one.pairs))

        def answer(one: Shipment = one, out_XH: Tensor = out_XH) -> Tensor:
            return one.answer(out_XH)

        returning.append(list(_submit(lanes, answer, one.homeward, one.finish)))
    beat(COMBINE)
    results = [tickets[-1].join() for tickets in returning]
    spans = [
        span
        for phase, sent in ((DISPATCH, arriving), (COMBINE, returning))
        for one, tickets in zip(shipments, sent, strict=True)
        for span in _spans(phase, one.outward if phase == DISPATCH else one.homeward, tickets)
    ]
    spans[0] = Span(DISPATCH, begin, spans[0].end, spans[0].sent, spans[0].received, spans[0].tokens)
    dispatches = sum(span.phase == DISPATCH for span in spans)
    return results, [*spans[:dispatches], *computed, *spans[dispatches:]]


def _in_turn(
    one: Shipment, experts: Experts, lanes: Lanes, begin: Any, beat: Callable[[int], None]
) -> tuple[list[Tensor], list[Span]]:
    one.unpack(_carry(one.pack(), one.outward))
    arrived = stamp(lanes.device)
    beat(EXPERTS)
    out_XH = experts(one.rows_XH, one.rows_P)
    computed = stamp(lanes.device)
    beat(COMBINE)
    result_TH = one.finish(_carry(one.answer(out_XH), one.homeward))
    end = stamp(lanes.device)
    return [result_TH], [
        Span(DISPATCH, begin, arrived, *_copies(one.outward)),
        Span(EXPERTS, arrived, computed, tokens=one.pairs),
        Span(COMBINE, computed, end, *_copies(one.homeward)),
    ]


def _submit(
    lanes: Lanes, first: Callable[[], Tensor], legs: list[Hop], last: Callable[[Tensor], Any]
) -> Iterator[Ticket]:
    """One job for each run of hops on one lane, each after the one before."""
    groups = _groups(legs)
    ticket = None
    for index, group in enumerate(groups):

        def job(given: Any, index: int = index, group: list[Hop] = group) -> Any:
            rows = _carry(first() if index == 0 else given, group)
            return last(rows) if index == len(groups) - 1 else rows

        ticket = lanes[len(groups) > 1 and group[0].inside].submit(job, ticket)
        yield ticket


def _carry(rows: Tensor, legs: Sequence[Hop]) -> Tensor:
    for leg in legs:
        rows = leg.run(rows)
    return rows


def _groups(legs: Sequence[Hop]) -> list[list[Hop]]:
    return [list(run) for _, run in groupby(legs, key=lambda leg: leg.inside)]


def _spans(phase: int, legs: list[Hop], tickets: list[Ticket]) -> list[Span]:
    return [
        Span(phase, ticket.begin, ticket.end, *_copies(group))
        for group, ticket in zip(_groups(legs), tickets, strict=True)
    ]


def _copies(legs: Sequence[Hop]) -> tuple[int, int, int]:
    sent, received = sum(leg.sent for leg in legs), sum(leg.received for leg in legs)
    return sent, received, sent
