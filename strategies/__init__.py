"""Methods of continual learning: one paper a file, each to be read next to it."""
