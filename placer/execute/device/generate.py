"""Greedy generation by a real model whose experts' planes are read from the disk while it computes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.errors import MismatchError, UsageError
from placer.core.timeline import Timeline
from placer.execute.device.experts import DeviceExperts, DeviceStep, LevelsOf
from placer.execute.device.record import session_timeline
from placer.execute.device.session import Session, open_session
from placer.execute.hf.architectures import architecture_of, require_transformers

__all__ = ["generate_on_device"]


def generate_on_device(
    model_path: Path,
    plan: DevicePlan,
    index: PlaneIndex,
    device: DeviceSpec,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    levels_of: LevelsOf | None = None,
    warm_up: int = 1,
    verify: bool = True,
    about: dict[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[list[int]], Timeline]:
    """The new tokens of each prompt (an end-of-sequence token included), and the measured Timeline.

    An iteration is one step of all requests that go on, prefill first. Attention is all that a layer does outside its
    experts; what comes behind the last layer is an attention span of layer -1. `levels_of` says what each choice
    demands (None: the highest level), `warm_up` how many steps are run before, unmeasured. Tokens are those that the
    same weights give in memory; `about` is as `run_device`'s.

    Raises DependencyError without transformers, MismatchError for planes of another model, UsageError for bad prompts,
    and what `run_device` raises.
    """
    require_transformers()
    _check_prompts(prompts, max_new_tokens)
    if architecture_of(model_path).clamped:
        raise MismatchError(f"{model_path}: its experts have biases, which planes do not hold; use another model")
    # torch's and transformers' parts of a model take a second to import
    from placer.execute.hf.backbone import load_backbone

    backbone = load_backbone(model_path, dtype=torch.float32, device=torch.device("cpu"))
    if backbone.layer_L != index.moe_layers or backbone.hidden_size != index.shapes[0][1]:
        raise MismatchError(
            f"{index.path}: has planes for layers {list(index.moe_layers)} of hidden size {index.shapes[0][1]}, "
            f"{model_path} has layers {list(backbone.layer_L)} of {backbone.hidden_size}; quantise this model"
        )
    largest = max(max(prompt) for prompt in prompts)
    if largest >= backbone.vocab_size:
        raise MismatchError(f"a prompt has token {largest}; the model's vocabulary has {backbone.vocab_size} tokens")
    with open_session(plan, index, device, verify=verify, progress=progress) as session:
        step = DeviceStep(session)
        for site, block in enumerate(backbone.blocks_L):
            block.experts = DeviceExperts(site, session, step, levels_of)
        if warm_up:
            _generate(session, backbone, step, prompts, warm_up)
        session.start_over()
        if progress is not None:
            progress(f"generating for {len(prompts)} requests")
        tokens, routed = _generate(session, backbone, step, prompts, max_new_tokens)
    timeline = session_timeline(
        session,
        {
            **(about or {}),
            "work": "generate",
            "iterations": len(routed),
            "warm_up": warm_up,
            "batch": len(prompts),
            "tokens_per_iteration": max(routed),
            "tokens_by_iteration": routed,
            "kinds": ["prefill", *["decode"] * (len(routed) - 1)],
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "max_new_tokens": max_new_tokens,
            "generated": tokens,
            "disk_limit_mbytes_per_s": device.disk_limit_mbytes_per_s,
            "planes_sha256": index.sha256,
        },
    )
    return tokens, timeline


def _generate(
    session: Session, backbone: Any, step: DeviceStep, prompts: Sequence[Sequence[int]], steps: int
) -> tuple[list[list[int]], list[int]]:
    """New tokens of each prompt, and how many tokens each step routed."""
    from placer.execute.hf.batch import RankBatch

    # a batch asks its step for little, and joins no layer as long as a request goes on
    batch = RankBatch(backbone, (), cast(Any, step), prompts, range(len(prompts)), len(prompts), steps)
    routed = []
    for _ in range(steps):
        if not batch.running:
            break
        session.begin()
        routed.append(batch.advance(None))
        session.end()
        batch.take()
    return batch.generated, routed


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
    if not prompts:
        raise UsageError("prompts is empty; give one or more")
    for index, prompt in enumerate(prompts):
        if not prompt or min(prompt) < 0:
            raise UsageError(f"prompt {index} is {list(prompt)[:8]}; give one or more token ids from 0")
