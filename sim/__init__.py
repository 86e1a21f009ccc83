"""Discrete-event simulator of one expert-parallel deployment, on an integer nanosecond clock."""

from sim.simulator import FIDELITIES, Fidelity, simulate

__all__ = ["FIDELITIES", "Fidelity", "simulate"]
