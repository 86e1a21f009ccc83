"""The chooser equals brute force over all combinations of layers' choices, and keeps what is plain on ties."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.schedule import Rounds, Schedule
from solvers.schedule.choose import choose_schedule

ROUNDS = Rounds(to_GR=np.array([[1, 2, 0], [2, 0, 1]]), share_GR=np.ones((2, 3)))
DEGREES = (1, 2, 3)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 3))
def test_equal_to_brute_force_over_all_schedules(seed: int, layers: int) -> None:
    names = ("linear", "2dh", "rounds")
    table = np.random.default_rng(seed).integers(1, 6, (layers, 3, 3)).astype(float)

    def price(schedule: Schedule) -> np.ndarray:
        return np.array(
            [
                table[layer, names.index(schedule.algorithm_L[layer]), schedule.degree_L[layer] - 1]
                for layer in range(layers)
            ]
        )

    options = [[(name, ROUNDS if name == "rounds" else None)] * layers for name in names]
    choice = choose_schedule(options, DEGREES, price)
    cells = list(product(range(3), range(3)))
    best = min(sum(table[layer, a, d] for layer, (a, d) in enumerate(cell)) for cell in product(cells, repeat=layers))
    assert price(choice.schedule).sum() == choice.chosen_ns_L.sum() == best
    assert (choice.plain_ns_L == table[:, 0, 0]).all()
    assert (choice.chosen_ns_L <= choice.plain_ns_L).all()


def test_ties_stay_plain_and_layers_choose_by_themselves() -> None:
    options = [[("linear", None)] * 2, [("rounds", ROUNDS)] * 2]

    def price(schedule: Schedule) -> np.ndarray:
        second = 7.0 if (schedule.algorithm_L[1], schedule.degree_L[1]) == ("rounds", 2) else 9.0
        return np.array([5.0, second])

    choice = choose_schedule(options, (1, 2), price)
    assert choice.schedule.algorithm_L == ("linear", "rounds")
    assert choice.schedule.degree_L == (1, 2)
    assert choice.schedule.rounds_L[1] is ROUNDS
