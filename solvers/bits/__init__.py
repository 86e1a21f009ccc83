"""Budgets of bits: which planes stay in memory, how far demand is clipped, which width each expert gets. All ours, not D2MoE's."""
