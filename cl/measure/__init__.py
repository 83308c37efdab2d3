"""Measurements beside R: curves inside tasks, probes, estimators of transfer, costs, and references."""
