"""How a model is measured: in a process of its own, under the limits of a device. For steps and edge nodes."""
