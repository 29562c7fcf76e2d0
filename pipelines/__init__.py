"""Pipelines of slmops: wiring only, in lifecycle order."""
