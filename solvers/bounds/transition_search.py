"""Rounds of the bound on affinity: steps on promising arcs, judgement on all arcs, new arcs and cuts, and again.

Legend: L layers, Q rows (pair of layers, expert), E experts, A arcs, N cuts.
"""

import numpy as np
import numpy.typing as npt

from placer.core.problem import PlacementProblem
from solvers.balance.load import max_load_bound
from solvers.bounds.transition_cuts import violated_cuts
from solvers.bounds.transition_dual import charged, polish, value
from solvers.bounds.transition_lp import Duals, Program, improve

__all__ = ["TransitionSearch"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

ARCS_PER_PARTNER = 5
"""Arcs of each expert in the first program, for each partner it will have."""

CUTS_PER_EXPERT = 16
CUT_VIOLATION = 0.02
FIRST_POLISH = 3


class TransitionSearch:
    """The program, its multipliers and what was found out about all arcs, between two rounds."""

    def __init__(self, problem: PlacementProblem, flow_LEE: FloatArray, width: int, *, capped: bool, cuts: bool):
        self.pairs, self.experts = flow_LEE.shape[:2]
        self.width, self.with_cuts, self.capped = width, cuts, capped
        top_LE = np.partition(flow_LEE, self.experts - width, axis=2)[:, :, self.experts - width :]
        self.scale = max(1.0, float(top_LE.mean()))
        self.flow_LEE = flow_LEE / self.scale
        ranks, load_LE = problem.cluster.num_ranks, problem.profile.load_LE
        share_LE = load_LE * ranks / np.maximum(1.0, load_LE.sum(axis=1, keepdims=True))
        self.share_LE = np.ascontiguousarray(share_LE, dtype=np.float64)
        mean_L = np.maximum(1e-300, load_LE.sum(axis=1) / ranks)
        floor_L = [max_load_bound(load_E, ranks, problem.slots_per_rank) for load_E in load_LE]
        self.floor_L = np.where(load_LE.sum(axis=1) > 0, np.array(floor_L) / mean_L, 1.0)
        self.par_sum = len(load_LE) * problem.max_par if capped and problem.max_par is not None else np.inf
        rows = self.pairs * self.experts
        self.u_Q, self.v_Q = np.zeros(rows), np.zeros(rows)
        shape = flow_LEE.shape
        self.chosen_LEE = np.zeros(shape, dtype=bool)
        self.s_LEE = np.zeros(shape)
        self.rest_LEE = np.empty(shape)
        for pair in range(self.pairs):
            rest_EE = self._priced(pair)
            most = min(self.experts, ARCS_PER_PARTNER * width)
            everyone = np.arange(self.experts)
            best_EA = np.argpartition(-rest_EE, most - 1, axis=1)[:, :most]
            self.chosen_LEE[pair][everyone[:, None], best_EA] = True
            best_AE = np.argpartition(-rest_EE, most - 1, axis=0)[:most]
            self.chosen_LEE[pair][best_AE, everyone] = True
        self.cut_N5 = np.zeros((0, 5), dtype=np.int64)
        none_Q = np.zeros(rows)
        self.duals = Duals(
            np.zeros(0), self.floor_L.copy(), self.u_Q, self.v_Q, none_Q, none_Q.copy(), np.zeros(0), 0.0
        )
        self._build()

    def _priced(self, pair: int) -> FloatArray:
        """First prices of rows and columns, by turns; the flow less them."""
        u_E, v_E = np.zeros(self.experts), np.zeros(self.experts)
        polish(self.flow_LEE[pair], u_E, v_E, self.width, FIRST_POLISH)
        rows = slice(pair * self.experts, (pair + 1) * self.experts)
        self.u_Q[rows], self.v_Q[rows] = u_E, v_E
        return self.flow_LEE[pair] - u_E[:, None] - v_E

    def _build(self) -> None:
        """The program of the chosen arcs and cuts, from the point and multipliers there are."""
        pair_A, row_A, column_A = np.nonzero(self.chosen_LEE)
        first_Q1 = np.concatenate(([0], np.cumsum(np.bincount(pair_A * self.experts + row_A, minlength=len(self.u_Q)))))
        position_LEE = np.full(self.chosen_LEE.shape, -1, dtype=np.int32)
        position_LEE[pair_A, row_A, column_A] = np.arange(len(pair_A))
        pair, i, other, j, k = self.cut_N5.T
        cut_N4 = np.stack([position_LEE[pair, a, b] for a, b in ((i, j), (i, k), (other, j), (other, k))], axis=1)
        self.program = Program(
            pairs=self.pairs, experts=self.experts, width=self.width, first_Q1=first_Q1.astype(np.int64),
            to_A=pair_A * self.experts + column_A, weight_A=self.flow_LEE[pair_A, row_A, column_A],
            after_A=self.share_LE[pair_A + 1, column_A], before_A=self.share_LE[pair_A, row_A],
            cut_N4=cut_N4.astype(np.int64), floor_L=self.floor_L, par_sum=self.par_sum,
        )  # fmt: skip
        self.arcs = (pair_A, row_A, column_A)
        self.duals.s_A = self.s_LEE[self.arcs]

    def advance(self, steps: int) -> None:
        """Some steps of the method."""
        improve(self.program, self.duals, steps)

    def judge(self) -> float:
        """Prices made legal and best for the rest; the kept flow that they prove to be the most, over all arcs."""
        duals, experts, capped = self.duals, self.experts, self.capped
        self.u_LE, self.v_LE = (part.reshape(-1, experts).copy() for part in (duals.u_Q, duals.v_Q))
        self.mu_LE, self.nu_LE = (part.reshape(-1, experts).copy() for part in (duals.mu_Q, duals.nu_Q))
        kept = 0.0
        if capped:
            used_L = np.zeros(self.pairs + 1)
            used_L[1:] += self.mu_LE.sum(axis=1)
            used_L[:-1] += self.nu_LE.sum(axis=1)
            shrink_L = np.minimum(1.0, duals.price / np.maximum(used_L, 1e-300))
            self.mu_LE *= shrink_L[1:, None]
            self.nu_LE *= shrink_L[:-1, None]
            kept += duals.price * self.par_sum - float((duals.price - used_L * shrink_L).clip(min=0) @ self.floor_L)
        first_N = np.searchsorted(self.cut_N5[:, 0], np.arange(self.pairs + 1))
        for pair in range(self.pairs):
            mine = slice(first_N[pair], first_N[pair + 1])
            left_EE = charged(
                self.flow_LEE[pair], self.share_LE[pair + 1], self.share_LE[pair], self.mu_LE[pair], self.nu_LE[pair],
                self.cut_N5[mine, 1:], duals.tau_N[mine],
            )  # fmt: skip
            polish(left_EE, self.u_LE[pair], self.v_LE[pair], self.width, 2)
            kept += value(left_EE, self.u_LE[pair], self.v_LE[pair], self.width)
            self.rest_LEE[pair] = left_EE - self.u_LE[pair][:, None] - self.v_LE[pair]
        kept += 2.0 * float(duals.tau_N.sum())
        return kept * self.scale

    def multipliers(self) -> dict[str, FloatArray]:
        """What the last `judge` judged, in transitions."""
        used = self.duals.tau_N > 0
        return {
            "u_LE": self.u_LE * self.scale, "v_LE": self.v_LE * self.scale, "mu_LE": self.mu_LE * self.scale,
            "nu_LE": self.nu_LE * self.scale, "tau_N": self.duals.tau_N[used] * self.scale,
            "biclique_N5": self.cut_N5[used].astype(np.float64), "price": np.array([self.duals.price * self.scale]),
        }  # fmt: skip

    def extend(self) -> None:
        """Takes in arcs that the prices want and cuts that the point breaks; lets idle cuts go."""
        self.s_LEE[self.arcs] = self.duals.s_A
        self.chosen_LEE |= self.rest_LEE > 0
        if self.with_cuts:
            used = self.duals.tau_N > 0
            known, tau_N = self.cut_N5[used], self.duals.tau_N[used]
            fresh = []
            for pair in range(self.pairs):
                cut_N4 = violated_cuts(self.s_LEE[pair], CUT_VIOLATION, CUTS_PER_EXPERT * self.experts)[0]
                fresh.append(np.column_stack([np.full(len(cut_N4), pair), cut_N4]))
            both = np.concatenate([known, *fresh])
            tau_N = np.concatenate([tau_N, np.zeros(len(both) - len(tau_N))])
            # the same cut twice keeps its first multiplier
            code_N = both @ np.array([self.experts**4, self.experts**3, self.experts**2, self.experts, 1])
            _, first = np.unique(code_N, return_index=True)
            self.cut_N5, self.duals.tau_N = both[first], tau_N[first]
            self.chosen_LEE[self.cut_N5[:, 0], self.cut_N5[:, 2], self.cut_N5[:, 4]] = True
        self._build()
