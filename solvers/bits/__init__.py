"""Bits under a budget: planes that stay, demand that is clipped, widths of experts. Ours; D2MoE plans no bits."""
