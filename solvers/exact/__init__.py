"""Exact models for small problems, and what running a solver back end safely takes."""
