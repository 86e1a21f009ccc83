"""Tokens that stay where they are: experts of consecutive layers on one rank, for `coherent` dispatch."""
