"""KFP interfaces of slmops' steps: signatures only, the work is in `slmops`."""
