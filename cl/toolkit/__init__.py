"""What methods share: memories, the Fisher information, subspaces, subnetworks, herding."""
