"""What a schedule of Newton–Schulz makes of singular values."""

from nl_kernels.ops.newton_schulz.coefficients import evaluate


def singular_value_band(schedule, lower):
    """Smallest and largest of what singular values in [lower, 1] become, on a fine logarithmic grid."""
    points = 20_000
    values = [lower ** (1 - i / points) for i in range(points + 1)]
    for triple in schedule:
        values = [evaluate(triple, s) for s in values]
    return min(values), max(values)
