"""Variants in the forms that others take: Foundry Local's cache, a model card, an OCI artifact."""
