"""The routing of a generation over all ranks, as a RoutingTrace on rank 0.

Legend: I steps, L MoE layers, N tokens of one rank and step, T tokens, K top-k, C columns.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from placer.core.model import ModelSpec
from placer.execute.collect import gather_to_first
from placer.execute.dispatch import exchange
from traces.ids import convert_ids, id_dtype
from traces.trace import RoutingTrace

__all__ = ["Recording"]

IntArray = npt.NDArray[np.int64]
COLUMNS = ("request_id_T", "position_T", "token_id_T", "phase_T")


@dataclass(slots=True)
class Recording:
    """What one rank keeps: an integer row (4 columns, step, rank, then ids) and the weights of each routed token."""

    layers: int
    top_k: int
    rows: list[IntArray] = field(default_factory=list)
    weights: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(
        self, step: int, rank: int, column_N: dict[str, IntArray], kept: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    ) -> None:
        """Takes one step: `kept` has ids and weights, (N, K) each, of every layer."""
        tokens = len(column_N["position_T"])
        place_N2 = np.broadcast_to([step, rank], (tokens, 2))
        self.rows.append(
            np.column_stack([*(column_N[name] for name in COLUMNS), place_N2, *(expert_NK for expert_NK, _ in kept)])
        )
        self.weights.append(np.column_stack([weight_NK for _, weight_NK in kept]).astype(np.float32))

    def gather(self, model: ModelSpec, provenance: str) -> RoutingTrace | None:
        """The trace of all ranks, ordered by step, request and position, on rank 0; None elsewhere. Collective."""
        row_TC = _to_first(torch.from_numpy(np.concatenate(self.rows).astype(np.int64)))
        weight_TC = _to_first(torch.from_numpy(np.concatenate(self.weights)))
        if row_TC is None or weight_TC is None:
            return None
        request_T, position_T, token_T, phase_T, step_T, rank_T = row_TC[:, :6].T
        order_T = np.lexsort((position_T, request_T, step_T))

        def by_layer(flat_TC: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return flat_TC[order_T].reshape(len(order_T), self.layers, self.top_k).transpose(1, 0, 2)

        return RoutingTrace(
            model=model,
            expert_LTK=convert_ids(by_layer(row_TC[:, 6:]).astype(np.uint16), id_dtype(model.num_ids)),
            weight_LTK=np.ascontiguousarray(by_layer(weight_TC)).astype(np.float16),
            request_id_T=request_T[order_T].astype(np.int32),
            position_T=position_T[order_T].astype(np.int32),
            token_id_T=token_T[order_T].astype(np.int32),
            phase_T=phase_T[order_T].astype(np.uint8),
            step_T=step_T[order_T].astype(np.int32),
            source_rank_T=rank_T[order_T].astype(np.int32),
            provenance=provenance,
        )


def _to_first(row_TC: torch.Tensor) -> npt.NDArray[Any] | None:
    """Every rank's rows, one rank after the other, on rank 0; None elsewhere. Collective, over the CPU backend."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    count_R1 = gather_to_first(np.array([len(row_TC)], dtype=np.int64), rank, num_ranks)
    nothing_R = [0] * num_ranks
    receive_R = nothing_R if count_R1 is None else count_R1[:, 0].tolist()
    arrived_TC = exchange(row_TC, [len(row_TC), *nothing_R[1:]], receive_R)
    return None if count_R1 is None else arrived_TC[:-1].numpy()
