"""One gradient a step: ``C`` and all ``K_i`` step from the same point (Ceruti, Kusch, Lubich & Sulz, 2024, for Tucker tensors).

The augmented core has ``C + step_C`` in the old block, ``Ũ_i^T step_{K_i} Q_i^T`` in the block in which only mode ``i`` is new,
and zeros in the mixed blocks; then it is truncated as in Algorithm 1. New directions are of second order in the step size, so
under a positive tolerance a rank rarely rises, and not for small steps: keep at least one spare direction.
"""

from __future__ import annotations

from tdlrt_jax.integrators import bug
from tdlrt_jax.integrators.base import Integrator

__all__ = ["parallel"]

# The core's increment is the embedded step of (C, K_i) instead of a second gradient; augmentation and truncation are shared.
parallel = Integrator(evaluations=1, basis_step=bug.basis_step, core_step=bug.core_step, same_network=True)
