"""What a network costs, layer by layer, at its true ranks; and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tdlrt_jax import active_rank
from tdlrt_jax.baselines import cp_to_dense, is_cp
from tdlrt_jax.paths import path_name
from tdlrt_jax.report import Total, kernels_by_layer, layer_name, summarize_params
from tdlrt_jax.tucker import is_tucker, multi_mode_product, unfold

__all__ = [
    "Layer",
    "Totals",
    "correct",
    "cross_entropy",
    "layer_name",
    "layers",
    "paper_order",
    "singular_values",
    "totals",
]


class Layer(NamedTuple):
    """One layer's weights, without biases and normalizations; modes in the paper's order (out, in, height, width)."""

    name: str
    kind: str  # "convolution" or "linear"
    shape: tuple[int, ...]
    rank: tuple[int, ...] | None  # None for a dense kernel; the number of terms of one in CP format
    parameters: int  # core and factors at the true ranks; prod(shape) for a dense kernel, what is left of a pruned one
    full: int  # prod(shape)

    @property
    def compression(self) -> float:
        """``1 - c / f`` (paper, section 4.1); negative where ranks are so high that the format costs more."""
        return Total(self.parameters, self.full).compression


class Totals(NamedTuple):
    """Weights and compression rates of a network."""

    parameters: int
    full: int
    compression: float  # of all weights
    conv_parameters: int
    conv_full: int
    conv_compression: float  # of the convolutions alone, the paper's c.r.


def paper_order(modes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reorders what is stored per mode, ``(spatial..., in, out)``, as the paper writes it, ``(out, in, spatial...)``."""
    return (*modes[:-3:-1], *modes[:-2])


def layers(params: Any, kinds: dict[str, str] | None = None, masks: Any = None) -> list[Layer]:
    """The layers with kernels, in the order of the tree.

    Args:
      params: of the network.
      kinds: of its layers, see :func:`tdlrt_jax.report.summarize_params`.
      masks: of what is pruned, see :mod:`tdlrt_jax.baselines.pruning`; ``None`` if nothing is.
    """
    left = {
        layer_name(path_name(path)): int(np.count_nonzero(mask))
        for path, mask in jax.tree_util.tree_leaves_with_path(masks)
    }
    return [
        Layer(
            layer.path,
            layer.kind,
            paper_order(layer.shape),
            layer.rank and paper_order(layer.rank),
            left.get(layer.path, layer.parameters),
            layer.dense_parameters,
        )
        for layer in summarize_params(params, kinds).layers
    ]


def totals(summary: list[Layer]) -> Totals:
    """Sums over layers. A network without convolutions has a convolutional compression of 0."""

    def add(some: list[Layer]) -> tuple[int, int, float]:
        total = Total(sum(layer.parameters for layer in some), sum(layer.full for layer in some))
        return *total, total.compression

    return Totals(*add(summary), *add([layer for layer in summary if layer.kind == "convolution"]))


def singular_values(params: Any) -> dict[str, list[np.ndarray]]:
    """Singular values of every unfolding of every kernel, descending, modes in the paper's order; as many as the rank."""
    values = {}
    for name, kernel in kernels_by_layer(params).items():
        tensor, ranks = _rotated(kernel)
        spectra = []
        for mode, rank in enumerate(ranks):
            matrix = np.asarray(unfold(tensor, mode), np.float64)
            gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
            # The Gram matrix of a kernel with wide unfoldings is small; its square root is accurate enough for a plot.
            spectrum = np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))
            spectra.append(spectrum[:rank])
        values[name] = list(paper_order(tuple(spectra)))
    return values


def _rotated(kernel: Any) -> tuple[Any, Sequence[int]]:
    """A tensor with a kernel's singular values, small where it is known only in factors, and the ranks of its modes."""
    if is_cp(kernel):
        dense = cp_to_dense(kernel)
        return dense, [min(n, kernel.factors[0].shape[1]) for n in dense.shape]
    if not is_tucker(kernel):
        return kernel, np.shape(kernel)
    # Plain gradients leave no factor orthonormal: the triangular parts of their QR go into the core.
    triangles = [None if factor is None else np.linalg.qr(np.asarray(factor), mode="r") for factor in kernel.factors]
    tensor = multi_mode_product(jnp.asarray(kernel.core), triangles)
    ranks = np.asarray(active_rank(kernel)).tolist()
    return tensor, [min(pair) for pair in zip(ranks, tensor.shape)]


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Softmax cross entropy of each image, float32 ``(N,)``."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - picked


def correct(logits: Array, labels: Array) -> Array:
    """Whether each image is classified rightly, booleans ``(N,)``."""
    return jnp.argmax(logits, axis=1) == labels
