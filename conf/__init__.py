"""Hydra configuration: one group for each thing that a user swaps."""
