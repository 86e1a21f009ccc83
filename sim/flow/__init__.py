"""Fidelity `flow`: every message is a flow, flows share links max-min fairly."""

from sim.flow.ranks import flow_times

__all__ = ["flow_times"]
