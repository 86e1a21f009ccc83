"""Bound for few large groups: the flow split into a part that few directions can keep and a part judged arc by arc.

With G groups of C experts, who shares a group with whom in the next layer is a matrix of G singular values C, one of
them on the all-ones vectors. The alternating direction method finds the split of the flow for which that and the box
0 <= s <= 1 together prove most; every split is valid.

Legend: Q pairs of layers, E experts, G groups, C experts per group.
Reference: Boyd et al. (2011), Distributed Optimization and Statistical Learning via ADMM, section 3.
"""

import numpy as np
import numpy.typing as npt

from solvers.bounds.transition_dual import polish, value

__all__ = ["SplitSearch"]

FloatArray = npt.NDArray[np.float64]

PENALTY = 1.0
"""In the largest flows' mean per unit of s."""

POLISH = 2


class SplitSearch:
    """The best split of each pair so far, and the state of the method. O(Q E^3) a step, with a large constant."""

    def __init__(self, flow_LEE: FloatArray, groups: int, u_LE: FloatArray, v_LE: FloatArray) -> None:
        pairs, self.experts = flow_LEE.shape[:2]
        self.groups, self.width = groups, self.experts // groups
        top_LE = np.partition(flow_LEE, self.experts - self.width, axis=2)[:, :, self.experts - self.width :]
        self.scale = max(1.0, float(top_LE.mean()))
        self.flow_LEE = flow_LEE / self.scale
        # the matching's own prices are a split that proves the same; from there on it only gets better
        self.split_LEE = (u_LE[:, :, None] + v_LE[:, None, :]) / self.scale
        self.near_LEE = np.stack([self._spectral(flow > split) for flow, split in self._pairs()])
        self.best_split_LEE = self.split_LEE.copy()
        self.best_u_LE, self.best_v_LE = np.zeros(u_LE.shape), np.zeros(v_LE.shape)
        self.best_L = np.array([self._judge(pair)[0] for pair in range(pairs)])

    @property
    def kept(self) -> float:
        """The kept flow that the best splits prove to be the most."""
        return float(self.best_L.sum()) * self.scale

    def step(self, iterations: int) -> None:
        """Some iterations on every pair; splits that prove more are kept."""
        for pair, (flow_EE, split_EE) in enumerate(self._pairs()):
            near_EE = self.near_LEE[pair]
            for _ in range(iterations):
                s_EE = np.clip(near_EE + (flow_EE - split_EE) / PENALTY, 0.0, 1.0)
                near_EE = self._spectral(s_EE + split_EE / PENALTY)
                split_EE += PENALTY * (s_EE - near_EE)
            self.near_LEE[pair] = near_EE
            kept, u_E, v_E = self._judge(pair)
            if kept < self.best_L[pair]:
                self.best_L[pair], self.best_u_LE[pair], self.best_v_LE[pair] = kept, u_E, v_E
                self.best_split_LEE[pair] = split_EE

    def multipliers(self) -> dict[str, FloatArray]:
        """u_LE, v_LE and split_LEE of the best splits, in transitions."""
        return {
            "u_LE": self.best_u_LE * self.scale,
            "v_LE": self.best_v_LE * self.scale,
            "split_LEE": self.best_split_LEE * self.scale,
        }

    def _pairs(self) -> list[tuple[FloatArray, FloatArray]]:
        return list(zip(self.flow_LEE, self.split_LEE, strict=True))

    def _judge(self, pair: int) -> tuple[float, FloatArray, FloatArray]:
        """What the pair's split proves, with the best prices of rows and columns for what it leaves."""
        split_EE = self.split_LEE[pair]
        u_E, v_E = np.zeros(self.experts), np.zeros(self.experts)
        left_EE = self.flow_LEE[pair] - split_EE
        polish(left_EE, u_E, v_E, self.width, POLISH)
        singular = np.linalg.svd(_centred(split_EE), compute_uv=False)
        directions = self.width * float(singular[: self.groups - 1].sum()) + float(split_EE.sum()) / self.groups
        return directions + value(left_EE, u_E, v_E, self.width), u_E, v_E

    def _spectral(self, point_EE: npt.NDArray[np.generic]) -> FloatArray:
        """The nearest matrix with C on the all-ones vectors, no singular value above C, and G - 1 times C in sum."""
        left, singular, right = np.linalg.svd(_centred(point_EE.astype(np.float64)).astype(np.float32))
        most = self.width * (self.groups - 1)
        low, high = 0.0, float(singular[0])
        if np.clip(singular, 0.0, self.width).sum() > most:
            for _ in range(40):
                middle = (low + high) / 2
                over = np.clip(singular - middle, 0.0, self.width).sum() > most
                low, high = (middle, high) if over else (low, middle)
            singular = singular - high
        result: FloatArray = ((left * np.clip(singular, 0.0, self.width)) @ right).astype(np.float64)
        return result + self.width / self.experts


def _centred(matrix_EE: FloatArray) -> FloatArray:
    centred: FloatArray = matrix_EE - matrix_EE.mean(axis=0) - matrix_EE.mean(axis=1)[:, None] + matrix_EE.mean()
    return centred
