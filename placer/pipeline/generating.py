"""A real model generates under a plan: prompts in, tokens and a measured Timeline out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from placer.config.settings import RunSettings
from placer.core.errors import InputFileError, UsageError
from placer.core.plan import Plan
from placer.core.timeline import Timeline
from placer.pipeline.timelines import lab_of
from traces.hf_config import model_from_hf_config

if TYPE_CHECKING:
    from placer.execute.launch import Host

__all__ = ["Completion", "generate", "read_prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one request got: its new token ids (an end-of-sequence token included), and their text where texts came."""

    rank: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None = None


def generate(
    plan: Plan,
    model_dir: Path,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 32,
    mode: str | None = None,
    ranks: int | None = None,
    rank_Q: Sequence[int] | None = None,
    settings: RunSettings | None = None,
    record_path: Path | None = None,
    lab: str | None = None,
    hosts: "Sequence[Host]" = (),
    progress: Callable[[str], None] | None = None,
) -> tuple[Timeline, list[Completion], list[str]]:
    """The measured Timeline of greedy generation on the plan's ranks, what each prompt got, and warnings.

    `prompts` are texts, for which the checkpoint needs a tokenizer, or token ids. `ranks` must be the plan's where
    given; `rank_Q` says where each request's attention runs (None: `source_ranks`). Of `settings`, dtype, warmup,
    realtime and timeout_s count. `record_path` gets the routing of all steps as a trace. Ranks run on this machine,
    on `hosts`, or in a `lab` of the plan's shape, such as 2x2@200mbit (needs root).

    Raises DependencyError without torch or transformers, UsageError for no prompts or a mode that cannot generate,
    MismatchError for the plan of another model, InputFileError for a checkpoint that lacks something, ExecutionError
    for a rank that failed.
    """
    from placer.execute.hf import (
        check_model,
        decode,
        encode,
        generate_tokens,
        plain_greedy,
        require_transformers,
        unpipelined,
    )
    from placer.execute.lab import Lab

    settings, model_dir = settings or RunSettings(), Path(model_dir)
    if not prompts:
        raise UsageError("there is no prompt; give at least one text")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and len(texts) < len(prompts):
        raise UsageError("some prompts are texts and some token ids; give either")
    require_transformers()
    check_model(plan, model_dir)
    prompt_ids = encode(model_dir, texts) if texts else [[int(token) for token in prompt] for prompt in prompts]
    spec = lab_of(plan, lab)
    with nullcontext() if spec is None else Lab.open(spec) as opened:
        timeline = generate_tokens(
            plan,
            model_dir,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            mode=mode,  # type: ignore[arg-type]  # GenerateJob refuses unknown names
            rank_Q=rank_Q,
            num_ranks=ranks,
            warmup=settings.warmup,
            dtype=settings.dtype,
            timeout_s=settings.timeout_s,
            record_path=record_path,
            realtime=settings.realtime,
            hosts=hosts if opened is None else opened.hosts,
            progress=progress,
        )
    generated = timeline.about["generated"]
    said = decode(model_dir, generated) if texts else [None] * len(generated)
    completions = [
        Completion(rank=rank, prompt_ids=tuple(prompt), token_ids=tuple(tokens), text=text)
        for rank, prompt, tokens, text in zip(timeline.about["request_rank"], prompt_ids, generated, said, strict=True)
    ]
    return timeline, completions, [*_warnings(plan, model_dir), *unpipelined(plan), *plain_greedy(model_dir)]


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file: one a line, empty lines left out. Raises InputFileError, UsageError for none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path}: cannot be read as text ({error})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path}: has no prompt; give one a line")
    return prompts


def _warnings(plan: Plan, model_dir: Path) -> list[str]:
    """The plan fits in shape, but it may have been solved for another model."""
    name = model_from_hf_config(model_dir, name=model_dir.resolve().name).name
    if plan.model == name:
        return []
    return [f"the plan was solved for model {plan.model!r}, this one is {name!r}; layers and experts agree"]
