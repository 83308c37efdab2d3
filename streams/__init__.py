"""Kinds of stream: each file says how tasks are made from a dataset, whichever it is."""
