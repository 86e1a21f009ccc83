"""Load balance alone: engines' start maps, EPLB's rules, LPT with swaps."""
