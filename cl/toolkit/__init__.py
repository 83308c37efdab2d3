"""Building blocks that several methods share: memories, Fisher information, subspaces, subnetworks, herding."""
