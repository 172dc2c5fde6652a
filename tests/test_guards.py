"""Training steps under JAX's own guards: no NaN on the way, no tracer leaks, nothing moves to or from the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdlrt_jax import fit_capacity, resize, tdlrt, tdlrt_step
from tests.test_step import loss_fn, network, with_statistics

INTEGRATORS = ["bug", "parallel", "fixed_rank"]


def optimizer(integrator, **options):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    return tdlrt(inner, tolerance=0.05, integrator=integrator, **options)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_nothing_is_not_a_number(integrator):
    """Also not where it would be masked out: every operation of the step is looked at, by itself."""
    params, images, labels = network()
    tx = optimizer(integrator)
    state = tx.init(params)
    with jax.debug_nans(True), jax.disable_jit():
        step = tdlrt_step(loss_fn, tx, donate=False)
        params, state, info = step(params, state, images, labels)
    assert int(info.status) == 0
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        step(params, state, images.at[0].set(jnp.nan), labels)[2].loss.block_until_ready()


def test_nothing_is_not_a_number_for_a_kernel_of_zeros():
    params, images, labels = network()
    params["conv"] = params["conv"]._replace(core=jnp.zeros_like(params["conv"].core))
    tx = tdlrt(optax.adamw(0.01), tolerance=0.05)  # optax's clipping divides zero by zero where it does not clip
    with jax.debug_nans(True), jax.disable_jit():
        tdlrt_step(loss_fn, tx, donate=False)(params, tx.init(params), images, labels)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_no_tracer_leaks(integrator):
    params, images, labels = network()
    statistics = {"mean": jnp.zeros(4), "count": jnp.zeros((), jnp.int32)}
    tx = optimizer(integrator, adapt_every=2)
    with jax.checking_leaks():
        step = tdlrt_step(with_statistics, tx, has_aux=True, has_state=True, donate=False)
        step(params, tx.init(params), statistics, images, labels)
        leaked = []
        with pytest.raises(Exception, match=r"[Ll]eak"):
            jax.jit(lambda x: leaked.append(x) or x)(1.0)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_nothing_moves_between_host_and_device(integrator):
    """Of a step that is compiled; what it reports stays on the device until it is asked for."""
    params, images, labels = network()
    tx = optimizer(integrator)
    step, state = tdlrt_step(loss_fn, tx), tx.init(params)
    params, state, _ = step(params, state, images, labels)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            params, state, info = step(params, state, images, labels)
        with pytest.raises(Exception, match=r"[Dd]isallowed"):
            step(params, state, np.zeros(images.shape, np.float32), labels)
    assert int(info.status) == 0


def test_nothing_moves_where_capacities_have_changed():
    """The arrays are on the device when ``resize`` returns."""
    params, images, labels = network()
    tx = optimizer("bug")
    step, state = tdlrt_step(loss_fn, tx), tx.init(params)
    params, state, _ = step(params, state, images, labels)
    wanted = fit_capacity(params, multiple=1, headroom=1.0, hysteresis=1.0)
    before = params["conv"].core.shape
    params, state = resize(params, wanted), resize(state, wanted)
    assert params["conv"].core.shape != before
    params, state, _ = step(params, state, images, labels)
    with jax.transfer_guard("disallow"):
        _, _, info = step(params, state, images, labels)
    assert np.isfinite(float(info.loss))
