"""The plan of a trained layer's forward pass: never more work than the dense kernel, and known where it is obvious."""

import itertools

import pytest

from tdlrt_jax.conv import PLANS, choose_plan, count_work, forward_plan


@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("image", [1, 4, 16])
def test_the_forward_plan_never_takes_more_work_than_dense(channels, image):
    shape, x = (3, 3, channels, channels), [(2, image, image, channels)]
    for r_in, r_out in itertools.product((1, channels // 4, channels - 1, None), repeat=2):
        rank = (3, 3, r_in, r_out)
        plan = forward_plan(shape, rank, x, device="gpu")
        work = {name: count_work(name, shape, rank, x[0]).forward for name in PLANS}
        assert work[plan] <= work["dense"]
        if r_in is None:
            assert plan in ("dense", "merge_in")


def test_the_forward_plan_where_it_is_known():
    plan = forward_plan
    assert plan((3, 3, 64, 64), (3, 3, 8, 8), [(1, 16, 16, 64)], device="cpu") == "factored"
    assert plan((3, 3, 64, 64), (3, 3, 60, 60), [(1, 16, 16, 64)], device="cpu") == "dense"
    assert plan((3, 3, 64, 64), (3, 3, 60, 8), [(1, 16, 16, 64)], device="cpu") == "merge_in"
    assert plan((64, 64), (4, 4), [(1, 64)], device="cpu") in ("merge_in", "merge_out"), "two stages beat three"
    assert plan((3, 3, 1, 64), (3, 3, 1, 8), [(1, 16, 16, 64)], groups=64) == "dense"
    # Without any call, what stores the fewest numbers: 9 8 8 + 2 64 8, 9 64 8 + 64 8, 9 64 64.
    assert plan((3, 3, 64, 64), (3, 3, 8, 8), []) == "factored"
    assert plan((3, 3, 64, 64), (3, 3, 64, 64), []) == "dense"
    assert plan((64, 64), (60, 60), []) == "dense"


def test_a_trained_layers_kernels_are_formed_already():
    """A training step forms a kernel and contracts its gradient, a trained layer does not: merging is cheaper there."""
    shape, rank, x = (64, 256), (40, 40), (1, 64)
    assert choose_plan(shape, rank, x, device="cpu") == "factored"
    assert forward_plan(shape, rank, [x], device="cpu") == "merge_in"


def test_the_work_of_all_calls_is_added_up():
    small, large = (1, 4, 4, 64), (1, 32, 32, 64)  # at 4x4 pixels a VALID window sees few outputs for its inputs

    def plan(calls):
        return forward_plan((3, 3, 64, 64), (3, 3, 24, 40), calls, padding="VALID", device="cpu")

    assert (plan([small]), plan([large])) == ("merge_out", "factored")
    assert plan([small, large]) == plan([large, small]) == "factored"
    assert plan([(400, *small[1:]), large]) == plan([small] * 400 + [large]) == "merge_out"


def test_arguments_that_do_not_fit_are_refused_as_by_choose_plan():
    with pytest.raises(ValueError, match=r"x_shape must be \(batch\.\.\., 2 spatial dimensions, 4\)"):
        forward_plan((3, 3, 4, 8), (3, 3, 2, 2), [(1, 9, 9, 5)])
    with pytest.raises(ValueError, match="rank as long"):
        forward_plan((3, 3, 4, 8), (2, 2), [(1, 9, 9, 4)])


def test_few_in_channels_are_not_streamed_to_fewer_on_a_cpu():
    """A convolution of one in-channel is no faster there than one of three, and its input's gradient would be needed."""
    for pick in (
        lambda device: choose_plan((3, 3, 3, 64), (3, 3, 1, 9), (128, 32, 32, 3), device=device),
        lambda device: forward_plan((3, 3, 3, 64), (3, 3, 1, 9), [(128, 32, 32, 3)], device=device),
    ):
        assert pick("cpu") == "merge_in"
    assert count_work("merge_in", (3, 3, 3, 64), (3, 3, 1, 9), (128, 32, 32, 3)).idle == 3 * 13 * 9 * 9 * 128 * 32**2
    assert count_work("factored", (3, 3, 64, 64), (3, 3, 16, 16), (128, 32, 32, 64)).idle == 0
