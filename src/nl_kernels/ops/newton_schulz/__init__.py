"""Newton–Schulz orthogonalisation of stacks of matrices."""

from nl_kernels.ops.newton_schulz.api import newton_schulz
from nl_kernels.ops.newton_schulz.coefficients import MUON_COEFFICIENTS, optimal_coefficients

__all__ = ["MUON_COEFFICIENTS", "newton_schulz", "optimal_coefficients"]
