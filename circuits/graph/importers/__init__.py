"""Graphs of other tools, read as the parts of a `CircuitGraph`."""
