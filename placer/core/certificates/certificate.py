"""Certificate: multipliers from which anybody can recompute a lower bound on every legal plan's objective.

Four kinds. Each is the dual of a relaxation, so ANY multipliers of the right sign give a valid bound; good ones a good
bound. Verification is arithmetic on the profile's counts, with numpy alone.

    par       max / mean rank load                                  `par.py`
    kept      affinity: the share of transitions cut                `kept.py`
    touched   co-activation: ranks (and nodes) touched per token    `touched.py`
    blocks    the same for few experts: every block of experts      `blocks.py`
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.certificates.blocks import blocks_bound
from placer.core.certificates.kept import kept_bound
from placer.core.certificates.par import par_bound
from placer.core.certificates.touched import touched_bound
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem

__all__ = ["Certificate", "verify"]

CertificateKind = Literal["par", "kept", "touched", "blocks"]
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """A proof of `bound`: no plan that is legal for the problem has a smaller objective on the problem's profile.

    arrays    multipliers, named and shaped as the kind's module says
    numbers   scalar multipliers and weights of the objective (node_weight, price)
    proof     one line for people: which relaxation
    """

    kind: CertificateKind
    objective_name: str
    bound: float
    proof: str
    arrays: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


def verify(problem: PlacementProblem, certificate: Certificate) -> float:
    """The bound that the certificate's data really proves for `problem`, recomputed.

    Raises ViolationError where a multiplier has the wrong sign or shape, or where the data proves less than
    `certificate.bound` claims (beyond a relative 1e-9); UsageError for a kind that is not known or a profile without
    the counts it speaks about. Cost O(L E^3) at most, for eigenvalues.
    """
    bounds = {"par": par_bound, "kept": kept_bound, "touched": touched_bound, "blocks": blocks_bound}
    if certificate.kind not in bounds:
        raise UsageError(f"certificate.kind is {certificate.kind!r}; known kinds are {', '.join(bounds)}")
    for name, array in certificate.arrays.items():
        if not np.isfinite(array).all():
            raise ViolationError(f"certificate array {name} has a value that is no number; it proves nothing")
    proven = bounds[certificate.kind](problem, certificate.arrays, certificate.numbers)
    if not proven >= certificate.bound - TOLERANCE * max(1.0, abs(certificate.bound)):
        raise ViolationError(
            f"the certificate claims a bound of {certificate.bound:.9g} but its data proves {proven:.9g} only"
        )
    return proven
