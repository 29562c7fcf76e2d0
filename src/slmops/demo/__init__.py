"""The demo: everything from a real base model to an answer at the edge, on one machine."""
