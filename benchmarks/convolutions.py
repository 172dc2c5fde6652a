"""What XLA's operations cost where the library takes another way: inside of control flow, between few channels, over many pixels.

A 3x3 convolution's kernel gradient (``corr``) by itself and inside of a ``lax.cond``, as a convolution and as matrix products;
forward passes to 64 channels from few in-channels, and from odd and even numbers of them to 24 channels; kernel gradients from
many pixels of few channels to few pixels of many, with the memory that they need meanwhile; products that contract all
pixels, as factors have them for their gradients; and convolutions of few channels, with their gradients, also in blocks.
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
GRADIENTS = (
    (32, 3, 64),
    (32, 8, 8),
    (32, 16, 16),
    (32, 24, 24),
    (32, 32, 32),
    (32, 64, 64),
    (32, 128, 128),
    (16, 16, 16),
    (16, 32, 32),
    (16, 64, 64),
    (16, 128, 128),
    (8, 32, 32),
    (8, 64, 64),
    (8, 128, 128),
    (8, 256, 256),
    (4, 64, 64),
    (4, 512, 512),
    (2, 512, 512),
)  # (pixels a side, channels in, out)
ROWS = (
    (131072, 64, 8),
    (131072, 64, 24),
    (32768, 128, 16),
    (8192, 256, 32),
    (2048, 512, 64),
)  # (pixels, channels, rank)
STRIDED = (
    (32, 11, 3, 8),
    (32, 11, 3, 16),
    (32, 11, 3, 24),
    (32, 11, 1, 8),
    (64, 7, 3, 8),
    (64, 7, 3, 16),
    (64, 7, 3, 24),
    (32, 5, 4, 8),
    (32, 3, 3, 8),
    (32, 3, 8, 8),
)  # (pixels a side, window, channels in, out), at stride 2
FEW_CHANNELS = (
    (28, 5, 1, 4, 4),
    (32, 3, 3, 8, 4),
    (32, 3, 3, 16, 2),
    (32, 3, 4, 8, 4),
    (32, 3, 4, 16, 2),
    (32, 3, 8, 8, 2),
    (16, 3, 8, 8, 2),
    (32, 3, 8, 12, 2),
    (32, 3, 8, 16, 2),
    (32, 3, 16, 16, 2),
)  # the same at stride 1, and pixels of a row in a block
FILTERS = (
    (32, 3, 64),
    (32, 64, 64),
    (16, 32, 32),
    (8, 32, 32),
    (8, 64, 64),
    (4, 128, 128),
)  # (pixels a side, channels in, out)


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
        Cell("kernel gradients", partial(_kernel_gradients, options.rounds, batch)),
        Cell("products over all pixels", partial(_rows, options.rounds, batch)),
        Cell("by XLA itself and as it comes", partial(_options, options.rounds, batch)),
        Cell(
            "strided, in blocks", partial(_in_blocks, options.rounds, batch, [(*size, 2, (2, 2)) for size in STRIDED])
        ),
        Cell(
            "few channels, in blocks of a row",
            partial(_in_blocks, options.rounds, batch, [(*size, 1, (1, row)) for *size, row in FEW_CHANNELS]),
        ),
    ]


def _control_flow(rounds: int, batch: int, side: int, channels: int, say: Callable[[str], None]) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from tdlrt_jax.conv.geometry import resolve

    geometry, _ = resolve((3, 3), (side, side))
    kernel = jnp.zeros((3, 3, channels, channels))
    x, dy = (jax.random.normal(jax.random.key(i), (batch, side, side, channels)) for i in range(2))

    def inside(gradient: Callable[..., Any], x: Any, dy: Any, predicate: Any) -> Any:
        return jax.lax.cond(predicate, lambda: gradient(geometry, x, dy), lambda: kernel)

    programs = {}
    for name, gradient in (("convolution", _by_convolution), ("matrix products", _by_products)):
        programs[name] = partial(_run, jax.jit(partial(gradient, geometry)), x, dy)
        programs[f"{name} inside of cond"] = partial(_run, jax.jit(partial(inside, gradient)), x, dy, jnp.bool_(True))
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _xlas_convolution() -> Callable[..., Any]:
    """XLA's own, at stride 1 and with as many pixels out as in."""
    import jax

    layout = ("NHWC", "HWIO", "NHWC")
    return partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=layout)


def _forward(
    rounds: int, batch: int, side: int, in_channels: Sequence[int], n_out: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """XLA's convolution itself, of images of 32x32 pixels."""
    import jax

    convolution = _xlas_convolution()
    programs = {}
    for channels in in_channels:
        x = jax.random.normal(jax.random.key(0), (batch, 32, 32, channels))
        kernel = jax.random.normal(jax.random.key(1), (side, side, channels, n_out))
        programs[f"{channels} to {n_out} channels"] = partial(_run, jax.jit(convolution), x, kernel)
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _kernel_gradients(rounds: int, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The transpose of XLA's 3x3 convolution in its kernel, the product of all patches, and that of a few images' at a time."""
    import jax

    from benchmarks.methods import memory_of
    from tdlrt_jax import compiler_options
    from tdlrt_jax.conv.geometry import resolve

    programs, temporary = {}, {}
    ways = {"convolution": _by_convolution, "all patches": _by_all_patches, "patches in parts": _by_products}
    for side, channels, n_out in GRADIENTS:
        geometry, _ = resolve((3, 3), (side, side))
        x, dy = (
            jax.random.normal(jax.random.key(i), (batch, side, side, size)) for i, size in enumerate((channels, n_out))
        )
        for way, gradient in ways.items():
            name = f"{channels} to {n_out} channels at {side}x{side} pixels, {way}"
            compiled = jax.jit(partial(gradient, geometry), compiler_options=compiler_options()).lower(x, dy).compile()
            programs[name] = partial(_run, compiled, x, dy)
            temporary[name] = memory_of(compiled).get("temporary_bytes", 0)
    say("timing")
    seconds = {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}
    return {"batch": batch, "seconds": seconds, "temporary_bytes": temporary}


def _by_convolution(geometry: Any, x: Any, dy: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from tdlrt_jax.conv.convolution import convolve

    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]))
    return jax.linear_transpose(lambda k: convolve(x, k, geometry), kernel)(dy)[0]


def _by_all_patches(geometry: Any, x: Any, dy: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from tdlrt_jax.conv.patches import product_of_patches

    kernel = jnp.zeros((3, 3, x.shape[-1], dy.shape[-1]))
    return jax.linear_transpose(lambda k: product_of_patches(x, k, geometry), kernel)(dy)[0]


def _by_products(geometry: Any, x: Any, dy: Any) -> Any:
    from tdlrt_jax.conv.convolution import kernel_gradient

    return kernel_gradient(x, dy, (3, 3), geometry, products=True)


def _rows(rounds: int, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``A^T B`` with a long sum, as XLA takes it, with few columns, and as the library has it, with few rows."""
    import jax
    import jax.numpy as jnp

    from tdlrt_jax import compiler_options
    from tdlrt_jax.conv.rows import contract_rows

    def few_columns(a: Any, b: Any) -> Any:
        return jnp.matmul(b.T, a).T  # which XLA takes for A^T B

    programs, compiled = {}, partial(jax.jit, compiler_options=compiler_options())
    for rows, channels, rank in ROWS:
        rows = rows * batch // 128
        a, b = (jax.random.normal(jax.random.key(i), (rows, size)) for i, size in enumerate((channels, rank)))
        name = f"{rows} pixels, {channels} by {rank}"
        programs[f"{name}, few columns"] = partial(_run, compiled(few_columns), a, b)
        programs[f"{name}, few rows"] = partial(_run, compiled(contract_rows), a, b)
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _options(rounds: int, batch: int, say: Callable[[str], None]) -> dict[str, Any]:
    """XLA's convolution as it comes, which may be a library's, and with the options for programs that run often."""
    import jax

    from tdlrt_jax import compiler_options

    convolution = _xlas_convolution()
    programs = {}
    for side, channels, n_out in FILTERS:
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, n_out))
        for name, how in (("as it comes", {}), ("with the options", compiler_options(runs_often=True))):
            case = f"3x3, {channels} to {n_out} channels at {side}x{side} pixels, {name}"
            programs[case] = partial(_run, jax.jit(convolution, compiler_options=how), x, kernel)
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _in_blocks(rounds: int, batch: int, sizes: Sequence[tuple[Any, ...]], say: Callable[[str], None]) -> dict[str, Any]:
    """A convolution by XLA, forward and both its transposes, and the same in blocks of pixels."""
    import jax

    from tdlrt_jax import compiler_options
    from tdlrt_jax.conv.blocks import in_blocks
    from tdlrt_jax.conv.geometry import resolve

    def convolution(geometry: Any, x: Any, kernel: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, geometry.strides, geometry.padding, dimension_numbers=layout)

    def by_blocks(geometry: Any, blocks: tuple[int, int], x: Any, kernel: Any) -> Any:
        x, larger, geometry = in_blocks(x, kernel, geometry, blocks)
        y = convolution(geometry, x, larger)
        return y.reshape(*y.shape[:-2], -1, kernel.shape[-1])

    def in_the_image(way: Callable[..., Any], x: Any, kernel: Any, dy: Any) -> Any:
        return jax.linear_transpose(lambda x: way(x, kernel), x)(dy)[0]

    def in_the_kernel(way: Callable[..., Any], x: Any, kernel: Any, dy: Any) -> Any:
        return jax.linear_transpose(lambda kernel: way(x, kernel), kernel)(dy)[0]

    programs, compiled = {}, partial(jax.jit, compiler_options=compiler_options())
    for side, window, channels, n_out, stride, blocks in sizes:
        geometry, _ = resolve((window, window), (side, side), strides=stride)
        x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
        kernel = jax.random.normal(jax.random.key(1), (window, window, channels, n_out))
        ways = {"as it is": partial(convolution, geometry), "in blocks": partial(by_blocks, geometry, blocks)}
        for name, way in ways.items():
            case = f"{window}x{window}, {channels} to {n_out} channels, {side}x{side} pixels, {name}"
            dy = way(x, kernel)
            programs[case] = partial(_run, compiled(way), x, kernel)
            programs[f"{case}, gradient in the image"] = partial(
                _run, compiled(partial(in_the_image, way)), x, kernel, dy
            )
            programs[f"{case}, gradient in the kernel"] = partial(
                _run, compiled(partial(in_the_kernel, way)), x, kernel, dy
            )
    say("timing")
    return {"batch": batch, "seconds": {name: spread(s) for name, s in in_turn(programs, rounds=rounds).items()}}


def _run(program: Callable[..., Any], *arguments: Any) -> None:
    import jax

    jax.block_until_ready(program(*arguments))
