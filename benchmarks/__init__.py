"""Speed beside a loop written by hand and beside the peers: `python -m benchmarks --help`."""
