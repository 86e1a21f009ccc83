"""Algorithm and pipeline degree of every layer: the cheapest of all candidates by the caller's prices.

Legend: L layers, A algorithms, D degrees. Times are nanoseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.schedule import Algorithm, Rounds, Schedule

__all__ = ["Choice", "Option", "choose_schedule"]

Option = tuple[Algorithm, Rounds | None]
"""An algorithm with its rounds, None where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The schedule, and what its layers and those of the plain one (linear, degree 1) take, (L,) each.

    `price_ADL` has every candidate's price.
    """

    schedule: Schedule
    chosen_ns_L: npt.NDArray[np.float64]
    plain_ns_L: npt.NDArray[np.float64]
    price_ADL: npt.NDArray[np.float64]


def choose_schedule(
    options_AL: Sequence[Sequence[Option]],
    degrees: Sequence[int],
    price: Callable[[Schedule], npt.NDArray[np.floating]],
) -> Choice:
    """Prices every option in every degree and takes each layer's cheapest; the plain one wins ties.

    The first option is linear, the first degree 1, for all layers: that is the plain schedule. `price` returns what
    each layer takes, (L,), under a schedule; a layer's price may depend on that layer's choice alone.
    Guarantee: optimal over the grid under that condition; never dearer than plain. Complexity: A * D prices.
    """
    layers = len(options_AL[0])
    assert degrees[0] == 1
    assert all(option == ("linear", None) for option in options_AL[0])
    price_ADL = np.empty((len(options_AL), len(degrees), layers))
    for at, options in enumerate(options_AL):
        for place, degree in enumerate(degrees):
            price_ADL[at, place] = price(_schedule(options, [degree] * layers))
    flat = price_ADL.reshape(-1, layers)
    best_L = flat.argmin(axis=0)
    algorithm_L, degree_L = np.divmod(best_L, len(degrees))
    schedule = _schedule(
        [options_AL[at][layer] for layer, at in enumerate(algorithm_L.tolist())],
        [degrees[place] for place in degree_L.tolist()],
    )
    chosen = flat[best_L, np.arange(layers)]
    return Choice(schedule=schedule, chosen_ns_L=chosen, plain_ns_L=price_ADL[0, 0].copy(), price_ADL=price_ADL)


def _schedule(options_L: Sequence[Option], degree_L: Sequence[int]) -> Schedule:
    return Schedule(
        algorithm_L=tuple(algorithm for algorithm, _ in options_L),
        degree_L=tuple(degree_L),
        rounds_L=tuple(rounds for _, rounds in options_L),
    )
