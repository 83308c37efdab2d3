"""What is looked at beside R: curves inside tasks, probes, estimators of transfer, costs, and references."""
