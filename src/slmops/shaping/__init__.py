"""Making a student out of a larger model: fewer layers, less width, or the same architecture with new weights."""
