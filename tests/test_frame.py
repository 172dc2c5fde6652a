import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import Frame, TuckerTensor, canonicalize, lift, resize, tdlrt, to_dense, value_and_grad
from tdlrt_jax.tucker import multi_mode_product, unfold
from tests import references
from tests.helpers import dense64, orthonormal, random_kernel


def loss(dense):
    weights = jnp.arange(dense.size, dtype=dense.dtype).reshape(dense.shape) / dense.size
    return jnp.sum(jnp.sin(dense * (1 + weights))) + 0.5 * jnp.sum(dense**2)


@pytest.mark.parametrize("rank", [(2, 3, 2, 3), (1, 1, 1, 1), (3, 4, 5, 6), (2, None, 3, 3)])
def test_theorem_1(x64, rng, rank):
    """dK_i = Mat_i(grad W ×_{j != i} U_j^T) Q_i and dC = grad W ×_j U_j^T, all from one jax.grad on the chart."""
    kernel = random_kernel(rng, (3, 4, 5, 6), rank)
    value, grads = value_and_grad(lambda w: loss(to_dense(w)))(kernel)
    dense_grad = np.asarray(jax.grad(loss)(to_dense(kernel)))
    np.testing.assert_allclose(value, loss(to_dense(kernel)), rtol=1e-13)
    factors = [None if u is None else np.asarray(u) for u in kernel.factors]
    Q, _ = references.frame(np.asarray(kernel.core), factors)
    frame = lift(kernel)
    np.testing.assert_allclose(grads.core, references.core_gradient(dense_grad, factors), atol=1e-12)
    for mode, u in enumerate(factors):
        if u is None:
            assert grads.factors[mode] is None
            continue
        ours = unfold(frame.Q[mode], mode).T
        np.testing.assert_allclose(ours @ ours.T, Q[mode] @ Q[mode].T, atol=1e-12)  # the same range
        expected = references.k_gradient(dense_grad, factors, {mode: np.asarray(ours)}, mode)
        np.testing.assert_allclose(grads.factors[mode], expected, atol=1e-12)


@pytest.mark.parametrize("mode", range(4))
def test_theorem_1_is_the_gradient_of_the_papers_own_reparametrization(x64, rng, mode):
    """d/dK_i of L(Ten_i(Q_i^T) ×_{j != i} U_j ×_i K_i), written as the paper writes it."""
    kernel = random_kernel(rng, (3, 4, 5, 6), (2, 3, 2, 3))
    frame = lift(kernel)

    def papers(k):
        return loss(multi_mode_product(frame.Q[mode], [k if j == mode else u for j, u in enumerate(frame.U)]))

    np.testing.assert_allclose(papers(frame.K[mode]), loss(to_dense(kernel)), rtol=1e-12)
    _, grads = value_and_grad(lambda w: loss(to_dense(w)))(kernel)
    np.testing.assert_allclose(grads.factors[mode], jax.grad(papers)(frame.K[mode]), atol=1e-12)


def test_gradients_are_coordinates_of_the_projected_gradient(x64, rng):
    """dC and (I - U U^T) dK_i assemble to P(W) grad, equation (6)."""
    kernel = random_kernel(rng, (4, 5, 6), (2, 3, 3))
    _, grads = value_and_grad(lambda w: loss(to_dense(w)))(kernel)
    frame = lift(kernel)
    tangent = to_dense(TuckerTensor(grads.core, kernel.factors))
    for mode, (u, dk) in enumerate(zip(kernel.factors, grads.factors)):
        new = dk - u @ (u.T @ dk)
        tangent += multi_mode_product(frame.Q[mode], [new if j == mode else v for j, v in enumerate(kernel.factors)])
    dense_grad = np.asarray(jax.grad(loss)(to_dense(kernel)))
    expected = references.projected_gradient(
        np.asarray(kernel.core), [np.asarray(u) for u in kernel.factors], dense_grad
    )
    np.testing.assert_allclose(tangent, expected, atol=1e-12)


def test_frames_do_not_depend_on_capacity(x64, rng):
    kernel = random_kernel(rng, (4, 5, 6), (2, 3, 3))
    padded = resize(kernel, (4, 5, 6))
    f = value_and_grad(lambda w: loss(to_dense(w)))
    (value, grads), (value_padded, grads_padded) = f(kernel), f(padded)
    np.testing.assert_allclose(value, value_padded, rtol=1e-13)
    np.testing.assert_allclose(resize(grads_padded, (2, 3, 3)).core, grads.core, atol=1e-12)
    for padded_k, k in zip(grads_padded.factors, grads.factors):
        assert (padded_k[:, k.shape[1] :] == 0).all()
        projector, projector_padded = k @ k.T, padded_k @ padded_k.T  # QR signs are free
        np.testing.assert_allclose(projector_padded, projector, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dependent_slices_lose_nothing(x64, rng, dtype):
    """C = Ten_i(Q_i^T) ×_i S_i also with repeated and zero slices, where dropping small R_jj would lose 10% and more."""
    core = rng.normal(size=(4, 4, 5))
    core[1] = core[0]
    core[:, 2] = 0
    kernel = random_kernel(rng, (6, 5, 7), (4, 4, 5), dtype=dtype)._replace(core=jnp.array(core, dtype))
    kernel = resize(kernel, (6, 5, 7))
    frame = lift(kernel)
    scale = np.abs(dense64(kernel)).max()
    for mode in range(3):
        rebuilt = multi_mode_product(frame.Q[mode], [frame.K[mode] if j == mode else u for j, u in enumerate(frame.U)])
        np.testing.assert_allclose(rebuilt, dense64(kernel), atol=20 * np.finfo(dtype).eps * scale)


def test_value_and_grad_of_a_network(x64, rng):
    """Kernels anywhere in the tree, ordinary leaves beside them, aux, one trace of the loss."""
    params = {"a": [random_kernel(rng, (3, 4), (2, 2)), jnp.ones(4)], "b": (random_kernel(rng, (4, 2), (1, 1)),)}
    calls = []

    def network(p, x):
        calls.append(1)
        hidden = jnp.tanh(x @ to_dense(p["a"][0]) + p["a"][1])
        out = hidden @ to_dense(p["b"][0])
        return jnp.sum(out**2), out

    x = jnp.array(rng.normal(size=(7, 3)))
    (value, out), grads = value_and_grad(network, has_aux=True)(params, x)
    assert len(calls) == 1
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(value, jnp.sum(out**2))
    dense = jax.tree.map(to_dense, params, is_leaf=lambda n: isinstance(n, TuckerTensor))
    np.testing.assert_allclose(grads["a"][1], jax.grad(lambda p: network(p, x)[0])(dense)["a"][1], atol=1e-12)


def test_core_only_frames_give_the_galerkin_gradient(x64, rng):
    kernel = random_kernel(rng, (4, 5, 6), (2, 3, 3))
    frame = Frame(kernel.core, None, kernel.factors, None)
    value, grads = value_and_grad(lambda p: loss(to_dense(p["w"])))({"w": frame})
    dense_grad = jax.grad(loss)(to_dense(kernel))
    np.testing.assert_allclose(value, loss(to_dense(kernel)))
    np.testing.assert_allclose(
        grads["w"].core, multi_mode_product(dense_grad, kernel.factors, transpose=True), atol=1e-12
    )
    assert grads["w"].factors == (None, None, None)


def test_plain_differentiation_keeps_its_meaning(x64, rng):
    """jax.grad of a TuckerTensor gives ordinary factor gradients, and second derivatives work."""
    kernel = random_kernel(rng, (4, 5), (2, 2))
    grads = jax.grad(lambda w: loss(to_dense(w)))(kernel)
    dense_grad = jax.grad(loss)(to_dense(kernel))
    np.testing.assert_allclose(grads.factors[0], dense_grad @ kernel.factors[1] @ kernel.core.T, atol=1e-12)
    _, curvature = jax.jvp(jax.grad(lambda w: loss(to_dense(w))), (kernel,), (kernel,))
    assert np.isfinite(curvature.core).all() and np.abs(curvature.core).max() > 0


def test_a_capacity_that_no_unfolding_can_fill_is_refused(x64, rng):
    """By lift and by value_and_grad, naming kernel, mode, capacity and product; the advice given works."""
    kernel = TuckerTensor(
        jnp.array(rng.normal(size=(2, 5, 2))), tuple(jnp.array(orthonormal(rng, 6, r)) for r in (2, 5, 2))
    )
    message = r"capacity 5 of mode 1 exceeds the product 4 of the others \(core shape \(2, 5, 2\)\)"
    with pytest.raises(ValueError, match="the kernel: " + message):
        lift(kernel)
    for f in (value_and_grad(lambda p: loss(to_dense(p["a"]["w"]))), tdlrt(optax.sgd(0.1), tolerance=0.1).init):
        with pytest.raises(ValueError, match="kernel 'a/w': " + message):
            f({"a": {"w": kernel}})
    with pytest.raises(ValueError, match=message):
        jax.jit(lift)(kernel)
    smaller = resize(canonicalize(kernel), kernel.core.shape)
    assert smaller.core.shape == (2, 4, 2)
    np.testing.assert_allclose(to_dense(smaller), to_dense(kernel), atol=1e-13)
    lift(smaller)


def test_whole_modes_have_no_such_limit(x64, rng):
    frame = lift(random_kernel(rng, (9, 4, 2), (None, 4, 2)))
    np.testing.assert_allclose(frame.K[1] @ unfold(frame.Q[1], 1), frame.U[1] @ unfold(frame.core, 1), atol=1e-13)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 2)], r"a core with 2 modes and 1 factors"),
        ([(3, 2), (4, 2), (5, 2)], r"a core with 2 modes and 3 factors"),
        ([(3, 2), (4, 1)], r"factor 1 has shape \(4, 1\), its core mode size 2"),
        ([(1, 2), (4, 2)], r"factor 0 has shape \(1, 2\), its core mode size 2"),
        ([(2,), (4, 2)], r"factor 0 has shape \(2,\), its core mode size 2"),
    ],
)
def test_factors_that_do_not_fit_the_core_are_refused(shapes, message):
    kernel = TuckerTensor(jnp.ones((2, 2)), tuple(jnp.ones(shape) for shape in shapes))
    with pytest.raises(ValueError, match="the kernel.*" + message):
        lift(kernel)
    with pytest.raises(ValueError, match="kernel 'w'.*" + message):
        value_and_grad(lambda p: jnp.sum(to_dense(p["w"])))({"w": kernel})
