"""Initial kernels: their norm, their variance, their spectra, and what users may ask for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import initializers

from tdlrt_jax import TuckerTensor, kernel_shape, to_dense, tucker_linear
from tdlrt_jax.initialization import (
    dense_norm,
    initial_kernel,
    kernel_rank,
    tucker_from_dense,
    tucker_normal,
    tucker_normalized,
    tucker_spectral,
)
from tdlrt_jax.spectra import mode_spectra, prescribe_spectra
from tests import references as ref

KEY = jax.random.key(0)


def assert_orthonormal(kernel, tolerance):
    for factor in kernel.factors:
        if factor is not None:
            factor = np.asarray(factor)
            np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=tolerance)


def dense(kernel):
    return ref.to_dense(np.asarray(kernel.core), [None if f is None else np.asarray(f) for f in kernel.factors])


# Ranks


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((3, 3, 16, 32), None, (3, 3, 16, 32)),
        ((3, 3, 16, 32), 0.5, (3, 3, 8, 16)),
        ((3, 3, 16, 32), 20, (3, 3, 16, 20)),
        ((3, 3, 16, 32), 1.0, (3, 3, 16, 32)),
        ((3, 3, 16, 32), 1, (1, 1, 1, 1)),  # one in- and one out-direction leave one direction to each spatial mode...
        ((3, 3, 16, 32), 0.01, (1, 1, 1, 1)),
        ((3, 3, 16, 32), (None, None, 4, 0.25), (None, None, 4, 8)),
        ((3, 3, 1, 64), None, (3, 3, 1, 9)),
        ((20, 10), None, (10, 10)),
        ((20, 10), 0.5, (5, 5)),
        ((20, 10), 4, (4, 4)),
        ((20, 10), (None, 4), (None, 4)),
    ],
)
def test_kernel_rank_counts_fractions_and_whole_modes(shape, rank, expected):
    ranks = kernel_rank(shape, rank)
    if expected == (1, 1, 1, 1):  # feasibility: r_h <= r_w r_in r_out and so on
        assert ranks[2:] == (1, 1)
        assert ranks[0] == ranks[1]
    else:
        assert ranks == expected


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank=0 for mode 2"),
        (-1.0, r"fraction of the mode's size"),
        (1.5, r"in \(0, 1\]"),
        ((3, 3, 17, 4), r"rank=17 for mode 2 .* 1\.\.16"),
        ((3, 3, 4), "3 entries"),
        ((32, 16, 3, 3), "layout is spatial"),
    ],
)
def test_kernel_rank_says_what_is_wrong(rank, message):
    with pytest.raises(ValueError, match=message):
        kernel_rank((3, 3, 16, 32), rank)


# Norm and variance


@pytest.mark.parametrize(
    ("scheme", "initializer"),
    [
        ("lecun", initializers.lecun_normal()),
        ("he", initializers.he_normal()),
        ("glorot", initializers.glorot_uniform()),
    ],
)
def test_dense_norm_is_that_of_the_dense_initializers(scheme, initializer):
    shape = (3, 3, 32, 48)
    drawn = np.linalg.norm(initializer(KEY, shape))
    np.testing.assert_allclose(dense_norm(shape, scheme), drawn, rtol=0.03)
    with pytest.raises(ValueError, match="scheme='xavier'"):
        dense_norm(shape, "xavier")


@pytest.mark.parametrize(("shape", "rank"), [((3, 8, 16), 0.25), ((5, 1, 20), (None, None, 5)), ((8, 8), 1)])
def test_tucker_normal_has_the_dense_variance(shape, rank):
    kernel = tucker_normal(KEY, shape, rank)
    assert kernel_shape(kernel) == shape
    assert [f is None for f in kernel.factors] == [r is None for r in kernel_rank(shape, rank)]
    assert_orthonormal(kernel, 1e-5)
    fan_in = np.prod(shape[:-1])
    np.testing.assert_allclose(np.mean(dense(kernel) ** 2), 1 / fan_in, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(dense(tucker_normal(KEY, shape, rank, norm=3.0))), 3.0, rtol=1e-5)
    assert not np.allclose(dense(kernel), dense(tucker_normal(jax.random.key(1), shape, rank)), rtol=0.1)


def test_entries_of_tucker_normal_are_unbiased_and_of_equal_variance_over_keys():
    shape, draws = (2, 3, 4), 2000
    draw = jax.jit(jax.vmap(lambda key: to_dense(tucker_normal(key, shape, (2, 2, 2)))))
    kernels = np.asarray(draw(jax.random.split(KEY, draws)))
    variance = 1 / 6
    assert np.max(np.abs(np.mean(kernels, 0))) < 5 * np.sqrt(variance / draws)
    np.testing.assert_allclose(np.mean(kernels**2, 0), variance, rtol=0.2)


def test_activations_keep_their_size_over_six_layers():
    """Without rescaling, the HOSVD of random weights at 1/8 of the ranks loses a factor of two or more in every layer."""

    @jax.jit
    def layer(key, dense_init, hosvd_init, plain):
        weights = initializers.he_normal()(key, (64, 64))
        make = functools.partial(initial_kernel, kernel_init=initializers.he_normal(), dtype=jnp.float32)
        kernels = (
            make(key, (64, 64), 8, initialization="dense"),
            make(key, (64, 64), 8, initialization="hosvd"),
            tucker_from_dense(weights, 8, rescale=False),
        )
        inputs = (dense_init, hosvd_init, plain)
        return [jax.nn.relu(tucker_linear(x, kernel)) for x, kernel in zip(inputs, kernels)]

    start = jax.random.normal(KEY, (64, 64))
    outputs = [start] * 3
    for i in range(6):
        outputs = layer(jax.random.fold_in(KEY, i), *outputs)
    dense_size, hosvd_size, plain_size = (np.mean(np.square(y)) / np.mean(np.square(start)) for y in outputs)
    assert 0.05 < dense_size < 20
    assert 0.05 < hosvd_size < 20
    assert plain_size < 0.01 * hosvd_size


def test_tucker_from_dense_at_full_rank_is_the_weights_and_rescales_below(rng):
    weights = jnp.asarray(rng.standard_normal((3, 4, 6)), jnp.float32)
    np.testing.assert_allclose(dense(tucker_from_dense(weights)), weights, atol=1e-5)
    low = tucker_from_dense(weights, rank=(2, 2, 2))
    plain = tucker_from_dense(weights, rank=(2, 2, 2), rescale=False)
    np.testing.assert_allclose(np.linalg.norm(low.core), np.linalg.norm(weights), rtol=1e-5)
    ratio = np.linalg.norm(weights) / np.linalg.norm(plain.core)
    assert ratio > 1.2
    np.testing.assert_allclose(dense(low), ratio * dense(plain), atol=1e-5)
    assert not np.any(tucker_from_dense(0 * weights, rank=(2, 2, 2)).core)


# Spectra


def singular_values(tensor, mode):
    return np.linalg.svd(ref.unfold(tensor, mode), compute_uv=False)


@pytest.mark.parametrize(
    "rank", [(5, 5, 1, 10), (5, 5, 20, 10), (3, 3, 9, 9), (12, 12), (6, 6, 6), (5, 5, 10, 25)], ids=str
)
def test_powers_of_ten_are_prescribed_in_every_unfolding(rank, rng):
    spectra = mode_spectra([10.0**-k for k in range(50)], rank)
    core = prescribe_spectra(rng.standard_normal(rank), spectra)
    for mode, values in enumerate(spectra):
        np.testing.assert_allclose(singular_values(core, mode), values, rtol=1e-6, atol=1e-14)
        # Slice by slice they are there far below the rounding of the largest, where no SVD finds them.
        np.testing.assert_allclose(np.linalg.norm(ref.unfold(core, mode), axis=1), values, rtol=1e-6)


def test_spectral_initialization_has_them_in_the_dense_kernel(x64):
    kernel = tucker_spectral(KEY, (3, 3, 8, 12), 7, norm=2.0, dtype=jnp.float64)
    assert_orthonormal(kernel, 1e-12)
    full = dense(kernel)
    np.testing.assert_allclose(np.linalg.norm(full), 2.0, rtol=1e-12)
    for mode, r in enumerate((3, 3, 7, 7)):
        values = 10.0 ** -np.arange(r)
        values *= 2.0 / np.linalg.norm(values)
        np.testing.assert_allclose(singular_values(full, mode)[:r], values, rtol=1e-6)
        np.testing.assert_allclose(singular_values(full, mode)[r:], 0, atol=1e-14)


def test_spectral_initialization_under_jit_and_vmap_and_in_float32():
    make = functools.partial(tucker_spectral, shape=(5, 5, 6), rank=(5, 5, 5))
    keys = jax.random.split(KEY, 2)
    several = jax.jit(jax.vmap(make))(keys)
    assert several.core.shape == (2, 5, 5, 5)
    one = make(keys[1])
    assert one.core.dtype == jnp.float32
    np.testing.assert_allclose(dense(jax.tree.map(lambda leaf: leaf[1], several)), dense(one), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(one.core), np.sqrt(6), rtol=1e-5)
    slices = np.linalg.norm(ref.unfold(np.asarray(one.core), 2), axis=1)  # small values survive the rounding
    np.testing.assert_allclose(slices / slices[0], 10.0 ** -np.arange(5), rtol=1e-5)


def test_other_spectra_and_free_modes(rng):
    given = [[1.0, 0.9, 0.1], None, [2.0, 1.0, 0.5, 0.1]]
    core = prescribe_spectra(rng.standard_normal((3, 4, 4)), mode_spectra(given, (3, 4, 4)))
    for mode in (0, 2):
        expected = np.asarray(given[mode]) / np.linalg.norm(given[mode])
        np.testing.assert_allclose(singular_values(core, mode), expected, rtol=1e-6)
    assert mode_spectra([1.0, 0.5, 0.1], (None, 3, 2))[0] is None  # a whole mode is free
    # From values that a tensor has, the same are found again.
    spectra = [singular_values(core, mode) for mode in range(3)]
    again = prescribe_spectra(rng.standard_normal((3, 4, 4)), spectra, tolerance=1e-9)
    for mode in range(3):
        np.testing.assert_allclose(singular_values(again, mode), spectra[mode], rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 0.0}, "decay=0.0"),
        ({"singular_values": [1.0, 0.5]}, "2 values for mode 0 of rank 3"),
        ({"singular_values": [1.0, 2.0, 3.0]}, "descending"),
        ({"singular_values": [1.0, 0.5, 0.0]}, "positive"),
        ({"singular_values": [[1.0], [1.0]]}, "2 sequences"),
        # ||Mat_0|| of almost rank one forces the other two spectra to agree.
        ({"singular_values": [[1, 1e-3, 1e-4], [1, 1, 1], [1, 0.1, 0.01]]}, "constrain each other"),
    ],
)
def test_spectra_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tucker_spectral(KEY, (3, 3, 3), **options)


@pytest.mark.parametrize("rank", [0.125, 0.5, (None, None, 6, 48), None])
def test_a_step_turns_a_normalized_kernel_as_far_as_a_dense_one(rng, rank):
    """The gradient of a function of ``W / ||W||`` falls with the norm, and the core sees a part of it."""
    shape = (3, 3, 48, 64)
    gradient = rng.normal(size=shape)  # at norm 1
    kernel = tucker_normalized(KEY, shape, rank, norm=5.0)
    seen = to_dense(kernel._replace(core=project(gradient, kernel)))

    def turned(gradient, norm):
        return np.linalg.norm(gradient) / norm**2

    expected = turned(gradient, 5.0)
    # The least core has 432 entries: the norm of its random gradient is known to 3.4%.
    assert turned(seen, np.linalg.norm(kernel.core)) == pytest.approx(expected, rel=0.1)
    # With the dense norm it turns less, by the fraction of the directions of both modes.
    share = math.prod(size / n for size, n in zip(kernel.core.shape, shape))
    assert turned(seen, 5.0) == pytest.approx(math.sqrt(share) * expected, rel=0.1)


def project(gradient, kernel):
    """The gradient of the core."""
    for mode, factor in enumerate(kernel.factors):
        if factor is not None:
            gradient = np.moveaxis(np.tensordot(factor.T, gradient, (1, mode)), 0, mode)
    return gradient


# What layers ask for


def test_initial_kernel_of_every_kind_has_the_norm_of_the_dense_draw():
    shape, init = (6, 8), initializers.he_normal()
    draw = init(KEY, shape, jnp.float32)
    make = functools.partial(initial_kernel, KEY, shape, 0.5, kernel_init=init, dtype=jnp.float32)
    for initialization in ("dense", "hosvd", "spectral", functools.partial(tucker_spectral, decay=0.5)):
        kernel = make(initialization=initialization)
        assert kernel.core.shape == (3, 3)
        np.testing.assert_allclose(np.linalg.norm(dense(kernel)), np.linalg.norm(draw), rtol=1e-5)
    ready = TuckerTensor(jnp.ones((1, 1)), (jnp.ones((3, 1)), jnp.ones((2, 1))))
    assert initial_kernel(KEY, (3, 2), None, initialization="dense", kernel_init=lambda *_: ready, dtype=float) is ready
    half = initial_kernel(KEY, shape, 0.5, initialization="dense", kernel_init=init, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.float32)}
    zero = initial_kernel(KEY, shape, 0.5, initialization="dense", kernel_init=initializers.zeros, dtype=jnp.float32)
    assert not np.any(dense(zero))
    assert_orthonormal(zero, 1e-5)


def test_initial_kernel_says_what_is_wrong():
    make = functools.partial(initial_kernel, KEY, (3, 4), None, dtype=jnp.float32)
    with pytest.raises(ValueError, match="initialization='svd' is unknown"):
        make(initialization="svd", kernel_init=initializers.he_normal())
    with pytest.raises(ValueError, match=r"weights of shape \(4, 3\)"):
        make(initialization="hosvd", kernel_init=lambda *_: jnp.ones((4, 3)))
