# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Momentum in bases that move
#
# The paper takes the descent steps of Algorithm 1 by SGD with momentum. Momentum remembers: it keeps an average of past
# gradients. But what is remembered are numbers, coordinates of a direction in the bases $U_i$ of the kernel, and Algorithm 1
# changes the bases in every step. What has to become of the numbers then, and what happens if nothing is done?
#
# 1. The heavy ball: momentum as an equation of motion.
# 2. A ball that is held on the manifold of low-rank tensors.
# 3. A moment is a tangent vector. How it is carried from one tangent space to the next.
# 4. The optimizer follows the ball on the manifold as its steps become short. Without transport it does not.
# 5. What that costs on the way to an optimum.
# 6. A momentum that stays as it is while the learning rate falls: back to the gradient flow.
# 7. Adam: what remembers squares.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import tdlrt_jax
from tdlrt_jax import lift, tdlrt, to_dense
from tdlrt_jax.dynamics import (
    chart_to_dense,
    dense_velocity,
    factor_flow,
    factor_heavy_ball_flow,
    full_heavy_ball_flow,
    integrate,
    project,
)

jax.config.update("jax_enable_x64", True)  # orders of convergence are measured: rounding must not show
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
SMALL = bool(os.environ.get("TDLRT_NOTEBOOK_SMALL"))  # for a quick test of this notebook

# %% [markdown]
# ## 1. The heavy ball
#
# We take one kernel of $5 \times 6 \times 7$ numbers and a smooth, convex loss with a known optimum $T$ of rank $(3, 3, 3)$,
# $L(W) = \sum_j w_j \log\cosh(W_j - T_j)$. A ball of unit mass and friction $\gamma$ on this landscape moves by
#
# $$\ddot W = -\gamma \dot W - \nabla L(W).$$
#
# Take short steps of size $s$ and keep $m = -\dot W / s$: then this is the familiar recursion
#
# $$m \leftarrow \beta\, m + \nabla L(W), \qquad W \leftarrow W - \eta\, m, \qquad \eta = s^2,\quad \beta = 1 - \gamma s,$$
#
# which is `optax.sgd(eta, momentum=beta)`. Learning rate and momentum together are a step size and a friction.

# %%
shape, rank = (5, 6, 7), 3
rng = np.random.default_rng(0)
weights = jnp.asarray(rng.uniform(0.5, 1.5, shape))
T = to_dense(tdlrt_jax.hosvd(jnp.asarray(rng.normal(size=shape)), rank=rank))
T = 2 * T / jnp.linalg.norm(T)


def loss_fn(kernel):
    x = jnp.abs(to_dense(kernel) - T)
    return jnp.sum(weights * (x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(2.0)))


gradient = tdlrt_jax.value_and_grad(loss_fn)
start = tdlrt_jax.hosvd(jnp.asarray(T + 0.2 * rng.normal(size=shape)), rank=rank)


def distance(a, b):
    return float(jnp.linalg.norm(a - b))


# %%
friction, end = 0.3, 12.0
times = np.linspace(0, end, 121)
full = integrate(full_heavy_ball_flow(loss_fn, friction=friction), start, times)
kinetic = 0.5 * jnp.sum(full.states.velocity**2, axis=(1, 2, 3))
potential = jax.vmap(loss_fn)(full.params)

fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(times, potential, label="loss")
ax.plot(times, kinetic, label=r"$\frac{1}{2} \|\dot W\|^2$")
ax.plot(times, potential + kinetic, color="0.3", linestyle="--", label="energy")
ax.set(xlabel="t", title="a heavy ball rolls over the optimum and comes back")
ax.legend()
plt.show()
print("the energy never rises:", bool((np.diff(np.asarray(potential + kinetic)) <= 1e-9).all()))

# %% [markdown]
# ## 2. A ball on the manifold
#
# Now $W$ has to stay on the manifold of tensors of rank $(3, 3, 3)$, like a bead on a wire. A frictionless wire pushes with
# forces *normal* to it only. So in all tangent directions the equation of motion holds, and $P(W)$, the projection (6) onto the
# tangent space, says so:
#
# $$P(W)\,\big(\ddot W + \gamma \dot W + \nabla L(W)\big) = 0, \qquad \dot W = P(W)\, \dot W.$$
#
# `factor_heavy_ball_flow` integrates this in core and factors, the second-order counterpart of equation (7). We check it in the
# midst of the motion: $\ddot W$ by differentiating $\dot W$ along the flow, and the force that is left over.

# %%
flow = factor_heavy_ball_flow(loss_fn, friction=friction)
held = integrate(flow, start, times)
state = jax.tree.map(lambda leaf: leaf[30], held.states)
speed, acceleration = jax.jvp(dense_velocity, (state,), (flow.velocity(state),))
left_over = acceleration + friction * speed + jax.grad(loss_fn)(to_dense(state.params))
tangential = jnp.linalg.norm(project(state.params, left_over))
print(f"force of the manifold on the ball: {jnp.linalg.norm(left_over):.3f}, its tangential part: {tangential:.0e}")

energy = jax.vmap(loss_fn)(held.params) + 0.5 * jnp.sum(jax.vmap(dense_velocity)(held.states) ** 2, axis=(1, 2, 3))
gaps = [[distance(W, T) for W in found.params] for found in (full, held)]

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.plot(times, potential + kinetic, label="free")
left.plot(times, energy, label="on the manifold")
left.set(xlabel="t", title="energy")
right.semilogy(times, gaps[0], label="free")
right.semilogy(times, gaps[1], label="on the manifold")
right.set(xlabel="t", title=r"distance to the optimum $\|W - T\|$")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# The manifold does no work: here too energy is lost by friction alone. And since the optimum is on the manifold, the ball that is
# held there arrives as the free one does.
#
# ## 3. A moment is a tangent vector
#
# In the optimizer the moment of a kernel has the shapes of its core and its $K_i$, numbers $(m_C, m_{K_i})$. They are the
# coordinates of *one* tensor in the tangent space at $W$,
#
# $$V = m_C \times_j U_j + \sum_i \mathrm{Ten}_i(Q_i^\top) \times_{j \ne i} U_j \times_i (I - U_i U_i^\top)\, m_{K_i} .$$
#
# After a step the kernel has other bases. The library puts the coordinates of the orthogonal projection of $V$ onto the *new*
# tangent space in the place of the old ones. We watch one step, with a gradient of zero so that nothing is added to the moment:
# the tensor stays nearly the same, while its numbers become entirely different ones.

# %%
tx = tdlrt(optax.sgd(0.05, momentum=1.0), tolerance=0.0)


@jax.jit
def step(kernel, state, scale):
    """A step with the gradient times ``scale``."""

    def scaled(kernel):
        return jax.tree.map(lambda leaf: scale * leaf, gradient(kernel))

    _, grads = scaled(kernel)
    updates, state = tx.update(grads, state, kernel, value_and_grad_fn=scaled)
    return optax.apply_updates(kernel, updates), state


kernel, state = start, tx.init(start)
for _ in range(5):
    kernel, state = step(kernel, state, 1.0)
new_kernel, new_state = step(kernel, state, 0.0)


def tensor_of(kernel, moment):
    """The tangent vector that a moment's numbers mean; its K-part has no part within the bases."""
    inside = [m - u @ (u.T @ m) for u, m in zip(kernel.factors, moment.factors)]
    return chart_to_dense(lift(kernel), moment._replace(factors=tuple(inside)))


def relative(a, b):
    return distance(a, b) / float(jnp.linalg.norm(b))


m, new_m = (s.inner[0].trace for s in (state, new_state))
V, new_V = tensor_of(kernel, m), tensor_of(new_kernel, new_m)
print(f"change of the tensor V:           {relative(new_V, V):.1%}")
print(f"change of the numbers m_C:        {relative(new_m.core, m.core):.1%}")
for mode in range(3):
    print(f"change of the numbers m_K{mode + 1}:        {relative(new_m.factors[mode], m.factors[mode]):.1%}")
print(f"V and the projection of the old V: {relative(new_V, project(new_kernel, V)):.0e} apart")
print(f"old numbers in the new bases:      {relative(tensor_of(new_kernel, m), V):.1%} off V")

# %% [markdown]
# ## 4. The optimizer follows the ball, if its moments are carried
#
# As the step $s$ falls, `tdlrt(optax.sgd(s**2, momentum=1 - friction * s))` should tend to the ball on the manifold. We compare
# at a fixed time, for three ways to treat the moments:
#
# - **carried**: what the library does,
# - **core only**: the core's moment is turned with its bases, those of the $K_i$ are forgotten,
# - **kept**: the same numbers, in whatever bases there are now.

# %%
WAYS = ("carried", "core only", "kept")


def runner(way, looks=1):
    """``run(kernel, learning_rate, momentum, stride)``: the full kernels after every ``stride`` steps."""

    @jax.jit
    def run(kernel, learning_rate, momentum, stride):
        tx = tdlrt(optax.sgd(learning_rate, momentum=momentum), tolerance=0.0)

        def one(_, carry):
            kernel, state = carry
            _, grads = gradient(kernel)
            updates, after = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
            old, (trace, *rest) = state.inner[0].trace, after.inner
            if way == "core only":
                forgotten = jax.tree.map(jnp.zeros_like, trace.trace.factors)
                trace = trace._replace(trace=trace.trace._replace(factors=forgotten))
            elif way == "kept":
                outside = [g - u @ (u.T @ g) for u, g in zip(kernel.factors, grads.factors)]
                now = grads._replace(factors=tuple(outside))
                trace = trace._replace(trace=jax.tree.map(lambda m, g: momentum * m + g, old, now))
            return optax.apply_updates(kernel, updates), after._replace(inner=(trace, *rest))

        def look(carry, _):
            carry = jax.lax.fori_loop(0, stride, one, carry)
            return carry, to_dense(carry[0])

        return jax.lax.scan(look, (kernel, tx.init(kernel)), None, length=looks)[1]

    return run


runs = {way: runner(way) for way in WAYS}
end, gamma = 2.0, 1.0
counts = (20, 40, 80) if SMALL else (20, 40, 80, 160, 320)
ball = integrate(factor_heavy_ball_flow(loss_fn, friction=gamma), start, end).params[-1]
moved = distance(ball, to_dense(start))
errors = {way: [] for way in WAYS}
for way, run in runs.items():
    for count in counts:
        s = end / count
        errors[way].append(distance(run(start, s**2, 1 - gamma * s, count)[-1], ball) / moved)

sizes = [end / count for count in counts]
fig, ax = plt.subplots(figsize=(6, 3.2))
for way in WAYS:
    order = np.polyfit(np.log(sizes), np.log(errors[way]), 1)[0]
    ax.loglog(sizes, errors[way], marker="o", label=f"{way}: order {order:.2f}")
ax.loglog(sizes, np.array(sizes) * errors["carried"][0] / sizes[0], color="0.5", linestyle=":", label="order 1")
ax.set(xlabel="step size s", ylabel="error / distance moved", title="distance to the heavy ball on the manifold")
ax.legend()
plt.show()

# %% [markdown]
# Carried moments converge to the ball with first order, the order of the method. The other two do not converge at all: shorter
# steps mean more changes of basis, and at each of them the memory is lost or turned.
#
# ## 5. The price on the way to an optimum
#
# In training nobody takes steps short enough to resolve a flow. So the same for the usual numbers, a momentum of 0.9 and one
# learning rate for all, beside heavy ball and plain gradient descent on the full kernel.

# %%
looks, stride = 40, 5 if SMALL else 10
rate, beta = 0.02, 0.9


@jax.jit
def dense_descent(W, momentum):
    def one(_, carry):
        W, m = carry
        m = momentum * m + jax.grad(loss_fn)(W)
        return W - rate * m, m

    def look(carry, _):
        carry = jax.lax.fori_loop(0, stride, one, carry)
        return carry, jnp.linalg.norm(carry[0] - T)

    return jax.lax.scan(look, (W, jnp.zeros_like(W)), None, length=looks)[1]


steps = stride * np.arange(1, looks + 1)
fig, ax = plt.subplots(figsize=(6.5, 3.4))
ax.semilogy(steps, dense_descent(to_dense(start), beta), color="k", linewidth=3, alpha=0.4, label="dense heavy ball")
ax.semilogy(steps, dense_descent(to_dense(start), 0.0), color="0.6", linestyle="--", label="dense, no momentum")
final = {}
for way in WAYS:
    kernels = runner(way, looks)(start, rate, beta, stride)
    way_gaps = [distance(W, T) for W in kernels]
    final[way] = way_gaps[-1]
    ax.semilogy(steps, way_gaps, label=f"low rank, {way}")
ax.set(xlabel="step", ylabel=r"$\|W - T\|$", title="the way to an optimum of rank 3")
ax.legend(fontsize="small")
plt.show()
print("distance at the end:", {way: f"{gap:.0e}" for way, gap in final.items()})

# %% [markdown]
# With carried moments low-rank descent is as fast as dense descent. Where the moments of the bases are forgotten, the bases move
# without momentum and hold everything up. The conclusion is not about this library: it holds for any optimizer with memory on a
# representation that changes its coordinates.
#
# ## 6. A fixed momentum is the gradient flow again
#
# Keep $\beta$ as it is and let the learning rate fall. The memory of $1 / (1 - \beta)$ steps then covers less and less time, and
# what remains is a two-step method for the *gradient* flow, at the time $t = \eta k / (1 - \beta)$ after $k$ steps. This is the
# reading of the paper. On the manifold the limit is the projected flow (5):

# %%
crawl = integrate(factor_flow(loss_fn), start, end).params[-1]
moved = distance(crawl, to_dense(start))
fig, ax = plt.subplots(figsize=(6, 3.2))
for way in WAYS:
    gaps = [distance(runs[way](start, s * (1 - beta), beta, c)[-1], crawl) / moved for s, c in zip(sizes, counts)]
    order = np.polyfit(np.log(sizes), np.log(gaps), 1)[0]
    ax.loglog(sizes, gaps, marker="o", label=f"{way}: order {order:.2f}")
ax.set(xlabel="time of a step", ylabel="error / distance moved", title="distance to the projected gradient flow")
ax.legend()
plt.show()

# %% [markdown]
# The order of the carried moments approaches one from below, since a momentum of 0.9 needs many steps to get going. Moments in
# stale coordinates miss this limit as well: turned at random they average out, and the bases move with a tenth of the speed.
#
# ## 7. Adam: what remembers squares
#
# Adam divides by the root of an average of *squared* gradients, entry by entry. That is no vector, and there is no projection of
# it. The library carries it by the same maps with every matrix squared entrywise: squares stay nonnegative, and none grows beyond
# the largest. What is still missing are directions of which nothing is remembered, since a basis has just taken them up. A zero
# there would give them a step of $(1 - \beta_1) / \sqrt{1 - \beta_2} \approx 3$ learning rates, however small their gradient. So
# every entry is at least the average of the core's. Nothing has to be asked for: any optax transformation whose moments the
# library knows is carried, and others raise an error at `init`.

# %%
adam_steps = 60 if SMALL else 200


@jax.jit
def adam_on_the_manifold(kernel):
    tx = tdlrt(optax.adam(0.01), tolerance=1e-3)

    def one(carry, _):
        kernel, state = carry
        loss, grads = gradient(kernel)
        updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
        least = jnp.min(state.inner[0].nu.core)
        return (optax.apply_updates(kernel, updates), state), (loss, least, state.inner[0].nu.core.max())

    return jax.lax.scan(one, (kernel, tx.init(kernel)), None, length=adam_steps)[1]


@jax.jit
def adam_in_full(W):
    tx = optax.adam(0.01)

    def one(carry, _):
        W, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(W)
        updates, state = tx.update(grads, state)
        return (W + updates, state), loss

    return jax.lax.scan(one, (W, tx.init(W)), None, length=adam_steps)[1]


losses, least, largest = adam_on_the_manifold(start)
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.semilogy(adam_in_full(to_dense(start)), color="k", linewidth=3, alpha=0.4, label="dense")
left.semilogy(losses, label="low rank")
left.set(xlabel="step", title="loss with Adam")
left.legend()
right.semilogy(largest, label="largest")
right.semilogy(least, label="smallest")
right.set(xlabel="step", title="second moments of the core")
right.legend()
plt.show()

# %% [markdown]
# Adam is another method in every basis, so the two curves differ. Both go to the optimum, the low-rank one more slowly, and the
# right picture says why: a floor at the average lifts the small entries in every step, until in effect Adam has one rate for the
# whole kernel. What is left of its adaptivity is that between kernels. Momentum loses nothing.
#
# The measurements behind this page, for all integrators and smaller singular values, are those of
# `python -m experiments.dynamics.momentum`.
