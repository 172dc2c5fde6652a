"""What XLA's convolutions cost where the library takes another way: inside of control flow, and between few channels.

A 3x3 convolution's kernel gradient (``corr``) by itself and inside of a ``lax.cond``, as a convolution and as matrix products;
and forward passes to 64 channels from few in-channels, and from odd and even numbers of them to 24 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.timing import in_turn, spread

__all__ = ["cells"]

SIZES = ((32, 18), (16, 36), (8, 72), (4, 144))  # (pixels a side, channels in and out)
NARROW = (1, 3, 8, 16, 32)
ODD_AND_EVEN = (3, 4, 7, 8, 15, 16)


def cells(options: Options) -> list[Cell]:
    """Kernel gradients inside and outside of a ``cond`` for every size, and convolutions of few in-channels."""
    batch = options.batches[0]
    found = [
        Cell(
            f"{channels} channels at {side}x{side} pixels",
            partial(_control_flow, options.rounds, batch, side, channels),
        )
        for side, channels in SIZES
    ]
    return [
        *found,
        Cell("few in-channels", partial(_forward, options.rounds, batch, 3, NARROW, 64)),
        Cell("odd and even in-channels, 3x3", partial(_forward, options.rounds, batch, 3, ODD_AND_EVEN, 24)),
        Cell("odd and even in-channels, 5x5", partial(_forward, options.rounds, batch, 5, ODD_AND_EVEN, 24)),
    ]


def _control_flow(rounds: int, batch: int, side: int, channels: int, say: Callable[[str], None]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from tdlrt_jax.conv.convolution import convolve
    from tdlrt_jax.conv.geometry import resolve

    window = (3, 3)
    geometry, _ = resolve(window, (side, side))
    kernel = jnp.zeros((*window, channels, channels))
    x, dy = (jax.random.normal(jax.random.key(i), (batch, side, side, channels)) for i in range(2))

    def gradient(products: bool, x: Any, dy: Any) -> Any:
        return jax.linear_transpose(lambda k: convolve(x, k, geometry, products=products), kernel)(dy)[0]

    def inside(products: bool, x: Any, dy: Any, predicate: Any) -> Any:
        return jax.lax.cond(predicate, lambda: gradient(products, x, dy), lambda: kernel)

    programs = {}
    for name, products in (("convolution", False), ("matrix products", True)):
        programs[name] = partial(_run, jax.jit(partial(gradient, products)), x, dy)
        programs[f"{name} inside of cond"] = partial(_run, jax.jit(partial(inside, products)), x, dy, jnp.bool_(True))
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _forward(
    rounds: int, batch: int, side: int, in_channels: Sequence[int], n_out: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """XLA's convolution itself, of images of 32x32 pixels."""
    import jax

    convolution = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    programs = {}
    for channels in in_channels:
        x = jax.random.normal(jax.random.key(0), (batch, 32, 32, channels))
        kernel = jax.random.normal(jax.random.key(1), (side, side, channels, n_out))
        programs[f"{channels} to {n_out} channels"] = partial(_run, jax.jit(convolution), x, kernel)
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _run(program: Callable[..., Any], *arguments: Any) -> None:
    import jax

    jax.block_until_ready(program(*arguments))
