"""One integrator a file: each moves a kernel by the steps that an optimizer proposes for ``C`` and the ``K_i``."""

from tdlrt_jax.integrators import bug as _bug
from tdlrt_jax.integrators import fixed_rank as _fixed_rank
from tdlrt_jax.integrators import parallel as _parallel
from tdlrt_jax.integrators.augmentation import Augmented, augment, augment_all, embed, unchanged
from tdlrt_jax.integrators.base import Galerkin, Integrator, Moved, Truncation
from tdlrt_jax.integrators.turning import TurnedTangent, overlaps, project_core, turn, turn_all

INTEGRATORS: dict[str, Integrator] = {
    "bug": _bug.bug,
    "parallel": _parallel.parallel,
    "fixed_rank": _fixed_rank.fixed_rank,
}

__all__ = [
    "INTEGRATORS",
    "Augmented",
    "Galerkin",
    "Integrator",
    "Moved",
    "Truncation",
    "TurnedTangent",
    "augment",
    "augment_all",
    "embed",
    "overlaps",
    "project_core",
    "turn",
    "turn_all",
    "unchanged",
]
