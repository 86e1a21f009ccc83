"""What chooses how all-to-alls run: rounds, algorithm and pipeline degree, and the papers' own choosers."""
