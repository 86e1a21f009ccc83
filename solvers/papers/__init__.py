"""Published placement methods as their papers state them: baselines and oracles, not the methods to use."""
