"""What a cache of whole experts would hit on a trace: replacement rules, the optimum, and prefetch from predictions."""
