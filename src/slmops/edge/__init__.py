"""What runs on an edge node: pull a release, serve it. Imports no torch, no kfp, no training code."""
