"""Domain types, the cost model and the plan checker. Imports numpy and the standard library only."""
