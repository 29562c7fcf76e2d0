"""Recipes: what a pipeline does when nothing is said, and named variations of it."""
