"""The linear program behind the bound on affinity, solved for its multipliers by a primal-dual gradient method.

maximise sum w s over the pairs of layers, with rows and columns of s summing to C, each partner's load at most its
layer's PAR, biclique cuts, 0 <= s <= 1 and one cap on the sum of PAR. Only promising arcs (expert of one layer, expert
of the next) are in the program: whoever turns the multipliers into a bound must look at all of them.

Legend: Q pairs of layers, E experts, L layers, A arcs, N cuts. Rows are (pair, expert), so Q E of them.
Reference: r2HPDHG, reflected and restarted Halpern iterations (Lu and Yang 2024, arXiv 2407.16144), with the diagonal
steps of Pock and Chambolle (2011).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["Duals", "Program", "improve"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

RESTART_ENOUGH = 0.2
RESTART_NEEDED = 0.8
RESTART_LONG = 0.36
BALANCE_RANGE = 1e3


@dataclass(slots=True)
class Program:
    """One program in arc form; arcs are sorted by row.

    first_Q1 (Q E + 1,) arcs of each row; to_A column of each arc as a row number of its pair's columns (pair * E +
    expert); weight_A scaled so that a kept arc is worth about 1; after_A, before_A load shares of the arc's two ends;
    cut_N4 arcs of each cut, the last one with a minus sign; floor_L, par_sum: bounds on each PAR and on their sum (no
    cap: inf).
    """

    pairs: int
    experts: int
    width: int
    first_Q1: IntArray
    to_A: IntArray
    weight_A: FloatArray
    after_A: FloatArray
    before_A: FloatArray
    cut_N4: IntArray
    floor_L: FloatArray
    par_sum: float


@dataclass(slots=True)
class Duals:
    """Multipliers (u, v, mu, nu over rows; tau over cuts; price) and the primal point (s over arcs, PAR) beside."""

    s_A: FloatArray
    par_L: FloatArray
    u_Q: FloatArray
    v_Q: FloatArray
    mu_Q: FloatArray
    nu_Q: FloatArray
    tau_N: FloatArray
    price: float
    balance: float = 1.0


@njit(cache=True)
def _run(
    pairs: int,
    experts: int,
    width: int,
    first_Q1: IntArray,
    to_A: IntArray,
    weight_A: FloatArray,
    after_A: FloatArray,
    before_A: FloatArray,
    cut_N4: IntArray,
    floor_L: FloatArray,
    par_sum: float,
    s_A: FloatArray,
    par_L: FloatArray,
    y_4Q: FloatArray,
    tau_N: FloatArray,
    price: float,
    balance: float,
    iterations: int,
    tolerance: float,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, float, float, int]:  # pragma: no cover - compiled
    """`iterations` steps from the given point; the last projected point, the balance of steps, steps done."""
    rows, arcs, cuts, layers = pairs * experts, len(to_A), len(cut_N4), pairs + 1
    capped = par_sum < np.inf
    row_scale = float(experts)
    # step lengths: 1 / sum of the absolute coefficients of each column and row
    step_A = np.empty(arcs)
    step_4Q = np.zeros((4, rows))
    for row in range(rows):
        for a in range(first_Q1[row], first_Q1[row + 1]):
            step_A[a] = 2.0
            step_4Q[0, row] += 1.0
            step_4Q[1, to_A[a]] += 1.0
            if capped:
                step_A[a] += after_A[a] + before_A[a]
                step_4Q[2, row] += after_A[a]
                step_4Q[3, to_A[a]] += before_A[a]
    for n in range(cuts):
        for k in range(4):
            step_A[cut_N4[n, k]] += 1.0
    for a in range(arcs):
        step_A[a] = 1.0 / step_A[a]
    for row in range(rows):
        step_4Q[0, row] = 1.0 / max(1.0, step_4Q[0, row])
        step_4Q[1, row] = 1.0 / max(1.0, step_4Q[1, row])
        step_4Q[2, row] = 1.0 / (1.0 + step_4Q[2, row])
        step_4Q[3, row] = 1.0 / (1.0 + step_4Q[3, row])
    step_L = np.empty(layers)
    for layer in range(layers):
        step_L[layer] = 1.0 / (row_scale + experts * ((layer > 0) + (layer < pairs)))
    step_price = 1.0 / (row_scale * layers)
    price /= row_scale
    # z is the running point, z0 its anchor, t its image under one primal-dual step
    s0_A, par0_L, y0_4Q, tau0_N, price0 = s_A.copy(), par_L.copy(), y_4Q.copy(), tau_N.copy(), price
    st_A, part_L, yt_4Q, taut_N, pricet = s_A.copy(), par_L.copy(), y_4Q.copy(), tau_N.copy(), price
    bar_A, adjust_A = np.empty(arcs), np.zeros(arcs)
    sum_4Q = np.zeros((4, rows))
    parbar_L = np.empty(layers)
    inner, first_residual, last_residual = 0, 0.0, 0.0
    done = 0
    for done in range(1, iterations + 1):
        h = (inner + 1.0) / (inner + 2.0)
        keep = 1.0 - h
        moved_primal, moved_dual = 0.0, 0.0
        if cuts:
            adjust_A[:] = 0.0
            for n in range(cuts):
                t = tau_N[n]
                if t != 0.0:
                    adjust_A[cut_N4[n, 0]] += t
                    adjust_A[cut_N4[n, 1]] += t
                    adjust_A[cut_N4[n, 2]] += t
                    adjust_A[cut_N4[n, 3]] -= t
        sum_4Q[:] = 0.0
        for row in range(rows):
            u, mu = y_4Q[0, row], y_4Q[2, row]
            row_sum, row_load = 0.0, 0.0
            for a in range(first_Q1[row], first_Q1[row + 1]):
                column = to_A[a]
                slope = weight_A[a] - u - y_4Q[1, column] - adjust_A[a]
                if capped:
                    slope -= mu * after_A[a] + y_4Q[3, column] * before_A[a]
                old = s_A[a]
                new = min(1.0, max(0.0, old + step_A[a] / balance * slope))
                bar = 2.0 * new - old
                row_sum += bar
                sum_4Q[1, column] += bar
                if capped:
                    row_load += after_A[a] * bar
                    sum_4Q[3, column] += before_A[a] * bar
                moved_primal += (new - old) * (new - old) / step_A[a]
                st_A[a] = new
                bar_A[a] = bar
                s_A[a] = h * bar + keep * s0_A[a]
            sum_4Q[0, row] = row_sum
            sum_4Q[2, row] = row_load
        if capped:
            total = 0.0
            for layer in range(layers):
                slope = -price * row_scale
                if layer > 0:
                    for row in range((layer - 1) * experts, layer * experts):
                        slope += y_4Q[2, row]
                if layer < pairs:
                    for row in range(layer * experts, (layer + 1) * experts):
                        slope += y_4Q[3, row]
                old = par_L[layer]
                new = max(floor_L[layer], old + step_L[layer] / balance * slope)
                parbar_L[layer] = 2.0 * new - old
                moved_primal += (new - old) * (new - old) / step_L[layer]
                part_L[layer] = new
                par_L[layer] = h * parbar_L[layer] + keep * par0_L[layer]
                total += parbar_L[layer]
            new_price = max(0.0, price + balance * step_price * row_scale * (total - par_sum))
            moved_dual += (new_price - price) * (new_price - price) / step_price
            pricet = new_price
            price = h * (2.0 * new_price - price) + keep * price0
        for kind in range(4 if capped else 2):
            for row in range(rows):
                old = y_4Q[kind, row]
                over = sum_4Q[kind, row]
                if kind < 2:
                    new = old + balance * step_4Q[kind, row] * (over - width)
                else:
                    layer = row // experts + (kind == 2)
                    new = max(0.0, old + balance * step_4Q[kind, row] * (over - parbar_L[layer]))
                moved_dual += (new - old) * (new - old) / step_4Q[kind, row]
                yt_4Q[kind, row] = new
                y_4Q[kind, row] = h * (2.0 * new - old) + keep * y0_4Q[kind, row]
        for n in range(cuts):
            old = tau_N[n]
            over = bar_A[cut_N4[n, 0]] + bar_A[cut_N4[n, 1]] + bar_A[cut_N4[n, 2]] - bar_A[cut_N4[n, 3]] - 2.0
            new = max(0.0, old + balance * 0.25 * over)
            moved_dual += (new - old) * (new - old) * 4.0
            taut_N[n] = new
            tau_N[n] = h * (2.0 * new - old) + keep * tau0_N[n]
        residual = np.sqrt(balance * moved_primal + moved_dual / balance)
        if inner == 0:
            first_residual = residual
        inner += 1
        restart = residual <= RESTART_ENOUGH * first_residual
        restart |= residual <= RESTART_NEEDED * first_residual and residual > last_residual
        restart |= inner >= RESTART_LONG * done and inner >= 40
        last_residual = residual
        if restart and inner > 1:
            primal = ((st_A - s0_A) ** 2 / step_A).sum() + ((part_L - par0_L) ** 2 / step_L).sum()
            dual = ((yt_4Q - y0_4Q) ** 2 / step_4Q).sum() + 4.0 * ((taut_N - tau0_N) ** 2).sum()
            dual += (pricet - price0) ** 2 / step_price
            if primal > 1e-20 and dual > 1e-20:
                wanted = np.sqrt(dual / primal)
                balance = np.exp(0.5 * np.log(balance) + 0.5 * np.log(wanted))
                balance = min(BALANCE_RANGE, max(1.0 / BALANCE_RANGE, balance))
            s_A[:], par_L[:], y_4Q[:], tau_N[:], price = st_A, part_L, yt_4Q, taut_N, pricet
            s0_A[:], par0_L[:], y0_4Q[:], tau0_N[:], price0 = st_A, part_L, yt_4Q, taut_N, pricet
            inner = 0
            if residual < tolerance * np.sqrt(1.0 * rows * width):
                break
    return st_A, part_L, yt_4Q, taut_N, pricet * row_scale, balance, done


def improve(program: Program, duals: Duals, iterations: int, tolerance: float = 1e-5) -> int:
    """Moves `duals` towards the program's optimum in place; the steps done (fewer where `tolerance` was met)."""
    y_4Q = np.stack([duals.u_Q, duals.v_Q, duals.mu_Q, duals.nu_Q])
    s_A, par_L, y_4Q, tau_N, price, balance, done = _run(
        program.pairs, program.experts, program.width, program.first_Q1, program.to_A, program.weight_A,
        program.after_A, program.before_A, program.cut_N4, program.floor_L, program.par_sum, duals.s_A.copy(),
        duals.par_L.copy(), y_4Q, duals.tau_N.copy(), duals.price, duals.balance, iterations, tolerance,
    )  # fmt: skip
    duals.s_A, duals.par_L, duals.tau_N, duals.price, duals.balance = s_A, par_L, tau_N, price, balance
    duals.u_Q, duals.v_Q, duals.mu_Q, duals.nu_Q = y_4Q
    return int(done)
