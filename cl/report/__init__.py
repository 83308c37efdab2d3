"""What a person reads of one run: the terminal, files, pictures, Weights & Biases. Every report sees the same `Run`."""
