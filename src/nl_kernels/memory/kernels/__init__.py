"""The Triton kernels of a bank of memories; ``launch.py`` plans them, ``learn.py`` has the chunk."""
