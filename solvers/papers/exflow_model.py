"""ExFlow's integer program (arXiv 2401.08383, equations 8 to 12) in three forms, and its search on PuLP or CP-SAT.

    x[e,j,p] = 1: expert e of layer j is in part p     sum_e x[e,j,p] = E / P (9),   sum_p x[e,j,p] = 1 (10)
    r[i,j]   = 1: the experts i, j of neighbouring layers are apart, for all p:
                  r[i,j] >= x[i,l,p] - x[j,l+1,p] (11),   r[i,j] >= x[j,l+1,p] - x[i,l,p] (12)
    min sum of r over everything that goes from an expert to an expert of the next layer (8)

"per_token"   the paper's: one r for each token and layer step.
"aggregated"  one r for each pair that any token takes, weighted by how many: the same optimum, fewer variables.
"colocation"  ours: s = 1 - r for every pair. An expert shares its part with exactly C = E / P experts of the next
              layer, so sum_j s[i,j] = sum_i s[i,j] = C. Without these rows x = 1 / P everywhere makes every r zero and
              the relaxation proves nothing; with them it is at least a b-matching of each two layers.

Equal parts may be renamed, so expert e of layer 0 is in one of the parts 0 to e (not in the paper).
Where a token chooses k > 1 experts, each of its k * k pairs counts once, as in `Profile.transition_LEE`; that is the
paper's count at k = 1, and a factor of 1 / k, which others put before it, moves no optimum.

Legend: L layers, E logical experts, P parts (nodes or ranks), T tokens, I terms of the objective, V variables.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from placer.core.errors import SolverError
from solvers.exact.pulp_run import State, run_program, value_of

__all__ = ["Backend", "Form", "Parts", "Settings", "Terms", "count_rows", "cut_of", "search_parts"]

IntArray = npt.NDArray[np.int64]
Backend = Literal["cpsat", "highs", "cbc"]
Form = Literal["per_token", "aggregated", "colocation"]

LEAST_TIME_S = 0.05
ROUNDING = 1e-6
"""What the floating-point back ends may be off, relative to their bound."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which back end solves which form; `seed` reaches CP-SAT (PuLP's back ends run with their own)."""

    backend: Backend = "cpsat"
    form: Form = "colocation"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What goes from expert `before` of layer `step` to expert `after` of the next, `weight` times; all int64 (I,)."""

    step_I: IntArray
    before_I: IntArray
    after_I: IntArray
    weight_I: IntArray

    @classmethod
    def of_paths(cls, path_TL: npt.NDArray[np.integer[Any]]) -> "Terms":
        """One term for each token and layer step of top-1 paths; -1 where a token has no expert."""
        id_TL: IntArray = path_TL.astype(np.int64)
        token, step = np.nonzero((id_TL[:, :-1] >= 0) & (id_TL[:, 1:] >= 0))
        return cls(step, id_TL[token, step], id_TL[token, step + 1], np.ones(len(token), dtype=np.int64))

    @classmethod
    def of_weights(cls, weight_LEE: npt.NDArray[np.integer[Any]]) -> "Terms":
        """One term for each pair with a weight, (L - 1, E, E)."""
        step, before, after = np.nonzero(weight_LEE)
        return cls(step, before, after, weight_LEE[step, before, after].astype(np.int64))

    def weights(self, layers: int, experts: int) -> IntArray:
        """The terms added up, (L - 1, E, E)."""
        weight_LEE = np.zeros((layers - 1, experts, experts), dtype=np.int64)
        np.add.at(weight_LEE, (self.step_I, self.before_I, self.after_I), self.weight_I)
        return weight_LEE

    def within(self, member_LN: IntArray, experts: int) -> "Terms":
        """The terms between members (ascending ids of each layer), renumbered by their place among them."""
        place_LE = np.full((len(member_LN), experts), -1)
        np.put_along_axis(place_LE, member_LN, np.arange(member_LN.shape[1])[None], axis=1)
        before_I, after_I = place_LE[self.step_I, self.before_I], place_LE[self.step_I + 1, self.after_I]
        inside = (before_I >= 0) & (after_I >= 0)
        return Terms(self.step_I[inside], before_I[inside], after_I[inside], self.weight_I[inside])


@dataclass(frozen=True, slots=True)
class Parts:
    """An answer: `part_LE` int64 (None: nothing found), its cost in tokens, and a bound no equal parts go below."""

    state: State
    part_LE: IntArray | None = None
    cost: int = 0
    bound: int = 0


@dataclass(slots=True)
class ZeroOne:
    """A program in V variables that are 0 or 1: minimise cost_V x, least <= sum of factors * x <= most in every row."""

    cost_V: list[int]
    rows: list[tuple[int | None, int | None, list[tuple[int, int]]]]
    zero: set[int]
    place_LEP: IntArray
    pair_I: IntArray
    offset: int


def cut_of(terms: Terms, part_LE: IntArray) -> int:
    """The weight of the terms whose two experts are in different parts."""
    apart_I = part_LE[terms.step_I, terms.before_I] != part_LE[terms.step_I + 1, terms.after_I]
    return int(terms.weight_I[apart_I].sum())


def count_rows(terms: Terms, layers: int, experts: int, parts: int, form: Form) -> int:
    """Rows of the program, without building it."""
    if form == "colocation":
        pairs = (layers - 1) * experts**2
        return layers * (experts + parts) + 2 * parts * pairs + 2 * (layers - 1) * experts
    return layers * (experts + parts) + 2 * parts * len(terms.step_I)


def search_parts(
    terms: Terms,
    layers: int,
    experts: int,
    parts: int,
    settings: Settings,
    time_limit_s: float,
    start_LE: IntArray | None = None,
) -> Parts:
    """E / P experts of every layer in each part, with the least weight between parts that one run finds in its time.

    One thread. `start_LE` (equal parts) is the back end's first incumbent, and nothing worse comes back. State
    "optimal" is proven; "none" says that nothing was found. Raises DependencyError where CBC is not installed, and
    SolverError where a back end breaks its rows. Complexity: L E P + terms variables, 2 P rows a term; NP-hard.
    """
    deadline = time.perf_counter() + time_limit_s
    terms = terms if settings.form == "per_token" else Terms.of_weights(terms.weights(layers, experts))
    if parts == 1 or not len(terms.step_I):
        if start_LE is None:
            start_LE = np.tile(np.arange(experts) * parts // experts, (layers, 1))
        return Parts("optimal", start_LE)
    program = _program(terms, layers, experts, parts, settings.form)
    start_V = None if start_LE is None else _values(program, terms, _named(start_LE), settings.form)
    search = _search_cpsat if settings.backend == "cpsat" else _search_pulp
    state, value_V, least = search(program, settings, deadline, start_V)
    if state == "infeasible":
        raise SolverError(f"{settings.backend} calls a program infeasible that has solutions")
    found = [] if start_LE is None else [start_LE]
    if value_V is not None:
        found.insert(0, value_V[program.place_LEP].argmax(axis=2))
        size_LP = (found[0][:, :, None] == np.arange(parts)).sum(axis=1)
        if (size_LP != experts // parts).any():
            raise SolverError(f"{settings.backend} returned parts of {size_LP.tolist()} experts against its rows")
    if not found:
        return Parts("none")
    part_LE = min(found, key=lambda part_LE: cut_of(terms, part_LE))
    cost = cut_of(terms, part_LE)
    bound = max(0, min(cost, program.offset + least))
    return Parts("optimal" if bound == cost else "feasible", part_LE, cost, bound)


def _named(part_LE: IntArray) -> IntArray:
    """The same parts numbered by their first expert of layer 0."""
    _, first = np.unique(part_LE[0], return_index=True)
    name_P = np.empty(len(first), dtype=np.int64)
    name_P[np.argsort(first)] = np.arange(len(first))
    named: IntArray = name_P[part_LE]
    return named


def _program(terms: Terms, layers: int, experts: int, parts: int, form: Form) -> ZeroOne:
    place_LEP = np.arange(layers * experts * parts).reshape(layers, experts, parts)
    zero = {int(place_LEP[0, e, p]) for e in range(experts) for p in range(e + 1, parts)}
    rows: list[tuple[int | None, int | None, list[tuple[int, int]]]] = []
    for place_EP in place_LEP.tolist():
        rows += [(1, 1, [(1, v) for v in row]) for row in place_EP]
        rows += [(experts // parts,) * 2 + ([(1, row[p]) for row in place_EP],) for p in range(parts)]
    if form == "colocation":
        weight_I = terms.weights(layers, experts).ravel()
        step_I, before_I, after_I = (axis.ravel() for axis in np.indices((layers - 1, experts, experts)))
        cost_I, sign, room = -weight_I, 1, 1
    else:
        step_I, before_I, after_I = terms.step_I, terms.before_I, terms.after_I
        cost_I, sign, room = terms.weight_I, -1, 0
    pair_I = np.arange(len(step_I)) + place_LEP.size
    here_IP, there_IP = place_LEP[step_I, before_I], place_LEP[step_I + 1, after_I]
    for pair, here_P, there_P in zip(pair_I.tolist(), here_IP.tolist(), there_IP.tolist(), strict=True):
        # x - x' - r <= 0, or with s = 1 - r: x - x' + s <= 1
        for here, there in zip(here_P, there_P, strict=True):
            rows.append((None, room, [(1, here), (-1, there), (sign, pair)]))
            rows.append((None, room, [(-1, here), (1, there), (sign, pair)]))
    if form == "colocation":
        for pair_EE in pair_I.reshape(layers - 1, experts, experts):
            for line in [*pair_EE.tolist(), *pair_EE.T.tolist()]:
                rows.append((experts // parts, experts // parts, [(1, v) for v in line]))
    cost_V = [0] * place_LEP.size + cost_I.tolist()
    offset = int(terms.weight_I.sum()) if form == "colocation" else 0
    return ZeroOne(cost_V, rows, zero, place_LEP, pair_I, offset)


def _values(program: ZeroOne, terms: Terms, part_LE: IntArray, form: Form) -> IntArray:
    value_V = np.zeros(len(program.cost_V), dtype=np.int64)
    np.put_along_axis(
        value_V[: program.place_LEP.size].reshape(program.place_LEP.shape), part_LE[:, :, None], 1, axis=2
    )
    if form == "colocation":
        value_V[program.pair_I] = (part_LE[:-1, :, None] == part_LE[1:, None, :]).ravel()
    else:
        apart_I = part_LE[terms.step_I, terms.before_I] != part_LE[terms.step_I + 1, terms.after_I]
        value_V[program.pair_I] = apart_I
    return value_V


def _search_pulp(
    program: ZeroOne, settings: Settings, deadline: float, start_V: IntArray | None
) -> tuple[State, npt.NDArray[np.float64] | None, int]:
    import pulp

    model = pulp.LpProblem("exflow", pulp.LpMinimize)
    x = [
        model.add_variable(f"v{v}", lowBound=0, upBound=int(v not in program.zero), cat=pulp.LpInteger)
        for v in range(len(program.cost_V))
    ]
    model += pulp.LpAffineExpression([(x[v], cost) for v, cost in enumerate(program.cost_V) if cost])
    for least, most, factors in program.rows:
        total = pulp.LpAffineExpression([(x[v], factor) for factor, v in factors])
        model += total == most if least == most else total <= most
    if start_V is not None:
        for variable, value in zip(x, start_V.tolist(), strict=True):
            variable.setInitialValue(value)
    left_s = max(LEAST_TIME_S, deadline - time.perf_counter())
    backend = cast(Literal["highs", "cbc"], settings.backend)
    state, bound = run_program(model, backend, 0.0, left_s, warm_start=start_V is not None)
    least = (
        -program.offset
        if bound is None or not math.isfinite(bound)
        else math.ceil(bound - ROUNDING * max(1.0, abs(bound)))
    )
    if state not in ("optimal", "feasible"):
        return state, None, least
    value_V = np.array([value_of(variable) for variable in x])
    if state == "optimal":
        least = max(least, round(float(value_V.round() @ np.array(program.cost_V))))
    return state, value_V, least


def _search_cpsat(
    program: ZeroOne, settings: Settings, deadline: float, start_V: IntArray | None
) -> tuple[State, npt.NDArray[np.float64] | None, int]:
    from ortools.sat.python import cp_model

    model: Any = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in program.cost_V]
    for v in sorted(program.zero):
        model.add(x[v] == 0)
    for least, most, factors in program.rows:
        total = sum(factor * x[v] for factor, v in factors)
        model.add(total == most if least == most else total <= most)
    model.minimize(sum(cost * x[v] for v, cost in enumerate(program.cost_V) if cost))
    if start_V is not None:
        for variable, value in zip(x, start_V.tolist(), strict=True):
            model.add_hint(variable, value)
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(LEAST_TIME_S, deadline - time.perf_counter())
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = settings.seed % 2**31
    solver.parameters.linearization_level = 2
    status = solver.solve(model)
    states: dict[Any, State] = {
        cp_model.OPTIMAL: "optimal",
        cp_model.FEASIBLE: "feasible",
        cp_model.INFEASIBLE: "infeasible",
    }
    if status == cp_model.MODEL_INVALID:
        raise SolverError(f"CP-SAT refused the model: {model.validate()}")
    state = states.get(status, "none")
    bound = solver.best_objective_bound
    least = (
        math.ceil(bound - ROUNDING) if math.isfinite(bound) and state in ("optimal", "feasible") else -program.offset
    )
    value_V = np.array([solver.value(v) for v in x], dtype=np.float64) if state in ("optimal", "feasible") else None
    return state, value_V, least
