"""The projection onto the tangent space against the NumPy reference, and its defining equations."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tdlrt_jax import TuckerTensor, lift, resize, to_dense
from tdlrt_jax.dynamics import chart_coordinates, chart_to_dense, project, tangent_coordinates, tangent_to_dense
from tests import references
from tests.helpers import random_kernel

CASES = [
    ((6, 8), (3, 3)),
    ((5, 6, 7), (2, 3, 3)),
    ((5, 6, 7), (1, 1, 1)),
    ((3, 4, 5, 6), (2, 3, 2, 3)),
    ((3, 3, 6, 7), (None, None, 2, 4)),
    ((4, 3, 5, 2, 3), (2, 2, 2, 2, 2)),
]


def numpy_parts(kernel):
    return np.asarray(kernel.core), [None if u is None else np.asarray(u) for u in kernel.factors]


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_projector_is_the_references(x64, rng, shape, rank):
    kernel = random_kernel(rng, shape, rank)
    dense = rng.normal(size=shape)
    expected = references.projected_gradient(*numpy_parts(kernel), dense)
    np.testing.assert_allclose(project(kernel, jnp.asarray(dense)), expected, atol=1e-12)
    frame = lift(kernel)
    np.testing.assert_allclose(chart_to_dense(frame, chart_coordinates(frame, dense)), expected, atol=1e-12)
    tangent = tangent_coordinates(kernel, jnp.asarray(dense))
    np.testing.assert_allclose(tangent_to_dense(kernel, tangent), expected, atol=1e-11)
    for u, du in zip(kernel.factors, tangent.factors):
        if u is not None:
            np.testing.assert_allclose(u.T @ du, 0, atol=1e-12)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_projector_is_an_orthogonal_projection(x64, rng, shape, rank):
    """Idempotent, symmetric, and the residual is orthogonal to every curve through W on the manifold."""
    kernel = random_kernel(rng, shape, rank)
    x, y = jnp.asarray(rng.normal(size=(2, *shape)))
    px, py = project(kernel, x), project(kernel, y)
    np.testing.assert_allclose(project(kernel, px), px, atol=1e-12)
    np.testing.assert_allclose(jnp.vdot(px, y), jnp.vdot(x, py), atol=1e-11)
    moved = [u if u is None else u + 1e-6 * rng.normal(size=u.shape) for u in kernel.factors]
    back = [u if u is None else u - (v - u) for u, v in zip(kernel.factors, moved)]
    curve = (
        to_dense(TuckerTensor(kernel.core, tuple(moved))) - to_dense(TuckerTensor(kernel.core, tuple(back)))
    ) / 2e-6
    np.testing.assert_allclose(jnp.vdot(x - px, curve), 0, atol=1e-6)
    assert jnp.linalg.norm(px) < jnp.linalg.norm(x)


def test_padding_changes_nothing(x64, rng):
    kernel, dense = random_kernel(rng, (5, 6, 7), (2, 3, 2)), jnp.asarray(rng.normal(size=(5, 6, 7)))
    padded = resize(kernel, (4, 5, 6))
    np.testing.assert_allclose(project(padded, dense), project(kernel, dense), atol=1e-12)
    tangent = tangent_coordinates(padded, dense)
    np.testing.assert_allclose(tangent_to_dense(padded, tangent), project(kernel, dense), atol=1e-11)


def test_projector_does_not_feel_small_singular_values(x64):
    core, factors = references.tucker_random((5, 6, 7), (3, 3, 3), np.geomspace(1, 1e-9, 3), seed=1)
    kernel = TuckerTensor(jnp.asarray(core), tuple(map(jnp.asarray, factors)))
    dense = np.random.default_rng(2).normal(size=(5, 6, 7))
    expected = references.projected_gradient(core, factors, dense)
    np.testing.assert_allclose(project(kernel, jnp.asarray(dense)), expected, atol=1e-6)
    steep = tangent_coordinates(kernel, jnp.asarray(dense))
    assert max(float(jnp.linalg.norm(du)) for du in steep.factors) > 1e7


def test_diffrax_is_not_needed_to_import_the_library_and_is_named_where_it_is():
    """With diffrax hidden, as if it were not installed."""
    code = (
        "import sys; sys.modules['diffrax'] = None\n"
        "import tdlrt_jax\n"
        "try:\n    import tdlrt_jax.dynamics\n"
        "except ImportError as error:\n    assert '.[dynamics]' in str(error); print('named')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "named"


def test_importing_the_library_imports_no_diffrax():
    code = "import sys, tdlrt_jax; print('diffrax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
