"""A device's work replayed with real planes: real reads, real weights, real rows; only who is routed where is given.

Legend: B iterations, T tokens, H hidden size, L routing sites, E experts, K choices of a token (`_TK`) or levels.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import UsageError
from placer.core.timeline import Timeline
from placer.execute.device.checks import check_work
from placer.execute.device.record import session_timeline
from placer.execute.device.rows import ItemRows, assigned, weighted_choices
from placer.execute.device.session import Session, open_session
from placer.execute.reference import attention_stand_in, hidden_states

__all__ = ["AttentionBlock", "replay_iteration", "run_device"]


class AttentionBlock:
    """What replay runs in the place of a layer's attention: each token attends to itself alone.

    That leaves norm, value and output projection, (H, H) each: work that grows with the tokens. One block for all
    layers, random by the seed.
    """

    def __init__(self, hidden_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = 1 / math.sqrt(hidden_size)
        self._value_HH, self._output_HH = torch.randn(2, hidden_size, hidden_size, generator=generator) * scale

    def __call__(self, residual_TH: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream behind the block, and its norm, which is what the experts get; (T, H) each."""
        value_TH = functional.linear(attention_stand_in(residual_TH), self._value_HH)
        residual_TH = residual_TH + functional.linear(value_TH, self._output_HH)
        return residual_TH, attention_stand_in(residual_TH)


def run_device(
    plan: DevicePlan,
    work: DeviceWork,
    index: PlaneIndex,
    device: DeviceSpec,
    *,
    iterations: int | None = None,
    warm_up: int = 1,
    seed: int = 0,
    verify: bool = True,
    about: dict[str, Any] | None = None,
    on_output: Callable[[int, Tensor], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Timeline:
    """Measured Timeline of the first `iterations` (None: all) of `work` on this machine.

    warm_up      how often the first iteration is run before, unmeasured; then the cache is empty again
    seed         of hidden states, the attention block and the experts' weights in the sum: with it, outputs are fixed
    on_output    called between iterations with the iteration and its last residual stream, (T, H)

    Planes are read in a thread of their own, held to `device.disk_limit_mbytes_per_s`; one thread computes. `about` of
    the Timeline says how they were read (`read_mode`), what was asked for and what came from the disk (`asked_bytes`,
    `block_bytes`, `disk_read_bytes`: resident planes and warming up included), and what was held: `peak_plane_bytes`
    (exact), `rss_before_bytes` and `peak_rss_bytes` (the operating system's; None where it does not say),
    `lost_from_cache` (planes that the cache policy kept and that did not fit).

    Raises MismatchError and UsageError for things that do not belong together, InfeasibleError for too small a memory,
    InputFileError for a damaged file, ExecutionError for an error of the disk.
    """
    check_work(plan, work)
    count = work.num_iterations if iterations is None else iterations
    if not 1 <= count <= work.num_iterations:
        raise UsageError(f"iterations is {count}; the work has 1 to {work.num_iterations}")
    if warm_up < 0:
        raise UsageError(f"warm_up is {warm_up}; give 0 or more")
    work = work.clipped(plan.ceiling_LE)
    hidden_size = index.shapes[0][1]
    block = AttentionBlock(hidden_size, seed)
    with open_session(plan, index, device, verify=verify, progress=progress) as session:
        for _ in range(warm_up):
            replay_iteration(session, work, 0, block, seed)
        session.start_over()
        for iteration in range(count):
            residual_TH = replay_iteration(session, work, iteration, block, seed)
            if on_output is not None:
                on_output(iteration, residual_TH)
            if progress is not None:
                progress(f"iteration {iteration + 1} of {count}")
    tokens_B = work.tokens_B[:count].tolist()
    return session_timeline(
        session,
        {
            **(about or {}),
            "work": "replay",
            "iterations": count,
            "warm_up": warm_up,
            "seed": seed,
            "batch": max(tokens_B),
            "tokens_per_iteration": max(tokens_B),
            "tokens_by_iteration": tokens_B,
            "disk_limit_mbytes_per_s": device.disk_limit_mbytes_per_s,
            "planes_sha256": index.sha256,
        },
    )


def replay_iteration(session: Session, work: DeviceWork, iteration: int, block: AttentionBlock, seed: int) -> Tensor:
    """Runs one iteration and notes it in the session; returns the residual stream behind the last layer, (T, H).

    Who is routed where, and the first hidden states, are made before the iteration begins. The sum over the last
    layer's choices lies behind its end, since it is what the next layer's attention would begin with.
    """
    tokens = int(work.tokens_B[iteration])
    levels = work.count_BLEK.shape[-1]
    routed_L = []
    for count_EK in work.count_BLEK[iteration]:
        expert_TK, level_TK = assigned(count_EK, tokens)
        weight_TK = torch.from_numpy(np.where(expert_TK >= 0, 1 / expert_TK.shape[1], 0).astype(np.float32))
        routed_L.append((ItemRows(expert_TK, level_TK, len(count_EK), levels), weight_TK))
    predicted_LEK = None if work.predicted_BLEK is None else work.predicted_BLEK[iteration]
    hidden_TH = hidden_states(seed + iteration, np.arange(tokens), session.hidden_size)
    residual_TH = torch.from_numpy(hidden_TH)
    session.begin()
    pending: tuple[Tensor, Tensor] | None = None
    for site, (rows, weight_TK) in enumerate(routed_L):
        if pending is not None:
            residual_TH = residual_TH + weighted_choices(*pending)
        residual_TH, x_TH = block(residual_TH)
        ahead = site + 1 < len(routed_L) and predicted_LEK is not None
        predicted_EK = predicted_LEK[site + 1] if ahead and predicted_LEK is not None else None
        pending = session.runner.run(site, x_TH, rows, predicted_EK), weight_TK
    session.end()
    assert pending is not None
    return residual_TH + weighted_choices(*pending)
