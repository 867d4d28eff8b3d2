"""What the Triton kernels share, free of any op's formulas."""
