"""Counted work of a convolution, beside the compiler's own count, and the plan that is chosen by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdlrt_jax.conv import PLANS, choose_plan, count_work
from tdlrt_jax.frame import lift
from tests.conv.cases import applied, compiled, random_kernel


@pytest.mark.parametrize("rank", [(None, None, 4, 5), (2, 2, 4, 5), (3, 2, 6, 8)])
def test_counted_work_is_what_the_compiler_counts(rank, rng):
    """Without padding, whose zeros the compiler leaves out. The count does not know of shared subexpressions."""
    x_shape, shape, options = (4, 5, 4, 6), (3, 2, 6, 8), {"padding": "VALID"}
    x, y = jnp.ones(x_shape, jnp.float32), jnp.ones((4, 3, 3, 8), jnp.float32)
    frame = jax.eval_shape(lift, random_kernel(rng, shape, rank, np.float32))

    def both_passes(plan):
        def apply(x, frame, dy):
            y, transpose = jax.vjp(applied(plan, options), x, frame)
            return y, transpose(dy)

        return compiled(apply).lower(x, frame, y).compile().cost_analysis()["flops"] / 2

    for plan in PLANS:
        work = count_work(plan, shape, rank, x_shape, **options)
        assert 0.85 * work.total < both_passes(plan) < 1.03 * work.total, plan


def test_counted_work_of_the_other_plans():
    pixels, arguments = 4 * 6 * 6, ((3, 3, 8, 12), (2, 2, 5, 6), (4, 6, 6, 16))
    forward = {plan: count_work(plan, *arguments, groups=2).forward for plan in PLANS}
    assert forward == {
        "dense": pixels * 9 * 8 * 12,
        "merge_in": 2 * pixels * 9 * 8 * 6 + pixels * 6 * 12,
        "merge_out": pixels * 16 * 5 + pixels * 9 * 5 * 12,
        "factored": pixels * 16 * 5 + 2 * pixels * 9 * 5 * 6 + pixels * 6 * 12,
    }
    strided = count_work("factored", (1, 1, 8, 12), (None, None, 5, 6), (4, 6, 6, 8), strides=2)
    assert strided.forward == 4 * 3 * 3 * (8 * 5 + 5 * 6 + 6 * 12)  # a pointwise kernel reads only what it keeps


@given(
    channels=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    fraction=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    image=st.integers(1, 16),
    batch=st.integers(1, 64),
    groups=st.sampled_from([1, 1, 2, 4]),
    device=st.sampled_from(["cpu", "gpu"]),
)
def test_the_chosen_plan_never_counts_more_than_the_kernel_rebuilt(channels, fraction, image, batch, groups, device):
    n_in, n_out = channels[0], channels[1] * groups
    rank = tuple(max(1, round(f * n)) for f, n in zip(fraction, (n_in, n_out)))
    arguments = ((3, 3, n_in, n_out), (3, None, *rank), (batch, image, image, n_in * groups))
    chosen = choose_plan(*arguments, groups=groups, device=device)
    total = {plan: count_work(plan, *arguments, groups=groups).total for plan in PLANS}
    assert total[chosen] <= total["dense"]
    if groups > 1 and n_in == 1:
        assert chosen == "dense"


def test_choice_at_both_ends(rng):
    full, small = (3, 3, 64, 64), (2, 2, 8, 8)
    assert choose_plan((3, 3, 64, 64), full, (32, 8, 8, 64)) == "dense"
    assert choose_plan((3, 3, 64, 64), small, (32, 8, 8, 64)) == "factored"
    assert choose_plan((3, 3, 3, 64), (3, 3, 3, 8), (32, 32, 32, 3)) == "merge_in"
    assert choose_plan((3, 3, 64, 10), (3, 3, 8, 10), (32, 8, 8, 64)) == "merge_out"
    # Groups: with all modes streamed it pays only if g^2 r_in r_out < n_in n_out.
    assert choose_plan((3, 3, 16, 64), (3, 3, 12, 32), (32, 8, 8, 64), groups=4) in ("dense", "merge_out")
    assert choose_plan((3, 3, 128, 256), (3, 3, 16, 16), (32, 16, 16, 256), groups=2) == "factored"


def test_tucker_conv_takes_the_plan_that_choose_plan_names(rng):
    x = jnp.ones((8, 8, 8, 32))
    for rank in ((2, 2, 4, 4), (3, 3, 32, 32)):
        kernel = random_kernel(rng, (3, 3, 32, 32), rank, np.float32)
        traced = {p: str(jax.make_jaxpr(applied(p, {}))(x, kernel)) for p in (None, *PLANS)}
        chosen = choose_plan((3, 3, 32, 32), rank, x.shape)
        assert [p for p in PLANS if traced[p] == traced[None]] == [chosen]
