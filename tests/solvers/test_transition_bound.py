"""The bound on affinity: valid for any multipliers, tight against exact linear programs, and hard to forge."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from chain_problems import chain_problem, least_cut
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.core.certificates import Certificate, verify
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem
from solvers.bounds.transition import TransitionBound, transition_certificate
from solvers.bounds.transition_cuts import violated_cuts
from solvers.bounds.transition_search import TransitionSearch
from solvers.bounds.transition_spectrum import SplitSearch


def relaxation(problem: PlacementProblem, width: int, capped: bool) -> float:
    """Optimum of the linear program without cuts, by GLOP: the most flow that could be kept."""
    from ortools.linear_solver import pywraplp

    flow_LEE = problem.profile.transition_LEE
    assert flow_LEE is not None
    pairs, experts = flow_LEE.shape[:2]
    load_LE = problem.profile.load_LE
    ranks = problem.cluster.num_ranks
    share_LE = load_LE * ranks / load_LE.sum(axis=1, keepdims=True)
    solver = pywraplp.Solver.CreateSolver("GLOP")
    par_L = [solver.NumVar(1.0, 100.0, "") for _ in range(pairs + 1)]
    goal = []
    for pair in range(pairs):
        s = [[solver.NumVar(0.0, 1.0, "") for _ in range(experts)] for _ in range(experts)]
        for i in range(experts):
            solver.Add(sum(s[i]) == width)
            solver.Add(sum(row[i] for row in s) == width)
            if capped:
                solver.Add(sum(s[i][j] * float(share_LE[pair + 1, j]) for j in range(experts)) <= par_L[pair + 1])
                solver.Add(sum(s[j][i] * float(share_LE[pair, j]) for j in range(experts)) <= par_L[pair])
        goal += [s[i][j] * float(flow_LEE[pair, i, j]) for i in range(experts) for j in range(experts)]
    if capped and problem.max_par is not None:
        solver.Add(sum(par_L) <= problem.max_par * (pairs + 1))
    solver.Maximize(sum(goal))
    assert solver.Solve() == pywraplp.Solver.OPTIMAL
    return float(solver.Objective().Value())


@pytest.mark.parametrize("max_par", [None, 1.2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multipliers_come_near_the_exact_linear_program(seed: int, max_par: float | None) -> None:
    problem = chain_problem(seed, layers=4, experts=12, ranks=4, max_par=max_par)
    flow_LEE = problem.profile.transition_LEE
    assert flow_LEE is not None
    search = TransitionSearch(problem, flow_LEE.astype(np.float64), 3, capped=max_par is not None, cuts=False)
    # what the program knows beside the oracle's: the least PAR that single experts force
    search.floor_L[:] = 1.0
    kept = np.inf
    for _ in range(10):
        search.advance(300)
        kept = min(kept, search.judge())
        search.extend()
    exact = relaxation(problem, 3, max_par is not None)
    assert exact * (1 - 1e-9) <= kept <= exact * (1 + 2e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1.05, 1.3]), st.booleans())
def test_any_multipliers_of_the_right_sign_prove_a_true_bound(
    seed: int, max_par: float | None, with_split: bool
) -> None:
    problem = chain_problem(seed, max_par=max_par)
    optimum = least_cut(problem)
    assume(np.isfinite(optimum))
    rng = np.random.default_rng(seed)
    flow_LEE = problem.profile.transition_LEE
    assert flow_LEE is not None
    pairs, experts = flow_LEE.shape[:2]
    scale = rng.choice([0.1, 0.5, 1.0]) * flow_LEE.mean()
    cuts = 8
    at_N5 = np.column_stack(
        [rng.integers(0, pairs, cuts)]
        + [np.stack([rng.permutation(experts)[:2] for _ in range(cuts)]) for _ in range(2)]
    )
    arrays = {
        "rank_u_LE": scale * rng.normal(1.0, 1.0, (pairs, experts)),
        "rank_v_LE": scale * rng.normal(1.0, 1.0, (pairs, experts)),
        "rank_tau_N": scale * rng.exponential(1.0, cuts),
        "rank_biclique_N5": at_N5.astype(np.float64),
    }
    numbers = {}
    if with_split:
        arrays["rank_split_LEE"] = flow_LEE * rng.random()
    if max_par is not None:
        arrays["mu_LE"] = scale * rng.exponential(1.0, (pairs, experts))
        arrays["nu_LE"] = scale * rng.exponential(1.0, (pairs, experts))
        used_L = np.zeros(pairs + 1)
        used_L[1:] += arrays["mu_LE"].sum(axis=1)
        used_L[:-1] += arrays["nu_LE"].sum(axis=1)
        numbers["price"] = float(used_L.max() * rng.uniform(1.0, 1.5))
    proof = Certificate(
        kind="kept", objective_name="cut", bound=-np.inf, proof="random", arrays=arrays, numbers=numbers
    )
    assert verify(problem, proof) <= optimum + 1e-9


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1.1, 1.4]))
def test_the_bound_is_below_the_optimum_and_is_what_the_certificate_proves(seed: int, max_par: float | None) -> None:
    problem = chain_problem(seed, max_par=max_par)
    optimum = least_cut(problem)
    assume(np.isfinite(optimum))
    finder = TransitionBound(problem, 0.0)
    while finder.step():
        pass
    certificate = finder.certificate()
    assert certificate.bound <= optimum + 1e-9
    assert certificate.bound == pytest.approx(finder.bound, abs=1e-8)
    assert verify(problem, certificate) == certificate.bound


def test_bicliques_close_most_of_the_gap() -> None:
    gaps = {}
    for cuts in (False, True):
        missing = []
        for seed in range(6):
            problem = chain_problem(seed, layers=2, experts=6, ranks=2)
            flow_LEE = problem.profile.transition_LEE
            assert flow_LEE is not None
            search = TransitionSearch(problem, flow_LEE.astype(np.float64), 3, capped=False, cuts=cuts)
            kept = np.inf
            for _ in range(8):
                search.advance(200)
                kept = min(kept, search.judge())
                search.extend()
            missing.append(least_cut(problem) - (1 - kept / flow_LEE.sum()))
        assert min(missing) >= -1e-9
        gaps[cuts] = sum(missing)
    assert gaps[True] < 0.5 * gaps[False]


def test_nodes_are_bounded_too() -> None:
    for seed in range(3):
        problem = chain_problem(seed, layers=3, experts=4, ranks=4, nodes=2)
        certificate = transition_certificate(problem, node_weight=1.0)
        optimum = least_cut(problem, node_weight=1.0)
        assert 0 < certificate.bound <= optimum + 1e-9
        on_ranks = least_cut(problem)
        alone = replace(certificate, bound=0.0, numbers={"price": 0.0, "node_weight": 0.0})
        assert verify(problem, alone) == pytest.approx(on_ranks, abs=1e-8)


def test_the_spectrum_proves_more_than_the_matching_and_never_too_much() -> None:
    gained = 0.0
    for seed in range(3):
        problem = chain_problem(seed, layers=2, experts=6, ranks=6, nodes=2)
        flow_LEE = problem.profile.transition_LEE
        assert flow_LEE is not None
        optimum = least_cut(problem, node_weight=1.0)
        certificate = transition_certificate(problem, node_weight=1.0)
        assert certificate.bound <= optimum + 1e-9
        search = TransitionSearch(problem, flow_LEE.astype(np.float64), 3, capped=False, cuts=False)
        search.advance(400)
        matching = search.judge()
        found = search.multipliers()
        split = SplitSearch(flow_LEE.astype(np.float64), 2, found["u_LE"], found["v_LE"])
        assert split.kept == pytest.approx(matching, rel=1e-6)
        split.step(40)
        assert split.kept <= matching * (1 + 1e-6)
        assert 1 - split.kept / flow_LEE.sum() <= optimum - least_cut(problem) + 1e-9
        gained += matching - split.kept
    assert gained > 0
    assert "node_split_LEE" in certificate.arrays
    assert "spectrum" in certificate.proof


def test_cuts_found_are_violated_and_integer_placements_violate_none() -> None:
    rng = np.random.default_rng(0)
    rank_E, next_E = rng.permutation(12) // 3, rng.permutation(12) // 3
    together_EE = (rank_E[:, None] == next_E).astype(np.float64)
    assert len(violated_cuts(together_EE, 0.01, 100)[0]) == 0
    shifted_EE = np.roll(np.eye(12), 1, axis=1) + np.eye(12) + np.roll(np.eye(12), -1, axis=1)
    at_N4, by_N = violated_cuts(shifted_EE, 0.01, 40)
    assert 0 < len(at_N4) <= 40
    i, other, j, k = at_N4.T
    left = shifted_EE[i, j] + shifted_EE[i, k] + shifted_EE[other, j] - shifted_EE[other, k] - 2
    np.testing.assert_allclose(left, by_N)
    assert (by_N > 0.01).all()
    assert (i != other).all()
    assert (j != k).all()


Tamper = Callable[[dict[str, np.ndarray], dict[str, float]], None]


def _negative_mu(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["mu_LE"][0, 0] = -1.0


def _wrong_shape(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["rank_u_LE"] = arrays["rank_u_LE"][:, :-1]


def _low_price(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    numbers["price"] *= 0.5


def _negative_tau(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["rank_tau_N"][0] = -arrays["rank_tau_N"][0]


def _same_expert_twice(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["rank_biclique_N5"][0, 2] = arrays["rank_biclique_N5"][0, 1]


def _expert_that_is_not_there(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["rank_biclique_N5"][0, 4] = 12


def _no_number(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["nu_LE"][0, 0] = np.nan


def _other_multipliers(arrays: dict[str, np.ndarray], numbers: dict[str, float]) -> None:
    arrays["rank_v_LE"] += 1.0


TAMPERS = [
    (_negative_mu, "0 or more"),
    (_wrong_shape, "needs"),
    (_low_price, "price"),
    (_negative_tau, "none negative"),
    (_same_expert_twice, "one twice"),
    (_expert_that_is_not_there, "not there"),
    (_no_number, "no number"),
    (_other_multipliers, "proves"),
]


@pytest.mark.parametrize(("tamper", "says"), TAMPERS, ids=[tamper.__name__ for tamper, _ in TAMPERS])
def test_a_forged_certificate_is_refused(tamper: Tamper, says: str) -> None:
    problem = chain_problem(3, layers=3, experts=12, ranks=4, max_par=1.15)
    honest = transition_certificate(problem)
    assert honest.numbers["price"] > 0
    assert len(honest.arrays["rank_tau_N"]) > 0
    arrays, numbers = {name: array.copy() for name, array in honest.arrays.items()}, dict(honest.numbers)
    tamper(arrays, numbers)
    with pytest.raises(ViolationError, match=says):
        verify(problem, replace(honest, arrays=arrays, numbers=numbers))


def test_a_claim_above_the_proof_is_refused() -> None:
    problem = chain_problem(0)
    honest = transition_certificate(problem)
    with pytest.raises(ViolationError, match="claims a bound"):
        verify(problem, replace(honest, bound=honest.bound + 1e-6))


def test_what_cannot_be_bounded_says_why() -> None:
    with pytest.raises(UsageError, match="one copy"):
        TransitionBound(chain_problem(0, redundant=3), 0.0)
    problem = chain_problem(0)
    without = replace(problem, profile=replace(problem.profile, transition_LEE=None))
    with pytest.raises(UsageError, match="no transitions"):
        TransitionBound(without, 0.0)
