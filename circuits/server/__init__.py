"""A local server for a folder of graphs: a table, the viewer with saved labels, and, with a model, traces and interventions."""
