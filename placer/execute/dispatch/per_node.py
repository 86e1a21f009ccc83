"""per_node: one copy over the network for each node touched, handed on to that node's ranks by its entry rank.

Legend: T tokens of the chunk, K top-k, H hidden size, R ranks, N nodes, I ranks of a node, P slots of one rank,
C copies, E copies that arrive at an entry rank.
"""

import torch
from torch import Tensor

from placer.execute.dispatch.fabric import Hop, exchange_in
from placer.execute.dispatch.rows import fan_out, pack, unpack, weighted_sum
from placer.execute.dispatch.shipment import Counts, PartialSums

__all__ = ["PerNode"]


class PerNode(PartialSums):
    """The entry rank has the token's home rank's local index. Combine goes the same way back:

    y = sum over nodes ascending of
            [ sum over that node's ranks ascending of [ sum over that rank's k ascending of weight_k * expert_k(x) ] ]
    """

    def header(self) -> dict[str, Tensor]:
        """Counts for every rank."""
        nodes, per_node = self.fabric.nodes, self.fabric.ranks_per_node
        touched_TNI = self.touched_TR.view(-1, nodes, per_node)
        self.to_TN = touched_TNI.any(dim=2)
        # rank (n, j) hears: copies for node n, and for each of its ranks; it may be entry, or the receiver
        return {
            "pairs": self.pairs_RP,
            "entering": self.to_TN.sum(dim=0).repeat_interleave(per_node),
            "inside": touched_TNI.sum(dim=0).repeat_interleave(per_node, dim=0),
        }

    def accept(self, told: Counts, heard: Counts) -> None:
        """Plans the hops."""
        fabric = self.fabric
        nodes, per_node, node, local = fabric.nodes, fabric.ranks_per_node, fabric.node, fabric.local
        self.pairs_P = heard["pairs"].sum(axis=0)
        self.pairs = int(self.pairs_P.sum())
        send_N, receive_N = told["entering"][::per_node], heard["entering"][local::per_node]
        # summed over homes with one local index: what their entry rank hands to each rank
        inside_II = heard["inside"].reshape(nodes, per_node, per_node).sum(axis=0)
        hand_I, take_I = inside_II[local], inside_II[:, local]
        self.sent, self.handed = int(send_N.sum()), int(hand_I.sum())

        def enter(rows_CB: Tensor) -> Tensor:
            return exchange_in(fabric.across, rows_CB, send_N, receive_N)

        def hand_on(arrived_EB: Tensor) -> Tensor:
            return exchange_in(fabric.inside, self._hand_on(arrived_EB[:-1]), hand_I, take_I)

        def gather(rows_CH: Tensor) -> Tensor:
            return exchange_in(fabric.inside, rows_CH, take_I, hand_I)

        def leave(returned_CH: Tensor) -> Tensor:
            sum_EH = weighted_sum(returned_CH, self.entry_row_EJ, None)
            return exchange_in(fabric.across, sum_EH, receive_N, send_N)

        sent, received = int(send_N.sum() - send_N[node]), int(receive_N.sum() - receive_N[node])
        handed, taken = int(hand_I.sum() - hand_I[local]), int(take_I.sum() - take_I[local])
        two = nodes > 1
        self.outward = [
            Hop(enter, sent, received),
            Hop(hand_on, handed, taken, inside=two),
        ]
        self.homeward = [
            Hop(gather, taken, handed, inside=two),
            Hop(leave, received, sent),
        ]

    def pack(self) -> Tensor:
        """Copies, sorted by destination."""
        node_C, token_C, self.home_row_TJ = fan_out(self.to_TN, self.sent, self.top_k)
        slot_CK = self.slot_TK[token_C]
        slots_per_node = self.slots_per_rank * self.fabric.ranks_per_node
        here_CK = (slot_CK >= 0) & (slot_CK // slots_per_node == node_C[:, None])
        slot_CK = torch.where(here_CK, slot_CK % slots_per_node, -1)
        return pack(self.x_TH[token_C], slot_CK, self.weight_TK[token_C])

    def _hand_on(self, rows_EB: Tensor) -> Tensor:
        """At the entry rank: one copy for each rank of the node that the token touches."""
        per_node, per_rank = self.fabric.ranks_per_node, self.slots_per_rank
        x_EH, slot_EK, weight_EK, _ = unpack(rows_EB, self.top_k, self.x_TH.dtype)
        rank_EK = torch.where(slot_EK >= 0, slot_EK // per_rank, per_node)
        touched_EI = torch.zeros(len(x_EH), per_node + 1, dtype=torch.bool, device=x_EH.device)
        touched_EI = touched_EI.scatter_(1, rank_EK, value=True)[:, :-1]
        rank_C, row_C, self.entry_row_EJ = fan_out(touched_EI, self.handed, self.top_k)
        slot_CK = torch.where(rank_EK[row_C] == rank_C[:, None], slot_EK[row_C] % per_rank, -1)
        return pack(x_EH[row_C], slot_CK, weight_EK[row_C])
