"""Arrays that follow the ranks between two epochs."""

import jax.numpy as jnp
import pytest

from experiments.run.arrays import fit_arrays
from experiments.run.programs import TrainState
from tdlrt_jax.capacity import capacity
from tests.helpers import random_kernel


@pytest.fixture
def state(rng):
    kernel = random_kernel(rng, (3, 3, 64, 96), (1, 2, 20, 30), capacity=(3, 3, 48, 64))
    return TrainState(params={"w": kernel}, opt_state={"trace": {"w": kernel}}, model_state=(), healthy=jnp.bool_(True))


@pytest.mark.parametrize("settled, sizes", [(False, (2, 3, 32, 48)), (True, (2, 3, 24, 40))])
def test_ranks_that_have_settled_have_less_room_to_rise(state, settled, sizes):
    """Half of the rank, or a tenth, up to eights where there are channels for two of them."""
    fitted = fit_arrays(state, None, grow=False, settled=settled)
    assert capacity(fitted.params["w"]) == capacity(fitted.opt_state["trace"]["w"]) == sizes
    assert fit_arrays(fitted, None, grow=False, settled=settled) is fitted


def test_arrays_stay_where_too_few_steps_are_left(state):
    assert fit_arrays(state, None, grow=False, settled=True, steps_left=10) is state
