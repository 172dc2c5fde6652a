"""How the cost of one layer grows: with its width at fixed rank, with its rank at fixed width, with the batch.

A 3x3 convolution of ``n`` to ``n`` channels on images of 4x4 pixels and a squared loss: a dense step, a factorized one, and
those of ``bug`` and ``parallel``. The slopes are those of a straight line through the logarithms of the larger half of the
sizes, of the measured seconds and of the multiply-adds that are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks.cells import Cell, Options
from benchmarks.timing import in_turn, spread

__all__ = ["cells", "counted", "slope"]

METHODS = ("dense", "factorized", "bug", "parallel")
PIXELS = 4
WINDOW = (3, 3)


class Layer(NamedTuple):
    """One convolution."""

    channels: int
    rank: int
    batch: int

    @property
    def key(self) -> str:
        """A name for it."""
        return f"{self.channels} channels, rank {self.rank}, batch {self.batch}"


def cells(options: Options) -> list[Cell]:
    """One cell a direction of growth."""
    batch = options.growth_batches[0]
    directions = {
        "width": [Layer(n, options.growth_rank, batch) for n in options.growth_widths],
        "rank": [Layer(options.growth_width, r, batch) for r in options.growth_ranks],
        "batch": [Layer(options.growth_width, options.growth_rank, b) for b in options.growth_batches],
    }
    return [Cell(name, partial(_measure, options, name, layers)) for name, layers in directions.items()]


def _measure(options: Options, name: str, layers: list[Layer], say: Callable[[str], None]) -> dict[str, Any]:
    points = []
    for layer in layers:
        programs = {}
        for method in METHODS:
            say(f"compiling {method} at {layer.key}")
            programs[method] = _step(layer, method)
        say(f"timing {layer.key}")
        seconds = in_turn(programs, rounds=options.rounds)
        points.append(
            {
                **layer._asdict(),
                "seconds": {method: spread(values) for method, values in seconds.items()},
                "multiply_adds": {method: counted(layer, method) for method in METHODS},
            }
        )
    sizes = [point["channels" if name == "width" else name] for point in points]
    return {
        "points": points,
        "slopes": {
            method: {
                "measured": slope(sizes, [point["seconds"][method]["median"] for point in points]),
                "counted": slope(sizes, [point["multiply_adds"][method] for point in points]),
            }
            for method in METHODS
        },
    }


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The exponent of a power law through the larger half of the sizes, ``None`` for fewer than two sizes.

    Example:
      >>> round(slope([1, 2, 4, 8], [5, 4, 16, 64]), 6)
      2.0
    """
    keep = len(sizes) // 2 if len(sizes) > 3 else 0
    xs, ys = [math.log(s) for s in sizes[keep:]], [math.log(v) for v in values[keep:]]
    if len(xs) < 2:
        return None
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def counted(layer: Layer, method: str) -> int:
    """Multiply-adds of a step: the network's products, and the leading terms of the integrator's linear algebra.

    Of the latter, for each channel mode with ``n`` rows and rank ``r``: the QR of an unfolding ``9 r`` by ``r`` (twice: at the
    start and where the moments arrive), new directions ``n`` by ``r``, the Gram matrix and rotation of the augmented core
    (``2r`` by ``2r * 16``), and the products that form bases (``n`` by ``2r`` by ``r``).
    """
    from tdlrt_jax.conv import choose_plan, count_work

    n, r, pixels = layer.channels, layer.rank, layer.batch * PIXELS**2
    shape, rank, x = (*WINDOW, n, n), (*WINDOW, r, r), (layer.batch, PIXELS, PIXELS, n)
    window = math.prod(WINDOW)
    if method == "dense":
        return 3 * pixels * window * n * n
    work = count_work(choose_plan(shape, rank, x), shape, rank, x).total
    if method == "factorized":
        return work
    if method == "bug":  # the augmented core's gradient: input and output gradient reduced to 2r, and their correlation
        work += pixels * (2 * n * 2 * r + window * (2 * r) ** 2)
    qr, directions = 2 * 2 * window * r**3, 10 * n * r**2
    truncation = 2 * 16 * (2 * r) ** 3 + 9 * (2 * r) ** 3
    return work + 2 * (qr + directions + truncation + n * 2 * r * r)


def _step(layer: Layer, method: str) -> Callable[[], None]:
    import jax
    import jax.numpy as jnp
    import optax

    import tdlrt_jax
    from benchmarks.methods import TOLERANCE
    from tdlrt_jax.conv import conv_general_dilated
    from tdlrt_jax.initialization import initial_kernel

    n = layer.channels
    shape = (*WINDOW, n, n)
    keys = jax.random.split(jax.random.key(0), 3)
    x, target = (jax.random.normal(key, (layer.batch, PIXELS, PIXELS, n)) for key in keys[:2])
    inner = optax.sgd(1e-3, momentum=0.9)

    def loss_fn(params: Any, x: Any, target: Any) -> Any:
        if method == "dense":
            layout = ("NHWC", "HWIO", "NHWC")
            y = conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        else:
            y = tdlrt_jax.tucker_conv(x, params["kernel"])
        return jnp.mean((y - target) ** 2)

    if method == "dense":
        params = {"kernel": jax.random.normal(keys[2], shape) / n}
    else:
        make = partial(
            initial_kernel,
            shape=shape,
            rank=(*WINDOW, layer.rank, layer.rank),
            initialization="dense",
            kernel_init=jax.nn.initializers.lecun_normal(),
            dtype=jnp.float32,
        )
        params = {"kernel": jax.jit(make)(keys[2])}
    if method in ("dense", "factorized"):
        tx: Any = inner

        def plain(params: Any, state: Any, *batch: Any) -> Any:
            grads = jax.grad(loss_fn)(params, *batch)
            updates, state = inner.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step: Any = jax.jit(plain, donate_argnums=(0, 1))
    else:
        tx = tdlrt_jax.tdlrt(inner, tolerance=TOLERANCE, integrator=method)
        full_step = tdlrt_jax.tdlrt_step(loss_fn, tx)

        step = lambda params, state, *batch: full_step(params, state, *batch)[:2]  # noqa: E731

    held = [jax.tree.map(jnp.copy, (params, jax.jit(tx.init)(params)))]

    def run() -> None:
        held[0] = jax.block_until_ready(step(*held[0], x, target))

    run()  # compiles
    return run
