"""Attention heads of a circuit: who carries an edge or a feature, and why a head attends."""
