"""What XLA's convolutions cost where the library takes another way: inside of control flow, and between few channels.

A 3x3 convolution's kernel gradient (``corr``) by itself and inside of a ``lax.cond``, as a convolution and as matrix products;
and forward passes to 64 channels from few in-channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.cells import Cell, Options
from benchmarks.timing import in_turn, spread

__all__ = ["cells"]

SIZES = ((32, 18), (16, 36), (8, 72), (4, 144))  # (pixels a side, channels in and out)
NARROW = (1, 3, 8, 16, 32)


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
    return [*found, Cell("few in-channels", partial(_narrow, options.rounds, batch))]


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


def _narrow(rounds: int, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    import jax

    from tdlrt_jax.conv.convolution import convolve
    from tdlrt_jax.conv.geometry import resolve

    geometry, _ = resolve((3, 3), (32, 32))
    programs = {}
    for channels in NARROW:
        x = jax.random.normal(jax.random.key(0), (batch, 32, 32, channels))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, 64))
        programs[f"{channels} to 64 channels"] = partial(_run, jax.jit(partial(convolve, geometry=geometry)), x, kernel)
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _run(program: Callable[..., Any], *arguments: Any) -> None:
    import jax

    jax.block_until_ready(program(*arguments))
