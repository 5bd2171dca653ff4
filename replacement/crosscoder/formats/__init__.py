"""Layouts that crosscoders are published in: each module reads one kind into a `Published`; `layouts.py` finds out which."""
