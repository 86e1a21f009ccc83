"""Generate on real ranks: from prompts as token ids to a measured Timeline with the tokens chosen.

Legend: Q requests.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from placer.core.dispatch import source_ranks
from placer.core.errors import MismatchError
from placer.core.plan import Plan
from placer.core.schedule import KINDS
from placer.core.timeline import Timeline
from placer.execute.hf.architectures import check_model, require_transformers
from placer.execute.hf.job import GenerateJob, refuse_mode
from placer.execute.hf.schedules import schedule_of
from placer.execute.job import Backend, DType, ExecutionMode
from placer.execute.launch import Host, require_torch, run_ranks

__all__ = ["WORKER", "generate_tokens"]

WORKER = ("-m", "placer.execute.hf.worker")


def generate_tokens(
    plan: Plan,
    model_path: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    mode: ExecutionMode | None = None,
    rank_Q: Sequence[int] | None = None,
    num_ranks: int | None = None,
    warmup: int = 1,
    dtype: DType = "float32",
    backend: Backend = "auto",
    timeout_s: float = 600.0,
    realtime: bool = False,
    hosts: Sequence[Host] = (),
    record_path: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Timeline:
    """Measured Timeline of greedy generation by the checkpoint in `model_path`, its experts placed by `plan`.

    prompts      token ids of each request                 mode       dispatch mode; None means the plan's own
    rank_Q       the rank of each request's attention; None means `source_ranks`
    record_path  where to write the routing as a trace     timeout_s  for the whole launch
    realtime, hosts   ranks at real-time priority (root only); where ranks run (none: all on this machine)
    All-to-alls run as the plan's schedule of prefill or of decode says, but each layer whole (`unpipelined`).
    `about` of the Timeline has `generated`, the new token ids of each request (an end-of-sequence token included), and
    `kinds`, prefill or decode, of each iteration. In float32 the tokens are those of the single-process model.

    Raises DependencyError without torch or transformers, UsageError (also for a schedule that `mode` does not have),
    MismatchError for a plan of another model,
    InputFileError for a checkpoint that lacks something, ExecutionError for a rank that failed.
    """
    require_torch()
    require_transformers()
    chosen: Any = plan.mode if mode is None else mode
    refuse_mode(chosen)
    if num_ranks is not None and num_ranks != plan.num_ranks:
        raise MismatchError(f"the plan is for {plan.num_ranks} ranks, not {num_ranks}; use that many or solve again")
    model_path = Path(model_path).resolve()
    check_model(plan, model_path)
    for kind in KINDS:
        schedule_of(plan, kind, chosen)
    ranks = source_ranks(np.arange(len(prompts)), plan.num_ranks) if rank_Q is None else np.asarray(rank_Q)
    with tempfile.TemporaryDirectory(prefix="placer-generate-") as name:
        folder = Path(name)
        plan.save(folder / "plan.json")
        job = GenerateJob(
            plan_path=str(folder / "plan.json"),
            model_path=str(model_path),
            result_path=str(folder / "result.json"),
            prompts=tuple(tuple(int(token) for token in prompt) for prompt in prompts),
            rank_Q=tuple(int(rank) for rank in ranks),
            mode=chosen,
            max_new_tokens=max_new_tokens,
            warmup=warmup,
            dtype=dtype,
            backend=backend,
            timeout_s=timeout_s,
            realtime=realtime,
            record_path=None if record_path is None else str(Path(record_path).resolve()),
            about=about or {},
        )
        return run_ranks(
            [job], num_ranks=plan.num_ranks, timeout_s=timeout_s, progress=progress, entry=WORKER, hosts=hosts
        )[0]
