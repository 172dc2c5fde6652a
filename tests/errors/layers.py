"""Wrong calls of what is built on the core: convolutions, layers, baselines, flows, files."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as flax_linen
from flax import nnx

import tdlrt_jax
from tdlrt_jax import baselines, checkpoint, conv, dynamics, export, models, nn
from tdlrt_jax.conv import geometry, transposed
from tdlrt_jax.nn import linen
from tests.errors.core import DENSE, KERNEL, KEY, MATRIX, NAN, TREE, loss

X = jnp.ones((2, 5, 5, 4))
RNGS = functools.partial(nnx.Rngs, 0)
LAYER = nn.TuckerConv(4, 6, (3, 3), rngs=nnx.Rngs(0))
NORM = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
PLAIN_LINEN = flax_linen.Dense(3)
PLAIN = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))
CP = baselines.cp_normal(KEY, (3, 3, 4, 6), 2, norm=1.0)
MASKS = {"w": jnp.ones((3, 3), bool)}
WEIGHTS = {"w": jnp.ones((3, 3))}


def each(call, argument, values):
    """One wrong call for each value."""
    return [(functools.partial(call, value), argument) for value in values]


WINDOWS = {
    "strides": (0, -1, 1.5, "x", (1, 1, 1), (1, 0), True),
    "dilation": (0, -1, 1.5, "x", (1, 1, 1), (1, 0)),
    "padding": ("FULL", 1.5, (1, 2, 3), None, ("SAME", "SAME"), ((1, 2, 3), 1)),
}


def windows(call, names=tuple(WINDOWS)):
    return [entry for name in names for entry in each(lambda v, n=name: call(**{n: v}), name, WINDOWS[name])]


CONV = {
    "tucker_conv": [
        *windows(lambda **options: tdlrt_jax.tucker_conv(X, KERNEL, **options)),
        *each(
            lambda v: tdlrt_jax.tucker_conv(X, KERNEL, input_dilation=v, padding=1),
            "input_dilation",
            (0, 1.5, "x", (1,)),
        ),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL, groups=v), "groups", (0, -1, 1.5, "x", None)),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL, plan=v), "plan", ("fast", 3, [])),
        *each(lambda v: tdlrt_jax.tucker_conv(v, KERNEL), "x", (None, "x", jnp.ones((2, 5, 5, 3)), jnp.ones(4))),
        *each(lambda v: tdlrt_jax.tucker_conv(X, v), "kernel", (None, "x", 3, jnp.ones(3), [1, 2])),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL._replace(core=v)), "kernel", (None, jnp.ones((2, 2)))),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL._replace(factors=v)), "kernel", ((), KERNEL.factors[:3], None)),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL, precision=v), "precision", ("most", 3)),
        *each(lambda v: tdlrt_jax.tucker_conv(X, KERNEL, preferred_element_type=v), "preferred_element_type", ("x", 3)),
    ],
    "conv.tucker_conv_batch_norm": [
        *windows(lambda **options: conv.tucker_conv_batch_norm(X, KERNEL, **options)),
        *each(lambda v: conv.tucker_conv_batch_norm(v, KERNEL), "x", (None, "x", jnp.ones((2, 5, 5, 3)), jnp.ones(4))),
        *each(lambda v: conv.tucker_conv_batch_norm(X, v), "kernel", (None, "x", 3, jnp.ones(3), [1, 2])),
        *each(
            lambda v: conv.tucker_conv_batch_norm(X, KERNEL, v), "scale", ("x", 3, 1.0, jnp.ones(5), jnp.ones((6, 1)))
        ),
        *each(lambda v: conv.tucker_conv_batch_norm(X, KERNEL, bias=v), "bias", ("x", 0.0, jnp.ones(5))),
        *each(lambda v: conv.tucker_conv_batch_norm(X, KERNEL, epsilon=v), "epsilon", (-1e-5, NAN, None, "x", True)),
        *each(lambda v: conv.tucker_conv_batch_norm(X, KERNEL, groups=v), "groups", (0, -1, 1.5, "x", None)),
        *each(lambda v: conv.tucker_conv_batch_norm(X, KERNEL, plan=v), "plan", ("fast", 3, [])),
        *each(lambda v: conv.tucker_conv_batch_norm(X, KERNEL, precision=v), "precision", ("most", 3)),
        *each(
            lambda v: conv.tucker_conv_batch_norm(X, KERNEL, preferred_element_type=v),
            "preferred_element_type",
            ("x", 3, "int32"),
        ),
    ],
    "tucker_linear": [
        *each(lambda v: tdlrt_jax.tucker_linear(v, MATRIX), "x", (None, "x", jnp.ones((2, 3)), 1.0)),
        *each(lambda v: tdlrt_jax.tucker_linear(jnp.ones((2, 4)), v), "kernel", (None, KERNEL, jnp.ones(3))),
        *each(lambda v: tdlrt_jax.tucker_linear(jnp.ones((2, 4)), MATRIX, plan=v), "plan", ("fast", 3)),
        *each(lambda v: tdlrt_jax.tucker_linear(jnp.ones((2, 4)), MATRIX, precision=v), "precision", ("most",)),
    ],
    "conv.tucker_conv_transpose": [
        *windows(lambda **options: conv.tucker_conv_transpose(X, KERNEL, **options)),
        *each(lambda v: conv.tucker_conv_transpose(v, KERNEL), "x", (None, "x", jnp.ones((2, 5, 5, 3)), jnp.ones(4))),
        *each(lambda v: conv.tucker_conv_transpose(X, v), "kernel", (None, "x", jnp.ones(3))),
        *each(lambda v: conv.tucker_conv_transpose(X, KERNEL, plan=v), "plan", ("fast",)),
    ],
    "conv.transposed.transpose_kernel": each(transposed.transpose_kernel, "kernel", (None, "x", jnp.ones(3))),
    "conv.conv_general_dilated": [
        (lambda: conv.conv_general_dilated(X, DENSE, (1, 1, 1), "SAME", dimension_numbers=NUMBERS), "strides"),
        (lambda: conv.conv_general_dilated(X, DENSE, (1, 1), "FULL", dimension_numbers=NUMBERS), "padding"),
    ],
    "conv.geometry.resolve": windows(lambda **options: geometry.resolve((3, 3), (5, 5), **options)),
    "conv.geometry.resolve_input": windows(lambda **options: geometry.resolve_input(X, (3, 3), **options)),
    **{
        f"conv.{function.__name__}": [
            *windows(lambda f=function, **options: plans(f, **options)),
            *each(
                lambda v, f=function: plans(f, shape=v), "kernel_shape", ((3,), 3, None, (3, 3, 4, "x"), (3, 3, 0, 6))
            ),
            *each(lambda v, f=function: plans(f, rank=v), "rank", ((1, 1), 3, (1, 1, 1, 0.5), (0, 1, 1, 1), "abcd")),
            *each(lambda v, f=function: plans(f, x=v), name, ((2, 5, 5, 3), (4,), (2, 5, 5, "x"), 3)),
            *each(lambda v, f=function: plans(f, groups=v), "groups", (0, 1.5, 3)),
        ]
        for function, name in (
            (conv.choose_plan, "x_shape"),
            (conv.count_work, "x_shape"),
            (conv.forward_plan, "x_shape"),
        )
    },
    "conv.plans.streamed_modes": each(conv.plans.streamed_modes, "plan", ("fast", None)),
}
NUMBERS = ("NHWC", "HWIO", "NHWC")


def plans(function, *, shape=(3, 3, 4, 6), rank=(2, 2, 3, 3), x=(2, 5, 5, 4), **options):
    if function is conv.count_work:
        return function("dense", shape, rank, x, **options)
    return function(shape, rank, [x] if function is conv.forward_plan else x, **options)


def layer(cls, **options):
    given = {"in_features": 4, "out_features": 6, "rngs": RNGS()}
    if cls is not nn.TuckerLinear:
        given["kernel_size"] = (3, 3)
    if cls is nn.CPConv:
        given["rank"] = 2
    return cls(**{**given, **options})


def of_layer(cls, others=()):
    """What all layers refuse."""
    names = {
        "in_features": (0, -1, 1.5, "x", None),
        "out_features": (0, -1, 1.5, "x", None),
        "rank": (0, -1, 1.5, "x", (1,), NAN),
        "dtype": ("x", 3),
        "param_dtype": ("x", 3, None, int),
        "rngs": (None, 3),
        "kernel_init": (None, 3),
        "bias_init": (3,),
        **dict(others),
    }
    return [e for name, values in names.items() for e in each(lambda v, n=name: layer(cls, **{n: v}), name, values)]


TUCKER = {"initialization": ("x", None), "plan": ("fast", 3)}
WINDOW = {"kernel_size": (0, (3, -1), 1.5, "x", None), **{n: v for n, v in WINDOWS.items() if n != "dilation"}}
WINDOW["kernel_dilation"] = WINDOWS["dilation"]
MASK = {"mask": (jnp.ones((2, 2)), "x")}
GROUPS = {"feature_group_count": (0, -1, 3, 1.5, "x")}


def model_loss(model, x=X):
    return jnp.mean(model(x) ** 2)


NN = {
    "nn.TuckerConv": [
        *of_layer(nn.TuckerConv, {**TUCKER, **WINDOW, **MASK, **GROUPS, "input_dilation": (0, 1.5, "x")}),
        *each(LAYER, "inputs", (jnp.ones((2, 5, 5, 3)), jnp.ones(4), None, "x")),
    ],
    "nn.TuckerConvTranspose": [
        *of_layer(nn.TuckerConvTranspose, {**TUCKER, **WINDOW, **MASK}),
        *each(layer(nn.TuckerConvTranspose), "inputs", (jnp.ones((2, 5, 5, 3)), None)),
    ],
    "nn.TuckerLinear": [
        *of_layer(nn.TuckerLinear, TUCKER),
        *each(layer(nn.TuckerLinear), "inputs", (jnp.ones((2, 3)), None, "x")),
    ],
    "nn.conv_batch_norm": [
        *each(lambda v: nn.conv_batch_norm(v, NORM, X), "conv", (3, None)),
        *each(lambda v: nn.conv_batch_norm(LAYER, v, X), "norm", (3, None)),
        *each(lambda v: nn.conv_batch_norm(LAYER, NORM, v), "inputs", (jnp.ones((2, 5, 5, 3)), jnp.ones(4), None, "x")),
    ],
    "nn.CPConv": of_layer(nn.CPConv, {**WINDOW, "rank": (0, -1, 1.5, "x", NAN, None)}),
    "nn.MatrixConv": of_layer(nn.MatrixConv, {**WINDOW, "core": (None, 1, "x")}),
    "nn.tdlrt": [
        (lambda: nn.tdlrt(3, tolerance=0.1), "inner"),
        (lambda: nn.tdlrt(optax.sgd(0.1), tolerance=2.0), "tolerance"),
    ],
    "nn.purify": each(nn.purify, "tx", (3, None, optax.sgd)),
    "nn.resize": [
        *each(lambda v: nn.resize(v, None, 2), "model", (3, None, KERNEL)),
        *each(lambda v: nn.resize(LAYER, v, 2), "optimizer", (3, "x", optax.sgd(0.1))),
        *each(lambda v: nn.resize(LAYER, None, v), "capacity", (0, -1, 1.5, "x", None, {"x": 2})),
    ],
    "nn.tdlrt_step": [
        *each(nn.tdlrt_step, "loss_fn", (3, None)),
        (lambda: nn.tdlrt_step(model_loss, cores_only=True, ranks_stay=True), "ranks_stay"),
        (lambda: nn.tdlrt_step(model_loss, second_pass=True, cores_only=True), "second_pass"),
        *each(lambda v: nn.tdlrt_step(model_loss, accumulate=v), "accumulate", (0, -1, 1.5, "x", None)),
        *each(lambda v: nn.tdlrt_step(model_loss, compiler_options=v), "compiler_options", (0, "x")),
        (lambda: nn.tdlrt_step(model_loss)(3, None), "model"),
        (lambda: nn.tdlrt_step(model_loss)(LAYER, None), "optimizer"),
    ],
    "nn.value_and_grad": [
        *each(nn.value_and_grad, "loss_fn", (3, None)),
        *each(nn.value_and_grad(model_loss), "model", (3, None)),
    ],
    "nn.value_and_two_grads": [
        *each(nn.value_and_two_grads, "loss_fn", (3, None)),
        *each(nn.value_and_two_grads(model_loss), "model", (3, None)),
    ],
    "nn.value_and_grad_fn": [
        *each(nn.value_and_grad_fn, "loss_fn", (3, None)),
        *each(nn.value_and_grad_fn(model_loss), "model", (3, None)),
    ],
    "tuckerize": [
        *each(lambda v: tdlrt_jax.tuckerize(PLAIN, v), "rules", (3, "x", None, {"(": 2}, {"x": 2}, {"": {"rnak": 1}})),
        *each(lambda v: tdlrt_jax.tuckerize(v, {".*": 2}), "model", (3, None, jnp.ones(3))),
        *each(lambda v: tdlrt_jax.tuckerize(PLAIN, {"": {"rank": v}}), "rank", (9.0, (1, 1), 0)),
    ],
    "densify": each(tdlrt_jax.densify, "model", (3, None, jnp.ones(3))),
    "to_plain": [
        *each(tdlrt_jax.to_plain, "model", (3, None, jnp.ones(3))),
        *each(lambda v: tdlrt_jax.to_plain(LAYER, plan=v), "plan", ("fast", 3)),
        (lambda: tdlrt_jax.to_plain(LAYER, "x"), "example"),
    ],
    "summarize": [
        *each(tdlrt_jax.summarize, "model", (3, None, jnp.ones(3))),
        (lambda: tdlrt_jax.summarize(LAYER, "x"), "example"),
    ],
    "nn.plain.check_inference": each(nn.plain.check_inference, "model", (nnx.BatchNorm(3, rngs=nnx.Rngs(0)),)),
    "nn.plain.check_parameters": each(nn.plain.check_parameters, "model", (nnx.Param(3), None)),
    "nn.linen.tuckerize_params": [
        *each(lambda v: linen.tuckerize_params(v, {".*": 2}), "params", (3, None, [1])),
        *each(lambda v: linen.tuckerize_params({"a": {"kernel": DENSE}}, v), "rules", (3, None, {"(": 2}, {"v": 2})),
    ],
    "nn.linen.densify_params": each(linen.densify_params, "params", (3, None)),
    "nn.linen.apply": [
        (lambda: linen.apply(3, {"params": {}}), "module"),
        (lambda: linen.apply(PLAIN_LINEN, 3), "variables"),
    ],
}

BASELINES = {
    "baselines.cp_rank": [
        *each(lambda v: baselines.cp_rank((3, 4), v), "rank", (0, -1, 1.5, "x", None, True)),
        *each(lambda v: baselines.cp_rank(v, 2), "shape", (3, (3, "x"), ())),
    ],
    "baselines.cp_to_dense": each(baselines.cp_to_dense, "kernel", (None, KERNEL, DENSE)),
    "baselines.cp_conv": [
        *windows(lambda **options: baselines.cp_conv(X, CP, **options)),
        *each(lambda v: baselines.cp_conv(v, CP), "x", (None, jnp.ones((2, 5, 5, 3)))),
        *each(lambda v: baselines.cp_conv(X, v), "kernel", (None, KERNEL)),
    ],
    "baselines.cp_normal": [
        *each(lambda v: baselines.cp_normal(KEY, (3, 4), v, norm=1.0), "rank", (0, 1.5, "x", None)),
        *each(lambda v: baselines.cp_normal(v, (3, 4), 2, norm=1.0), "key", (0, None)),
        *each(lambda v: baselines.cp_normal(KEY, v, 2, norm=1.0), "shape", (3, (3, 0))),
        *each(lambda v: baselines.cp_normal(KEY, (3, 4), 2, norm=v), "norm", ("x", None)),
        *each(lambda v: baselines.cp_normal(KEY, (3, 4), 2, norm=1.0, dtype=v), "dtype", ("x", int)),
    ],
    "baselines.cp_spectral": [
        *each(lambda v: baselines.cp_spectral(KEY, (3, 4), v, norm=1.0), "rank", (0, 1.5, "x", None)),
        *each(lambda v: baselines.cp_spectral(KEY, (3, 4), 2, decay=v, norm=1.0), "decay", (0, 2, NAN, "x")),
        *each(lambda v: baselines.cp_spectral(v, (3, 4), 2, norm=1.0), "key", (0, None)),
    ],
    "baselines.cp_als": [
        *each(lambda v: baselines.cp_als(DENSE, v), "rank", (0, 1.5, "x", None)),
        *each(lambda v: baselines.cp_als(v, 2), "dense", (None, "x", jnp.ones(3))),
        *each(lambda v: baselines.cp_als(DENSE, 2, iterations=v), "iterations", (0, 1.5)),
    ],
    "baselines.matrix_conv": [
        *windows(lambda **options: baselines.matrix_conv(X, FLAT, (3, 3), **options)),
        *each(lambda v: baselines.matrix_conv(v, FLAT, (3, 3)), "x", (None, jnp.ones((2, 5, 5, 3)))),
        *each(lambda v: baselines.matrix_conv(X, v, (3, 3)), "kernel", (None, KERNEL, DENSE)),
        *each(lambda v: baselines.matrix_conv(X, FLAT, v), "window", (3, (3, 4), (3, "x"), None)),
    ],
    "baselines.balance": each(baselines.balance, "kernel", (None, DENSE)),
    "baselines.two_factors": each(baselines.two_factors, "kernel", (None, DENSE, KERNEL)),
    "baselines.masks_from_scores": [
        *each(lambda v: baselines.masks_from_scores(WEIGHTS, v), "density", (0, 1.5, NAN, "x", None)),
        (lambda: baselines.masks_from_scores({}, 0.5), "scores"),
        (lambda: baselines.masks_from_scores(WEIGHTS, 0.5, within={"w": jnp.zeros((3, 3), bool)}), "density"),
        (lambda: baselines.masks_from_scores(WEIGHTS, 0.5, within={"w": jnp.ones(4, bool)}), "within"),
    ],
    "baselines.density_of": each(baselines.density_of, "masks", ({}, None)),
    "baselines.apply_masks": [(lambda: baselines.apply_masks(WEIGHTS, {"v": MASKS["w"]}), "masks")],
    "baselines.magnitude_scores": [
        (lambda: baselines.magnitude_scores({"b": jnp.ones(3)}), "prunable"),
        (lambda: baselines.magnitude_scores(WEIGHTS, prunable=3), "prunable"),
    ],
    **{
        f"baselines.{function.__name__}": [
            *each(lambda v, f=function: f(v, WEIGHTS), "loss_fn", (3, None)),
            (lambda f=function: f(loss, {"b": jnp.ones(3)}), "prunable"),
        ]
        for function in (baselines.snip_scores, baselines.grasp_scores)
    },
    "baselines.iterative_magnitude_pruning": [
        *each(lambda v: rounds(rounds=v), "rounds", (0, 1.5, "x", None)),
        *each(lambda v: rounds(density=v), "density", (0, 2, NAN, "x")),
        *each(lambda v: rounds(train=v), "train", (3, None)),
    ],
    "baselines.prune_and_rewind": each(
        lambda v: baselines.prune_and_rewind(WEIGHTS, WEIGHTS, MASKS, v), "density", (0, 2, NAN, "x")
    ),
    "baselines.pruned": each(lambda v: baselines.pruned(v, MASKS), "inner", (3, None)),
}
FLAT = tdlrt_jax.hosvd(jax.random.normal(KEY, (36, 6)), rank=2)


def rounds(train=lambda current: current.params, **options):
    return list(baselines.iterative_magnitude_pruning(train, WEIGHTS, **{"density": 0.5, "rounds": 1, **options}))


FLOWS = (dynamics.full_flow, dynamics.factor_flow, dynamics.kc_flow)
HEAVY = (dynamics.full_heavy_ball_flow, dynamics.factor_heavy_ball_flow)
DYNAMICS = {
    **{f"dynamics.{flow.__name__}": each(flow, "loss_fn", (3, None)) for flow in FLOWS},
    "dynamics.projected_flow": each(lambda v: dynamics.projected_flow(v, TREE), "loss_fn", (3, None)),
    **{
        f"dynamics.{flow.__name__}": [
            *each(lambda v, f=flow: f(v, friction=1.0), "loss_fn", (3, None)),
            *each(lambda v, f=flow: f(loss, friction=v), "friction", (-1, NAN, "x", None)),
        ]
        for flow in HEAVY
    },
    "dynamics.integrate": [
        *each(lambda v: dynamics.integrate(dynamics.full_flow(loss), TREE, v), "times", (-1, (1, 0.5), "x", (), NAN)),
        *each(lambda v: dynamics.integrate(dynamics.full_flow(loss), TREE, 1.0, solver=v), "solver", ("x", None, [])),
        *each(lambda v: dynamics.integrate(v, TREE, 1.0), "flow", (None, loss)),
        *each(lambda v: dynamics.integrate(dynamics.full_flow(loss), TREE, 1.0, rtol=v), "rtol", (-1, NAN, "x")),
        *each(lambda v: dynamics.integrate(dynamics.full_flow(loss), TREE, 1.0, atol=v), "atol", (-1, NAN, "x")),
        *each(lambda v: dynamics.integrate(dynamics.full_flow(loss), TREE, 1.0, max_steps=v), "max_steps", (0, 1.5)),
    ],
    "dynamics.flow_step": [
        *each(dynamics.flow_step, "loss_fn", (3, None)),
        *each(lambda v: dynamics.flow_step(loss, integrator=v), "integrator", ("x", None)),
        *each(lambda v: dynamics.flow_step(loss, inner=v), "inner", ("x", None)),
        *each(lambda v: dynamics.flow_step(loss, policy=v), "policy", (3,)),
        (lambda: dynamics.flow_step(loss, policy=tdlrt_jax.RankPolicy("x")), "criterion"),
    ],
    "dynamics.project": [
        (lambda: dynamics.project(DENSE, DENSE), "kernel"),
        (lambda: dynamics.project(KERNEL, jnp.ones((2, 2))), "dense"),
    ],
    "dynamics.tangent_coordinates": [
        (lambda: dynamics.tangent_coordinates(DENSE, DENSE), "kernel"),
        (lambda: dynamics.tangent_coordinates(KERNEL, jnp.ones((2, 2))), "dense"),
    ],
    "dynamics.tangent_to_dense": [
        (lambda: dynamics.tangent_to_dense(DENSE, KERNEL), "kernel"),
        (lambda: dynamics.tangent_to_dense(KERNEL, DENSE), "tangent"),
    ],
    "dynamics.chart_coordinates": [
        (lambda: dynamics.chart_coordinates(KERNEL, DENSE), "frame"),
        (lambda: dynamics.chart_coordinates(tdlrt_jax.lift(KERNEL), jnp.ones((2, 2))), "dense"),
    ],
    "dynamics.chart_to_dense": [
        (lambda: dynamics.chart_to_dense(KERNEL, KERNEL), "frame"),
        (lambda: dynamics.chart_to_dense(tdlrt_jax.lift(KERNEL), DENSE), "tangent"),
    ],
    "dynamics.dense_velocity": [(lambda: dynamics.dense_velocity(TREE), "state")],
}


def in_folder(call):
    """With a directory that has one checkpoint, of step 3."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, 3, TREE)
            return call(folder)

    return run


SIMPLE = export.serialize(jnp.sin, jnp.ones(3), platforms=("cpu",))
FILES = {
    "checkpoint.save": [
        *[(in_folder(lambda d, v=v: checkpoint.save(d, v, TREE)), "step") for v in (-1, 1.5, "x", None, 3, True)],
        *[(in_folder(lambda d, v=v: checkpoint.save(d, 4, v)), "tree") for v in ({"a": "text"}, {"a": len})],
        *[(in_folder(lambda d, v=v: checkpoint.save(d, 4, TREE, v)), "metadata") for v in (3, {"a": {1j}}, {"a": len})],
        *[(in_folder(lambda d, v=v: checkpoint.save(d, 4, TREE, keep=v)), "keep") for v in (0, -1, 1.5, "x")],
        *each(lambda v: checkpoint.save(v, 4, TREE), "directory", (3, None)),
        (in_folder(lambda d: checkpoint.save(d, 4, {"a": {"b": DENSE}, "a/b": DENSE})), "leaves"),
    ],
    "checkpoint.restore": [
        *[(in_folder(lambda d, v=v: checkpoint.restore(d, TREE, v)), "step") for v in (-1, 1.5, "x", True)],
        *[(in_folder(lambda d, v=v: checkpoint.restore(d, v)), "leaves") for v in ({}, {"v": KERNEL}, {"w": MATRIX})],
        (in_folder(lambda d: checkpoint.restore(d, {"w": "text"})), "like"),
        *each(lambda v: checkpoint.restore(v, TREE), "directory", (3, None)),
    ],
    "checkpoint.ranks": [
        *[(in_folder(lambda d, v=v: checkpoint.ranks(d, v)), "step") for v in (-1, 1.5, "x")],
        *each(checkpoint.ranks, "directory", (3, None)),
    ],
    "checkpoint.all_steps": each(checkpoint.all_steps, "directory", (3, None)),
    "export.serialize": [
        *each(lambda v: export.serialize(v, X), "model", (3, None, "x", optax.sgd(0.1))),
        *each(lambda v: export.serialize(LAYER, v), "example", (None, "x", jnp.ones((2, 5, 5, 3)))),
        *each(lambda v: export.serialize(LAYER, X, platforms=v), "platforms", ("cpu", ("x",), (), None, 3)),
        *each(lambda v: export.serialize(LAYER, X, plan=v), "plan", ("fast", 3)),
        (lambda: export.serialize(jnp.sin, X, plan="dense"), "plan"),
    ],
    "export.deserialize": each(export.deserialize, "data", (b"", b"x", 3, None, "x", SIMPLE[:-1])),
    "export.Program": [
        (lambda: export.Program(3), "exported"),
        *each(export.deserialize(SIMPLE), "inputs", (None, "x", jnp.ones((3, 3)), jnp.ones(3, int))),
        (lambda: export.deserialize(SIMPLE)(), "inputs"),
    ],
    "export.save": [
        *each(lambda v: export.save(v, jnp.sin, X), "path", (3, None, "nowhere/at/all/model")),
        (lambda: export.save(Path(tempfile.gettempdir()) / "never.jaxexport", 3, X), "model"),
    ],
    "export.load": each(export.load, "path", (3, None, "nowhere/at/all/model")),
    "export.to_onnx": each(lambda v: export.to_onnx(jnp.sin, X, v), "path", (3, None)),
}

MODELS = {
    f"models.{model.__name__}": [
        *each(lambda v, m=model: m(rngs=v), "rngs", (None, 3)),
        *each(lambda v, m=model: m(num_classes=v, rngs=RNGS()), "num_classes", (0, 1.5, "x")),
    ]
    for model in (models.AlexNet, models.LeNet5, models.ResNet18, models.VGG16)
}
for _model in (models.AlexNet, models.VGG16):
    MODELS[f"models.{_model.__name__}"] += [
        *each(lambda v, m=_model: m(hidden=v, rngs=RNGS()), "hidden", (4096, (0,), "x")),
        *each(lambda v, m=_model: m(dropout=v, rngs=RNGS()), "dropout", (1.0, -0.1, NAN, "x", None)),
    ]
MODELS["models.hidden.hidden_layers"] = each(
    lambda v: models.hidden.hidden_layers(4, v, nnx.Linear, RNGS()), "hidden", (4096, (0,), "x", None)
)
MODELS["models.hidden.check_rate"] = each(lambda v: models.hidden.check_rate("dropout", v), "dropout", (1.0, NAN, "x"))
MODELS["models.width.scaled"] = each(lambda v: models.width.scaled(64, v), "width", (0, -1, NAN, "x", None))
MODELS["models.pooling.max_pool"] = [
    *each(models.pooling.max_pool, "x", (None, jnp.ones(3))),
    *each(lambda v: models.pooling.max_pool(X, v), "window", (0, 1.5)),
]

ALL = CONV | NN | BASELINES | DYNAMICS | FILES | MODELS
