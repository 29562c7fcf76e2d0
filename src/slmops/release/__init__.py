"""The release format: how a model lies in object storage."""
