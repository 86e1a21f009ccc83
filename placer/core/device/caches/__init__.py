"""The caches of planes by their rules: what all have in common, and who goes first."""
