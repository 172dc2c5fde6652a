"""What a step reports about itself: bit flags that stay on the device, and their meaning in words."""

from __future__ import annotations

from tdlrt_jax.arguments import check_integer

__all__ = ["NONFINITE", "OK", "PLAIN_GRADIENTS", "RANK_AT_CAPACITY", "describe_status"]

OK = 0
NONFINITE = 1
PLAIN_GRADIENTS = 2
RANK_AT_CAPACITY = 4

_ADVICE = {
    NONFINITE: (
        "a gradient or the next kernel was not finite: parameters and optimizer state were left as they were. "
        "Lower the learning rate, clip the gradient inside tdlrt (optax.chain(optax.clip_by_global_norm(1.0), ...)), or look for "
        "bad values in the batch"
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
