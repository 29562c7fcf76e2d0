"""The only code of slmops that knows kfp or a cluster."""
