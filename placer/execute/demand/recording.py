"""Demand on record: the routing of texts together with the bits that bit routers ask for, as one RoutingTrace.

Legend: L routing sites, T tokens, C experts of a token (top-k), K levels of the ladder.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from placer.core.errors import UsageError
from placer.execute.demand.model import LevelModel
from placer.execute.demand.quality import LevelRun
from placer.execute.demand.routers import BitRouters
from traces.recorder import RoutingRecorder
from traces.summarize import Progress
from traces.trace import RoutingTrace

__all__ = ["record_demand"]

SEQUENCES_PER_BATCH = 8


@torch.no_grad()
def record_demand(
    model: LevelModel, routers: BitRouters, prompts: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> RoutingTrace:
    """The routing of token ids (a request for each prompt), run at the levels that the routers name, with `bits_LTK`.

    Every token is a prefill token; ids of tokens are kept. Raises UsageError for no prompt or an empty one,
    MismatchError for routers of another model.
    """
    routers.refuse_misfit(model)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UsageError(f"{len(prompts)} prompts are given, empty ones among them or none; give token ids of each")
    run = LevelRun(model.weights, routers.levels_of, keep=True)
    done = 0
    with RoutingRecorder(model.backbone.model, spec=model.spec, token_ids=True) as recorder:
        for batch in _equally_long(prompts):
            model.logits(model.tokens(batch), run)
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    trace = recorder.finish(provenance=f"recorded from {model.spec.name} with bit routers")
    bits_of = np.array(model.weights.bits_K, dtype=np.uint8)
    expert_LTC = np.stack([np.concatenate([expert for expert, _ in kept]) for kept in run.kept_L])
    level_LTC = np.stack([np.concatenate([level for _, level in kept]) for kept in run.kept_L])
    assert np.array_equal(expert_LTC, trace.expert_LTK), "routers and experts disagree on the ids"
    note = f"bits are the demand of trained bit routers (alpha {routers.about.get('alpha', 'unknown')})"
    return replace(trace, bits_LTK=bits_of[level_LTC - 1], notes=(*trace.notes, note), checked=True, known_sha256="")


def _equally_long(prompts: Sequence[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    """Runs of neighbours of one length, a batch at a time."""
    for _, same in itertools.groupby(prompts, key=len):
        yield from (list(batch) for batch in _batched(list(same)))


def _batched(prompts: list[Sequence[int]]) -> Iterable[list[Sequence[int]]]:
    for start in range(0, len(prompts), SEQUENCES_PER_BATCH):
        yield prompts[start : start + SEQUENCES_PER_BATCH]
