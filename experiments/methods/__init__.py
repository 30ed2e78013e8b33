"""Pruning methods, each a callback of the training loop: one module a method."""
