"""Layers, the Hope model, training and tools that wire :mod:`nl_kernels` into PyTorch."""
