"""GenerateJob: everything the ranks of one generation must agree on, as a JSON file beside plan and checkpoint.

Legend: Q requests.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from placer.core.atomic import write_text_atomically
from placer.core.errors import InputFileError, UsageError
from placer.execute.hf.architectures import read_json
from placer.execute.job import BACKENDS, DTYPES, EXECUTION_MODES, Backend, DType, ExecutionMode

__all__ = ["GENERATION_MODES", "GenerateJob", "refuse_mode"]

NEEDS_EVERY_CONTEXT = ("coherent",)

GENERATION_MODES: tuple[ExecutionMode, ...] = tuple(mode for mode in EXECUTION_MODES if mode not in NEEDS_EVERY_CONTEXT)
"""The dispatch modes under which a model generates."""

FORMAT = "placer-generate-job"
VERSION = 1
PATHS = ("plan_path", "model_path", "result_path", "record_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateJob:
    """One plan, one checkpoint folder, the prompts, and how.

    prompts        token ids of each request, length Q          rank_Q        the rank on which each request runs
    result_path    where rank 0 writes the Timeline             record_path   where it writes the routing, or None

    Each request ends at the model's end-of-sequence token or after `max_new_tokens`. `warmup` times the prompts are
    run and one more token is decoded before, unrecorded. `timeout_s` is how long one collective may take. `realtime`:
    ranks ask the kernel for real-time priority (SCHED_RR, 10), which needs root. `about` is copied into the Timeline.
    Relative paths in a file are relative to the file's folder.
    """

    plan_path: str
    model_path: str
    result_path: str
    prompts: tuple[tuple[int, ...], ...]
    rank_Q: tuple[int, ...]
    mode: ExecutionMode
    max_new_tokens: int
    warmup: int = 1
    dtype: DType = "float32"
    backend: Backend = "auto"
    timeout_s: float = 600.0
    realtime: bool = False
    record_path: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_mode(self.mode)
        for name, allowed in (("dtype", DTYPES), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"generate.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name, least in (("max_new_tokens", 1), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"generate.{name} is {value!r}; give an integer of at least {least}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise UsageError(f"generate.timeout_s is {self.timeout_s!r}; give a positive number of seconds")
        if not self.prompts:
            raise UsageError("generate.prompts is empty; give at least one prompt")
        for index, prompt in enumerate(self.prompts):
            if not prompt or any(type(token) is not int or token < 0 for token in prompt):
                raise UsageError(
                    f"generate.prompts[{index}] is {str(prompt)[:60]}; give at least one token id, each 0 or more"
                )
        if len(self.rank_Q) != len(self.prompts) or any(type(rank) is not int or rank < 0 for rank in self.rank_Q):
            raise UsageError(
                f"generate.rank_Q is {str(self.rank_Q)[:60]} for {len(self.prompts)} prompts; give each one a rank"
            )

    def save(self, path: Path) -> None:
        """Writes the job as JSON, whole or not at all."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text_atomically(path, json.dumps(data, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> "GenerateJob":
        """Reads what `save` wrote, relative paths resolved. Raises InputFileError."""
        path = Path(path)
        data = read_json(path)
        if (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
            raise InputFileError(f"{path}: is not a generate job of version {VERSION}; give one that placer wrote")
        if unknown := sorted(set(data) - {item.name for item in fields(cls)}):
            raise InputFileError(f"{path}: unknown field {unknown[0]!r}; remove it or use a newer placer")
        try:
            prompts = tuple(tuple(prompt) for prompt in data["prompts"])
            job = cls(**data | {"prompts": prompts, "rank_Q": tuple(data["rank_Q"])})
            paths: dict[str, Any] = {name: getattr(job, name) for name in PATHS}
            paths = {name: None if value is None else str(path.parent / value) for name, value in paths.items()}
            return replace(job, **paths)
        except KeyError as error:
            raise InputFileError(f"{path}: field {error} is missing") from error
        except (TypeError, ValueError, UsageError) as error:
            raise InputFileError(f"{path}: damaged generate job ({error})") from error


def refuse_mode(mode: str) -> None:
    """Raises UsageError for a dispatch mode under which no model generates."""
    if mode in NEEDS_EVERY_CONTEXT:
        raise UsageError(
            f"generate.mode is {mode}, which needs every request's context on every rank; "
            f"use one of {', '.join(GENERATION_MODES)}"
        )
    if mode not in GENERATION_MODES:
        raise UsageError(f"generate.mode is {mode!r}; use one of {', '.join(GENERATION_MODES)}")
