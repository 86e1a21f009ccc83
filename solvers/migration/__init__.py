"""From the placement that runs to a better one: rank labels with least moves, new rank counts, plans under a budget."""
