"""Wrong calls of the core: tensors, ranks, capacities, the optimizer. ``name: [(call, argument), ...]``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tdlrt_jax
from tdlrt_jax import Budget, RankPolicy, budget, capacity, initialization, ranks, report, rules, spectra, tucker
from tdlrt_jax.gradients import StepGradients
from tdlrt_jax.initialization import tucker_from_dense, tucker_normal, tucker_normalized, tucker_spectral

KEY = jax.random.key(0)
DENSE = jax.random.normal(KEY, (3, 3, 4, 6))
KERNEL = tdlrt_jax.hosvd(DENSE, rank=(2, 2, 3, 3))
MATRIX = tdlrt_jax.hosvd(DENSE[0, 0], rank=2)
TREE = {"w": KERNEL}
NAN = float("nan")


def loss(params, x=1.0):
    return jnp.sum(tdlrt_jax.to_dense(params["w"]) ** 2) * x


def optimizer(**options):
    return lambda: tdlrt_jax.tdlrt(optax.sgd(0.1), **{"tolerance": 0.1, **options})


def started(**options):
    return lambda: tdlrt_jax.tdlrt(optax.sgd(0.1), **{"tolerance": 0.1, **options}).init(TREE)


def step(**options):
    return lambda: tdlrt_jax.tdlrt_step(loss, optax.sgd(0.1), **options)


TOP = {
    "Budget": [
        *[(lambda value=value: Budget(value, steps=10), "compression") for value in (2, 0, -1, NAN, "x", None)],
        *[(lambda value=value: Budget(0.5, steps=value), "steps") for value in (0, -1, 1.5, "x", None, True)],
        *[(lambda value=value: Budget(0.5, steps=10, start=value), "start") for value in (-1, 10, 0.5, None)],
        *[(lambda value=value: Budget(0.5, steps=10, of=value), "of") for value in ("conv", None, 3)],
        *[(lambda value=value: Budget(0.5, steps=10, every=value), "every") for value in (0, 1.5, None)],
        *[(lambda value=value: Budget(0.5, steps=10, power=value), "power") for value in (0, -1, NAN, "x")],
        *[(lambda value=value: Budget(0.5, steps=10, importance=value), "importance") for value in ("Loss", None, 1)],
    ],
    "active_rank": [(lambda: tdlrt_jax.active_rank(DENSE), "kernel"), (lambda: tdlrt_jax.active_rank(3), "kernel")],
    "array_bytes": [
        (lambda: tdlrt_jax.array_bytes({"a": "text"}), "tree"),
        (lambda: tdlrt_jax.array_bytes(len), "tree"),
    ],
    "average": [
        (lambda: tdlrt_jax.average([]), "kernels"),
        (lambda: tdlrt_jax.average(3), "kernels"),
        (lambda: tdlrt_jax.average([DENSE]), "kernels"),
        (lambda: tdlrt_jax.average([KERNEL, MATRIX]), "kernels"),
        (lambda: tdlrt_jax.average([KERNEL], [0.5, 0.5]), "weights"),
        (lambda: tdlrt_jax.average([KERNEL], ["x"]), "weights"),
        (lambda: tdlrt_jax.average([KERNEL], 1.0), "weights"),
        *[
            (lambda value=value: tdlrt_jax.average([KERNEL], tolerance=value), "tolerance")
            for value in (NAN, -1, 1.0, "x")
        ],
        *[(lambda value=value: tdlrt_jax.average([KERNEL], capacity=value), "capacity") for value in ((1, 1), 0, "x")],
    ],
    "canonicalize": [
        (lambda: tdlrt_jax.canonicalize(DENSE), "kernel"),
        (lambda: tdlrt_jax.canonicalize(None), "kernel"),
        (lambda: tdlrt_jax.canonicalize(KERNEL._replace(factors=KERNEL.factors[:2])), "kernel"),
        (lambda: tdlrt_jax.canonicalize(KERNEL._replace(core=3)), "kernel"),
    ],
    "describe_status": [
        (lambda value=value: tdlrt_jax.describe_status(value), "status") for value in ("x", None, -1, 1.5)
    ],
    "fit_capacity": [
        *[(lambda v=value: tdlrt_jax.fit_capacity(TREE, headroom=v), "headroom") for value in (0.5, NAN, "x", None)],
        *[(lambda v=value: tdlrt_jax.fit_capacity(TREE, multiple=v), "multiple") for value in (0, 1.5, "x", None)],
        *[(lambda v=value: tdlrt_jax.fit_capacity(TREE, hysteresis=v), "hysteresis") for value in (0, 2, NAN, "x")],
        *[(lambda v=value: tdlrt_jax.fit_capacity(TREE, steps_left=v), "steps_left") for value in (-1, 1.5, "x")],
        *[
            (lambda v=value: tdlrt_jax.fit_capacity(TREE, compilation_steps=v), "compilation_steps")
            for value in (-1, 1.5, None)
        ],
        (lambda: tdlrt_jax.fit_capacity(TREE, max_rank={"v": (1, 1, 1, 1)}), "max_rank"),
        (lambda: tdlrt_jax.fit_capacity(TREE, max_rank={"w": (1, 1)}), "max_rank"),
        (lambda: tdlrt_jax.fit_capacity(TREE, max_rank={"w": 3}), "max_rank"),
        (lambda: tdlrt_jax.fit_capacity(TREE, max_rank=3), "max_rank"),
        (lambda: jax.jit(tdlrt_jax.fit_capacity)(TREE), "params"),
    ],
    "full_kernels": [
        (lambda: tdlrt_jax.full_kernels(TREE, max_rank={"v": (1, 1, 1, 1)}), "max_rank"),
        (lambda: tdlrt_jax.full_kernels(TREE, max_rank={"w": 3}), "max_rank"),
        (lambda: jax.jit(tdlrt_jax.full_kernels)(TREE), "params"),
    ],
    "hosvd": [
        *[
            (lambda v=value: tdlrt_jax.hosvd(v), "tensor")
            for value in (jnp.ones(3), 1.0, jnp.ones((2, 2), int), "x", None)
        ],
        *[
            (lambda v=value: tdlrt_jax.hosvd(DENSE, rank=v), "rank")
            for value in (0, -1, 1.5, "x", (1, 2), (9, 1, 1, 1))
        ],
        *[(lambda v=value: tdlrt_jax.hosvd(DENSE, rank=v), "rank") for value in ((1, 1, 1, 0.5), (1, 1, 1, "a"), True)],
        *[(lambda v=value: tdlrt_jax.hosvd(DENSE, tolerance=v), "tolerance") for value in (NAN, -0.1, 1.0, "x", 1j)],
        (lambda: tdlrt_jax.hosvd(DENSE, tolerance=0.1, criterion="first"), "criterion"),
        (lambda: tdlrt_jax.hosvd(DENSE, tolerance=0.1, convention=None), "convention"),
        (lambda: tdlrt_jax.hosvd(DENSE, tolerance=0.1, route="short"), "route"),
        (lambda: tdlrt_jax.hosvd(jnp.ones((0, 3))), "tensor"),
    ],
    "kernel_paths": [(lambda: tdlrt_jax.kernel_paths({"a": {"b": KERNEL}, "a/b": KERNEL}), "leaves")],
    "kernel_shape": [(lambda value=value: tdlrt_jax.kernel_shape(value), "kernel") for value in (DENSE, None, 3)],
    "lift": [
        *[(lambda value=value: tdlrt_jax.lift(value), "kernel") for value in (DENSE, None, tdlrt_jax.lift(KERNEL))],
        (lambda: tdlrt_jax.lift(KERNEL._replace(factors=KERNEL.factors[:2])), "kernel"),
    ],
    "parameter_count": [
        (lambda: tdlrt_jax.parameter_count((3, 4), (2,)), "rank"),
        (lambda: tdlrt_jax.parameter_count((3, 4), (2, 0.5)), "rank"),
        (lambda: tdlrt_jax.parameter_count((3, "x"), (2, 2)), "shape"),
        (lambda: tdlrt_jax.parameter_count(3, (2, 2)), "shape"),
        (lambda: tdlrt_jax.parameter_count((3, 4), (2, 2), whole=(True,)), "whole"),
    ],
    "resize": [
        *[(lambda value=value: tdlrt_jax.resize(TREE, value), "capacity") for value in (0, -1, 1.5, "x", None, (2, 2))],
        (lambda: tdlrt_jax.resize(TREE, {"w": (2, 2, 3, 0.5)}), "capacity"),
        (lambda: tdlrt_jax.resize(TREE, {"v": 3}), "capacity"),
        (lambda: tdlrt_jax.resize(TREE, 1), "capacity"),
        (lambda: jax.jit(lambda tree: tdlrt_jax.resize(tree, 2))(TREE), "tree"),
    ],
    "tdlrt": [
        *[(lambda v=value: tdlrt_jax.tdlrt(v, tolerance=0.1), "inner") for value in (0.1, None, "sgd")],
        *[(optimizer(tolerance=value), "tolerance") for value in (NAN, -1, 1.0, "x", None)],
        *[(optimizer(integrator=value), "integrator") for value in ("euler", None, 3, [])],
        *[(optimizer(criterion=value), "criterion") for value in ("first", None)],
        *[(optimizer(convention=value), "convention") for value in ("none", None)],
        *[(optimizer(route=value), "route") for value in ("none", None)],
        *[(optimizer(spare=value), "spare") for value in (-1, 0.5, "x")],
        *[(optimizer(warmup=value), "warmup") for value in (-1, 0.5, None)],
        *[(optimizer(adapt_every=value), "adapt_every") for value in (0, 1.5, None)],
        *[(optimizer(keep_momentum=value), "keep_momentum") for value in (1, "x", None)],
        *[(optimizer(freeze_after=value), "freeze_after") for value in (-1, 1.5, "x")],
        *[(started(min_rank=value), "min_rank") for value in (0, 1.5, "x", (1, 1), {"v": 2}, {"(": 2})],
        *[(started(max_rank=value), "max_rank") for value in (0, 1.5, "x", (1, 1), {"v": 2}, {"(": 2})],
        *[(optimizer(rules=value), "rules") for value in (3, {"(": 3}, {"w": "sparse"}, {"w": {"tau": 3}}, {3: 3})],
        *[(started(moments=value), "moments") for value in (3, {"trace": "cubic"})],
        (lambda: optimizer()().init({"w": KERNEL._replace(core=KERNEL.core[0])}), "kernel"),
        (lambda: optimizer()().init({"w": jax.tree.map(lambda a: a.astype(jnp.bfloat16), KERNEL)}), "kernel"),
        (lambda: optimizer()().update(TREE, started()()), "params"),
        (lambda: optimizer()().update(TREE, started()(), TREE), "value_and_grad_fn"),
        (lambda: optimizer()().update(TREE, started()(), TREE, value_and_grad_fn=3), "value_and_grad_fn"),
        (lambda: optimizer()().update(TREE, started()(), TREE, cores_only=True, ranks_stay=True), "ranks_stay"),
        (lambda: optimizer(integrator="parallel")().update({"v": KERNEL}, started()(), TREE), "grads"),
        (lambda: optimizer(integrator="parallel")().update(None, started()(), TREE), "grads"),
        (lambda: optimizer(integrator="parallel")().update(TREE, None, TREE), "state"),
    ],
    "tdlrt_step": [
        *[(lambda v=value: tdlrt_jax.tdlrt_step(v, optax.sgd(0.1)), "loss_fn") for value in (3, None, "x")],
        *[(lambda v=value: tdlrt_jax.tdlrt_step(loss, v), "tx") for value in (3, None, "x")],
        (lambda: tdlrt_jax.tdlrt_step(loss, optax.sgd(0.1), second_pass=True, cores_only=True), "second_pass"),
        (lambda: tdlrt_jax.tdlrt_step(loss, optax.sgd(0.1), second_pass=True, ranks_stay=True), "second_pass"),
        (lambda: tdlrt_jax.tdlrt_step(loss, optax.sgd(0.1), cores_only=True, ranks_stay=True), "ranks_stay"),
        *[(step(accumulate=value), "accumulate") for value in (0, -1, 1.5, "x", None)],
        *[(step(compiler_options=value), "compiler_options") for value in (0, "x", ["xla_cpu_use_fusion_emitters"])],
        (lambda: step(accumulate=2)()(TREE, optax.sgd(0.1).init(TREE), jnp.ones(3)), "accumulate"),
    ],
    "gradients.StepGradients": [
        *[(lambda v=value: StepGradients(accumulate=v), "accumulate") for value in (0, -1, 1.5, "x", None)],
        (lambda: StepGradients(second_pass=True, cores_only=True), "second_pass"),
        (lambda: StepGradients(cores_only=True, ranks_stay=True), "ranks_stay"),
    ],
    "to_dense": [(lambda v=value: tdlrt_jax.to_dense(v), "kernel") for value in ("x", None, {"w": KERNEL})],
    "value_and_grad": [(lambda v=value: tdlrt_jax.value_and_grad(v), "loss_fn") for value in (3, None, "x")],
    "value_and_two_grads": [(lambda v=value: tdlrt_jax.value_and_two_grads(v), "loss_fn") for value in (3, None, "x")],
}

SUBMODULES = {
    "tucker.capacity": [(lambda value=value: tucker.capacity(value), "kernel") for value in (DENSE, None)],
    "tucker.check_structure": [
        (lambda: tucker.check_structure(KERNEL._replace(factors=KERNEL.factors[:2])), "kernel"),
        (lambda: tucker.check_structure(DENSE), "kernel"),
    ],
    "tucker.unfold": [
        *[(lambda v=value: tucker.unfold(DENSE, v), "mode") for value in (4, -1, 0.5, None)],
        (lambda: tucker.unfold(3, 0), "tensor"),
    ],
    "tucker.fold": [
        *[(lambda v=value: tucker.fold(jnp.ones((3, 4)), v, (3, 4)), "mode") for value in (2, -1, 0.5)],
        (lambda: tucker.fold(jnp.ones((3, 4)), 0, (3, 5)), "matrix"),
    ],
    "tucker.mode_product": [
        (lambda: tucker.mode_product(DENSE, jnp.ones((2, 5)), 0), "matrix"),
        (lambda: tucker.mode_product(DENSE, jnp.ones(3), 0), "matrix"),
        (lambda: tucker.mode_product(DENSE, jnp.ones((2, 3)), 7), "mode"),
    ],
    "tucker.multi_mode_product": [
        (lambda: tucker.multi_mode_product(DENSE, [None]), "matrices"),
        (lambda: tucker.multi_mode_product(DENSE, [jnp.ones((2, 5)), None, None, None]), "matrices"),
    ],
    "truncation.truncate": [
        (lambda: tdlrt_jax.truncation.truncate(DENSE, 0.1, capacity=(1, 1)), "capacity"),
        (lambda: tdlrt_jax.truncation.truncate(DENSE, 0.1, whole=(True,)), "whole"),
        (lambda: tdlrt_jax.truncation.truncate(DENSE, 0.1, policy=RankPolicy("x")), "criterion"),
        (lambda: tdlrt_jax.truncation.truncate(jnp.ones((3, 3), int), 0.1), "core"),
    ],
    "ranks.check_policy": [
        (lambda: ranks.check_policy(RankPolicy("x"), 2), "criterion"),
        (lambda: ranks.check_policy(RankPolicy(convention="x"), 2), "convention"),
        (lambda: ranks.check_policy(RankPolicy(route="x"), 2), "route"),
        *[(lambda v=v: ranks.check_policy(RankPolicy(spare=v), 2), "spare") for v in (-1, 0.5, "x", None)],
        *[
            (lambda v=v: ranks.check_policy(RankPolicy(min_rank=v), 2), "min_rank")
            for v in (0, 0.5, "x", (1,), (1, None))
        ],
        *[(lambda v=v: ranks.check_policy(RankPolicy(max_rank=v), 2), "max_rank") for v in (0, 0.5, "x", (1,), (1, 0))],
        (lambda: ranks.check_policy(3, 2), "policy"),
    ],
    "ranks.check_ranks": [
        (lambda v=v: ranks.check_ranks(v, (3, 4)), "rank") for v in (0, 1.5, "x", (1,), (1, 9), True)
    ],
    "ranks.check_tolerance": [(lambda v=v: ranks.check_tolerance(v), "tolerance") for v in (NAN, -1, 1, "x", None)],
    "ranks.max_capacity": [
        (lambda: ranks.max_capacity((3, 4), (1,)), "rank"),
        (lambda: ranks.max_capacity(3), "shape"),
    ],
    "ranks.per_mode": [(lambda v=v: ranks.per_mode(v, 2, "bound"), "bound") for v in ((1,), "xy", 0.5)],
    "rules.Rule": [
        *[(lambda v=v: rules.Rule(rank=v), "rank") for v in (0, -1, 2.0, "x", (1, 0), NAN, True)],
        *[(lambda v=v: rules.Rule(weights=v), "weights") for v in ("x", None, 3)],
        *[(lambda v=v: rules.Rule(tolerance=v), "tolerance") for v in ("x", -1, NAN)],
        *[(lambda v=v: rules.Rule(spare=v), "spare") for v in (-1, 0.5, "x")],
        *[(lambda v=v: rules.Rule(min_rank=v), "min_rank") for v in (0, 0.5, "x")],
        *[(lambda v=v: rules.Rule(max_rank=v), "max_rank") for v in (0, 0.5, "x")],
        (lambda: rules.Rule(dense=1), "dense"),
        (lambda: rules.Rule(criterion="x"), "criterion"),
        (lambda: rules.Rule(convention="x"), "convention"),
    ],
    "rules.parse_rules": [(lambda v=v: rules.parse_rules(v), "rules") for v in (3, "x", {"(": 1}, {"w": "x"}, {1: 1})],
    "rules.check_rules_match": [(lambda: rules.check_rules_match(rules.parse_rules({"v": 1}), ["w"]), "rules")],
    "budget.plan_budget": [(lambda: budget.plan_budget(DENSE, RankPolicy()), "kernel")],
    "capacity.resize": [(lambda: capacity.resize(TREE, "x"), "capacity")],
    "initialization.kernel_rank": [
        *[
            (lambda v=v: initialization.kernel_rank((3, 4), v), "rank")
            for v in (0, -1, 1.5, "x", (1,), (1, "x"), NAN, True)
        ],
        (lambda: initialization.kernel_rank(3), "shape"),
        (lambda: initialization.kernel_rank((3,)), "shape"),
        (lambda: initialization.kernel_rank((3, 0)), "shape"),
    ],
    "initialization.dense_norm": [
        (lambda: initialization.dense_norm((3, 4), "x"), "scheme"),
        (lambda: initialization.dense_norm((3,)), "shape"),
        (lambda: initialization.dense_norm((3, "x")), "shape"),
    ],
    "initialization.tucker_normal": [
        (lambda: tucker_normal(0, (3, 4)), "key"),
        (lambda: tucker_normal(KEY, (3,)), "shape"),
        (lambda: tucker_normal(KEY, (3, 4), 1.5), "rank"),
        (lambda: tucker_normal(KEY, (3, 4), dtype="x"), "dtype"),
        (lambda: tucker_normal(KEY, (3, 4), dtype=int), "dtype"),
        (lambda: tucker_normal(KEY, (3, 4), norm="x"), "norm"),
    ],
    "initialization.tucker_normalized": [
        (lambda: tucker_normalized(0, (3, 4)), "key"),
        (lambda: tucker_normalized(KEY, (3,)), "shape"),
        (lambda: tucker_normalized(KEY, (3, 4), 1.5), "rank"),
        (lambda: tucker_normalized(KEY, (3, 4), dtype="x"), "dtype"),
        (lambda: tucker_normalized(KEY, (3, 4), dtype=int), "dtype"),
        (lambda: tucker_normalized(KEY, (3, 4), norm="x"), "norm"),
    ],
    "initialization.tucker_from_dense": [
        (lambda: tucker_from_dense(jnp.ones(3)), "weights"),
        (lambda: tucker_from_dense("x"), "weights"),
        (lambda: tucker_from_dense(jnp.ones((3, 3), int)), "weights"),
        (lambda: tucker_from_dense(DENSE, 0), "rank"),
    ],
    "initialization.tucker_spectral": [
        (lambda: tucker_spectral("x", (3, 4)), "key"),
        (lambda: tucker_spectral(KEY, (3,)), "shape"),
        (lambda: tucker_spectral(KEY, (3, 4), (1, 2, 3)), "rank"),
        *[(lambda v=v: tucker_spectral(KEY, (3, 4), decay=v), "decay") for v in (0, 2, NAN, "x")],
        *[
            (lambda v=v: tucker_spectral(KEY, (3, 4), singular_values=v), "singular_values")
            for v in ([1.0], [1, 2, 3, 4])
        ],
        *[(lambda v=v: tucker_spectral(KEY, (3, 4), singular_values=v), "singular_values") for v in (3, "x", [[1.0]])],
        (lambda: tucker_spectral(KEY, (3, 4), norm="x"), "norm"),
        (lambda: tucker_spectral(KEY, (3, 4), dtype="x"), "dtype"),
    ],
    "initialization.initial_kernel": [
        (lambda: initial(initialization="x"), "initialization"),
        (lambda: initial(initialization=None), "initialization"),
        (lambda: initial(kernel_init=3), "kernel_init"),
        (lambda: initial(kernel_init=lambda key, shape, dtype: jnp.ones((2, 2))), "kernel_init"),
        (lambda: initial(dtype="x"), "dtype"),
        (lambda: initial(rank="x"), "rank"),
    ],
    "spectra.mode_spectra": [
        *[(lambda v=v: spectra.mode_spectra(v, (2, 2)), "singular_values") for v in (3, "x", [[1.0]], [0.5, 1.0])],
        *[(lambda v=v: spectra.mode_spectra(v, (2, 2)), "singular_values") for v in ([1.0], [1.0, 0.0], [[1.0], None])],
    ],
    "spectra.prescribe_spectra": [
        (lambda: spectra.prescribe_spectra(np.ones((2, 2)), [np.ones(2)]), "spectra"),
        (lambda: spectra.prescribe_spectra(np.ones((2, 2)), [np.ones(3), None]), "spectra"),
        (
            lambda: spectra.prescribe_spectra(np.eye(2), [np.array([2.0, 1]), np.array([9.0, 1])]),
            "singular values",
        ),
    ],
    "report.summarize_params": [
        (lambda: report.summarize_params(TREE, kinds=3), "kinds"),
        (lambda: report.summarize_params({"a": "text"}), "params"),
    ],
    "report.summarize_layer": [(lambda: report.summarize_layer("a", "conv", 3), "kernel")],
    "report.layer_name": [(lambda: report.layer_name(3), "path")],
}


def initial(rank=None, **options):
    given = {"initialization": "dense", "kernel_init": jax.nn.initializers.normal(), "dtype": jnp.float32, **options}
    return initialization.initial_kernel(KEY, (3, 4), rank, **given)
