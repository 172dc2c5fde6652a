"""What a step reports about itself: bit flags that stay on the device, and their meaning in words."""

from __future__ import annotations

from tdlrt_jax.arguments import check_integer

__all__ = [
    "NONFINITE",
    "NOT_ORTHONORMAL",
    "OK",
    "OTHER_GRADIENT",
    "PLAIN_GRADIENTS",
    "RANK_AT_CAPACITY",
    "SKIPPED",
    "describe_status",
]

OK = 0
NONFINITE = 1
PLAIN_GRADIENTS = 2
RANK_AT_CAPACITY = 4
NOT_ORTHONORMAL = 8
OTHER_GRADIENT = 16

# The flags of a step that was left out.
SKIPPED = NONFINITE | NOT_ORTHONORMAL

_ADVICE = {
    NONFINITE: (
        "the loss, a gradient, or what the step would have made of the parameters or a state was not finite: all were left as "
        "they were. "
        "Lower the learning rate, clip the gradient inside tdlrt (optax.chain(optax.clip_by_global_norm(1.0), ...)), lower the "
        "loss scale where there is one (float16), or look for bad values in the batch"
    ),
    PLAIN_GRADIENTS: (
        "the gradients do not satisfy U_i^T dK_i = Mat_i(dC) Q_i: they look like plain factor gradients. "
        "Take them with tdlrt_jax.value_and_grad, and transform them inside tdlrt, not before it"
    ),
    RANK_AT_CAPACITY: (
        "a rank presses against the capacity of its arrays: the tolerance asks for more. "
        "Enlarge it with tdlrt_jax.resize(tree, tdlrt_jax.fit_capacity(params)), parameters and optimizer state alike, "
        "or set max_rank if the bound is meant"
    ),
    NOT_ORTHONORMAL: (
        "the factors of a kernel are not orthonormal, or its active columns do not come first: a step from there would be wrong, "
        "and all was left as it was. Something outside of tdlrt changed them (an average, a decay, rounding to fewer bits, a "
        "transformation after tdlrt in a chain). tdlrt_jax.canonicalize(kernel) repairs them without changing the tensor; then "
        "make the optimizer's state anew with init, which also names a kernel that is not in order"
    ),
    OTHER_GRADIENT: (
        "the second gradient of bug is another one than the first, where both are of the same network, and kernels move by the "
        "second. Something changed the first before tdlrt saw it (clipping or a loss scale before it in a chain, a sum over "
        "micro-batches as in optax.MultiSteps, a mean over devices), or the loss drew other random numbers. Transform gradients "
        'inside of tdlrt, add up micro-batches by tdlrt_step(accumulate=), or use integrator="parallel", which has no second one'
    ),
}


def describe_status(status: int) -> list[str]:
    """The messages behind the bit flags of a status, empty when all is well.

    Example:
      >>> describe_status(0)
      []
    """
    known = sum(_ADVICE)
    flags = check_integer("status", status, 0, "the status of a step")
    if flags & ~known:
        raise ValueError(f"status={flags} has flags that are unknown: expected the status of a step, at most {known}")
    return [message for flag, message in _ADVICE.items() if flags & flag]
