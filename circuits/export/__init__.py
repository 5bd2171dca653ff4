"""Views and files of a circuit that other tools read. Nothing here changes a graph; importing it registers every exporter."""

from circuits.export import dot, network, neuronpedia, svg

__all__ = ["dot", "network", "neuronpedia", "svg"]
