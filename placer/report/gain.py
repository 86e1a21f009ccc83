"""Gain of one plan over another: never without the dispatch mode it holds for."""

from dataclasses import dataclass

from placer.core.errors import UsageError
from placer.core.evaluate import Evaluation
from placer.core.modes import DispatchMode

__all__ = ["Gain", "gain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Predicted iteration times of a plan and of the linear plan (experts by index) under one dispatch mode."""

    mode: DispatchMode
    plan_us: float
    linear_us: float

    @property
    def ratio(self) -> float:
        """Plan's time / linear plan's time; below 1 the plan is faster."""
        return self.plan_us / self.linear_us

    @property
    def speedup(self) -> float:
        """Linear plan's time / plan's time; above 1 the plan is faster."""
        return self.linear_us / self.plan_us

    def __str__(self) -> str:
        times = f"{self.linear_us:.1f} -> {self.plan_us:.1f} us an iteration"
        balance = "; with allgather a plan can gain balance only" if self.mode == "allgather" else ""
        return f"{self.speedup:.2f}x the speed of linear under {self.mode} ({times}, predicted{balance})"


def gain(plan: Evaluation, linear: Evaluation, mode: DispatchMode) -> Gain:
    """Gain of `plan` over `linear`, both judged on the same tokens, under `mode`.

    Raises UsageError where the token counts differ, or where one was not timed under `mode`.
    """
    if plan.tokens != linear.tokens:
        raise UsageError(
            f"plan judged on {plan.tokens} tokens, linear on {linear.tokens}; judge both on the same tokens"
        )
    for name, evaluation in (("plan", plan), ("linear", linear)):
        if mode not in evaluation.iteration_us:
            known = ", ".join(evaluation.iteration_us)
            raise UsageError(f"{name} has no time for mode {mode!r}, only {known}; evaluate it with modes=({mode!r},)")
        if not evaluation.iteration_us[mode] > 0:
            raise UsageError(
                f"{name} takes {evaluation.iteration_us[mode]} us under {mode}; a gain needs positive times"
            )
    return Gain(mode=mode, plan_us=plan.iteration_us[mode], linear_us=linear.iteration_us[mode])
