"""The reports of one run: terminal, files, pictures, Weights & Biases. Every report reads the same `Run`."""
