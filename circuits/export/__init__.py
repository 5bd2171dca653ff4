"""Views and files of a circuit that other tools read. Nothing here changes a graph."""
