"""The certified bound on ranks touched: below every placement, tight where it should be, and hard to forge."""

from dataclasses import replace

import numpy as np
import pytest
from bound_problems import least_par, least_touched, least_with_replicas, problem_of_sets, random_sets
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.certificates import Certificate, verify
from placer.core.certificates.touched import touched_bound
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from solvers.bounds import touched
from solvers.bounds.touched import bound_touched

FEW = settings(max_examples=8, deadline=None)
SEEDS = st.integers(0, 10**6)


def tiny(
    seed: int, *, experts: int = 6, top_k: int = 3, ranks: int = 3, layers: int = 2, **limits: object
) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    sets = [random_sets(rng, 14, experts, top_k, ragged=bool(rng.integers(2))) for _ in range(layers)]
    return problem_of_sets(sets, experts, ranks, **limits)


def any_multipliers(
    problem: PlacementProblem, rng: np.random.Generator, *, paired: bool, level: str = "rank"
) -> dict[str, np.ndarray]:
    """Multipliers of the right signs and otherwise of no merit."""
    sets = problem.profile.sets
    layers, experts = problem.profile.load_LE.shape
    expert_HK = np.concatenate([layer.expert_HK for layer in sets])
    first, second = np.triu_indices(expert_HK.shape[1], 1)
    tokens = float(sets[0].weight_H.sum())
    low = 0.0 if problem.redundant else -0.3
    arrays = {f"{level}_u_LE": rng.uniform(low, 0.3, (layers, experts)) * tokens}
    if paired:
        present = (expert_HK[:, first] >= 0) & (expert_HK[:, second] >= 0)
        arrays[f"{level}_slope_HQ"] = rng.uniform(low, 1.0, present.shape) * present
    else:
        arrays[f"{level}_slope_HK"] = rng.uniform(low, 0.6, expert_HK.shape)
    if not problem.redundant:
        arrays[f"{level}_spectrum_LEE"] = rng.normal(0, 0.1, (layers, experts, experts)) * tokens
        arrays[f"{level}_tau_N"] = rng.exponential(0.05, 9) * tokens
        corners = np.stack([rng.choice(experts, 3, replace=False) for _ in range(9)])
        arrays[f"{level}_triangle_N4"] = np.column_stack([rng.integers(layers, size=9), corners]).astype(float)
    return arrays


@FEW
@given(SEEDS, st.booleans(), st.sampled_from([(6, 3, 3), (6, 2, 2), (6, 6, 3), (8, 4, 2)]))
def test_any_multipliers_prove_something_true(seed: int, paired: bool, shape: tuple[int, int, int]) -> None:
    experts, top_k, ranks = shape
    problem = tiny(seed, experts=experts, top_k=top_k, ranks=ranks)
    rng = np.random.default_rng(seed)
    best = least_touched(problem)
    for scale in (1.0, 0.3):
        arrays = {
            name: array if "triangle" in name else array * scale
            for name, array in any_multipliers(problem, rng, paired=paired).items()
        }
        assert touched_bound(problem, arrays, {}) <= best


@FEW
@given(SEEDS, st.booleans())
def test_any_load_multipliers_prove_something_true(seed: int, paired: bool) -> None:
    problem = tiny(seed)
    rng = np.random.default_rng(seed)
    problem = replace(problem, max_par=least_par(problem) + float(rng.uniform(0, 0.2)))
    arrays = any_multipliers(problem, rng, paired=paired)
    arrays["load_q_LE"] = rng.exponential(0.1, problem.profile.load_LE.shape)
    price = float(arrays["load_q_LE"].sum(axis=1).max() * rng.uniform(1, 1.5))
    assert touched_bound(problem, arrays, {"price": price}) <= least_touched(problem)


@FEW
@given(SEEDS, st.booleans())
def test_any_multipliers_prove_something_true_with_replicas(seed: int, paired: bool) -> None:
    problem = tiny(seed, experts=4, ranks=3, redundant=2, layers=1)
    arrays = any_multipliers(problem, np.random.default_rng(seed), paired=paired)
    assert touched_bound(problem, arrays, {}) <= least_with_replicas(problem)


@FEW
@given(SEEDS, st.sampled_from([(6, 2, 3), (6, 3, 2), (6, 3, 3), (8, 4, 2), (6, 6, 3), (8, 6, 2), (8, 8, 2), (6, 1, 3)]))
def test_bound_is_below_the_best_placement(seed: int, shape: tuple[int, int, int]) -> None:
    experts, top_k, ranks = shape
    problem = tiny(seed, experts=experts, top_k=top_k, ranks=ranks)
    certificate = bound_touched(problem, iterations=300)
    assert certificate.objective_name == "ranks_touched"
    assert verify(problem, certificate) == certificate.bound
    assert certificate.bound <= least_touched(problem)


@FEW
@given(SEEDS)
def test_bound_is_below_the_best_placement_under_a_cap(seed: int) -> None:
    problem = tiny(seed)
    problem = replace(problem, max_par=least_par(problem) * 1.02)
    certificate = bound_touched(problem, iterations=300)
    assert verify(problem, certificate) <= least_touched(problem)


def test_a_cap_that_binds_raises_the_bound() -> None:
    # the two busy experts are chosen together; apart is the only way under the cap
    rows = np.array([[0, 1], [0, 2], [1, 3]], dtype=np.int16)
    sets = ExpertSets(rows, np.array([10, 2, 2]))
    problem = problem_of_sets([sets], 4, 2)
    capped = replace(problem, max_par=1.05)
    free, tight = bound_touched(problem, iterations=400).bound, bound_touched(capped, iterations=400).bound
    assert free == pytest.approx(least_touched(problem), abs=5e-3) == pytest.approx(18 / 14, abs=5e-3)
    assert least_touched(capped) == pytest.approx(24 / 14)
    assert free + 0.2 < tight <= least_touched(capped)
    assert bound_touched(capped, price=0.0, iterations=400).bound == free


@FEW
@given(SEEDS)
def test_bound_on_nodes_too(seed: int) -> None:
    problem = tiny(seed, experts=6, ranks=6, nodes=2, top_k=3, layers=1)
    certificate = bound_touched(problem, node_weight=2.5, iterations=100)
    assert certificate.objective_name == "ranks_touched + 2.5 * nodes_touched"
    assert verify(problem, certificate) <= least_touched(problem, 2.5)
    assert {name.split("_")[0] for name in certificate.arrays} == {"rank", "node"}


@FEW
@given(SEEDS, st.sampled_from([(4, 3, 2, 1), (4, 2, 2, 1), (4, 4, 4, 2)]))
def test_bound_is_below_the_best_placement_with_replicas(seed: int, shape: tuple[int, int, int, int]) -> None:
    experts, ranks, redundant, nodes = shape
    problem = tiny(seed, experts=experts, ranks=ranks, nodes=nodes, redundant=redundant, layers=1)
    certificate = bound_touched(problem, node_weight=float(nodes - 1), iterations=200)
    assert verify(problem, certificate) <= least_with_replicas(problem, float(nodes - 1))


def test_replicas_of_all_are_never_worth_more_than_the_bound_says() -> None:
    rows = np.array([[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]], dtype=np.int16)
    problem = problem_of_sets([ExpertSets(rows, np.full(6, 5))], 4, 4, redundant=4)
    certificate = bound_touched(problem, iterations=2000)
    # 4 ranks of 2 slots hold 4 of the 6 pairs at most
    assert least_with_replicas(problem) == pytest.approx(4 / 3)
    assert certificate.bound == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.parametrize(("experts", "ranks", "top_k"), [(8, 2, 2), (16, 4, 4), (32, 8, 3)])
def test_planted_clusters_are_proven(experts: int, ranks: int, top_k: int) -> None:
    """All members but one from one cluster, the last from the next: nothing is better than two ranks."""
    rng, width = np.random.default_rng(0), experts // ranks
    place_E = rng.permutation(experts)
    rows = []
    for group in range(ranks):
        for _ in range(40):
            inside = rng.choice(width, top_k - 1, replace=False) + group * width
            outside = (group + 1) % ranks * width + rng.integers(width)
            rows.append(np.sort(place_E[[*inside, outside]]))
    problem = problem_of_sets(
        [ExpertSets(np.array(rows, dtype=np.int16), np.ones(len(rows), np.int64))], experts, ranks
    )
    certificate = bound_touched(problem, iterations=600)
    if top_k == 2:  # half of the tokens' pairs cannot be together, which half is the search's affair
        assert certificate.bound == pytest.approx(least_touched(problem), abs=0.02)
    else:
        assert 1.9 < certificate.bound <= 2.0


@pytest.mark.parametrize("top_k", [6, 8])
def test_larger_sets_have_slopes_per_member_and_per_pair_where_there_is_time(top_k: int) -> None:
    problem = tiny(3, experts=12, ranks=6, top_k=top_k, layers=1)
    fast = bound_touched(problem, iterations=290)
    thorough = bound_touched(problem, iterations=600)
    assert "rank_slope_HK" in fast.arrays
    assert "rank_slope_HQ" in thorough.arrays
    assert -(-top_k // 2) * 0.9 < verify(problem, fast) <= verify(problem, thorough) + 0.01
    assert "rank_slope_HK" in bound_touched(problem, iterations=600, time_limit_s=0.01).arrays


def test_many_experts_are_bounded_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny(5, experts=6, ranks=3, top_k=2)
    spectral = bound_touched(problem, iterations=300)
    monkeypatch.setattr("solvers.bounds.touch_layer.SPECTRUM_EXPERTS", 4)
    rows = bound_touched(problem, iterations=300)
    capped = bound_touched(replace(problem, max_par=least_par(problem)), iterations=300)
    assert "rank_spectrum_LEE" not in rows.arrays
    assert verify(problem, rows) == pytest.approx(least_touched(problem), abs=0.02)
    assert verify(problem, spectral) == pytest.approx(least_touched(problem), abs=0.02)
    assert capped.bound <= least_touched(replace(problem, max_par=least_par(problem)))


def test_same_problem_same_certificate() -> None:
    problem = tiny(1, max_par=1.3)
    one, two = bound_touched(problem, iterations=120), bound_touched(problem, iterations=120)
    assert one.bound == two.bound
    assert one.numbers == two.numbers
    assert all((one.arrays[name] == two.arrays[name]).all() for name in one.arrays)


@pytest.mark.parametrize("limits", [{}, {"max_par": 1.2}, {"redundant": 3}])
def test_no_time_still_proves_the_capacity_bound(limits: dict[str, object]) -> None:
    rng = np.random.default_rng(2)
    problem = problem_of_sets([random_sets(rng, 20, 6, 4)], 6, 3, **limits)
    least = -(-4 // problem.slots_per_rank)
    assert bound_touched(problem, time_limit_s=0.0).bound == pytest.approx(least, abs=1e-9)


def test_interrupt_returns_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny(4)
    turns = []

    def stop(done: int, total: int) -> None:
        turns.append((done, total))
        if done == 10:
            raise KeyboardInterrupt

    certificate = bound_touched(problem, iterations=4000, progress=stop)
    assert turns == [(turn, 200) for turn in range(1, 11)]
    assert 1.0 < verify(problem, certificate) <= least_touched(problem)


def forged(certificate: Certificate, **changed: np.ndarray) -> Certificate:
    return replace(certificate, arrays=certificate.arrays | changed)


def test_forged_certificates_are_refused() -> None:
    problem = tiny(7, experts=6, ranks=3, top_k=3)
    certificate = bound_touched(problem, iterations=100)
    verify(problem, certificate)
    arrays = certificate.arrays
    with pytest.raises(ViolationError, match="claims a bound"):
        verify(problem, replace(certificate, bound=certificate.bound + 1e-6))
    with pytest.raises(ViolationError, match="claims a bound"):
        verify(problem, forged(certificate, rank_slope_HQ=arrays["rank_slope_HQ"] * 0))
    with pytest.raises(ViolationError, match="rank_slope_HQ is"):
        verify(problem, forged(certificate, rank_slope_HQ=arrays["rank_slope_HQ"][1:]))
    with pytest.raises(ViolationError, match="give one"):
        verify(problem, forged(certificate, rank_slope_HK=np.zeros((28, 3))))
    with pytest.raises(ViolationError, match="no number"):
        verify(problem, forged(certificate, rank_u_LE=np.full((2, 6), np.nan)))
    with pytest.raises(ViolationError, match="rank_spectrum_LEE is"):
        verify(problem, forged(certificate, rank_spectrum_LEE=np.zeros((2, 6, 5))))
    with pytest.raises(ViolationError, match="none negative"):
        verify(problem, forged(certificate, rank_tau_N=np.array([-1.0]), rank_triangle_N4=np.array([[0.0, 0, 1, 2]])))
    with pytest.raises(ViolationError, match="or one twice"):
        verify(problem, forged(certificate, rank_tau_N=np.array([1.0]), rank_triangle_N4=np.array([[0.0, 1, 1, 2]])))
    with pytest.raises(ViolationError, match="no price"):
        verify(problem, replace(certificate, numbers={"price": 1.0}))
    capped = replace(problem, max_par=1.2)
    with pytest.raises(ViolationError, match="adds up to more"):
        verify(capped, replace(forged(certificate, load_q_LE=np.full((2, 6), 0.2)), numbers={"price": 1.0}))
    with pytest.raises(ViolationError, match="load_q_LE"):
        verify(capped, replace(forged(certificate, load_q_LE=np.full((2, 6), -0.2)), numbers={"price": 1.0}))


def test_slopes_of_absent_members_are_refused() -> None:
    rows = np.array([[0, 1, 2], [1, -1, 3]], dtype=np.int16)
    problem = problem_of_sets([ExpertSets(rows, np.array([3, 4]))], 4, 2)
    slope_HQ = np.zeros((2, 3))
    touched_bound(problem, {"rank_slope_HQ": slope_HQ}, {})
    slope_HQ[1, 0] = 0.1
    with pytest.raises(ViolationError, match="does not have"):
        touched_bound(problem, {"rank_slope_HQ": slope_HQ}, {})


def test_slopes_per_pair_of_large_sets_are_refused() -> None:
    rows = np.arange(9, dtype=np.int16)[None]
    problem = problem_of_sets([ExpertSets(rows, np.array([3]))], 10, 2)
    with pytest.raises(ViolationError, match="at most 8 members"):
        touched_bound(problem, {"rank_slope_HQ": np.zeros((1, 36))}, {})


def test_with_replicas_slopes_and_rows_are_not_negative() -> None:
    problem = tiny(8, experts=4, ranks=2, redundant=2)
    certificate = bound_touched(problem, iterations=50)
    for name in ("rank_slope_HQ", "rank_u_LE"):
        with pytest.raises(ViolationError, match=name):
            verify(problem, forged(certificate, **{name: certificate.arrays[name] - 1.0}))
    with pytest.raises(ViolationError, match="without redundant slots"):
        verify(problem, forged(certificate, rank_spectrum_LEE=np.zeros((2, 4, 4))))


def test_refusals() -> None:
    problem = tiny(9)
    with pytest.raises(UsageError, match="no expert sets"):
        bound_touched(replace(problem, profile=replace(problem.profile, sets=())))
    with pytest.raises(UsageError, match="equal slots"):
        bound_touched(replace(problem, allow_empty_slots=True))
    with pytest.raises(UsageError, match="iterations is 0"):
        bound_touched(problem, iterations=0)
    with pytest.raises(UsageError, match="price is -1"):
        bound_touched(replace(problem, max_par=1.2), price=-1.0)
    with pytest.raises(UsageError, match="only under a load cap"):
        bound_touched(problem, price=1.0)


def test_price_goes_towards_the_cap() -> None:
    assert touched._next_price(0.0, -0.1, 0) == 0.0
    assert touched._next_price(0.0, 0.1, 0) == touched.FIRST_PRICE
    assert touched._next_price(1.0, 0.1, 0) > touched._next_price(1.0, 0.1, 5) > 1.0
    assert touched._next_price(1.0, -0.1, 0) < 1.0
