"""coherent: the token stays where its first expert is (ExFlow's context-coherent expert parallelism, for any top-k).

Legend: T tokens of the chunk, K top-k, H hidden size, R ranks, N nodes, I ranks of a node, P slots of one rank,
C copies, M tokens that meet on this rank.

Copies go to every rank touched and carry the residual stream, the receiver norms them. The partial results meet on the
rank of the token's first expert, where the token then stays: its residual stream is there already. Tokens without any
expert stay where they are. For top-1 that is one all-to-all a layer: each token answers itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from placer.execute.dispatch.fabric import Carriage, Fabric, Flow, hops
from placer.execute.dispatch.rows import expert_rows, fan_out, pack, positions, unpack, weighted_sum
from placer.execute.dispatch.shipment import Counts, Shipment

__all__ = ["Coherent"]


class Coherent(Shipment):
    """Sums in per_rank's order; slots and weights travel with the copies, and the token's name (a number).

    After `finish`, `name_M` and `residual_MH` are the tokens that are on this rank now, those that stayed first; the
    sums are theirs.
    """

    name_M: Tensor
    residual_MH: Tensor

    def __init__(
        self,
        fabric: Fabric,
        carriage: Carriage,
        residual_TH: Tensor,
        slot_TK: Tensor,
        weight_TK: Tensor,
        slots_per_rank: int,
        *,
        name_T: Tensor,
        norm: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(fabric, carriage, residual_TH, slot_TK, weight_TK, slots_per_rank)
        self.name_T, self.norm = name_T, norm

    def header(self) -> dict[str, Tensor]:
        """Counts for every rank."""
        ranks, nodes, per_node = self.fabric.num_ranks, self.fabric.nodes, self.fabric.ranks_per_node
        self.to_TR = self.touched_TR
        meet_T = self._meeting_rank(self.slot_TK)
        meets_TR = meet_T[:, None] == torch.arange(ranks, device=meet_T.device)
        # float32 counts exactly up to 2**24 tokens; entry [v, m]: tokens that visit v and meet on m
        visit_RR = (self.to_TR.T.float() @ meets_TR.float()).to(torch.int64)
        header = {"pairs": self.pairs_RP, "meeting": visit_RR, "visiting": visit_RR.T}
        if self.carriage.algorithm == "2dh":
            copies_NI = visit_RR.sum(dim=1).view(nodes, per_node)
            header["there"] = copies_NI.T.expand(nodes, per_node, nodes).reshape(ranks, nodes)
            # rank (n, j) hears what (n, i) will have for (m, j), for all i and m
            header["back"] = visit_RR.view(nodes, per_node, nodes, per_node).permute(0, 3, 1, 2).reshape(ranks, -1)
        return header

    def accept(self, told: Counts, heard: Counts) -> None:
        """Plans the hops."""
        fabric, algorithm, rank = self.fabric, self.carriage.algorithm, self.fabric.rank
        self.pairs_P = heard["pairs"].sum(axis=0)
        self.pairs = int(self.pairs_P.sum())
        send_R, receive_R = told["meeting"].sum(axis=1), heard["meeting"].sum(axis=1)
        self.answer_R, self.returned_R = heard["meeting"].sum(axis=0), heard["visiting"].sum(axis=0)
        self.sent, self.received, self.met = int(send_R.sum()), int(receive_R.sum()), int(self.answer_R[rank])
        self.stayed = len(self.slot_TK) - int(np.trace(told["meeting"]))
        there_IN = back_IN = None
        if algorithm == "2dh":
            start = fabric.node * fabric.ranks_per_node
            there_IN = heard["there"][start : start + fabric.ranks_per_node]
            back_IN = heard["back"].sum(axis=0).reshape(fabric.ranks_per_node, fabric.nodes)
        self.outward = hops(fabric, algorithm, Flow(send_R, receive_R, there_IN), self.carriage.there)
        self.homeward = hops(fabric, algorithm, Flow(self.answer_R, self.returned_R, back_IN), self.carriage.back)

    def pack(self) -> Tensor:
        """Copies, sorted by destination."""
        _, token_C, _ = fan_out(self.to_TR, self.sent, self.top_k)
        return pack(self.x_TH[token_C], self.slot_TK[token_C], self.weight_TK[token_C], self.name_T[token_C])

    def unpack(self, arrived_CB: Tensor) -> None:
        """Copies to expert rows."""
        fabric, per_rank = self.fabric, self.slots_per_rank
        residual_CH, slot_CK, weight_CK, name_C = unpack(arrived_CB[:-1], self.top_k, self.x_TH.dtype, named=True)
        assert name_C is not None
        local_CK = torch.where((slot_CK >= 0) & (slot_CK // per_rank == fabric.rank), slot_CK % per_rank, -1)
        self.rows_XH, self.rows_P, self.expert_row_CK = expert_rows(self.norm(residual_CH), local_CK, self.pairs_P)
        self.expert_weight_CK = weight_CK
        self.meet_C = self._meeting_rank(slot_CK)
        row_M = positions(self.meet_C == fabric.rank, self.met)
        stay_M = positions((self.slot_TK < 0).all(dim=1), self.stayed)
        self.residual_MH = torch.cat([self.x_TH[stay_M], residual_CH[row_M]])
        self.name_M = torch.cat([self.name_T[stay_M], name_C[row_M]])
        met_slot_MK = slot_CK[row_M]
        rank_MK = torch.where(met_slot_MK >= 0, met_slot_MK // per_rank, fabric.num_ranks)
        visited_MR = torch.zeros(self.met, fabric.num_ranks + 1, dtype=torch.bool, device=rank_MK.device)
        visited_MR = visited_MR.scatter_(1, rank_MK, value=True)[:, :-1]
        # ranks answer in the order in which the copies reached them, which is this rank's order too
        _, _, self.home_row_MJ = fan_out(visited_MR, int(self.returned_R.sum()), self.top_k)

    def answer(self, out_XH: Tensor) -> Tensor:
        """Outputs, weighed and summed where this rank can."""
        answer_CH = weighted_sum(out_XH, self.expert_row_CK, self.expert_weight_CK)
        return answer_CH[torch.sort(self.meet_C, stable=True).indices]

    def finish(self, returned_CH: Tensor) -> Tensor:
        """Sums of what came back."""
        met_MH = weighted_sum(returned_CH, self.home_row_MJ, None)
        return torch.cat([met_MH.new_zeros(self.stayed, met_MH.shape[1]), met_MH])

    def _meeting_rank(self, slot_TK: Tensor) -> Tensor:
        """Rank of the first expert, R where there is none, (T,)."""
        column_K = torch.arange(self.top_k, device=slot_TK.device)
        first_T = torch.where(slot_TK >= 0, column_K, self.top_k - 1).amin(dim=1)
        slot_T = slot_TK.gather(1, first_T[:, None])[:, 0]
        return torch.where(slot_T >= 0, slot_T // self.slots_per_rank, self.fabric.num_ranks)
