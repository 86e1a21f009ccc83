"""CP-SAT's model of layers on a disk, a copy engine and a processor that take each layer's items in one order.

    before[i,j]   item i goes before j of its layer: on every machine it is done before j begins
    held[i]       from the start of i's read to the end of its expert's last item: i's bytes of the buffer
    routed[l]     end of layer l's attention, which begins when layer l - 1 is computed

Reads of a layer begin after all reads of the one before, and not before layer l - ahead is routed. Legend: I items.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from solvers.io_order.layers import LayerLoad
from solvers.io_order.result import chains_of

__all__ = ["CpsatOrders", "search_orders"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CpsatOrders:
    """`state`: CP-SAT's status in lower case; an order (I,) per layer and a bound where it found one."""

    state: str
    orders: tuple[IntArray, ...] = ()
    bound: int = 0


def search_orders(
    layers: Sequence[LayerLoad], ahead: int | None, buffer_bytes: int | None, time_limit_s: float, seed: int
) -> CpsatOrders:
    """The orders of all layers that let the last end soonest, with one worker."""
    from ortools.sat.python import cp_model

    horizon = sum(_work_ns(load) for load in layers)
    model = cp_model.CpModel()
    built: list[_Layer] = []
    held: list[tuple[Any, int]] = []
    reads_done: Any = 0
    layer_done: Any = 0
    routed: list[Any] = []
    for at, load in enumerate(layers):
        now_routed = model.new_int_var(0, horizon, "")
        model.add(now_routed >= layer_done + load.attention_ns)
        routed.append(now_routed)
        gates = [reads_done] if ahead is None else [reads_done, routed[max(0, at - ahead)]]
        layer = _Layer(cp_model, model, load, horizon)
        layer.add_gates(gates, now_routed)
        held += layer.held_intervals()
        reads_done, layer_done = layer.reads_done(reads_done), layer.done(now_routed)
        built.append(layer)
    if buffer_bytes is not None and held:
        model.add_cumulative([interval for interval, _ in held], [size for _, size in held], buffer_bytes)
    model.minimize(layer_done)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    state = solver.status_name(status).lower()
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return CpsatOrders(state)
    # the objective is a whole number, and rounding a bound down never breaks it
    bound = int(np.floor(solver.best_objective_bound + 1e-6))
    return CpsatOrders(state, tuple(layer.order(solver) for layer in built), bound)


def _work_ns(load: LayerLoad) -> int:
    times = load.times
    return load.attention_ns + int(times.read_ns_I.sum() + times.copy_ns_I.sum() + times.compute_ns_I.sum())


class _Layer:
    """Variables of one layer; machine 0 reads, 1 copies, 2 computes."""

    def __init__(self, cp_model: Any, model: Any, load: LayerLoad, horizon: int) -> None:
        self.model, self.load, self.horizon = model, load, horizon
        self.chains = chains_of(load.items)
        times = load.times
        self.length = [column.tolist() for column in (times.read_ns_I, times.copy_ns_I, times.compute_ns_I)]
        self.size = times.bytes_I.tolist()
        count = len(load.items)
        self.start = [[model.new_int_var(0, horizon, "") for _ in range(count)] for _ in range(3)]
        for item in range(count):
            if self.size[item]:
                model.add(self.start[1][item] >= self._end(0, item))
                model.add(self.start[2][item] >= self._end(1, item))
        self._add_order()
        for machine in range(3):
            pick = [item for item in range(count) if self._uses(machine, item) and self.length[machine][item]]
            model.add_no_overlap(
                [
                    model.new_fixed_size_interval_var(self.start[machine][item], self.length[machine][item], "")
                    for item in pick
                ]
            )

    def _uses(self, machine: int, item: int) -> bool:
        return machine == 2 or self.size[item] > 0

    def _end(self, machine: int, item: int) -> Any:
        return self.start[machine][item] + self.length[machine][item]

    def _follows(self, i: int, j: int, literals: list[Any]) -> None:
        for machine in range(3):
            if self._uses(machine, i) and self._uses(machine, j):
                rule = self.model.add(self.start[machine][j] >= self._end(machine, i))
                if literals:
                    rule.only_enforce_if(literals)

    def _add_order(self) -> None:
        for chain in self.chains:
            # all pairs: a present plane between two that are read does not part them
            for i, j in itertools.combinations(chain, 2):
                self._follows(i, j, [])
        for at, chain in enumerate(self.chains):
            for other in self.chains[at + 1 :]:
                before = [[self.model.new_bool_var("") for _ in other] for _ in chain]
                for a, i in enumerate(chain):
                    for b, j in enumerate(other):
                        self._follows(i, j, [before[a][b]])
                        self._follows(j, i, [before[a][b].negated()])
                        # the order of two chains is a path through a grid
                        if b:
                            self.model.add_implication(before[a][b - 1], before[a][b])
                        if a:
                            self.model.add_implication(before[a][b], before[a - 1][b])

    def add_gates(self, read_gates: list[Any], routed: Any) -> None:
        """Nothing is read before the gates nor computed before routing."""
        for item, size in enumerate(self.size):
            self.model.add(self.start[2][item] >= routed)
            for gate in read_gates if size else []:
                self.model.add(self.start[0][item] >= gate)

    def held_intervals(self) -> list[tuple[Any, int]]:
        """Of each plane that is read: how long it is held, and its bytes."""
        held = []
        for chain in self.chains:
            end = self._end(2, chain[-1])
            for item in chain:
                if self.size[item]:
                    span = self.model.new_int_var(0, self.horizon, "")
                    held.append((self.model.new_interval_var(self.start[0][item], span, end, ""), self.size[item]))
        return held

    def reads_done(self, before: Any) -> Any:
        """When the disk is done with the layer."""
        done = self.model.new_int_var(0, self.horizon, "")
        self.model.add(done >= before)
        for item, size in enumerate(self.size):
            if size:
                self.model.add(done >= self._end(0, item))
        return done

    def done(self, routed: Any) -> Any:
        """When the processor is done with the layer."""
        done = self.model.new_int_var(0, self.horizon, "")
        self.model.add(done >= routed)
        for item in range(len(self.size)):
            self.model.add(done >= self._end(2, item))
        return done

    def order(self, solver: Any) -> IntArray:
        """The order found: by the processor, then the disk; an item that takes no time goes right behind its chain."""
        keys: dict[tuple[int, int, int, int, int], int] = {}
        for expert, chain in enumerate(self.chains):
            key = (-1, -1, -1)
            for place, item in enumerate(chain):
                start = solver.value(self.start[2][item])
                read = solver.value(self.start[0][item]) if self.size[item] else -1
                key = max(key, (start, start + self.length[2][item], read))
                keys[(*key, expert, place)] = item
        return np.array([keys[key] for key in sorted(keys)], dtype=np.int64)
