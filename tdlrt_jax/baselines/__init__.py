"""What TDLRT is compared with: other low-rank formats, and pruning at initialization and by magnitude."""

from tdlrt_jax.baselines.cp import CPTensor, cp_als, cp_conv, cp_normal, cp_rank, cp_spectral, cp_to_dense, is_cp
from tdlrt_jax.baselines.matrix import matrix_conv, two_factors
from tdlrt_jax.baselines.pruning import (
    PrunedState,
    PruningRound,
    apply_masks,
    density_of,
    grasp_scores,
    iterative_magnitude_pruning,
    magnitude_scores,
    masks_from_scores,
    prune_and_rewind,
    pruned,
    snip_scores,
    weights_of_layers,
)
from tdlrt_jax.baselines.tucker import balance

__all__ = [
    "CPTensor",
    "PrunedState",
    "PruningRound",
    "apply_masks",
    "balance",
    "cp_als",
    "cp_conv",
    "cp_normal",
    "cp_rank",
    "cp_spectral",
    "cp_to_dense",
    "density_of",
    "grasp_scores",
    "is_cp",
    "iterative_magnitude_pruning",
    "magnitude_scores",
    "masks_from_scores",
    "matrix_conv",
    "prune_and_rewind",
    "pruned",
    "snip_scores",
    "two_factors",
    "weights_of_layers",
]
