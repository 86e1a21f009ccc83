"""Shipment: what one pipeline chunk of one layer sends, computes and gets back; per_expert, per_rank, allgather.

Legend: T tokens of the chunk, K top-k, H hidden size, R ranks, N nodes, I ranks of a node, P slots of one rank,
C copies, X expert rows, D chunks, W counts in a header.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.execute.dispatch.fabric import Carriage, Fabric, Flow, Hop, exchange_counts, hops
from placer.execute.dispatch.rows import ROW_MULTIPLE, expert_rows, fan_out, pack, unpack, weighted_sum

__all__ = ["AllGather", "PartialSums", "PerExpert", "PerRank", "Shipment", "agree_on_counts"]

IntArray = npt.NDArray[np.int64]
Counts = Mapping[str, IntArray]


class Shipment(ABC):
    """One chunk: header -> accept -> pack, outward hops, unpack -> (experts) -> answer, homeward hops, finish.

    slot_TK     global slot that serves each choice of the rank's own tokens, -1 where there is none; int64
    weight_TK   router weights, float32
    rows_XH, rows_P   the experts' rows after `unpack`: rows of each of this rank's slots (padded), then one zero row
    pairs             (token, expert) pairs this rank computes, known after `accept`
    outward, homeward hops of dispatch and combine, known after `accept`
    """

    rows_XH: Tensor
    rows_P: list[int]
    pairs: int
    outward: list[Hop]
    homeward: list[Hop]

    def __init__(
        self,
        fabric: Fabric,
        carriage: Carriage,
        x_TH: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        slots_per_rank: int,
    ) -> None:
        self.fabric, self.carriage, self.slots_per_rank = fabric, carriage, slots_per_rank
        self.x_TH, self.slot_TK, self.weight_TK = x_TH, slot_TK, weight_TK
        self.top_k = slot_TK.shape[1]
        # rank that serves each choice, R where there is none
        self.rank_TK = torch.where(slot_TK >= 0, slot_TK // slots_per_rank, fabric.num_ranks)

    @property
    def pairs_RP(self) -> Tensor:
        """Pairs that this rank's tokens have for every slot of every rank."""
        slots = self.fabric.num_ranks * self.slots_per_rank
        count = torch.bincount(self.slot_TK.reshape(-1) + 1, minlength=slots + 1)
        return count[1:].view(self.fabric.num_ranks, self.slots_per_rank)

    @property
    def touched_TR(self) -> Tensor:
        """Ranks that serve any choice of each token."""
        touched_TR = torch.zeros(
            len(self.slot_TK), self.fabric.num_ranks + 1, dtype=torch.bool, device=self.x_TH.device
        )
        return touched_TR.scatter_(1, self.rank_TK, value=True)[:, :-1]

    @abstractmethod
    def header(self) -> dict[str, Tensor]:
        """Counts that this rank tells each rank, (R, ...) each; "pairs" is (R, P)."""

    @abstractmethod
    def accept(self, told: Counts, heard: Counts) -> None:
        """Takes the headers told to and heard from each rank."""

    @abstractmethod
    def pack(self) -> Tensor:
        """Rows for the first hop of dispatch."""

    @abstractmethod
    def unpack(self, arrived_CB: Tensor) -> None:
        """Takes what the last hop of dispatch gave (with its zero row) and makes the experts' rows of it."""

    @abstractmethod
    def answer(self, out_XH: Tensor) -> Tensor:
        """Rows for the first hop of combine, from the experts' outputs (their last row still zero)."""

    @abstractmethod
    def finish(self, returned_CH: Tensor) -> Tensor:
        """Sums for this chunk's tokens, from what the last hop of combine gave."""


class _OneLevel(Shipment):
    """One all-to-all there and one back, the way back being the way there turned round."""

    def _forwards(self, copies_R: Tensor) -> dict[str, Tensor]:
        """What 2dh adds to the header: ranks of this node are told what they shall pass on."""
        if self.carriage.algorithm != "2dh":
            return {}
        shape = (self.fabric.nodes, self.fabric.ranks_per_node)
        copies_NI = copies_R.view(shape)
        return {
            # rank (n, j) hears how much there is for (m, j), for all m; and how much will come back from (n, i), all i
            "there": copies_NI.T.expand(shape[0], shape[1], shape[0]).reshape(-1, shape[0]),
            "back": copies_NI[:, None, :].expand(shape[0], shape[1], shape[1]).reshape(-1, shape[1]),
        }

    def _route(self, send_R: IntArray, receive_R: IntArray, heard: Counts) -> None:
        fabric, algorithm = self.fabric, self.carriage.algorithm
        there_IN = back_IN = None
        if algorithm == "2dh":
            start = fabric.node * fabric.ranks_per_node
            there_IN = heard["there"][start : start + fabric.ranks_per_node]
            back_IN = heard["back"][fabric.local :: fabric.ranks_per_node].T
        self.outward = hops(fabric, algorithm, Flow(send_R, receive_R, there_IN), self.carriage.there)
        self.homeward = hops(fabric, algorithm, Flow(receive_R, send_R, back_IN), self.carriage.back)


class PerExpert(_OneLevel):
    """One copy per choice, sorted by slot, so that the pairs of each slot tell the receiver all it needs.

    y = sum over k ascending of weight_k * expert_k(x)
    """

    def header(self) -> dict[str, Tensor]:
        """Counts for every rank."""
        pairs_RP = self.pairs_RP
        return {"pairs": pairs_RP, **self._forwards(pairs_RP.sum(dim=1))}

    def accept(self, told: Counts, heard: Counts) -> None:
        """Plans the hops."""
        self.arriving_RP = heard["pairs"]
        self.sent, self.pairs = int(told["pairs"].sum()), int(self.arriving_RP.sum())
        self._route(told["pairs"].sum(axis=1), self.arriving_RP.sum(axis=1), heard)

    def pack(self) -> Tensor:
        """Copies, sorted by destination."""
        flat_N = self.slot_TK.reshape(-1)
        slots = self.fabric.num_ranks * self.slots_per_rank
        pair_C = torch.sort(torch.where(flat_N >= 0, flat_N, slots), stable=True).indices[: self.sent]
        home_row_N = torch.full_like(flat_N, self.sent)
        home_row_N[pair_C] = torch.arange(self.sent, device=flat_N.device)
        self.home_row_TK = home_row_N.view_as(self.slot_TK)
        return self.x_TH[pair_C // self.top_k]

    def unpack(self, arrived_CB: Tensor) -> None:
        """Copies to expert rows."""
        ranks, per_rank = self.arriving_RP.shape
        slot_C = np.repeat(np.tile(np.arange(per_rank), ranks), self.arriving_RP.reshape(-1))
        count_P = self.arriving_RP.sum(axis=0)
        padded_P = (count_P + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        shift_P = (np.cumsum(padded_P) - padded_P) - (np.cumsum(count_P) - count_P)
        order_C = np.argsort(slot_C, kind="stable")
        row_C = np.empty_like(slot_C)
        row_C[order_C] = np.arange(self.pairs) + shift_P[slot_C[order_C]]
        self.row_C = torch.from_numpy(row_C).to(arrived_CB.device)
        self.rows_P = padded_P.tolist()
        self.rows_XH = arrived_CB.new_zeros(sum(self.rows_P) + 1, arrived_CB.shape[1])
        self.rows_XH[self.row_C] = arrived_CB[:-1]

    def answer(self, out_XH: Tensor) -> Tensor:
        """Outputs, weighed and summed where this rank can."""
        return out_XH[self.row_C]

    def finish(self, returned_CH: Tensor) -> Tensor:
        """Sums of what came back."""
        return weighted_sum(returned_CH, self.home_row_TK, self.weight_TK)


class PartialSums(Shipment):
    """Modes whose copies carry slots and weights, so that a rank answers with the sum over its own experts.

    Subclasses set `pairs_P` (pairs of each of this rank's slots) and `home_row_TJ` (returned rows of each token's sum).
    """

    pairs_P: IntArray
    home_row_TJ: Tensor

    def unpack(self, arrived_CB: Tensor) -> None:
        """Copies to expert rows."""
        arrived_CH, slot_CK, self.expert_weight_CK, _ = unpack(arrived_CB[:-1], self.top_k, self.x_TH.dtype)
        self.rows_XH, self.rows_P, self.expert_row_CK = expert_rows(arrived_CH, slot_CK, self.pairs_P)

    def answer(self, out_XH: Tensor) -> Tensor:
        """Outputs, weighed and summed where this rank can."""
        return weighted_sum(out_XH, self.expert_row_CK, self.expert_weight_CK)

    def finish(self, returned_CH: Tensor) -> Tensor:
        """Sums of what came back."""
        return weighted_sum(returned_CH, self.home_row_TJ, None)


class PerRank(_OneLevel, PartialSums):
    """One copy per rank touched; which of that rank's slots and with which weights travels in front of the copy.

    y = sum over ranks ascending of [ sum over that rank's k ascending of weight_k * expert_k(x) ]
    """

    def destinations_TR(self) -> Tensor:
        """Ranks to which each token is copied."""
        return self.touched_TR

    def header(self) -> dict[str, Tensor]:
        """Counts for every rank."""
        self.to_TR = self.destinations_TR()
        copies_R = self.to_TR.sum(dim=0)
        return {"pairs": self.pairs_RP, "copies": copies_R, **self._forwards(copies_R)}

    def accept(self, told: Counts, heard: Counts) -> None:
        """Plans the hops."""
        self.pairs_P = heard["pairs"].sum(axis=0)
        self.sent, self.pairs = int(told["copies"].sum()), int(self.pairs_P.sum())
        self._route(told["copies"], heard["copies"], heard)

    def most_destinations(self) -> int:
        """Most copies that one token can have."""
        return self.top_k

    def pack(self) -> Tensor:
        """Copies, sorted by destination."""
        rank_C, token_C, self.home_row_TJ = fan_out(self.to_TR, self.sent, self.most_destinations())
        rank_CK, first_C = self.rank_TK[token_C], (rank_C * self.slots_per_rank)[:, None]
        slot_CK = torch.where(rank_CK == rank_C[:, None], self.slot_TK[token_C] - first_C, -1)
        return pack(self.x_TH[token_C], slot_CK, self.weight_TK[token_C])


class AllGather(PerRank):
    """One copy of every token to every rank, which answers every copy, zero where it serves no choice.

    The sum is per_rank's: ranks that serve nothing add zero.
    """

    def destinations_TR(self) -> Tensor:
        """All ranks."""
        return torch.ones_like(self.touched_TR)

    def most_destinations(self) -> int:
        """All ranks."""
        return self.fabric.num_ranks


def agree_on_counts(shipments: Sequence[Shipment]) -> None:
    """One exchange of the headers of all chunks of a layer. Collective."""
    headers = [shipment.header() for shipment in shipments]
    ranks = shipments[0].fabric.num_ranks
    told = [torch.cat([counts.reshape(ranks, -1) for counts in header.values()], dim=1) for header in headers]
    told_RDW, heard_RDW = exchange_counts(torch.stack(told, dim=1).to(torch.int32))
    shapes = {name: counts.shape for name, counts in headers[0].items()}
    for chunk, shipment in enumerate(shipments):
        by_name: tuple[dict[str, IntArray], ...] = ({}, {})
        at = 0
        for name, shape in shapes.items():
            width = shape[1:].numel()
            for counts, whole_RDW in zip(by_name, (told_RDW, heard_RDW), strict=True):
                counts[name] = whole_RDW[:, chunk, at : at + width].reshape(shape)
            at += width
        shipment.accept(*by_name)
