"""The viewer: a circuit as one HTML file that needs no network. Importing it registers the exporter `html`."""

from circuits.viewer import page

__all__ = ["page"]
