"""What one rank measures, with the executor's own functions: messages, experts, packing, the fixed costs of a layer.

Every function is collective, starts each repetition with a barrier, visits its cases in one seeded random order per
repetition (so that drift falls on all alike) and returns int64 nanoseconds (or counts) of this rank.

Legend: I repetitions, N cases, R ranks, M = start and end.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from placer.core.modes import DispatchMode
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.dispatch import SHIPMENTS, exchange
from placer.execute.dispatch.coherent import Coherent
from placer.execute.dispatch.fabric import Carriage, Fabric
from placer.execute.dispatch.lanes import Lanes, stamp
from placer.execute.dispatch.layer import run_layer
from placer.execute.dispatch.shipment import Shipment
from placer.execute.experts import ExpertWeights, grouped_ffn
from placer.execute.reference import attention_stand_in

__all__ = ["IN_A_ROW", "LAYERS", "Bench"]

IntArray = npt.NDArray[np.int64]
COLD_BYTES = 1 << 26
IN_A_ROW = 3
"""Feed-forwards after one barrier, which does not let all ranks go at once."""
LAYERS = 8
"""Layers after one barrier when exchanges are measured: ranks drift apart as they do in an iteration."""


class Bench:
    """The measurements of one rank of a calibration."""

    def __init__(self, job: CalibrationJob, rank: int, device: torch.device) -> None:
        self.job, self.rank, self.device = job, rank, device
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
        self._order = np.random.default_rng(job.seed)
        self._experts = self._make_experts()
        self._lanes = Lanes(device)
        self._fabric = Fabric.create(job.ranks_per_node, device)
        self._turn = 0

    def close(self) -> None:
        """Ends the lanes."""
        self._lanes.close()

    def messages(self, pattern_RR: IntArray, copies_N: Sequence[int]) -> IntArray:
        """Start and end of exchanges in which rank a sends so many rows to every b with pattern_RR[a, b], (I, N, M)."""
        send_R, receive_R = pattern_RR[self.rank], pattern_RR[:, self.rank]
        most = copies_N[-1] * int(send_R.sum())
        rows_CH = torch.zeros(most, self.job.hidden_size, dtype=self.dtype, device=self.device)

        def case(copies: int) -> Callable[[], object]:
            sent, received = (send_R * copies).tolist(), (receive_R * copies).tolist()
            return lambda: exchange(rows_CH[: sum(sent)], sent, received)

        return self._time([case(copies) for copies in copies_N])

    def experts(self, cases: list[tuple[int, int]], active: bool) -> IntArray:
        """Start and end of IN_A_ROW feed-forwards of (experts, rows each), (I, N, M); ranks not active wait."""

        def case(experts: int, rows: int) -> Callable[[], object]:
            x_XH = torch.ones(experts * rows, self.job.hidden_size, dtype=self.dtype, device=self.device)

            def run() -> None:
                for _ in range(IN_A_ROW if active else 0):
                    grouped_ffn(x_XH, [rows] * experts, self._next_experts(experts))

            return run

        return self._time([case(*one) for one in cases])

    def exchanges(self, mode: DispatchMode, tokens: list[int]) -> IntArray:
        """Start and end of LAYERS layers without experts: dispatch and combine of so many own tokens, (I, N, M)."""

        def case(count: int) -> Callable[[], object]:
            slot_TK = torch.from_numpy(self.job.slots_TK(self.rank, count)).to(self.device)
            x_TH = torch.ones(count, self.job.hidden_size, dtype=self.dtype, device=self.device)
            weight_TK = torch.full(slot_TK.shape, 1.0 / slot_TK.shape[1], device=self.device)
            inputs = (self._fabric, Carriage(), x_TH, slot_TK, weight_TK, self.job.experts_per_rank)
            name_T = torch.arange(count, dtype=torch.int32, device=self.device)

            def run() -> None:
                for _ in range(LAYERS):
                    if mode == "coherent":
                        shipment: Shipment = Coherent(*inputs, name_T=name_T, norm=attention_stand_in)
                    else:
                        shipment = SHIPMENTS[mode](*inputs)
                    run_layer([shipment], lambda rows_XH, rows_P: rows_XH, self._lanes, stamp(self.device))

            return run

        return self._time([case(count) for count in tokens])

    def layer(self) -> IntArray:
        """Processor time of what replay does in place of attention, for `tokens_per_rank` tokens, (I, 1)."""
        shape = (self.job.tokens_per_rank, self.job.hidden_size)
        residual_TH, update_TH = (torch.ones(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return self._time_busy([lambda: attention_stand_in(residual_TH + update_TH)])

    def _time_busy(self, cases: list[Callable[[], object]]) -> IntArray:
        """Durations (I, N) on this thread's own clock; a device has no other than the wall's."""
        times = self._time(cases, time.thread_time_ns if self.device.type == "cpu" else time.perf_counter_ns)
        return times[:, :, 1] - times[:, :, 0]

    @torch.inference_mode()
    def _time(self, cases: list[Callable[[], object]], clock: Callable[[], int] = time.perf_counter_ns) -> IntArray:
        marks_INM = np.zeros((self.job.repetitions + 1, len(cases), 2), dtype=np.int64)
        for repetition in range(self.job.repetitions + 1):
            for case in self._order.permutation(len(cases)).tolist():
                # on the CPU backend, so that it is the same call for gloo and NCCL
                dist.all_reduce(torch.zeros(1))
                start = clock()
                cases[case]()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                marks_INM[repetition, case] = start, clock()
        return marks_INM[1:]

    def _make_experts(self) -> list[ExpertWeights]:
        """More than caches hold, as the layers of a model are."""
        job = self.job
        count = max(job.experts_per_rank, -(-COLD_BYTES // job.expert_bytes))
        generator = torch.Generator().manual_seed(job.seed)

        def weights(rows: int, columns: int) -> Tensor:
            values = torch.randn(rows, columns, generator=generator) / columns**0.5
            return values.to(dtype=self.dtype, device=self.device)

        inner, hidden = job.moe_intermediate_size, job.hidden_size
        return [ExpertWeights(weights(2 * inner, hidden), weights(hidden, inner)) for _ in range(count)]

    def _next_experts(self, count: int) -> list[ExpertWeights]:
        start, self._turn = self._turn, (self._turn + count) % len(self._experts)
        return [self._experts[(start + index) % len(self._experts)] for index in range(count)]
