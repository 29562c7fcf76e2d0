"""The node that serves the tiny model, as the tests of the edge have it."""

from tests.edge.conftest import tiny_node, tiny_store

__all__ = ["tiny_node", "tiny_store"]
