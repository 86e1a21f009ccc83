"""What one rank measures, with the executor's own functions: messages, experts, packing, the fixed costs of a layer.

Every function is collective, starts each repetition with a barrier, visits its cases in one seeded random order per
repetition (so that drift falls on all alike) and returns int64 nanoseconds (or counts) of this rank.

Legend: I repetitions, N cases, R ranks, M = start and end.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from placer.execute.calibrate.job import CalibrationJob
from placer.execute.dispatch import combine, dispatch, exchange
from placer.execute.experts import ExpertWeights, grouped_ffn
from placer.execute.job import ExecutionMode
from placer.execute.reference import attention_stand_in

__all__ = ["IN_A_ROW", "Bench"]

IntArray = npt.NDArray[np.int64]
COLD_BYTES = 1 << 26
IN_A_ROW = 3
"""Feed-forwards after one barrier, which does not let all ranks go at once."""


class Bench:
    """The measurements of one rank of a calibration."""

    def __init__(self, job: CalibrationJob, rank: int, device: torch.device) -> None:
        self.job, self.rank, self.device = job, rank, device
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
        self._order = np.random.default_rng(job.seed)
        self._experts = self._make_experts()
        self._turn = 0

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

    def packing(self, mode: ExecutionMode, tokens: list[int]) -> tuple[IntArray, IntArray]:
        """Processor time of dispatch and combine together, (I, N), and copies sent to and got from others, (N,).

        Of the calling thread only: it sleeps while messages travel, so this is what packing and unpacking cost.
        """
        per_rank, ranks = self.job.experts_per_rank, self.job.num_ranks
        rng = np.random.default_rng([self.job.seed, self.rank])
        top_k = min(self.job.top_k, ranks * per_rank)
        inputs, moved_N = [], np.zeros(len(tokens), dtype=np.int64)
        for count in tokens:
            slot_TK = torch.from_numpy(rng.random((count, ranks * per_rank)).argsort(axis=1)[:, :top_k].copy())
            inputs.append(self._routed(slot_TK))

        def run(at: int) -> None:
            rows_XH, _, metadata = dispatch(*inputs[at], mode=mode, slots_per_rank=per_rank)
            combine(rows_XH, metadata)
            moved_N[at] = metadata.sent + metadata.received

        return self._time_busy([partial(run, at) for at in range(len(tokens))]), moved_N

    def few(self, mode: ExecutionMode) -> IntArray:
        """Start and end of a dispatch and a combine in which each rank sends one token to one other rank, (I, 1, M)."""
        slot_TK = torch.full((1, 1), (self.rank + 1) % self.job.num_ranks * self.job.experts_per_rank)
        inputs = self._routed(slot_TK)

        def run() -> None:
            rows_XH, _, metadata = dispatch(*inputs, mode=mode, slots_per_rank=self.job.experts_per_rank)
            combine(rows_XH, metadata)

        return self._time([run])

    def layer(self) -> IntArray:
        """Processor time of what replay does in place of attention, for `tokens_per_rank` tokens, (I, 1)."""
        shape = (self.job.tokens_per_rank, self.job.hidden_size)
        residual_TH, update_TH = (torch.ones(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        return self._time_busy([lambda: attention_stand_in(residual_TH + update_TH)])

    def _routed(self, slot_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_TH = torch.ones(len(slot_TK), self.job.hidden_size, dtype=self.dtype, device=self.device)
        weight_TK = torch.full(slot_TK.shape, 1.0 / slot_TK.shape[1], device=self.device)
        return x_TH, slot_TK.to(self.device), weight_TK

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
