"""slmops: small language models from training data to edge nodes, on Kubeflow."""

__version__ = "0.1.0"
