"""Search for the fastest device plan within a memory budget: buffer, residents, ceilings, order, then cache.

Options are chosen by knapsacks at shadow weights, for a few sizes of the buffer; every plan is judged by its predicted
iteration time, so the weights need only point the right way. Ours, not D2MoE's (it plans no bits).
Legend: B iterations, L routing sites, E experts, K levels of the ladder, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from placer.core.device.cache import CachePolicy
from placer.core.device.evaluate import evaluate_device, mean_clipping_loss
from placer.core.device.items import OrderRule
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, SolverError
from solvers.bits.cache_bound import any_cache_bound_ns
from solvers.bits.knapsack import solve_greedy
from solvers.bits.knapsack_cpsat import solve_cpsat_knapsack
from solvers.bits.options import LevelOptions, level_options
from solvers.bits.replay import replay
from solvers.bits.shadow import LEAST_SHARE, Shadow, ascend

__all__ = ["BudgetSearch"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MIB = 2**20
BUFFER_EXPERTS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
CACHE_SHARES = (0.25, 0.5, 0.75, 1.0)
JUDGED_SITES = 1024
"""Sites (times iterations) on which caches are compared first; the best of them is then judged on all."""

REFINED_BUFFERS = 2
REFINE_STEPS = 24
SOFT_ROUNDS, SOFTNESS = 8, 0.6
PROVEN = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BudgetSearch:
    """One planning problem.

    empty       the plan that every other is a change of: nothing resident, no ceilings, the budget, no objective
    orders      rules to try; caches: policies to try beside none
    most_loss   limit on the quality cost (None: no clipping); error_LEK: error at every level (None: not known)
    """

    work: DeviceWork
    device: DeviceSpec
    options: LevelOptions
    empty: DevicePlan
    orders: tuple[OrderRule, ...]
    caches: tuple[CachePolicy, ...]
    most_loss: float | None
    error_LEK: FloatArray | None
    solver: Literal["greedy", "cpsat"]
    time_limit_s: float

    @classmethod
    def of(
        cls,
        work: DeviceWork,
        device: DeviceSpec,
        empty: DevicePlan,
        *,
        orders: tuple[OrderRule, ...],
        caches: tuple[CachePolicy, ...],
        most_loss: float | None,
        error_LEK: FloatArray | None,
        solver: Literal["greedy", "cpsat"],
        time_limit_s: float,
    ) -> "BudgetSearch":
        """The problem with the options of every expert."""
        levels = empty.ladder.levels
        options = level_options(
            work,
            device,
            empty.ladder,
            empty.plane_bytes_K,
            ceilings=(levels,) if most_loss is None else range(1, levels + 1),
            error_LEK=None if most_loss is None else error_LEK,
        )
        return cls(
            work=work, device=device, options=options, empty=empty, orders=orders, caches=caches, most_loss=most_loss,
            error_LEK=error_LEK, solver=solver, time_limit_s=time_limit_s,
        )  # fmt: skip

    def found(self) -> DevicePlan:
        """The best plan found, with its bound. Raises InfeasibleError naming the smallest budget."""
        plan, shadow = self.without_cache()
        return self.finished(self.with_cache(plan, shadow) or plan, shadow)

    def without_cache(self) -> tuple[DevicePlan, Shadow]:
        """The best plan found without a cache, judged, and the shadow weights with the bound."""
        memory, options = self.device.memory_bytes, self.options
        buffers = self._buffers()
        shadow = ascend(options, most_bytes=self.most_resident_bytes, buffer_bytes=memory, most_loss=self.most_loss)
        assert shadow.bound_ns is not None, "a legal plan exists, so the relaxation has a solution"
        best: DevicePlan | None = None
        ranked: list[tuple[float, int]] = []
        for buffer_bytes in buffers:
            for share_LB in (shadow.share_LB, np.ones_like(shadow.share_LB)):
                choice_LE = self._choice(share_LB, buffer_bytes, memory - buffer_bytes)
                if choice_LE is not None:
                    plan = self._judged(self._plan(choice_LE, buffer_bytes))
                    ranked.append((plan.objective or 0.0, buffer_bytes))
                    best = _better(best, plan)
        for plan in self._simple_plans():
            best = _better(best, self._judged(plan))
        for buffer_bytes in list(dict.fromkeys(size for _, size in sorted(ranked)))[:REFINED_BUFFERS]:
            refined = ascend(
                options,
                most_bytes=memory - buffer_bytes,
                buffer_bytes=buffer_bytes,
                most_loss=self.most_loss,
                start_LB=shadow.share_LB,
                steps=REFINE_STEPS,
            )
            for choice_LE in (*refined.choices, *self._softened(buffer_bytes)):
                best = _better(best, self._judged(self._plan(choice_LE, buffer_bytes)))
        if best is None:
            raise SolverError(
                "device-budget: no ceilings found within the quality limit; raise it, or use solver cpsat"
            )
        if self.solver == "cpsat":
            choice_LE = self._choice(shadow.share_LB, best.buffer_bytes, memory - best.buffer_bytes, exact=True)
            if choice_LE is not None:
                best = _better(best, self._judged(self._plan(choice_LE, best.buffer_bytes)))
        return best, shadow

    def with_cache(self, plan: DevicePlan, shadow: Shadow) -> DevicePlan | None:
        """A plan that gives up some resident planes for a cache and is faster; None where none was found."""
        iterations, sites = self.work.count_BLEK.shape[:2]
        few = min(iterations, max(1, JUDGED_SITES // sites))
        sample = DeviceWork(tokens_B=self.work.tokens_B[:few], count_BLEK=self.work.count_BLEK[:few])
        # a cache starts empty: what it is worth shows once it has filled up
        skipped = few // 4 if few < iterations else 0
        spare = self.device.memory_bytes - plan.buffer_bytes
        shown = evaluate_device(plan, sample, self.device).iteration_ns_B[skipped:].mean()
        best: tuple[float, DevicePlan] = (float(shown), plan)
        for policy in self.caches:
            for share in CACHE_SHARES if policy != "none" else ():
                cache_bytes = int(share * spare)
                choice_LE = self._choice(shadow.share_LB, plan.buffer_bytes, spare - cache_bytes)
                if cache_bytes < min(plan.plane_bytes_K) or choice_LE is None:
                    continue
                tried = replace(
                    self._plan(choice_LE, plan.buffer_bytes), order=plan.order, cache=policy, cache_bytes=cache_bytes
                )
                found = float(evaluate_device(tried, sample, self.device).iteration_ns_B[skipped:].mean())
                if found < best[0]:
                    best = (found, tried)
        if best[1] is plan:
            return None
        mean_ns = evaluate_device(best[1], self.work, self.device).mean_iteration_ns
        faster = plan.objective is None or mean_ns < plan.objective
        return replace(best[1], objective=mean_ns) if faster else None

    def finished(self, plan: DevicePlan, shadow: Shadow) -> DevicePlan:
        """The plan with its bound and its quality cost."""
        bound, bound_by = (
            shadow.bound_ns,
            "shadow weights (every residency, order and buffer, without cache or prefetch)",
        )
        if plan.cache != "none":
            clipped = self.work.clipped(plan.ceiling_LE)
            levels = plan.ladder.levels
            alone = level_options(clipped, self.device, plan.ladder, plan.plane_bytes_K, ceilings=(levels,))
            bound = any_cache_bound_ns(
                alone, plan.plane_bytes_K, memory_bytes=self.most_resident_bytes, start_LB=shadow.share_LB
            )
            bound_by = "reuse gaps (every residency, cache, order and buffer at its ceilings, without prefetch)"
        quality = None if self.error_LEK is None else mean_clipping_loss(self.work, plan.ceiling_LE, self.error_LEK)
        assert plan.objective is not None
        assert bound is not None
        return replace(
            plan,
            bound=bound,
            bound_by=bound_by,
            quality_cost=quality,
            stopped_by="optimal" if plan.objective - bound <= PROVEN * plan.objective else "effort",
        )

    @property
    def most_resident_bytes(self) -> int:
        """What may stay at most: beside a buffer for one plane at least, unless everything can be resident."""
        memory, bytes_K = self.device.memory_bytes, self.empty.plane_bytes_K
        lowest = self.empty.ladder.planes_of(int(self.options.ceiling_O.min()))
        whole = sum(bytes_K[plane] for plane in lowest) * self.empty.resident_LE.size
        return memory if whole <= memory else memory - min(bytes_K)

    def _buffers(self) -> list[int]:
        """Sizes to try, those that leave a legal plan. Raises InfeasibleError naming the smallest budget."""
        memory, options, most_loss = self.device.memory_bytes, self.options, self.most_loss
        whole, experts = int(options.missing_O.max()), self.empty.num_experts
        sizes = {int(size) for size in options.missing_O} | {whole * n for n in BUFFER_EXPERTS if n <= experts}
        bytes_LEO = np.broadcast_to(options.bytes_O.astype(np.float64), options.loss_LEO.shape)
        least: dict[int, int] = {}
        for size in sorted(sizes):
            answer = solve_greedy(options.knapsack(bytes_LEO, 2**62, size, most_loss))
            if answer.objective is not None:
                least[size] = size + int(answer.objective)
        fitting = [size for size, needed in least.items() if needed <= memory]
        if not fitting:
            if not least:
                raise InfeasibleError(f"plan.most_quality_cost {most_loss} is kept by no ceilings; raise it")
            needed = min(least.values())
            raise InfeasibleError(
                f"device.memory_mib {self.device.memory_mib:g} ({memory} bytes) is below the smallest legal plan, "
                f"{needed / MIB:.4g} MiB ({needed} bytes): a buffer that holds one expert; give at least "
                "that much, or allow clipping"
            )
        return fitting

    def _choice(
        self, share_LB: FloatArray, buffer_bytes: int, resident_bytes: int, *, exact: bool = False
    ) -> IntArray | None:
        """Options that save most time at these shares of the disk; None where none are legal."""
        cost_LEO = self.options.cost_LEO(np.maximum(share_LB, LEAST_SHARE))
        problem = self.options.knapsack(cost_LEO, resident_bytes, buffer_bytes, self.most_loss)
        if exact:
            limit_s, seed = self.time_limit_s, self.empty.seed
            choice_C = solve_cpsat_knapsack(problem, time_limit_s=limit_s, seed=seed).choice_C
        else:
            choice_C = solve_greedy(problem).choice_C
        return None if choice_C is None else choice_C.reshape(cost_LEO.shape[:2])

    def _softened(self, buffer_bytes: int) -> Iterator[IntArray]:
        """Choices at shares that follow from the choice before: half where both machines have as much to do.

        Where the bound is tight for the processor, its shadow weights say nothing about which reads delay it.
        """
        share_LB = np.full(self.options.shape_LBE[:2], 0.5)
        for _ in range(SOFT_ROUNDS):
            choice_LE = self._choice(share_LB, buffer_bytes, self.device.memory_bytes - buffer_bytes)
            if choice_LE is None:
                return
            yield choice_LE
            compute_LB, input_LB = self.options.machine_ns_LB(choice_LE)
            ahead_LB = (input_LB - compute_LB) / np.maximum(1.0, input_LB + compute_LB)
            share_LB = 0.5 * share_LB + 0.5 * np.clip(0.5 + ahead_LB / SOFTNESS, 0.0, 1.0)

    def _plan(self, choice_LE: IntArray, buffer_bytes: int) -> DevicePlan:
        resident_LE, ceiling_LE = self.options.resident_O[choice_LE], self.options.ceiling_O[choice_LE]
        return replace(self.empty, resident_LE=resident_LE, ceiling_LE=ceiling_LE, buffer_bytes=buffer_bytes)

    def _simple_plans(self) -> Iterator[DevicePlan]:
        """What anybody would try first: nothing resident, and whole experts, most used first."""
        memory, levels = self.device.memory_bytes, self.empty.ladder.levels
        whole = int(self.options.missing_O.max())
        if memory < whole:
            return
        yield replace(self.empty, buffer_bytes=memory)
        if not self.empty.ladder.nested:
            return
        uses_C = self.work.count_BLEK.sum(axis=(0, 3)).reshape(-1)
        hottest_C = np.argsort(-uses_C, kind="stable")[: min((memory - whole) // whole, int((uses_C > 0).sum()))]
        resident_C = np.zeros(len(uses_C), dtype=np.int64)
        resident_C[hottest_C] = levels
        yield replace(self.empty, resident_LE=resident_C.reshape(self.empty.resident_LE.shape), buffer_bytes=whole)

    def _judged(self, plan: DevicePlan) -> DevicePlan:
        """The plan in its best order, with its objective."""
        clipped = self.work.clipped(plan.ceiling_LE)
        fixed: dict[str, Any] = {
            "buffer_bytes": plan.buffer_bytes,
            "device": self.device,
            "ladder": plan.ladder,
            "plane_bytes_K": plan.plane_bytes_K,
        }
        means = {
            order: float(replay(clipped, plan.present_LEK, order=order, **fixed).makespan_ns_BL.sum(axis=1).mean())
            for order in self.orders
        }
        best = min(self.orders, key=lambda order: means[order])
        return replace(plan, order=best, objective=self.options.outside_ns + means[best])


def _better(best: DevicePlan | None, plan: DevicePlan) -> DevicePlan:
    """The faster one; of equals the one that keeps less, then the earlier."""
    if best is None or best.objective is None or plan.objective is None:
        return plan
    mine = (plan.objective, plan.resident_bytes + plan.buffer_bytes)
    return plan if mine < (best.objective, best.resident_bytes + best.buffer_bytes) else best
