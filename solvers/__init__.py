"""Placement solvers: pure optimisation over arrays, one file per method."""
