"""Training nnx models: gradients, Optimizer, other state, and the jitted step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tdlrt_jax
from tdlrt_jax import TuckerTensor, checkpoint
from tdlrt_jax import nn as tnn
from tests import references as ref


class Network(nnx.Module):
    """A Tucker convolution, BatchNorm, dropout and a dense layer, small enough to compile in a moment."""

    def __init__(self, rngs, dropout=0.0, rank=(None, None, 2, 5)):
        self.conv = tnn.TuckerConv(2, 6, (2, 2), rank=rank, padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.linear = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.dropout(self.norm(self.conv(x))))
        return self.linear(jnp.mean(x, axis=(1, 2)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def loss_with_aux(model, x, y):
    logits = model(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits


def images_and_labels():
    """24 images of three classes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 4, 4, 2)).astype(np.float32)
    y = np.arange(24) % 3
    x[..., 0] += y[:, None, None]
    return jnp.asarray(x), jnp.asarray(y)


@pytest.fixture(scope="module")
def batch():
    return images_and_labels()


def kernels(model):
    return tdlrt_jax.kernel_paths(nnx.as_pure(nnx.state(model, nnx.Param)))


def assert_trees_close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, atol=tolerance)


@pytest.mark.parametrize("graph_mode", [True, False])
def test_value_and_grad_is_the_core_one_on_split_parameters_and_moves_batch_statistics(batch, graph_mode):
    with nnx.set_graph_mode(graph_mode):
        model = Network(nnx.Rngs(0))
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def of_params(params):
            return loss_fn(nnx.merge(graphdef, params, rest, copy=True), *batch)

        expected, expected_grads = jax.jit(tdlrt_jax.value_and_grad(of_params))(params)
        mean = np.asarray(model.norm.mean.get_value())
        (value, logits), grads = nnx.jit(tnn.value_and_grad(loss_with_aux, has_aux=True))(model, *batch)
        assert isinstance(grads, nnx.State)
        assert logits.shape == (24, 3)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert_trees_close(grads, expected_grads)
        # BatchNorm's averages moved, exactly as by nnx.value_and_grad of the same loss.
        other = Network(nnx.Rngs(0))
        nnx.jit(lambda model: loss_fn(model, *batch))(other)
        assert np.any(mean != model.norm.mean.get_value())
        np.testing.assert_allclose(model.norm.mean.get_value(), other.norm.mean.get_value(), atol=1e-6)
        assert_trees_close(nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(params), 0)


def test_gradients_are_those_of_theorem_1(batch):
    model = Network(nnx.Rngs(0))
    _, grads = nnx.jit(tnn.value_and_grad(loss_fn))(model, *batch)
    kernel, grad = model.conv.kernel.get_value(), grads["conv"]["kernel"].get_value()
    q = tdlrt_jax.lift(kernel).Q
    for mode in (2, 3):  # the mark of Theorem 1: U_i^T dK_i = Mat_i(dC) Q_i
        inside = np.asarray(kernel.factors[mode]).T @ np.asarray(grad.factors[mode])
        core = ref.unfold(np.asarray(grad.core), mode) @ ref.unfold(np.asarray(q[mode]), mode).T
        np.testing.assert_allclose(inside, core, atol=1e-6)


def test_the_second_evaluation_sees_the_same_random_numbers(batch):
    model = Network(nnx.Rngs(0), dropout=0.5)
    params = nnx.as_pure(nnx.state(model, nnx.Param))

    @nnx.jit
    def both(model, params):
        again = tnn.value_and_grad_fn(loss_fn)(model, *batch)
        first, _ = tnn.value_and_grad(loss_fn)(model, *batch)
        after, _ = tnn.value_and_grad(loss_fn)(model, *batch)
        return first, again(params)[0], after

    first, second, after = both(model, params)
    assert first == second
    assert after != first  # the model's counters moved on


def test_both_gradients_of_one_pass_are_those_of_two(batch):
    """With dropout's random numbers, and statistics that move once."""
    one, two = Network(nnx.Rngs(0), dropout=0.3), Network(nnx.Rngs(0), dropout=0.3)
    again = tnn.value_and_grad_fn(loss_with_aux, has_aux=True)(one, *batch)
    (loss, logits), grads = tnn.value_and_grad(loss_with_aux, has_aux=True)(one, *batch)
    ((value, aux), both), second = tnn.value_and_two_grads(loss_with_aux, has_aux=True)(two, *batch)
    assert float(loss) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(logits, aux, atol=1e-6)
    assert_trees_close(grads, both, 1e-6)
    assert_trees_close(*(nnx.as_pure(nnx.split(model, nnx.Param, ...)[2]) for model in (one, two)))

    params = nnx.as_pure(nnx.state(Network(nnx.Rngs(0)), nnx.Param))
    at = jax.tree.map(
        lambda node: tdlrt_jax.frame.core_frame(node) if isinstance(node, TuckerTensor) else node,
        params,
        is_leaf=lambda node: isinstance(node, TuckerTensor),
    )
    (expected, _), plain = again(at)
    for evaluate in (second, second.at_same_network):
        value, grads = evaluate(at)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        np.testing.assert_allclose(grads["conv"]["kernel"].core, plain["conv"]["kernel"].core, atol=1e-6)


def make_optimizer(model, integrator="bug", tolerance=0.1):
    tx = tnn.tdlrt(optax.sgd(0.1, momentum=0.5), integrator=integrator, tolerance=tolerance)
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def check_state(model, optimizer, steps):
    """The optimizer's state mirrors the parameters, its ranks are the kernels', and factors are orthonormal."""
    state = nnx.as_pure(optimizer.opt_state)
    assert int(optimizer.step.get_value()) == int(state.step) == steps
    for name, kernel in kernels(model).items():
        assert isinstance(kernel, TuckerTensor)
        np.testing.assert_array_equal(state.rank[name], tdlrt_jax.active_rank(kernel))
        for factor in kernel.factors:
            if factor is not None:
                active = np.any(np.asarray(factor) != 0, axis=0)
                np.testing.assert_allclose(np.asarray(factor).T @ np.asarray(factor), np.diag(active), atol=1e-5)
    assert not any("finite" in line or "plain" in line for line in tdlrt_jax.describe_status(state.status))
    return state


@pytest.mark.parametrize(("graph_mode", "integrator"), [(True, "bug"), (False, "parallel")])
def test_an_unmodified_nnx_optimizer_trains(batch, graph_mode, integrator):
    with nnx.set_graph_mode(graph_mode):
        model = Network(nnx.Rngs(0))
        optimizer = make_optimizer(model, integrator, tolerance=0.4 if integrator == "bug" else 0.7)
        start = {name: np.asarray(tdlrt_jax.active_rank(kernel)) for name, kernel in kernels(model).items()}
        structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
        traces = []

        @nnx.jit
        def step(model, optimizer, x, y):
            traces.append(None)
            again = tnn.value_and_grad_fn(loss_fn)(model, x, y)
            loss, grads = tnn.value_and_grad(loss_fn)(model, x, y)
            optimizer.update(model, grads, value_and_grad_fn=again)
            return loss

        losses = [float(step(model, optimizer, *batch)) for _ in range(30)]
        assert len(traces) == 1
        assert losses[-1] < 0.7 * losses[0]
        state = check_state(model, optimizer, 30)
        assert jax.tree.structure(state) == structure
        assert any(np.any(np.asarray(state.rank[name]) != rank) for name, rank in start.items())


def test_nnx_optimizer_takes_the_steps_of_plain_optax(batch):
    """The same three steps by nnx.Optimizer and by hand on split parameters with the core functions."""
    model = Network(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(model, "parallel")
    tx = tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.5), integrator="parallel", tolerance=0.1)

    def of_params(params, rest):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        return loss_fn(merged, *batch), nnx.split(merged, nnx.Param, ...)[2]

    @jax.jit
    def plain_step(params, opt_state, rest):
        (_, rest), grads = tdlrt_jax.value_and_grad(of_params, has_aux=True)(params, rest)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rest

    @nnx.jit
    def nnx_step(model, optimizer):
        _, grads = tnn.value_and_grad(loss_fn)(model, *batch)
        optimizer.update(model, grads)

    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state, rest = plain_step(params, opt_state, rest)
        nnx_step(model, optimizer)
    found = kernels(model)
    for name, kernel in tdlrt_jax.kernel_paths(nnx.as_pure(params)).items():
        np.testing.assert_allclose(tdlrt_jax.to_dense(found[name]), tdlrt_jax.to_dense(kernel), atol=1e-5)
    assert_trees_close(nnx.as_pure(rest), nnx.as_pure(nnx.split(model, nnx.Param, ...)[2]), 1e-5)
    check_state(model, optimizer, 3)


def test_tdlrt_step_trains_and_reports(batch):
    model = Network(nnx.Rngs(0), dropout=0.1)
    optimizer = make_optimizer(model)
    step = tnn.tdlrt_step(loss_with_aux, has_aux=True)
    infos = [step(model, optimizer, *batch) for _ in range(20)]
    assert infos[-1].loss < infos[0].loss
    assert infos[0].aux.shape == (24, 3)
    assert set(infos[-1].rank) == {"conv/kernel"}
    check_state(model, optimizer, 20)
    for name, kernel in kernels(model).items():
        np.testing.assert_array_equal(infos[-1].rank[name], tdlrt_jax.active_rank(kernel))

    # A batch that is not finite leaves the model, its statistics and the optimizer as they were.
    before = nnx.as_pure(nnx.state((model, optimizer.opt_state.inner)))
    info = step(model, optimizer, batch[0].at[0].set(jnp.nan), batch[1])
    assert "not finite" in tdlrt_jax.describe_status(info.status)[0]
    after = nnx.as_pure(nnx.state((model, optimizer.opt_state.inner)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        if jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_array_equal(old, new)


def statistics(model):
    return nnx.as_pure(nnx.state(model, nnx.BatchStat))


def stepper(interface, model, integrator, batch):
    """A function that takes one training step of the model, in place, by nnx's interface or by that of the core."""
    if interface == "nnx":
        optimizer, step = make_optimizer(model, integrator), tnn.tdlrt_step(loss_fn)
        return lambda: step(model, optimizer, *batch)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)

    def with_state(params, rest, x, y):
        merged = nnx.merge(graphdef, params, rest)
        loss = loss_fn(merged, x, y)
        return loss, nnx.as_pure(nnx.split(merged, nnx.Param, ...)[2])

    tx = tdlrt_jax.tdlrt(optax.sgd(0.1, momentum=0.5), integrator=integrator, tolerance=0.1)
    step = tdlrt_jax.tdlrt_step(with_state, tx, has_state=True, donate=False)
    carried = [params, tx.init(params), rest]

    def take():
        *carried[:], info = step(*carried, *batch)
        nnx.update(model, carried[0])
        nnx.update(model, carried[2])
        return info

    return take


@pytest.mark.parametrize("interface", ["nnx", "core"])
@pytest.mark.parametrize("integrator", ["bug", "parallel", "fixed_rank"])
def test_batch_statistics_move_once_a_step_to_those_of_a_dense_forward_pass(batch, integrator, interface):
    """However often an integrator evaluates the network, statistics are those of one pass at the parameters before."""
    model = Network(nnx.Rngs(0))
    forward, step = nnx.jit(lambda model: model(batch[0])), stepper(interface, model, integrator, batch)
    for _ in range(3):
        before, dense = statistics(model), tnn.densify(model)
        forward(dense)
        expected = statistics(dense)
        forward(dense)
        twice = statistics(dense)
        step()
        assert_trees_close(statistics(model), expected)
        for a, b, c in zip(*map(jax.tree.leaves, (before, expected, twice)), strict=True):
            assert np.all(a != b) and np.max(np.abs(b - c)) > 1e-4, "no pass, or one more, would have been noticed"
        elsewhere = tnn.densify(model)
        nnx.update(elsewhere, before)
        forward(elsewhere)
        for a, b in zip(*map(jax.tree.leaves, (expected, statistics(elsewhere))), strict=True):
            assert np.max(np.abs(a - b)) > 1e-5, "so would a pass at the parameters after the step"


def test_tdlrt_step_needs_tdlrt_and_bug_its_second_gradient(batch):
    model = Network(nnx.Rngs(0))
    plain = nnx.Optimizer(model, optax.with_extra_args_support(optax.sgd(0.1)), wrt=nnx.Param)
    with pytest.raises(ValueError, match="TdlrtState"):
        tnn.tdlrt_step(loss_fn)(model, plain, *batch)
    optimizer = make_optimizer(model, "bug")
    _, grads = nnx.jit(tnn.value_and_grad(loss_fn))(model, *batch)
    with pytest.raises(ValueError, match="value_and_grad_fn"):
        optimizer.update(model, grads)


def test_only_nn_and_models_import_flax():
    import subprocess
    import sys

    code = "import sys, tdlrt_jax; assert not any(name.split('.')[0] == 'flax' for name in sys.modules), 'flax'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrt_selects_what_is_differentiated(batch):
    model = Network(nnx.Rngs(0))
    only_kernels = nnx.All(nnx.Param, nnx.PathContains("kernel"))
    _, grads = nnx.jit(functools.partial(tnn.value_and_grad(loss_fn, wrt=only_kernels)))(model, *batch)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"kernel"}


def test_other_array_sizes_for_a_model_and_its_optimizer(tmp_path):
    """By kernels: nnx.state of an optimizer has their parts by themselves, which resize names and checkpoints follow."""

    def pair(rank):
        model = tnn.TuckerLinear(12, 10, rank=rank, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tnn.tdlrt(optax.sgd(0.1, momentum=0.9), tolerance=0.1), wrt=nnx.Param)

    model, optimizer = pair(6)
    step = tnn.tdlrt_step(lambda model, x: jnp.mean((model(x) - 1) ** 2))
    x = jax.random.normal(jax.random.key(0), (5, 12))
    step(model, optimizer, x)
    state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    checkpoint.save(tmp_path, 1, state)

    larger, its_optimizer = pair(None)
    like = {"model": nnx.state(larger), "optimizer": nnx.state(its_optimizer)}
    restored, _ = checkpoint.restore(tmp_path, like)
    nnx.update(larger, restored["model"])
    nnx.update(its_optimizer, restored["optimizer"])
    assert larger.kernel.get_value().core.shape == (6, 6)
    ours, theirs = step(model, optimizer, x), step(larger, its_optimizer, x)
    np.testing.assert_array_equal(ours.loss, theirs.loss)
    assert_trees_close(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(larger)), 0)

    wanted = dict.fromkeys(tdlrt_jax.fit_capacity(nnx.state(model)), 8)
    assert list(wanted) == ["kernel/value"]
    with pytest.raises(
        ValueError, match=r"parts of the kernel '.*/kernel', core and factors.*nnx.as_pure\(optimizer.opt_state\)"
    ):
        tdlrt_jax.resize(nnx.state(optimizer), wanted)
    nnx.update(model, tdlrt_jax.resize(nnx.state(model), wanted))
    resized = tdlrt_jax.resize(nnx.as_pure(optimizer.opt_state), wanted)
    assert resized.inner[0].trace["kernel"].core.shape == model.kernel.get_value().core.shape == (8, 8)


def test_rules_of_layers_that_a_filter_hides_are_explained():
    model = nnx.Dict(body=tnn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0)), head=nnx.Linear(5, 2, rngs=nnx.Rngs(1)))
    tx = tnn.tdlrt(optax.sgd(0.1), tolerance=0.1, rules={"head": "dense", "body": 0.5})
    with pytest.raises(ValueError, match=r"'head' is found in no layer's path.*wrt= of nnx.Optimizer"):
        nnx.Optimizer(model, tx, wrt=nnx.All(nnx.Param, nnx.PathContains("body")))


def test_the_transformation_for_plain_trees_is_named_in_an_nnx_optimizer():
    model = tnn.TuckerLinear(6, 5, rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, tdlrt_jax.tdlrt(optax.sgd(0.1), tolerance=0.1, integrator="parallel"), wrt=nnx.Param
    )
    _, grads = tnn.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(model, jnp.ones((3, 6)))
    with pytest.raises(ValueError, match=r"there is tdlrt_jax\.nn\.tdlrt"):
        optimizer.update(model, grads)


def test_the_step_of_arrays_says_which_one_is_for_models():
    model = Network(nnx.Rngs(0))
    tx = tnn.tdlrt(optax.sgd(0.1), tolerance=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = tdlrt_jax.tdlrt_step(lambda model, x: jnp.mean(model(x) ** 2), tx)
    with pytest.raises(ValueError, match=r"params is the model Network: .*tdlrt_jax\.nn\.tdlrt_step"):
        step(model, optimizer.opt_state, jnp.ones((2, 6, 6, 2)))
