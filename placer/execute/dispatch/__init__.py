"""Dispatch and combine of MoE layers on real ranks, in every mode: the distributed arithmetic.

Legend: T own tokens, K top-k, H hidden size, R ranks, P slots of one rank, X expert rows (slot by slot, runs padded).

    fabric    ranks, groups, and the ways to carry rows     rows      packing, sorting and summing on one rank
    shipment  per_expert, per_rank, allgather               per_node, coherent   the modes that they name
    layer     one layer in pipelined chunks                 lanes     what runs beside the arithmetic

A copy is one token's hidden state on its way to an expert, a rank or a node. Copies that a rank sends to itself travel
through the same buffers and cost a memory copy; only the others are traffic. The order of every sum is fixed, so
results do not depend on algorithm, pipeline degree or on who computed them:
    per_expert            over k ascending: weight_k * expert_k(x)
    per_rank, allgather,  over ranks ascending of [ over that rank's k ascending ]
    coherent
    per_node              over nodes ascending of [ over its ranks ascending of [ over that rank's k ascending ] ]
Sums are in float32; what travels, each bracket too, is in the hidden states' own type.
"""

from dataclasses import dataclass

from torch import Tensor

from placer.core.modes import DispatchMode
from placer.execute.dispatch.fabric import Carriage, Fabric, exchange
from placer.execute.dispatch.layer import run_layer
from placer.execute.dispatch.per_node import PerNode
from placer.execute.dispatch.rows import ROW_MULTIPLE, weighted_sum
from placer.execute.dispatch.shipment import AllGather, PerExpert, PerRank, Shipment, agree_on_counts

__all__ = [
    "ROW_MULTIPLE",
    "SHIPMENTS",
    "Carriage",
    "DispatchMetadata",
    "Fabric",
    "Shipment",
    "combine",
    "dispatch",
    "exchange",
    "run_layer",
    "weighted_sum",
]

SHIPMENTS: dict[DispatchMode, type[Shipment]] = {
    "per_expert": PerExpert,
    "per_rank": PerRank,
    "per_node": PerNode,
    "allgather": AllGather,
}
"""The modes in which a token's sums come back to its home rank; `coherent` is placer.execute.dispatch.coherent."""


@dataclass(frozen=True, slots=True)
class DispatchMetadata:
    """What `combine` needs to undo `dispatch`, and what the layer moved: copies sent and received (own ones left out,
    of all legs), and the (token, expert) pairs that this rank computes."""

    shipment: Shipment
    sent: int
    received: int
    pairs: int


def dispatch(
    x_TH: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor,
    *,
    mode: DispatchMode,
    slots_per_rank: int,
    fabric: Fabric | None = None,
    carriage: Carriage | None = None,
) -> tuple[Tensor, list[int], DispatchMetadata]:
    """Expert rows (X, H) of this rank, the rows of each of its slots (P), and the metadata for `combine`.

    `slot_TK` int64 holds the global slot that serves each choice of the rank's own tokens, -1 where there is none;
    `weight_TK` float32 the router weights. A last, all-zero row belongs to no slot. Every mode but `coherent`.
    `fabric` None: all ranks are one node. `carriage` None: linear. Collective over all ranks.
    """
    carriage = Carriage() if carriage is None else carriage
    fabric = Fabric.plain() if fabric is None else fabric
    shipment = SHIPMENTS[mode](fabric, carriage, x_TH, slot_TK, weight_TK, slots_per_rank)
    agree_on_counts([shipment])
    rows = shipment.pack()
    for hop in shipment.outward:
        rows = hop.run(rows)
    shipment.unpack(rows)
    sent, received = sum(hop.sent for hop in shipment.outward), sum(hop.received for hop in shipment.outward)
    return shipment.rows_XH, shipment.rows_P, DispatchMetadata(shipment, sent, received, shipment.pairs)


def combine(out_XH: Tensor, metadata: DispatchMetadata) -> Tensor:
    """Sum (T, H) of the experts' outputs for the rank's own tokens, in the mode's order.

    `out_XH` are the outputs of the rows that `dispatch` gave, its last row still zero. Collective over all ranks.
    """
    rows = metadata.shipment.answer(out_XH)
    for hop in metadata.shipment.homeward:
        rows = hop.run(rows)
    return metadata.shipment.finish(rows)
