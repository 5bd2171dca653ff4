"""Crosscoders spliced into a language model: the replacement model, its local form, and interventions."""
