"""Simulator of one small machine: a disk, a copy engine and a processor that share a byte budget."""

from sim.device.simulator import DEVICE_FIDELITIES, DeviceFidelity, simulate_device

__all__ = ["DEVICE_FIDELITIES", "DeviceFidelity", "simulate_device"]
