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
# # The gradient flow on the manifold
#
# [The first notebook](01_tucker_in_ten_minutes.ipynb) took Theorem 1 and Algorithm 1 as they are. This one shows where they
# come from. Training is seen here as a motion in continuous time, and everything is computed for kernels so small that the
# exact motion can be had too, from `tdlrt_jax.dynamics`.
#
# 1. The gradient flow of a kernel leaves the low-rank tensors.
# 2. The projection onto the tangent space keeps it there.
# 3. The projected flow can be written in factors, or in the $K_i$ and $C$ of Theorem 1. It is one flow.
# 4. In factors it is stiff: small singular values make the manifold bend sharply. Steps of Algorithm 1 do not notice.
# 5. Such a step is the flow with its frame held still, solved exactly or by one Euler step.
# 6. Where a small kernel exists that does the task, a "winning ticket", the steps find its ranks.
#
# The equation numbers are those of the paper. Some of what follows are differences near rounding, so we ask JAX for float64,
# in which it does not compute by default.

# %%
import os
from functools import partial

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tdlrt_jax
from tdlrt_jax import TuckerTensor, to_dense
from tdlrt_jax.dynamics import factor_flow, flow_step, full_flow, integrate, kc_flow, project, projected_flow
from tdlrt_jax.tucker import multi_mode_product, unfold

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
SMALL = bool(os.environ.get("TDLRT_NOTEBOOK_SMALL"))  # for a quick test of this notebook

# %% [markdown]
# ## 1. The full flow leaves the manifold
#
# Gradient descent with small steps follows the *gradient flow*, equation (4),
#
# $$\dot W(t) = -\nabla_W \mathcal L(W(t)).$$
#
# Our loss is a smooth distance to some target $T$ of full ranks, with weights $w_j$ for the entries,
# $\mathcal L(W) = \sum_j w_j \log\cosh(W_j - T_j)$. Its gradient and its second derivatives are bounded, as the paper's
# theorems ask for. The kernel at the start has ranks (3, 3, 3) and singular values that we choose: it is a sum of three
# products $\sigma_k\, a_k \otimes b_k \otimes c_k$ with orthonormal vectors.

# %%
shape, rank = (4, 5, 6), 3
rng = np.random.default_rng(1)


def orthonormal(n, r):
    """Random orthonormal columns."""
    return jnp.asarray(np.linalg.qr(rng.normal(size=(n, r)))[0])


def norm(x):
    return float(np.linalg.norm(np.ravel(x)))


weights = jnp.asarray(rng.uniform(0.5, 1.5, shape))
fading = np.einsum("i,j,k->ijk", *(0.6 ** np.arange(n) for n in shape))  # every mode's singular values fall
T = multi_mode_product(jnp.asarray(rng.normal(size=shape) * fading), [orthonormal(n, n) for n in shape])
T = 2 * T / norm(T)


def loss(kernel):
    d = to_dense(kernel) - T
    return jnp.sum(weights * (jnp.logaddexp(d, -d) - jnp.log(2.0)))


bases = [orthonormal(n, rank) for n in shape]


def start(sigma):
    """The kernel with singular values 1, 0.5 and sigma in every mode."""
    core = jnp.zeros((rank,) * 3).at[(jnp.arange(rank),) * 3].set(jnp.array([1.0, 0.5, sigma]))
    return TuckerTensor(core, tuple(bases))


W0 = start(0.2)
for mode in range(3):
    values = np.linalg.svd(unfold(to_dense(W0), mode), compute_uv=False)
    print(f"singular values of Mat_{mode + 1}(W):", values.round(6))

# %% [markdown]
# A flow is made from a loss, and `integrate` follows it with adaptive steps of a Runge-Kutta method.

# %%
times = np.concatenate([[0.0], np.geomspace(1e-4, 4, 60)])
full = integrate(full_flow(loss), W0, times)
found = np.array([np.linalg.svd(unfold(np.asarray(w), 2), compute_uv=False) for w in full.params])


@jax.jit
def nearby(w):
    """A kernel of ranks (3, 3, 3) near w: its truncated HOSVD."""
    return to_dense(tdlrt_jax.hosvd(w, rank=rank))


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for k in range(shape[2]):
    color, label = "C0" if k < rank else "C3", {0: "the first three", 3: "beyond"}.get(k)
    left.loglog(times[1:], found[1:, k], color=color, label=label)
left.set(xlabel="$t$", title=r"singular values of $\mathrm{Mat}_3(W(t))$", ylim=(1e-6, 5))
left.legend()
right.plot(times, [norm(w - nearby(w)) for w in full.params], color="C3")
right.set(xlabel="$t$", title="error of its HOSVD of ranks (3, 3, 3)")
plt.show()

# %% [markdown]
# The kernel starts with three singular values in every mode, and all others are there at once: they grow in proportion to
# $t$. No matter how small the ranks of the first kernel are, the flow does not keep them. To compute with a few factors all
# the time, the motion itself has to be changed.
#
# ## 2. The tangent space, and the projection onto it
#
# The kernels of ranks $\rho = (r_1, \dots, r_d)$ form a smooth manifold $\mathcal M_\rho$. A velocity keeps the ranks if it
# lies in the tangent space at $W$, equation (3): all
# $\delta C \times_i U_i + \sum_j C \times_j \delta U_j \times_{k \ne j} U_k$. Of these velocities we take the one nearest to
# the negative gradient, equation (6). This is an orthogonal projection $P(W)$, and `project` computes it. Here we write it as
# a matrix, once by `project` and once from the definition: the tangent space is what the derivative of
# $(C, U_1, \dots, U_d) \mapsto W$ reaches.

# %%
numbers = int(np.prod(shape))
units = jnp.eye(numbers).reshape(numbers, *shape)
P = jax.jit(jax.vmap(lambda z: project(W0, z).ravel(), out_axes=1))(units)

J = jnp.concatenate([j.reshape(numbers, -1) for j in jax.tree.leaves(jax.jit(jax.jacobian(to_dense))(W0))], axis=1)
dimension = rank**3 + sum(rank * (n - rank) for n in shape)
nearest = J @ np.linalg.pinv(J, rcond=1e-10)  # the minimizers of (6), for all unit tensors

print(f"a matrix of {P.shape[0]} x {P.shape[1]}")
print(f"idempotent:           ||P P - P|| = {norm(P @ P - P):.0e}")
print(f"orthogonal:           ||P - P^T|| = {norm(P - P.T):.0e}")
print(f"solves (6):       ||P - J J^+||   = {norm(P - nearest):.0e}")
print(f"dimension of the tangent space    = {float(jnp.trace(P)):.6f}, the manifold's is {dimension}")

Z = -jax.grad(loss)(to_dense(W0))
print(f"length of the gradient {norm(Z):.3f}, of its projection {norm(project(W0, Z)):.3f}")

# %% [markdown]
# What is lost is considerable at this point: most directions are not tangent. For a picture we take the smallest manifold
# with something to see. Symmetric $2 \times 2$ matrices have three entries, and those of rank 1 with a positive trace are a
# cone: with coordinates
#
# $$W = \frac{1}{\sqrt 2} \begin{pmatrix} z + x & y \\ y & z - x \end{pmatrix}, \qquad \|W\|^2 = x^2 + y^2 + z^2, \qquad
# \det W = \tfrac12 (z^2 - x^2 - y^2),$$
#
# it is $z = \sqrt{x^2 + y^2}$. Its only singular value is $\sigma = \|W\|$, the distance to the tip. The loss is a weighted
# squared distance to a target inside of the cone, of rank 2. From one start we follow the full flow (4) and the projected
# flow (5),
#
# $$\dot W(t) = -P(W(t))\, \nabla_W \mathcal L(W(t)).$$


# %%
def matrix(x, y, z):
    return jnp.array([[z + x, y], [y, z - x]]) / jnp.sqrt(2.0)


def coordinates(w):
    """x, y and z of symmetric matrices."""
    return np.array([w[..., 0, 0] - w[..., 1, 1], 2 * w[..., 0, 1], w[..., 0, 0] + w[..., 1, 1]]) / np.sqrt(2)


def on_cone(s, phi):
    """The point at distance s from the tip, at angle phi around the axis."""
    return s / np.sqrt(2) * np.array([np.cos(phi), np.sin(phi), np.ones_like(phi)])


target2 = matrix(0.75, 0.15, 1.35)
weights2 = jnp.array([[1.0, 0.6], [0.6, 1.6]])


def loss2(kernel):
    return 0.5 * jnp.sum(weights2 * (to_dense(kernel) - target2) ** 2)


begin = tdlrt_jax.hosvd(matrix(*on_cone(1.6, 0.84 * np.pi)), rank=1)
moments = np.linspace(0, 12, 200)
free = integrate(full_flow(loss2), begin, moments)
bound = integrate(projected_flow(loss2, begin), begin, moments)
print(f"determinant, at most, on (4): {float(jnp.abs(jnp.linalg.det(free.params)).max()):.2f}", end=", ")
print(f"on (5): {float(jnp.abs(jnp.linalg.det(bound.params)).max()):.0e}")

# %% [markdown]
# A cone can be cut open and laid flat without stretching. That is the right panel: every length and every angle on the
# manifold is as in the picture, and the contours are those of the loss on the manifold.


# %%
def unroll(w):
    """The point in the plane: the distance to the tip stays, angles around the axis shrink by sqrt(2)."""
    x, y, z = coordinates(w)
    s, psi = np.sqrt(x**2 + y**2 + z**2), np.arctan2(y, x) / np.sqrt(2)
    return np.array([s * np.cos(psi), s * np.sin(psi)])


S, PHI = np.meshgrid(np.linspace(0, 2.3, 60), np.linspace(-np.pi, np.pi, 120))
X = on_cone(S, PHI)
level = np.asarray(jax.vmap(loss2)(jnp.moveaxis(matrix(*X), (0, 1), (-2, -1)).reshape(-1, 2, 2))).reshape(S.shape)
depth = np.log(level)
depth = (depth - depth.min()) / np.ptp(depth)
colors = plt.get_cmap("viridis_r")

fig = plt.figure(figsize=(9, 4))
left, right = fig.add_gridspec(1, 2, width_ratios=(1.25, 1))
cone, flat = fig.add_subplot(left, projection="3d", computed_zorder=False), fig.add_subplot(right)
lower = S[0] <= 1.9  # the drawing in space ends below the one in the plane
cone.plot_surface(*X[:, :, lower], facecolors=colors(depth[:, lower]), alpha=0.4, rcount=40, ccount=40, linewidth=0)
plane = np.array([S * np.cos(PHI / np.sqrt(2)), S * np.sin(PHI / np.sqrt(2))])
flat.contourf(*plane, depth, levels=np.linspace(0, 1, 13), cmap=colors, alpha=0.4)
flat.contour(*plane, depth, levels=np.linspace(0, 1, 13), colors="0.4", linewidths=0.6)
cone.plot(*coordinates(free.params), "C3--", label="full flow (4)")
cone.plot(*coordinates(bound.params), "C0", linewidth=2, label="projected flow (5)")
cone.plot(*coordinates(target2), "k*", markersize=10, label="target, rank 2")
flat.plot(*unroll(bound.params), "C0", linewidth=2)
for k in (0, 14):
    w = bound.params[k]
    at, push = coordinates(w), 0.5 * coordinates(-jax.grad(loss2)(w))
    tangent = 0.5 * coordinates(project(tdlrt_jax.hosvd(w, rank=1), -jax.grad(loss2)(w)))
    cone.quiver(*at, *push, color="C3", arrow_length_ratio=0.15)
    cone.quiver(*at, *tangent, color="k", arrow_length_ratio=0.15)
    cone.plot(*np.transpose([at + push, at + tangent]), color="0.3", linestyle=":")
    arrow = (unroll(w + 1e-4 * matrix(*tangent)) - unroll(w)) / 1e-4
    flat.quiver(*unroll(w), *arrow, angles="xy", scale_units="xy", scale=1, color="k", width=0.008, zorder=5)
flat.plot(0, 0, "ko", markersize=4)
flat.annotate("tip: $W = 0$", (0, 0), (-1.05, -0.08))
flat.set(aspect="equal", title="laid flat, with contours of the loss")
flat.axis("off")
cone.set(xlabel="$x$", ylabel="$y$", zlabel="$z$", xticks=(-1, 0, 1), yticks=(-1, 0, 1), zticks=(0, 1))
cone.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), zlim=(0, 1.4), title="the matrices of rank 1: a cone")
cone.view_init(elev=22, azim=60)
cone.set_box_aspect((2, 2, 1), zoom=1.3)
cone.legend(loc="upper left", fontsize="small")
plt.show()

# %% [markdown]
# The full flow goes through the inside of the cone to its target. The projection (black) takes from the negative gradient
# (red) what points off the cone, and the rest slides along it to the nearest that rank 1 has to offer. In the plane the
# arrows meet the contours at right angles: the projected flow is the gradient flow of the loss *on* the manifold.
#
# ## 3. One flow in three kinds of variables
#
# No one would store $W$ to follow (5). In core and factors, with $U_i^\top \dot U_i = 0$ to make them unique, it becomes
# equation (7),
#
# $$\dot U_i = -(I - U_i U_i^\top)\, \mathrm{Mat}_i\big(\nabla_W \mathcal L \times_{j \ne i} U_j^\top\big)\,
# \mathrm{Mat}_i(C)^\dagger , \qquad \dot C = -\nabla_W \mathcal L \times_j U_j^\top ,$$
#
# and with $\mathrm{Mat}_i(C)^\top = Q_i S_i^\top$ and $K_i = U_i S_i$ equation (8) of Theorem 1,
#
# $$\dot K_i = -\nabla_{K_i} \mathcal L\big(\mathrm{Ten}_i(Q_i^\top) \times_{j \ne i} U_j \times_i K_i\big), \qquad
# \dot C = -\nabla_C \mathcal L\big(C \times_j U_j\big).$$
#
# The library has all three. The states differ, the kernels should not, up to the errors of the solver. So we integrate with
# smaller and smaller tolerances for these errors: a difference of the flows themselves would remain.

# %%
flows = {"(5)": projected_flow(loss, W0), "(7)": factor_flow(loss), "(8)": kc_flow(loss)}
times = np.linspace(0, 2, 21)
tolerances = (1e-5, 1e-9) if SMALL else (1e-5, 1e-7, 1e-9, 1e-11)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for number, rtol in enumerate(tolerances):
    solved = {
        name: integrate(flow, W0, times, solver="dopri8", rtol=rtol, atol=rtol / 100) for name, flow in flows.items()
    }
    assert all(trajectory.statistics.succeeded for trajectory in solved.values())
    for ax, name in ((left, "(5)"), (right, "(8)")):
        apart = [norm(a - b) / norm(b) for a, b in zip(solved[name].params, solved["(7)"].params)]
        ax.semilogy(times[1:], apart[1:], color=f"C{number}", marker=".", label=f"tolerance {rtol:.0e}")
left.set(xlabel="$t$", title="between (5) and (7)", ylabel="relative distance", ylim=(1e-14, 1e-3))
right.set(xlabel="$t$", title="between (8) and (7)")
right.legend(fontsize="small", ncols=2, loc="upper center")
plt.show()

moved = norm(solved["(7)"].params[-1] - to_dense(W0)) / norm(to_dense(W0))
print(f"for comparison: the kernel itself moves by {moved:.1f} times its norm")

# %% [markdown]
# A word of honesty about (8), which is not written in the theorem. $Q_i$ and $S_i$ are determined by $\mathrm{Mat}_i(C)$ only
# up to a rotation, and as $C$ moves one has to say how they move. The product rule on
# $K_i Q_i^\top = U_i\, \mathrm{Mat}_i(C)$ gives
#
# $$\dot K_i + K_i\, \dot Q_i^\top Q_i = -\nabla_{K_i} \mathcal L .$$
#
# So (8) holds as it stands if $Q_i^\top \dot Q_i = 0$. This is what `kc_flow` does: it carries a $Q_i$ along that never turns
# within its own range. With a fresh QR decomposition at every instant, $\dot Q_i^\top Q_i$ is a skew matrix that turns the
# columns of $K_i$ among themselves. Their range is the same, and that is all a step of Algorithm 1 takes from $K_i$. Here are
# both along the trajectory.


# %%
def decomposed(core, u, mode):
    """K_i and Q_i by a QR decomposition."""
    Q, s_transposed = jnp.linalg.qr(unfold(core, mode).T)
    return u @ s_transposed.T, Q


@jax.jit
def defects(kernel):
    """How far the K_i' of such decompositions are from -grad, relative to it: as they are, and with K_i Q_i'^T Q_i added."""
    velocity = flows["(7)"].velocity(kernel)
    gradient = jax.grad(loss)(to_dense(kernel))
    plain, corrected = [], []
    for mode, (u, du) in enumerate(zip(kernel.factors, velocity.factors)):
        (K, Q), (dK, dQ) = jax.jvp(partial(decomposed, mode=mode), (kernel.core, u), (velocity.core, du))
        descent = -unfold(multi_mode_product(gradient, kernel.factors, transpose=True, skip=mode), mode) @ Q
        plain.append(jnp.linalg.norm(dK - descent) / jnp.linalg.norm(descent))
        corrected.append(jnp.linalg.norm(dK + K @ dQ.T @ Q - descent) / jnp.linalg.norm(descent))
    return jnp.stack([jnp.stack(plain).max(), jnp.stack(corrected).max()])


states = solved["(7)"].states
plain, corrected = np.array(jax.lax.map(defects, states)).T
frames = solved["(8)"].states
turns = [norm(q @ q.T - jnp.eye(rank)) for q in (unfold(frames.Q[mode][-1], mode) for mode in range(3))]

fig, ax = plt.subplots(figsize=(5.5, 3))
ax.semilogy(times, plain, marker=".", label=r"$\dot K_i$ of a QR at every instant")
ax.semilogy(times, corrected, marker=".", label=r"the same, with $K_i \dot Q_i^\top Q_i$ added")
ax.set(xlabel="$t$", title=r"relative distance from $-\nabla_{K_i} \mathcal{L}$", ylim=(1e-17, 10))
ax.legend(fontsize="small")
plt.show()
print(f"Q_i at the end of (8) is orthonormal to {max(turns):.0e}")

# %% [markdown]
# ## 4. What goes wrong in (7)
#
# The manifold is curved, and near kernels of lower rank it bends sharply. On the cone one can see it: at the distance
# $\sigma$ from the tip, the radius of curvature is $\sigma$. In (7) this is the pseudoinverse $\mathrm{Mat}_i(C)^\dagger$,
# which divides by the smallest singular value. An Euler step of (7) moves $U_i$ by about $h / \sigma$. Its products with the
# others then have terms of the size $\sigma\, (h / \sigma)^2$, and these are small beside the step itself only if
# $h \ll \sigma$.
#
# Small singular values are not an exception: training begins with more ranks than needed, or is about to drop one, or has
# just added one. We start from kernels with smaller and smaller $\sigma_3 = \sigma$, which as tensors are hardly different,
# and take steps of one size. `flow_step` with `inner="euler"` is Algorithm 1 with plain gradient descent, here with tolerance
# 0 and arrays that have room for three directions, so that the ranks stay (3, 3, 3).

# %%
steps = 20
algorithm1 = flow_step(loss, integrator="bug", inner="euler")


def euler_on_factors(kernel, h):
    return jax.tree.map(lambda x, velocity: x + h * velocity, kernel, flows["(7)"].velocity(kernel))


def algorithm1_step(kernel, h):
    return algorithm1(kernel, h, 0.0)[0]


@partial(jax.jit, static_argnums=0)
def losses(step, kernel, h):
    """The losses at the start and after each of so many steps."""

    def body(kernel, _):
        kernel = step(kernel, h)
        return kernel, loss(kernel)

    return jnp.append(loss(kernel), jax.lax.scan(body, kernel, None, length=steps)[1])


h = 0.1
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for number, sigma in enumerate((1e-1, 1e-2, 1e-3, 1e-4)):
    style = {"color": f"C{number}", "marker": "osD^"[number], "markersize": 9 - 2 * number, "markerfacecolor": "none"}
    of_factors = np.minimum(losses(euler_on_factors, start(sigma), h), 1e9)  # soon they overflow
    left.semilogy(of_factors, label=rf"$\sigma = 10^{{-{number + 1}}}$", **style)
    right.semilogy(losses(algorithm1_step, start(sigma), h), **style)
left.set(xlabel="step", ylabel="loss", title=f"Euler steps on (7), $h = {h}$", ylim=(0.05, 1e4))
right.set(xlabel="step", title=f"Algorithm 1, $h = {h}$")
left.legend(loc="upper right")
plt.show()

# %% [markdown]
# On the left only the largest $\sigma$ survives, the others leave the picture after a step or two. On the right one can
# hardly tell the curves apart. (Where both work they are not the same: Algorithm 1 augments the bases and truncates in every
# step.) Next, the largest step size with which the loss falls in each of 20 steps, by bisection.

# %%
sigmas = np.geomspace(1e-1, 1e-6, 3 if SMALL else 6)


def largest_step(step, kernel, low=1e-10, high=10.0):
    """The largest step size that lets the loss fall all the time."""
    for _ in range(12):
        middle = np.sqrt(low * high)
        found = np.asarray(losses(step, kernel, middle))
        falls = np.all(np.isfinite(found)) and np.all(np.diff(found) <= 0)
        low, high = (middle, high) if falls else (low, middle)
    return low


largest_7 = [largest_step(euler_on_factors, start(sigma)) for sigma in sigmas]
largest_1 = [largest_step(algorithm1_step, start(sigma)) for sigma in sigmas]
slope = np.polyfit(np.log(sigmas), np.log(largest_7), 1)[0]
print(f"the largest step on (7) falls like sigma to the power {slope:.2f}")
print(f"that of Algorithm 1 stays between {min(largest_1):.2f} and {max(largest_1):.2f}")

# %% [markdown]
# Adaptive solvers find small steps by themselves. How many they need up to a time $t$ shows where they spend them.

# %%
ends = np.geomspace(1e-7, 1, 8 if SMALL else 15)
spent = {
    sigma: [integrate(flows["(7)"], start(sigma), t, rtol=1e-6, atol=1e-8).statistics for t in ends]
    for sigma in sigmas[:: 2 if SMALL else 1]
}

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.loglog(sigmas, largest_7, marker="o", label="Euler on (7)")
left.loglog(sigmas, largest_1, marker="s", label="Algorithm 1")
left.loglog(sigmas, sigmas, color="0.4", linestyle=":", label=r"$h = \sigma$")
left.set(xlabel=r"$\sigma$", title="largest step size")
left.invert_xaxis()
left.legend()
for number, (sigma, statistics) in enumerate(spent.items()):
    label = rf"$\sigma = 10^{{{round(np.log10(sigma))}}}$"
    right.semilogx(ends, [s.accepted + s.rejected for s in statistics], f"C{number}", marker=".", label=label)
    right.semilogx(ends, [s.rejected for s in statistics], f"C{number}", linestyle=":")
right.set(xlabel="$t$", title="steps of an adaptive solver of (7) up to $t$")
right.legend(fontsize="small", title="dotted: rejected", title_fontsize="small")
plt.show()

# %% [markdown]
# A curve rises once $t$ is about as large as $\sigma$: there the solver has to follow a factor that turns within the time
# $\sigma$. After that the small singular value has grown with $t$, steps get longer, and every decade of time costs about ten
# of them. So the price is a transient, and grows with $\log(1 / \sigma)$ only; but it is due whenever a singular value is
# small, and fixed step sizes, with which networks are trained, cannot pay it.
#
# ## 5. From the flow to the algorithm
#
# The change of variables to $K_i$ and $C$ does not take the curvature away: it belongs to the manifold. Followed exactly, (8)
# turns as fast as (7), since $U_i = K_i S_i^{-1}$, and takes an adaptive solver more and more steps too, as printed below.
# What helps is what Algorithm 1 does with (8): it holds $U_j$ and $Q_i$ still for a step, and then nothing is inverted, and
# nothing bends. The sub-steps for $K_i$ and for $C$ are motions in a flat space, with the Lipschitz constant of the loss
# itself. They may be solved exactly, as the paper's theorems assume, or by one Euler step, as in training. The two differ in
# one argument. Bases, augmentation and truncation are the same code.

# %%
exact = flow_step(loss, integrator="bug", inner="exact", rtol=1e-8, atol=1e-10)
table = ["solver steps for   (8) up to t = 1   the sub-steps of one step with h = 0.1"]
for sigma in (1e-1, 1e-3, 1e-6):
    statistics = integrate(flows["(8)"], start(sigma), 1.0, rtol=1e-6, atol=1e-8).statistics
    _, info = exact(start(sigma), 0.1, 0.0)
    table.append(f"sigma = {sigma:.0e}   {statistics.accepted + statistics.rejected:16} {int(info.inner_steps):19}")
print("\n".join(table))

# %% [markdown]
# On the cone one can watch the steps, first picture below. In each, the basis gets a second direction, the core's step leaves
# the cone, and truncation brings the matrix back to it.
#
# How near do the steps come to the flow? Theorem 3 compares with the full flow, and assumes a gradient close to the tangent
# space. The plainest loss with a gradient exactly in it is a quadratic one, with symmetric matrices $H_i$,
#
# $$\mathcal L(W) = \tfrac12 \sum_i \langle W, W \times_i H_i \rangle, \qquad
# \nabla \mathcal L = \sum_i W \times_i H_i, \qquad W(t) = W(0) \times_i e^{-t H_i} ,$$
#
# whose full flow turns and stretches the bases and keeps the ranks. Beside it we take the loss from above, whose gradient is
# far from tangent, and compare with the projected flow (5).


# %%
@partial(jax.jit, static_argnums=(0, 3))
def follow(step, kernel, h, count):
    """The kernels at the start and after each of so many steps, as full arrays."""
    move = lambda kernel, _: (step(kernel, h, 0.0)[0], to_dense(kernel))
    return jax.lax.scan(move, kernel, None, length=count + 1)[1]


def at_one(step, kernel, count):
    """The kernel at t = 1 after so many steps, as a full array."""
    for _ in range(count):
        kernel, _ = step(kernel, 1 / count, 0.0)
    return to_dense(kernel)


turning = [orthonormal(n, n) for n in shape]
rates = [jnp.linspace(-1, 1, n) for n in shape]
H = [v @ jnp.diag(r) @ v.T for v, r in zip(turning, rates)]
decay = [v @ jnp.diag(jnp.exp(-r)) @ v.T for v, r in zip(turning, rates)]  # e^{-H_i}


def tangent_loss(kernel):
    w = to_dense(kernel)
    return 0.5 * sum(jnp.vdot(w, multi_mode_product(w, [H[i] if i == j else None for j in range(3)])) for i in range(3))


counts, finer = ((4, 8), (160,)) if SMALL else ((5, 10, 20, 40), (160, 640, 2560))
inners = ("exact", "euler")
options = {"rtol": 1e-8, "atol": 1e-10}
errors = {}
for inner in inners:
    tangent_step = flow_step(tangent_loss, inner=inner, **options)
    for sigma in (1e-1, 1e-12):
        goal = multi_mode_product(to_dense(start(sigma)), decay)
        ends = [at_one(tangent_step, start(sigma), n) for n in counts]
        errors["tangent", inner, sigma] = counts, [norm(w - goal) / norm(goal) for w in ends]
for sigma in (0.2, 1e-2):
    goal = integrate(flows["(7)"], start(sigma), 1.0).params[-1]
    for inner, step, used in (("exact", exact, counts), ("euler", algorithm1, counts + finer)):
        ends = [at_one(step, start(sigma), n) for n in used]
        errors["smooth", inner, sigma] = used, [norm(w - goal) / norm(goal) for w in ends]
        print(f"sigma = {sigma:4}, {inner}: loss of the flow {loss(goal):.3f}", end=", ")
        print(f"of {counts[-1]} steps {loss(ends[len(counts) - 1]):.3f}")

# %%
fig, panels = plt.subplots(1, 3, figsize=(11.5, 3.4), width_ratios=(1.2, 1, 1))
panels[0].contour(*plane, depth, levels=np.linspace(0, 1, 13), colors="0.85", linewidths=0.8)
panels[0].plot(*unroll(bound.params), "C0", label="flow (5)")
on_cone_step = {inner: flow_step(loss2, inner=inner, **options) for inner in inners}
for inner, h, style in (("euler", 0.8, "C1s--"), ("exact", 0.8, "ko--"), ("exact", 0.2, "k.")):
    points = unroll(follow(on_cone_step[inner], begin, h, 40))
    panels[0].plot(*points, style, linewidth=0.8, markerfacecolor="none", label=f"{inner}, $h = {h}$")
panels[0].legend(fontsize="small", loc="lower left")
panels[0].set(aspect="equal", title="steps on the cone, laid flat", xlim=(-0.7, 2), ylim=(-0.2, 1.7))
panels[0].axis("off")
for ax, kind in zip(panels[1:], ("tangent", "smooth")):
    for (_, inner, sigma), (used, values) in (item for item in errors.items() if item[0][0] == kind):
        style = {"color": {"exact": "k", "euler": "C1"}[inner]}
        style |= {"linewidth": 1.5, "marker": "o"} if sigma >= 0.1 else {"linestyle": "--", "marker": "x"}
        ax.loglog(1 / np.array(used), values, label=rf"{inner}, $\sigma$ = {sigma:g}", markerfacecolor="none", **style)
    ax.set(xlabel="$h$")
    ax.legend(fontsize="small")
panels[1].set_xticks(1 / np.array(counts), [f"1/{n}" for n in counts])
panels[1].minorticks_off()
panels[2].axvline(1e-2, color="0.6", linestyle=":")
panels[2].text(9e-3, 1.3e-4, r"$h = 0.01$", color="0.4", ha="right")
panels[1].set(title="tangent gradient: distance to (4)", ylabel="relative, at $t = 1$", ylim=(1e-16, 10))
panels[2].set(title="gradient not tangent: to (5)", ylim=(1e-4, 2))
plt.show()

# %% [markdown]
# Smaller steps come closer to the flow on the cone. In the middle, $\sigma$ makes no difference: the curves for a healthy and
# for a vanishing singular value lie on each other. Euler steps are of first order. Exact ones are exact up to rounding and
# the solver's tolerance, which Theorem 3 does not even promise: $K_i(h)$ spans $e^{-h H_i}\, \mathrm{range}(U_i)$ and with
# that the bases of the flow, so nothing is missing in the core's step.
#
# The right panel shows what is *not* promised. For a gradient far from tangent, steps much smaller than $\sigma$ do come
# to (5), and larger ones do not come near it. Within a time of about $\sigma$ the flow (5) turns the weak direction,
# and all that comes later depends on this turn. Steps with $h \gg \sigma$ do not see it. They choose the direction anew, by
# what is largest after the step, and the printed losses say that nothing is lost by it here: theirs are lower than the
# flow's. It is another path. Yet (5) is a means, and the goal is the kernel of the full flow (4), if there is a small one
# near it.
#
# ## 6. A winning ticket
#
# Suppose that there is one: a convolution with a kernel of small Tucker ranks, the *teacher*, which we are to find from its
# outputs. The loss is half the mean squared difference of outputs, for random images. The student begins with a random
# full-rank kernel. The full flow (4) finds the teacher as well, of course, but as a dense kernel. Algorithm 1 has the
# tolerance $\tau$, and is not told the ranks.

# %%
rng = np.random.default_rng(0)
shape, ticket = (3, 3, 5, 6), (2, 2, 2, 3)
images = jnp.asarray(rng.normal(size=(2, 6, 6, shape[2]) if SMALL else (4, 8, 8, shape[2])))
core = jnp.asarray(rng.normal(size=ticket))
teacher = to_dense(TuckerTensor(3 * core / norm(core), tuple(orthonormal(n, r) for n, r in zip(shape, ticket))))
answers = tdlrt_jax.tucker_conv(images, teacher)


def conv_loss(kernel):
    return 0.5 * jnp.sum((tdlrt_jax.tucker_conv(images, kernel) - answers) ** 2) / answers[..., 0].size


student = jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:3])))
print(f"norms: teacher {norm(teacher):.1f}, student {norm(student):.1f}")
for mode, r in enumerate(ticket):
    values = np.linalg.svd(unfold(teacher, mode), compute_uv=False)[:r] / norm(teacher)
    print(f"relative singular values of the teacher, mode {mode + 1}:", values.round(2))

h, count = (1.2, 8) if SMALL else (0.3, 40)
ticket_step = flow_step(conv_loss, integrator="bug", inner="exact", rtol=1e-6, atol=1e-8)


@jax.jit
def train(kernel, tolerance):
    """Full kernels, ranks and losses of so many steps."""

    def body(kernel, _):
        moved, _ = ticket_step(kernel, h, tolerance)
        return moved, (to_dense(kernel), tdlrt_jax.active_rank(kernel), conv_loss(kernel))

    return jax.lax.scan(body, kernel, None, length=count + 1)[1]


times = h * np.arange(count + 1)
large = tdlrt_jax.hosvd(student)  # all ranks, lossless
small = tdlrt_jax.resize(tdlrt_jax.hosvd(student, rank=1), shape)  # rank 1, with room for all
full = np.asarray(integrate(full_flow(conv_loss), large, times).params)
runs = {tau: jax.device_get(train(large, tau)) for tau in (0.3, 0.1, 0.03)}
grown = jax.device_get(train(small, 0.1))

# %%
fig, panels = plt.subplots(1, 3, figsize=(11, 3.2))
shown = {"ranks, from all": runs[0.3], "ranks, from 1": grown}
for ax, (title, (_, ranks, _)), tau in zip(panels, shown.items(), (0.3, 0.1)):
    for mode in range(4):
        shift = 0.06 * (mode - 1.5)  # so that equal ranks can be told apart
        ax.step(times, ranks[:, mode] + shift, color=f"C{mode}", where="post", label=f"mode {mode + 1}")
        ax.axhline(ticket[mode] + shift, color=f"C{mode}", linestyle=":")
    ax.set(xlabel="$t$", title=rf"{title}, $\tau = {tau}$", ylim=(0, 8))
panels[0].legend(fontsize="small", title="dotted: the teacher's", title_fontsize="small")
apart = {tau: [norm(y - w) / norm(teacher) for y, w in zip(kernels, full)] for tau, (kernels, _, _) in runs.items()}
for tau, distances in apart.items():
    panels[2].plot(times, distances, label=rf"$\tau = {tau}$")
panels[2].set(xlabel="$t$", title=r"$\|W(t) - Y(t)\|$ relative to the teacher")
panels[2].legend(fontsize="small")
plt.show()

# %%
print("largest distance to the full flow:", ", ".join(f"{max(d) / tau:.2f} tau for {tau}" for tau, d in apart.items()))
ends = {"full flow": (full[-1], shape, conv_loss(full[-1]))}
ends |= {f"tau = {tau}": [values[-1] for values in run] for tau, run in runs.items()}
ends |= {"tau = 0.1, from rank 1": [values[-1] for values in grown]}
table = ["at the end               ranks          loss     distance to the teacher"]
for name, (kernel, ranks, value) in ends.items():
    listed = str(tuple(np.asarray(ranks).tolist()))
    table.append(f"{name:24} {listed:12} {value:9.1e}     {norm(kernel - teacher) / norm(teacher):.4f}")
print("\n".join(table))

# %% [markdown]
# Nothing is dropped while the noise of the random start is larger than the tolerance allows. Until then a step with all ranks
# and exact sub-steps *is* the full flow, and the distance is zero up to the errors of the solvers. As the noise fades, the
# ranks fall to the teacher's and stay there: sooner for a large tolerance, later for a small one. A student of rank 1 gets
# its directions from the augmentation. It takes more than it needs at first, and ends at the same ranks.
#
# The distance to the full flow is largest just after the truncations, and is about $\tau$. (Theorem 3 allows $\tau$ to be
# lost in every step; here only a few steps lose anything.) Then it falls, since both go to the same kernel, and the table
# shows which of the two is nearer to it: what was cut away is noise, and the full flow still has to unlearn it. In these runs
# $\tau$ decides when the ticket is found, and not which. It could not be chosen freely, though: each of the four modes may
# drop a tail of $\tau / \sqrt 4$, and where this is more than the smallest relative singular value of the teacher, truncation
# would cut into the teacher itself.
#
# Next: [the theorems, measured](03_theorems.ipynb).
