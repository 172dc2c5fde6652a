"""Contraction plans for a Tucker kernel, their counted work, and the choice between them.

The spatial modes are always *merged* into the kernel that is convolved (``M[X]``, a core-shaped ``X`` multiplied by
the factors of the merged modes). The channel modes are either merged too or *streamed*, that is applied to the
activations as a stage of their own:

    ===========  ===========  ============  ======================================================
    plan         in-channels  out-channels
    ===========  ===========  ============  ======================================================
    factored     streamed     streamed      ``((Z U_in) * M[X]) U_out^T``, three stages
    merge_in     merged       streamed      ``(Z * M[X]) U_out^T``, two stages
    merge_out    streamed     merged        ``(Z U_in) * M[X]``, two stages
    dense        merged       merged        ``Z * W``, the kernel rebuilt
    ===========  ===========  ============  ======================================================

All give the same numbers. Groups: with streamed out-channels the group is a batch axis of the convolution (its kernel
is shared by the groups); with merged ones the convolution is grouped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from tdlrt_jax.arguments import check_integer, check_integers, shown
from tdlrt_jax.conv.geometry import Geometry, PaddingLike, output_size, resolve

__all__ = ["PLANS", "Work", "choose_plan", "count_work", "forward_plan", "plan_for", "streamed_modes", "work_of"]

PLANS = ("dense", "merge_in", "merge_out", "factored")


class Work(NamedTuple):
    """What one training step of a layer costs under a plan."""

    forward: int  # multiply-adds on activations
    backward: int  # the same, for the input's and all kernel gradients
    kernel: int  # multiply-adds to form the kernels that are convolved and to contract their gradient
    elements: int  # activations read and written by all stages
    gathered: int  # pixels gathered into patches by the convolutions, one for each output pixel and window position
    idle: int  # multiply-adds missing from convolutions of few in-channels to have _NARROW of them

    @property
    def total(self) -> int:
        """All multiply-adds."""
        return self.forward + self.backward + self.kernel


class _Balance(NamedTuple):
    """How a device weighs memory traffic against arithmetic: multiply-adds in the time of one element read or written."""

    per_element: float
    per_gathered: float  # and in the time of one pixel copied into a patch
    per_idle: float  # and in the time of one that a convolution of few in-channels could have done

    def overhead(self, work: Work) -> float:
        """What a training step costs beside its arithmetic, memory traffic above all, in multiply-adds."""
        return self.per_element * work.elements + self.per_gathered * work.gathered + self.per_idle * work.idle


# Fitted to timings on two CPU cores (jax 0.10, float32; 1 to 512 channels, 2x2 to 32x32 pixels), which they follow only
# roughly; the last two terms are what makes convolutions of few channels slow: one in-channel takes two thirds of the time
# of eight (benchmarks/results/cpu).
_BALANCE = {"cpu": _Balance(10.0, 200.0, 1.0)}
_NARROW = 16
# Not measured: the ratio of float32 arithmetic to memory bandwidth in the data sheets of current accelerators.
_ACCELERATOR = _Balance(40.0, 0.0, 0.0)
# The prediction is no better than this: a plan with more stages must save more.
_MARGIN = 1.1
_USUAL_BATCH = 32
_PASSES = 3  # a Work counts the overhead of a training step as that of three forward passes


def streamed_modes(plan: str) -> tuple[bool, bool]:
    """Whether a plan streams the in-channels and the out-channels."""
    check_plan(plan)
    return plan in ("factored", "merge_out"), plan in ("factored", "merge_in")


def count_work(
    plan: str,
    kernel_shape: Sequence[int],
    rank: Sequence[int | None],
    x_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    input_dilation: int | Sequence[int] = 1,
) -> Work:
    """The work of one forward and backward pass through a layer.

    An ordinary convolution costs ``forward + backward`` of the plan ``"dense"``, without its ``kernel``.

    Args:
      plan: one of :data:`PLANS`.
      kernel_shape: ``(spatial..., in / groups, out)``.
      rank: one for each mode, ``None`` where the mode is whole; of capacities for what is computed, of ranks in use
        for what would be after a resize.
      x_shape: ``(batch..., spatial..., in)``.
      strides, padding, dilation, groups, input_dilation: as in :func:`tdlrt_jax.tucker_conv`.

    Returns:
      A :class:`Work`.

    Raises:
      ValueError: for an unknown plan or arguments that do not fit the shapes.

    Example:
      >>> dense = count_work("dense", (3, 3, 256, 256), (3, 3, 32, 32), (128, 8, 8, 256))
      >>> factored = count_work("factored", (3, 3, 256, 256), (3, 3, 32, 32), (128, 8, 8, 256))
      >>> round(dense.forward / factored.forward, 1)
      23.0
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    batch, image, geometry = _layer(kernel_shape, rank, x_shape, strides, padding, dilation, groups, input_dilation)
    return work_of(plan, tuple(kernel_shape), tuple(rank), batch, image, geometry)


def choose_plan(
    kernel_shape: Sequence[int],
    rank: Sequence[int | None],
    x_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    input_dilation: int | Sequence[int] = 1,
    device: str | None = None,
) -> str:
    """The plan that :func:`tdlrt_jax.tucker_conv` takes by itself, from static shapes alone.

    The cheapest, by multiply-adds and, weighed for the device, memory traffic, among the plans with no more
    multiply-adds than the kernel rebuilt. Of plans that are nearly as cheap, the one with the fewest stages. Depthwise
    kernels are always rebuilt.

    Args:
      kernel_shape, rank, x_shape, strides, padding, dilation, groups, input_dilation: as in :func:`count_work`.
      device: ``"cpu"``, ``"gpu"``, ...; ``jax.default_backend()`` by default.

    Returns:
      One of :data:`PLANS`.

    Example:
      >>> choose_plan((3, 3, 256, 256), (3, 3, 32, 32), (128, 8, 8, 256))
      'factored'
      >>> choose_plan((3, 3, 256, 256), (3, 3, 250, 250), (128, 8, 8, 256))
      'dense'
    """
    batch, image, geometry = _layer(kernel_shape, rank, x_shape, strides, padding, dilation, groups, input_dilation)
    return plan_for(tuple(kernel_shape), tuple(rank), batch, image, geometry, device=device)


def plan_for(
    kernel_shape: tuple[int, ...],
    rank: tuple[int | None, ...],
    batch: int,
    image: tuple[int, ...],
    geometry: Geometry,
    *,
    device: str | None = None,
) -> str:
    """:func:`choose_plan` for arguments already made explicit; a symbolic batch counts as one of a usual size."""
    batch = batch if isinstance(batch, int) else _USUAL_BATCH
    if is_depthwise(kernel_shape, geometry.groups):
        return "dense"
    work = {plan: work_of(plan, kernel_shape, rank, batch, image, geometry) for plan in PLANS}
    balance = _balance(device)
    predicted = {plan: w.total + balance.overhead(w) for plan, w in work.items()}
    return _fewest_stages(predicted, {plan: w.total for plan, w in work.items()})


def forward_plan(
    kernel_shape: Sequence[int],
    rank: Sequence[int | None],
    x_shapes: Sequence[Sequence[int]],
    *,
    strides: int | Sequence[int] = 1,
    padding: PaddingLike = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    input_dilation: int | Sequence[int] = 1,
    device: str | None = None,
) -> str:
    """The plan whose forward pass is the cheapest, for a layer that is trained; :func:`choose_plan` weighs a training step.

    The kernels are taken as formed: a trained layer forms them once. Otherwise the rules are those of :func:`choose_plan`.

    Args:
      kernel_shape, rank, strides, padding, dilation, groups, input_dilation, device: as in :func:`choose_plan`.
      x_shapes: the input's shape in every call of the layer, whose work is added up; without any, the plan that stores
        the fewest numbers is taken.

    Returns:
      One of :data:`PLANS`.

    Example:
      >>> forward_plan((3, 3, 256, 256), (3, 3, 32, 32), [(1, 8, 8, 256)])
      'factored'
      >>> forward_plan((3, 3, 256, 256), (3, 3, 250, 250), [(1, 8, 8, 256)])
      'dense'
    """
    kernel_shape = check_integers("kernel_shape", kernel_shape, 1, what="sizes (spatial..., in / groups, out)")
    if is_depthwise(kernel_shape, groups):
        return "dense"
    if not x_shapes:
        return min(PLANS, key=lambda plan: (_stored(plan, kernel_shape, rank, groups), sum(streamed_modes(plan))))
    layer = (strides, padding, dilation, groups, input_dilation)
    calls = [_layer(kernel_shape, rank, shape, *layer) for shape in x_shapes]
    work = {plan: [work_of(plan, tuple(kernel_shape), tuple(rank), *call) for call in calls] for plan in PLANS}
    balance = _balance(device)
    predicted = {plan: sum(w.forward + balance.overhead(w) / _PASSES for w in work[plan]) for plan in PLANS}
    return _fewest_stages(predicted, {plan: sum(w.forward for w in work[plan]) for plan in PLANS})


def _balance(device: str | None) -> _Balance:
    return _BALANCE.get(device or jax.default_backend(), _ACCELERATOR)


def _fewest_stages(predicted: Mapping[str, float], multiply_adds: Mapping[str, int]) -> str:
    """Of the plans nearly as cheap as the cheapest, and with no more multiply-adds than the dense one, the simplest."""
    candidates = [plan for plan in PLANS if multiply_adds[plan] <= multiply_adds["dense"]]
    limit = _MARGIN * min(predicted[plan] for plan in candidates)
    nearly_as_cheap = [plan for plan in candidates if predicted[plan] <= limit]
    return min(nearly_as_cheap, key=lambda plan: (sum(streamed_modes(plan)), predicted[plan]))


def _stored(plan: str, shape: Sequence[int], rank: Sequence[int | None], groups: int) -> int:
    """Numbers in the kernels of a plan's stages, formed as ordinary (grouped) convolutions."""
    *window, n_in, n_out = shape
    stream_in, stream_out = (s and r is not None for s, r in zip(streamed_modes(plan), rank[-2:]))
    r_in, r_out = (rank[-2] or n_in) if stream_in else n_in, groups * (rank[-1] or n_out) if stream_out else n_out
    ends = (n_in * groups * r_in if stream_in else 0) + (n_out * (rank[-1] or n_out) if stream_out else 0)
    return math.prod(window) * r_in * r_out + ends


def is_depthwise(kernel_shape: tuple[int, ...], groups: int) -> bool:
    """Whether each group has one in-channel: nothing to factor, the kernel is always rebuilt."""
    return groups > 1 and kernel_shape[-2] == 1


def work_of(
    plan: str,
    kernel_shape: tuple[int, ...],
    rank: tuple[int | None, ...],
    batch: int,
    image: tuple[int, ...],
    geometry: Geometry,
) -> Work:
    """:func:`count_work` for arguments already made explicit."""
    *window, n_in, n_out = kernel_shape
    groups = geometry.groups
    stream_in, stream_out = (s and r is not None for s, r in zip(streamed_modes(plan), rank[-2:]))
    full = tuple(n if r is None else r for n, r in zip(kernel_shape, rank))
    *_, r_in, r_out = full
    channels, copies = (r_in if stream_in else n_in), (groups if stream_out else 1)  # n_in is that of one group
    produced = r_out if stream_out else n_out
    before = batch * math.prod(image)
    after = batch * math.prod(output_size(geometry, window, image))

    products = copies * after * math.prod(window) * channels * produced
    elements = groups * before * channels + copies * after * produced
    if stream_in:
        products += groups * before * n_in * r_in
        elements += groups * before * (n_in + r_in)
    if stream_out:
        products += after * n_out * r_out
        elements += after * (n_out + groups * r_out)
    gathered = 0 if math.prod(window) == 1 else copies * after * math.prod(window)
    idle = gathered * max(_NARROW - channels, 0) * produced

    merged = [r is not None for r in rank[:-2]]
    merged += [rank[-2] is not None and not stream_in, rank[-1] is not None and not stream_out]
    # The two passes share one kernel, M[C], only where nothing is streamed.
    kernel = _kernel_work(kernel_shape, full, merged, different_kernels=2 if stream_in or stream_out else 1)
    return Work(products, 2 * products, kernel, 3 * elements, 3 * gathered, 3 * idle)


def _kernel_work(shape: Sequence[int], rank: Sequence[int], merged: Sequence[bool], *, different_kernels: int) -> int:
    """Multiply-adds to form the ``M[X]`` and to contract ``dM`` to ``dC`` and the ``dK_i`` of merged modes."""
    modes = [mode for mode, is_merged in enumerate(merged) if is_merged]
    spatial = [mode for mode in modes if mode < len(shape) - 2]
    channels = [mode for mode in modes if mode not in spatial]
    gradient = [n if is_merged else r for n, r, is_merged in zip(shape, rank, merged)]
    inner = [*gradient[:-2], *rank[-2:]]
    work = different_kernels * _product_work(rank, shape, modes)
    work += _product_work(gradient, rank, channels) + _product_work(inner, rank, spatial)
    for mode in modes:
        start, others = (inner, spatial) if mode in spatial else (gradient, modes)
        work += _product_work(start, rank, [other for other in others if other != mode])
        work += shape[mode] * math.prod(rank)
    return work


def _product_work(sizes: Sequence[int], goal: Sequence[int], modes: Sequence[int]) -> int:
    """Multiply-adds of ``multi_mode_product``, which multiplies first where the result grows least."""
    sizes, work = list(sizes), 0
    for mode in sorted(modes, key=lambda i: goal[i] / sizes[i]):
        work += math.prod(sizes) * goal[mode]
        sizes[mode] = goal[mode]
    return work


def check_plan(plan: Any, *, or_none: bool = False) -> None:
    """Raises ``ValueError`` for anything but the name of a plan; ``None``, the library's choice, may be allowed."""
    if (plan is None and or_none) or (isinstance(plan, str) and plan in PLANS):
        return
    raise ValueError(f"plan must be one of {', '.join(PLANS)}{' or None' if or_none else ''}, got {plan!r}")


def check_rank(name: str, rank: Any) -> tuple[int | None, ...]:
    """One count a mode, ``None`` for whole modes."""
    entries = tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else (0,)
    try:
        return tuple(None if entry is None else check_integer(name, entry, 1) for entry in entries)
    except ValueError:
        raise ValueError(
            f"{name}={shown(rank)}: expected one count a mode, 1 or more, or None for a whole mode"
        ) from None


def _layer(
    kernel_shape: Sequence[int],
    rank: Sequence[int | None],
    x_shape: Sequence[int],
    strides: int | Sequence[int],
    padding: PaddingLike,
    dilation: int | Sequence[int],
    groups: int,
    input_dilation: int | Sequence[int],
) -> tuple[int, tuple[int, ...], Geometry]:
    """Batch, image and geometry of a layer, checked."""
    kernel_shape = check_integers("kernel_shape", kernel_shape, 1, what="sizes (spatial..., in / groups, out)")
    rank = check_rank("rank", rank)
    x_shape = check_integers("x_shape", x_shape, 0, what="sizes (batch..., spatial..., in)")
    check_integer("groups", groups, 1, "a positive integer")
    spatial = len(kernel_shape) - 2
    if spatial < 0 or len(rank) != len(kernel_shape):
        raise ValueError(
            f"kernel_shape must be (spatial..., in / groups, out) and rank as long, got {kernel_shape} and {rank}"
        )
    if len(x_shape) <= spatial or x_shape[-1] != kernel_shape[-2] * groups:
        raise ValueError(
            f"x_shape must be (batch..., {spatial} spatial dimensions, {kernel_shape[-2] * groups}) for the kernel "
            f"{tuple(kernel_shape)} with groups={groups}, got {tuple(x_shape)}"
        )
    if kernel_shape[-1] % groups:
        raise ValueError(f"groups must divide the kernel's {kernel_shape[-1]} output channels, got groups={groups}")
    lead = len(x_shape) - 1 - spatial
    image = tuple(x_shape[lead:-1])
    geometry, border = resolve(
        kernel_shape[:-2],
        image,
        strides=strides,
        padding=padding,
        dilation=dilation,
        input_dilation=input_dilation,
        groups=groups,
    )
    if border is not None:  # the border becomes part of the image
        image = tuple(n + sum(pad) for n, pad in zip(image, geometry.padding))
        geometry = geometry._replace(padding=((0, 0),) * spatial)
    if math.prod(kernel_shape[:-2]) == 1:  # a pointwise kernel sees only the pixels that it samples
        image = output_size(geometry, kernel_shape[:-2], image)
        ones = (1,) * spatial
        geometry = Geometry(ones, ((0, 0),) * spatial, ones, ones, groups)
    return math.prod(x_shape[:lead]), image, geometry
