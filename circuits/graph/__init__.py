"""Circuit graphs as plain values: nodes, edges, influence, pruning, scores and storage. Needs no torch and no model."""
