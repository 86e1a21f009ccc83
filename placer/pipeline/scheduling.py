"""How the all-to-alls of a plan run: candidates priced by the simulator, the best of each layer written to the plan.

Legend: L layers, T tokens, K top-k, W windows (iterations), R ranks.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from placer.config.settings import ScheduleSettings
from placer.core.check import assert_runnable
from placer.core.cluster import ClusterSpec
from placer.core.cost import gather_copies, leg_times
from placer.core.dispatch import LayerTraffic, assign_layer, layer_traffic
from placer.core.evaluate import window_index
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.core.schedule import SCHEDULED_MODES, Kind, Schedule
from placer.pipeline.sources import Progress, sources_of, warn_mismatch
from sim.port import port_times
from sim.stages import stages_of
from sim.traffic import work_of
from solvers.schedule.choose import Choice, Option, choose_schedule
from solvers.schedule.rounds import FAMILIES, Family, RoundsResult, rounds_families
from traces.trace import RoutingTrace

__all__ = ["ScheduledKind", "schedule_plan"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledKind:
    """What was chosen for one kind of iteration, and the mean time of the iterations that it was chosen on.

    `before_us` is with every all-to-all linear and nothing pipelined; `rounds_gap` how far the better rounds of each
    layer are from the bound for any rounds, mean over layers (None where there are none to choose).
    """

    kind: Kind
    schedule: Schedule
    batch_tokens: int
    iterations: int
    before_us: float
    after_us: float
    rounds_gap: float | None

    @property
    def layers_by_choice(self) -> dict[str, int]:
        """Layers of each algorithm and degree, most first."""
        names = zip(self.schedule.algorithm_L, self.schedule.degree_L, strict=True)
        return dict(Counter(f"{algorithm} x{degree}" for algorithm, degree in names).most_common())


def schedule_plan(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    *,
    batch_tokens: dict[Kind, int],
    settings: ScheduleSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[ScheduledKind], list[str]]:
    """The plan with a schedule for each kind in `batch_tokens` (tokens of its iterations), what each gains, warnings.

    Every layer takes the algorithm and degree that the simulator (fidelity `port`, in which layers do not touch each
    other) finds fastest on `settings.iterations` iterations spread over the trace; where nothing is faster than linear
    and unpipelined, that. Tokens of both phases of the trace are used for either kind. Deterministic for `plan.seed`.
    Raises ViolationError for a plan that cannot be run, MismatchError for one of another shape.
    """
    settings = settings or ScheduleSettings()
    warnings = warn_mismatch(plan, trace.model, cluster)
    assert_runnable(plan)
    scheduled = []
    for at, (kind, tokens) in enumerate(batch_tokens.items()):
        steps = (at, len(batch_tokens))
        found = _schedule_kind(plan, trace, cluster, kind, tokens, settings, steps, progress)
        scheduled.append(found)
        plan = replace(plan, prefill=found.schedule) if kind == "prefill" else replace(plan, decode=found.schedule)
    return plan, scheduled, warnings


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of the iterations that candidates are priced on, and where each is before every layer."""

    expert_LTK: npt.NDArray[np.integer]
    location_LT: IntArray
    window_T: IntArray
    windows: int


def _schedule_kind(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    kind: Kind,
    batch_tokens: int,
    settings: ScheduleSettings,
    steps: tuple[int, int],
    progress: Progress | None,
) -> ScheduledKind:
    expert_LTK, source_T, window_T, windows = _pick(trace, cluster.num_ranks, batch_tokens, settings.iterations)
    layers = len(expert_LTK)
    plain: list[Option] = [("linear", None)] * layers
    options: list[list[Option]] = [plain]
    degrees = range(1, 2 if plan.mode == "allgather" else settings.max_degree + 1)
    families = plan.mode in SCHEDULED_MODES and cluster.num_ranks > 1
    if families and min(cluster.nodes, cluster.ranks_per_node) > 1:
        options.append([("2dh", None)] * layers)
    done, rng = 0, np.random.default_rng(plan.seed)
    total = layers * (1 + len(degrees) * (len(options) + len(FAMILIES) * families))

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(steps[0] * total + done, steps[1] * total)

    location_LT, after_T, best = np.empty((layers, len(source_T)), dtype=np.int64), source_T, []
    for layer in range(layers):
        location_LT[layer] = after_T
        slot_TK, slots = assign_layer(plan, layer, expert_LTK[layer], after_T, np.arange(len(after_T)))
        traffic, after_T = layer_traffic(slots, plan.mode, slot_TK, after_T, window_T, windows)
        after_T = after_T if plan.mode == "coherent" else source_T
        if families:
            best.append(_rounds(traffic, cluster, trace.model, rng))
        advance()
    if families:
        options += [[("rounds", results[family].rounds) for results in best] for family in FAMILIES]
    tokens = _Tokens(expert_LTK, location_LT, window_T, windows)

    def price(schedule: Schedule) -> npt.NDArray[np.float64]:
        time_L = np.empty(layers)
        for layer in range(layers):
            time_L[layer] = _layer_ns(plan, trace.model, cluster, tokens, layer, schedule)
            advance()
        return time_L

    choice = choose_schedule(options, degrees, price)
    gather_ns = _gather_ns(cluster, trace.model, after_T, tokens) if plan.mode == "coherent" else 0.0
    gaps = [min(results.values(), key=lambda one: one.objective_ns).gap for results in best]
    return _report(kind, choice, batch_tokens, windows, gather_ns, float(np.mean(gaps)) if gaps else None)


def _pick(
    trace: RoutingTrace, num_ranks: int, batch_tokens: int, iterations: int
) -> tuple[npt.NDArray[np.integer], IntArray, IntArray, int]:
    """Experts, source rank and window of the tokens of `iterations` windows spread over the trace; and how many."""
    window_T, windows = window_index(trace.num_tokens, batch_tokens)
    chosen = np.unique(np.linspace(0, windows - 1, min(iterations, windows)).round().astype(np.int64))
    keep_T = np.isin(window_T, chosen)
    source_T = sources_of(trace, num_ranks)
    return trace.expert_LTK[:, keep_T], source_T[keep_T], np.searchsorted(chosen, window_T[keep_T]), len(chosen)


def _rounds(
    traffic: LayerTraffic, cluster: ClusterSpec, model: ModelSpec, rng: np.random.Generator
) -> dict[Family, RoundsResult]:
    """Both families for one layer, planned on what goes and what comes back."""
    back_WRR = traffic.returns_WRR[0].transpose(0, 2, 1)
    both = traffic.legs_WRR[0]
    if not np.array_equal(both, back_WRR):
        both = np.concatenate([both, back_WRR])
    return rounds_families(both, cluster, model.token_bytes, rng=rng)


def _layer_ns(
    plan: Plan, model: ModelSpec, cluster: ClusterSpec, tokens: _Tokens, layer: int, schedule: Schedule
) -> float:
    """Mean over iterations of one layer's time; one layer at a time, since the legs of all would not fit memory."""
    row = slice(layer, layer + 1)
    share_LP = None if plan.replica_share_LP is None else plan.replica_share_LP[row]
    alone = replace(
        plan,
        slot_expert_LP=plan.slot_expert_LP[row],
        replica_share_LP=share_LP,
        moe_layers=plan.moe_layers[row],
        prefill=None,
        decode=None,
    )
    own = Schedule(
        algorithm_L=schedule.algorithm_L[row], degree_L=schedule.degree_L[row], rounds_L=schedule.rounds_L[row]
    )
    work = work_of(
        alone,
        model,
        cluster,
        plan.mode,
        tokens.expert_LTK[row],
        tokens.location_LT[layer],
        tokens.window_T,
        tokens.windows,
        schedule=own,
    )
    work = replace(work, gather=None)
    return float(port_times(work, stages_of(work)).total_W.mean())


def _gather_ns(cluster: ClusterSpec, model: ModelSpec, after_T: IntArray, tokens: _Tokens) -> float:
    """Mean time of the all-gather that ends a `coherent` iteration, whatever the schedule."""
    ranks = cluster.num_ranks
    home = np.bincount(tokens.window_T * ranks + after_T, minlength=tokens.windows * ranks)
    copies_WRR = gather_copies(home.reshape(tokens.windows, ranks).astype(np.int64))
    return float(leg_times(cluster, copies_WRR, model.token_bytes).slowest_W.mean())


def _report(
    kind: Kind, choice: Choice, batch_tokens: int, windows: int, gather_ns: float, rounds_gap: float | None
) -> ScheduledKind:
    return ScheduledKind(
        kind=kind,
        schedule=choice.schedule,
        batch_tokens=batch_tokens,
        iterations=windows,
        before_us=(float(choice.plain_ns_L.sum()) + gather_ns) / 1e3,
        after_us=(float(choice.chosen_ns_L.sum()) + gather_ns) / 1e3,
        rounds_gap=rounds_gap,
    )
