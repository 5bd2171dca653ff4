"""Attribution: from a prompt to a graph. `trace.py` conducts."""
