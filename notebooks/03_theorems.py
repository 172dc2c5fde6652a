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
# # The theorems, measured
#
# The paper states three theorems about its method. This notebook measures what they say, on kernels small enough for the exact
# solution to be known. It is for readers of the paper who doubt.
#
# 1. The setting: losses with known constants, kernels with singular values down to $10^{-12}$.
# 2. Theorem 1: (7) and (8) are one flow, if $Q_i$ moves in the right gauge.
# 3. Theorem 2: every step lowers the loss, up to a multiple of the tolerance.
# 4. Theorem 3: the error is at most $c_1 \varepsilon + c_2 h + c_3 \tau / h$. Each term is measured by itself.
# 5. Sub-steps solved exactly, as the theorems assume, and Euler steps, as in training.
# 6. What the third theorem says about the choice of $h$ and $\tau$.
#
# The step size is $h$ here (the paper's $\lambda$), the tolerance is $\tau$. Kernels have three modes, to keep everything small;
# nothing depends on the number.

# %%
import os
from functools import partial
from typing import NamedTuple

import jax

jax.config.update(
    "jax_enable_x64", True
)  # float64: singular values of 1e-12 and errors of 1e-10 are below float32's rounding

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import tdlrt_jax
from tdlrt_jax.dynamics import factor_flow, flow_step, full_flow, integrate, kc_flow, project, projected_flow
from tdlrt_jax.initialization import tucker_spectral
from tdlrt_jax.tucker import multi_mode_product, unfold

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
SMALL = bool(os.environ.get("TDLRT_NOTEBOOK_SMALL"))  # for a quick test of this notebook

# %% [markdown]
# ## 1. The setting
#
# The theorems promise constants that do not depend on small singular values. So the smallest singular value of our kernels is
# prescribed: every unfolding has the singular values $1, 0.3, \sigma$ (before scaling to norm 1), and everything below is done
# for a harmless $\sigma$ and a tiny one.

# %%
SHAPE, RANK = (5, 6, 7), (3, 3, 3)
SIGMAS = (1e-1, 1e-12)


def kernel_with(sigma, shape=SHAPE):
    """A random kernel of norm 1 and Tucker rank (3, 3, 3) with a prescribed smallest singular value in every mode."""
    values = (1.0, 0.3, sigma)
    return tucker_spectral(jax.random.key(0), shape, RANK, singular_values=values, norm=1.0, dtype=jnp.float64)


for sigma in SIGMAS:
    for mode in range(3):
        values = jnp.linalg.svd(unfold(tdlrt_jax.to_dense(kernel_with(sigma)), mode), compute_uv=False)
        print(f"sigma = {sigma:.0e}, mode {mode + 1}:", "  ".join(f"{value:.1e}" for value in values[:3]))

# %% [markdown]
# For Theorems 1 and 2 we take the loss
#
# $$L(W) = \sum_j w_j \log\cosh(W_j - T_j), \qquad \nabla_W L = w \odot \tanh(W - T),$$
#
# which is not quadratic and has the constants of the theorems in closed form: $\|\nabla_W L\| \le L_1 = \|w\|$, and $\nabla_W L$
# has the Lipschitz constant $L_2 = \max_j w_j$. A look at random pairs of kernels confirms both.

# %%
rng = np.random.default_rng(0)
weights = jnp.asarray(rng.uniform(0.5, 1.5, SHAPE))
target = tdlrt_jax.to_dense(tucker_spectral(jax.random.key(1), SHAPE, RANK, decay=0.5, norm=2.0, dtype=jnp.float64))
L1, L2 = float(jnp.linalg.norm(weights)), float(jnp.max(weights))


def smooth_loss(kernel):
    """L(W), the kernel in any form; log cosh without overflow."""
    x = jnp.abs(tdlrt_jax.to_dense(kernel) - target)
    return jnp.sum(weights * (x + jnp.log1p(jnp.exp(-2 * x)) - jnp.log(2.0)))


gradient = jax.jit(jax.grad(smooth_loss))  # with respect to a full kernel


def norm(tensor):
    return float(np.linalg.norm(tensor))


largest, steepest = 0.0, 0.0
for scale in np.geomspace(0.01, 100, 50):
    Y1, Y2 = rng.normal(size=(2, *SHAPE)) * scale
    largest = max(largest, norm(gradient(Y1)))
    steepest = max(steepest, norm(gradient(target + Y1 / 1e4) - gradient(target + Y2 / 1e4)) / norm(Y1 - Y2) * 1e4)
print(f"L1 = {L1:.2f}, largest gradient seen:      {largest:.2f}")
print(f"L2 = {L2:.2f}, largest change of gradient: {steepest:.2f} times the change of the kernel")

# %% [markdown]
# ## 2. Theorem 1: two systems, one flow
#
# The projected flow (5) is $\dot W = -P(W) \nabla_W L(W)$. The system (7) is this flow in core and factors, the system (8) in
# $K_i = U_i S_i$ and core. `tdlrt_jax.dynamics` has all three as ordinary differential equations. We solve them to a tight
# tolerance with the same method and compare the kernels $W(t)$, for $\sigma$ as far down as (7) can be solved with some comfort.

# %%
times = np.linspace(0, 1, 6 if SMALL else 11)
flows = {
    "(5)": projected_flow(smooth_loss, kernel_with(0.1)),
    "(7)": factor_flow(smooth_loss),
    "(8)": kc_flow(smooth_loss),
}
solved = {}
print("sigma   moved     (7) - (8)   (7) - (5)   solver's steps for (5), (7), (8)")
for sigma in (1e-1, 1e-2, 1e-3, 1e-4):
    found = {
        name: integrate(flow, kernel_with(sigma), times, solver="dopri8", rtol=1e-11, atol=1e-13, max_steps=100_000)
        for name, flow in flows.items()
    }
    W = {name: np.asarray(trajectory.params) for name, trajectory in found.items()}
    moved = norm(W["(7)"][-1] - W["(7)"][0])
    apart = [max(norm(x - y) for x, y in zip(W["(7)"], W[other])) for other in ("(8)", "(5)")]
    steps = ", ".join(f"{t.statistics.accepted + t.statistics.rejected:3d}" for t in found.values())
    print(f"{sigma:.0e}   {moved:.2f}      {apart[0]:.0e}       {apart[1]:.0e}       {steps}")
    solved[sigma] = found

# %% [markdown]
# The three agree to the tolerance of the solver: they are one flow.
#
# **The gauge.** There is a condition behind (8). The decomposition $\mathrm{Mat}_i(C)^\top = Q_i S_i^\top$ is not unique: $Q_i R$
# and $S_i R$ with an orthogonal matrix $R$ do as well. Along the flow, the product rule on
# $K_i Q_i^\top = U_i\,\mathrm{Mat}_i(C)$ gives
#
# $$\dot K_i + K_i\,(\dot Q_i^\top Q_i) = -\nabla_{K_i} L .$$
#
# So (8) holds as it stands if $Q_i$ moves with $Q_i^\top \dot Q_i = 0$, and this is how `kc_flow` moves it. If one takes a QR
# decomposition *at every instant*, $S_i$ stays triangular, $\dot Q_i^\top Q_i$ is a skew matrix, and a term is missing from (8).
# It turns the columns of $K_i$ among themselves. It does not change their range, and the range is all that Algorithm 1 takes from
# $K_i$. We measure all of this:


# %%
def k_by_qr(kernel, mode):
    """K_i and Q_i of a QR decomposition of Mat_i(C)^T."""
    Q, R = jnp.linalg.qr(unfold(kernel.core, mode).T)
    return kernel.factors[mode] @ R.T, Q


@jax.jit
@jax.vmap
def defects(kernel, velocity, full_gradient):
    """Per mode: how far K_i' is from -∇_{K_i} L, relative to it, with a QR decomposition at every instant; without the
    turning term and with it."""
    found = []
    for mode in range(3):
        (K, Q), (dK, dQ) = jax.jvp(partial(k_by_qr, mode=mode), (kernel,), (velocity,))
        inside = multi_mode_product(full_gradient, kernel.factors, transpose=True, skip=mode)
        descent = -unfold(inside, mode) @ Q
        missing = [dK - descent, dK + K @ (dQ.T @ Q) - descent]
        found.append(jnp.stack([jnp.linalg.norm(x) for x in missing]) / jnp.linalg.norm(descent))
    return jnp.stack(found)


factors, moving = solved[1e-1]["(7)"], solved[1e-1]["(8)"]
velocities = jax.vmap(flows["(7)"].velocity)(factors.states)
without, with_turn = jnp.moveaxis(defects(factors.states, velocities, jax.vmap(gradient)(factors.params)), -1, 0)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
left.semilogy(times, without.max(1), marker="o", label=r"$\|\dot K_i + \nabla_{K_i} L\|$")
left.semilogy(times, with_turn.max(1), marker="s", label=r"$\|\dot K_i + K_i \dot Q_i^\top Q_i + \nabla_{K_i} L\|$")
left.set(
    title="QR at every instant: is (8) satisfied?", xlabel="$t$", ylabel="relative to the gradient", ylim=(1e-16, 10)
)
left.legend(loc="center right")
for mode in range(3):
    turned, product = [], []
    for k in range(len(times)):
        K_qr = np.asarray(k_by_qr(jax.tree.map(lambda leaf, k=k: leaf[k], factors.states), mode)[0])
        K_8 = np.asarray(moving.states.K[mode][k])
        K_qr = K_qr * np.sign(np.sum(K_qr * K_8, axis=0))  # a QR decomposition may choose the signs of columns
        turned.append(norm(K_qr - K_8) / norm(K_8))
        product.append(norm(K_qr @ K_qr.T - K_8 @ K_8.T) / norm(K_8 @ K_8.T))
    right.semilogy(times[1:], turned[1:], "C0", marker="o^v"[mode], label=r"$K_i$" if mode == 0 else None)
    right.semilogy(times[1:], product[1:], "C1", marker="o^v"[mode], label=r"$K_i K_i^\top$" if mode == 0 else None)
right.set(
    title="QR at every instant against (8), three modes", xlabel="$t$", ylabel="relative difference", ylim=(1e-16, 10)
)
right.legend(loc="center right")
plt.show()

# %% [markdown]
# Left: with a QR decomposition at every instant the equation $\dot K_i = -\nabla_{K_i} L$ is off by a sizeable part of the
# gradient, and with the turning term it holds to the accuracy of the
# trajectory. Right: the two $K_i$ drift apart, while $K_i K_i^\top$, and so the
# range and the singular values, stay the same.
#
# **What about the stiffness?** No inverse is written in (8). But the table above says that a solver takes about as many steps for
# (8) as for (7), and more for smaller $\sigma$. To follow the flow, $Q_i$ has to be carried along, and it turns as fast as $U_i$:
# the curvature belongs to the manifold, and no choice of variables removes it. What removes it is Algorithm 1, which holds $Q_i$
# and $U_j$ still during a step. `flow_step` does such a step with its sub-steps solved to a tolerance, and tells how many steps
# the solver needed for them:

# %%
step = flow_step(smooth_loss)  # "bug": Algorithm 1 as it stands


@jax.jit
def one_step(kernel, h, tau):
    """The loss and the norm of the kernel after one step; steps of the inner solver."""
    moved, info = step(kernel, h, tau)
    return smooth_loss(moved), jnp.linalg.norm(moved.core), info.inner_steps


print("sigma   solver's steps within one step of Algorithm 1 of size 1")
for sigma in (1e-1, 1e-2, 1e-3, 1e-4, 1e-8, 1e-12):
    print(f"{sigma:.0e}   {int(one_step(tdlrt_jax.resize(kernel_with(sigma), SHAPE), 1.0, 0.0)[2])}")

# %% [markdown]
# The same for all $\sigma$. (`resize` gave the arrays room for every rank, so that only $\tau$ truncates.)
#
# ## 3. Theorem 2: descent
#
# One step with exact sub-steps from $W(0)$ to $W(h)$ gives
#
# $$L(W(h)) \;\le\; L(W(0)) - \alpha h + \beta \tau$$
#
# with constants that do not depend on $h$ and $\tau$. We measure $\alpha$ as the least descent per step size without truncation,
# and $\beta$ as the largest loss per tolerance that truncation adds, on every other point of a grid. Then we try the inequality
# on the other points, at step sizes *and* tolerances that were not used.

# %%
hs = np.geomspace(1e-3, 1, 5 if SMALL else 7)
taus = np.geomspace(1e-3, 0.3, 5 if SMALL else 9)


def measure_descent(sigma):
    """Losses over the grid, alpha and beta from every other point, and the inequality at the others."""
    start = kernel_with(sigma)
    kernel, before = tdlrt_jax.resize(start, SHAPE), float(smooth_loss(start))
    plain, norms, _ = map(np.array, zip(*[one_step(kernel, h, 0.0) for h in hs]))
    losses = np.array([[float(one_step(kernel, h, tau)[0]) for tau in taus] for h in hs])
    rates = (before - plain) / hs
    excess = losses - plain[:, None]
    alpha, beta = rates[::2].min(), max((excess / taus)[::2, ::2].max(), 0.0)
    allowed = -alpha * hs[:, None] + beta * taus
    return {
        "rates": rates,
        "excess": excess,
        "alpha": alpha,
        "beta": beta,
        "beta bound": L1 * norms.max(),
        "first rate": first_rate(start),
        "allowed": allowed[1::2, 1::2].ravel(),
        "change": (losses - before)[1::2, 1::2].ravel(),
    }


def first_rate(kernel):
    """-dL/dh of a step at h = 0: the gradient's part within the augmented bases [U_i | dK_i], squared."""
    frame, full_gradient = tdlrt_jax.lift(kernel), gradient(tdlrt_jax.to_dense(kernel))
    bases = []
    for mode, U in enumerate(kernel.factors):
        inside = unfold(multi_mode_product(full_gradient, kernel.factors, transpose=True, skip=mode), mode)
        dK = inside @ unfold(frame.Q[mode], mode).T
        bases.append(jnp.linalg.qr(jnp.concatenate([U, dK], axis=1))[0])
    return norm(multi_mode_product(full_gradient, bases, transpose=True)) ** 2


descents = {sigma: measure_descent(sigma) for sigma in SIGMAS}
print("sigma   alpha   beta   L1 max||W(h)||   held-out pairs   above the bound   least distance to it")
for sigma, found in descents.items():
    slack = found["allowed"] - found["change"]
    print(
        f"{sigma:.0e}   {found['alpha']:.2f}    {found['beta']:.2f}   {found['beta bound']:.1f}             "
        f"{len(slack):2d}               {int((slack < 0).sum())}                 {slack.min():.1e}"
    )

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
for color, (sigma, found) in zip(("C0", "C1"), descents.items()):
    label = rf"$\sigma = 10^{{{round(np.log10(sigma))}}}$"
    left.semilogx(hs, found["rates"], color, marker="o", label=label)
    left.axhline(found["alpha"], color=color, linestyle="--")
    left.axhline(found["first rate"], color=color, linestyle=":")
    shown = np.where(found["excess"] > 1e-12, found["excess"], np.nan)
    middle.loglog(
        np.tile(taus, len(hs)),
        shown.ravel(),
        color,
        marker="o^"[color == "C1"],
        linestyle="",
        markersize=4,
        label=label,
    )
    middle.loglog(taus, found["beta"] * taus, color, linestyle="--")
    right.plot(found["allowed"], found["change"], color, marker="o^"[color == "C1"], linestyle="", label=label)
left.set(title=r"$(L(W(0)) - L(W(h)))\,/\,h$, no truncation", xlabel="$h$", ylim=(0, None))
left.legend(title=r"dashed: $\alpha$, dotted: $h \to 0$")
middle.set(title="loss added by truncation", xlabel=r"$\tau$")
middle.legend(title=r"all $h$; dashed: $\beta\tau$")
lowest = min(found["change"].min() for found in descents.values()) * 1.3
right.plot([lowest, 1], [lowest, 1], color="0.4", linestyle="--")
right.set(
    title="held-out pairs: under the diagonal?",
    xlabel=r"allowed, $-\alpha h + \beta\tau$",
    ylabel="$L(W(h)) - L(W(0))$",
)
for set_scale in (right.set_xscale, right.set_yscale):
    set_scale("symlog", linthresh=0.1)
right.set(xlim=(lowest, 1), ylim=(lowest, 1))
right.legend()
plt.show()

# %% [markdown]
# The descent per step size is largest for small steps, where it tends to the squared norm of the gradient's part within the
# augmented bases (dotted), and falls as the step uses up the descent there is. So $\alpha$ is the value at the largest $h$ that
# one wants to allow. Truncation adds far less than the bound $L_1 \max\|W(h)\|$ allows for $\beta$: what it drops is mostly not
# along the gradient. The inequality holds at all held-out pairs, and both constants are about the same for $\sigma = 10^{-12}$.
#
# ## 4. Theorem 3: distance to the full flow
#
# Let $W(t)$ be the solution of the full flow (4) and $Y(t)$ what $t/h$ steps of Algorithm 1 give. If the gradient is
# $\varepsilon$-close to the tangent space, then
#
# $$\|W(t) - Y(t)\| \;\le\; c_1\,\varepsilon + c_2\,h + c_3\,\tau / h .$$
#
# To see one term at a time we need a loss for which the others can be switched off. It is
#
# $$L(W) = \tfrac12 \sum_i \langle W,\, W \times_i H_i\rangle + \varepsilon\,\langle B, W\rangle, \qquad
# \nabla_W L = \sum_i W \times_i H_i + \varepsilon B, \qquad \|B\| = 1,$$
#
# with symmetric matrices $H_i$. The sum is in the tangent space at *every* kernel, since it moves $U_i$ by $H_i U_i$. So the
# distance of the gradient to the tangent space is at most $\varepsilon$, and zero for $\varepsilon = 0$. In the eigenvectors of
# the $H_i$ the full flow is diagonal, and has a closed form.

# %%
END = 0.5  # t


class Quadratic(NamedTuple):
    """A problem; an argument of compiled functions, so that one program does for all of them."""

    H: tuple[jax.Array, ...]
    B: jax.Array
    epsilon: float


def quadratic(shape, epsilon=0.0, decay=None):
    """Random H_i with eigenvalues between -1 and 1, and a random B of norm 1: its singular values decay, or are nearly equal."""
    rng = np.random.default_rng(2)
    H = []
    for n in shape:
        vectors = np.linalg.qr(rng.normal(size=(n, n)))[0]
        H.append(jnp.asarray(vectors @ np.diag(np.linspace(-1, 1, n)) @ vectors.T))
    if decay is None:
        B = jnp.asarray(rng.normal(size=shape))
    else:
        B = tdlrt_jax.to_dense(tucker_spectral(jax.random.key(3), shape, decay=decay, norm=1.0, dtype=jnp.float64))
    return Quadratic(tuple(H), B / jnp.linalg.norm(B), epsilon)


def moved_by(W, matrices):
    """The sum of W ×_i M_i."""
    return sum(multi_mode_product(W, [M if i == j else None for j in range(3)]) for i, M in enumerate(matrices))


def quadratic_loss(kernel, problem):
    W = tdlrt_jax.to_dense(kernel)
    return 0.5 * jnp.vdot(W, moved_by(W, problem.H)) + problem.epsilon * jnp.vdot(problem.B, W)


def full_solution(kernel, problem):
    """W(t) of the full flow at t = END: in the eigenvectors, w' = -rate w - epsilon b in every entry."""
    values, vectors = zip(*(np.linalg.eigh(H) for H in problem.H))
    rate = values[0][:, None, None] + values[1][:, None] + values[2]
    w, b = (multi_mode_product(x, vectors, transpose=True) for x in (tdlrt_jax.to_dense(kernel), problem.B))
    still = np.abs(rate) < 1e-12
    pushed = np.where(still, -END, np.expm1(-rate * END) / np.where(still, 1, rate))
    return np.asarray(multi_mode_product(np.exp(-rate * END) * w + problem.epsilon * b * pushed, vectors))


def outside(W, full_gradient):
    """The part of a gradient that is not in the tangent space, relative to the gradient."""
    return norm(full_gradient - project(W, full_gradient)) / norm(full_gradient)


def runner(loss, integrator="bug", inner="exact"):
    """Many steps as one compiled program: step size, tolerance, their number and the problem are arguments."""
    step = flow_step(loss, integrator=integrator, inner=inner)

    @jax.jit
    def run(kernel, h, tau, steps, *problem):
        def body(_, carry):
            kernel, _, solved = carry
            kernel, info = step(kernel, h, tau, *problem)
            return kernel, info.rank["kernel"], solved & info.solved

        first = kernel, jnp.zeros(3, jnp.int32), jnp.ones((), bool)
        kernel, rank, solved = jax.lax.fori_loop(0, steps, body, first)
        return tdlrt_jax.to_dense(kernel), rank, solved

    def follow(kernel, steps, *problem, tau=0.0):
        """Y(t) at t = END, and its ranks."""
        Y, rank, solved = run(kernel, END / steps, tau, int(steps), *problem)
        assert solved, "the sub-steps did not reach their tolerance"
        return np.asarray(Y), np.asarray(rank)

    return follow


def slope(x, y):
    """The observed order: the slope of log y over log x by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


problem = quadratic(SHAPE)
for sigma in SIGMAS:
    W = kernel_with(sigma)
    print(f"sigma = {sigma:.0e}: outside of the tangent space", end=" ")
    print(f"{outside(W, jax.grad(quadratic_loss)(tdlrt_jax.to_dense(W), problem)):.0e} of the gradient")

# %% [markdown]
# **The term in $\varepsilon$.** Steps so short that theirs does not count, arrays with room for rank 3 and no other truncation,
# and a normal part that grows.
#
# **The term in $h$.** Now $\varepsilon = 0$ and only $h$ changes.

# %%
follow = runner(quadratic_loss)
epsilons = np.geomspace(1e-3, 1e-1, 3 if SMALL else 5)
counts = 2 ** np.arange(2, 5 if SMALL else 7)  # of steps
eps_term, h_term = {}, {}
for sigma in SIGMAS:
    W = kernel_with(sigma)
    problems = [quadratic(SHAPE, float(e)) for e in epsilons]
    eps_term[sigma] = np.array([norm(follow(W, 64, p)[0] - full_solution(W, p)) for p in problems])
    h_term[sigma] = np.array([norm(follow(W, n, problem)[0] - full_solution(W, problem)) for n in counts])
    print(f"sigma = {sigma:.0e}: slope {slope(epsilons, eps_term[sigma]):.2f} in epsilon, expected 1", end="; ")
    print(f"slope {slope(END / counts, h_term[sigma]):.2f} in h, expected 1")

# %% [markdown]
# The error is of order 2 in $h$, not 1. This does not contradict the theorem, which is an upper bound, but we should know where
# the order comes from. In this loss, $H_i$ turns the subspace of mode $i$ by itself, whatever the other modes do. So the range of
# $K_i(h)$, found with the others held still, is just that of the solution, and only the core's step makes an error.
#
# If that is the reason, a loss in which the modes turn *each other* must be of order 1. With $G_i = \mathrm{Mat}_i(W)
# \mathrm{Mat}_i(W)^\top$ and random symmetric $A_i$, $D_i$ we take
#
# $$L(W) = \tfrac12 \sum_i \langle A_i, G_i\rangle + \tfrac12 \sum_i \langle A_i, G_i\rangle\,\langle D_{i+1}, G_{i+1}\rangle .$$
#
# Its gradient is again in the tangent space at every kernel, but the matrix that moves $U_i$ depends on the other modes. There is
# no closed form; the full flow is solved numerically to $10^{-12}$.


# %%
def random_symmetric(n):
    M = rng.normal(size=(n, n))
    return jnp.asarray((M + M.T) / np.linalg.norm(M + M.T, 2))


A, D = (tuple(random_symmetric(n) for n in SHAPE) for _ in range(2))


def coupled_loss(kernel):
    W = tdlrt_jax.to_dense(kernel)
    G = [unfold(W, mode) @ unfold(W, mode).T for mode in range(3)]
    a, d = ([jnp.vdot(M, G_i) for M, G_i in zip(matrices, G)] for matrices in (A, D))
    return 0.5 * sum(a) + 0.5 * (a[0] * d[1] + a[1] * d[2] + a[2] * d[0])


follow_coupled, coupled_flow, coupled_term = runner(coupled_loss), full_flow(coupled_loss), {}
for sigma in SIGMAS:
    W = kernel_with(sigma)
    exact = np.asarray(integrate(coupled_flow, W, END, solver="dopri8", rtol=1e-12, atol=1e-14).params[0])
    coupled_term[sigma] = np.array([norm(follow_coupled(W, n)[0] - exact) for n in counts])
    print(f"sigma = {sigma:.0e}: outside of the tangent space", end=" ")
    print(f"{outside(W, jax.grad(coupled_loss)(tdlrt_jax.to_dense(W))):.0e} of the gradient", end="; ")
    print(f"slope {slope(END / counts, coupled_term[sigma]):.2f} in h, expected 1")

# %% [markdown]
# Order 1: the theorem's order cannot be improved for Algorithm 1, and the quadratic loss is a lucky case.
#
# **The term in $\tau/h$.** Every step may drop $\tau \|Y\|$, and there are $t/h$ steps. To see it, every step must find new
# directions of all sizes, of which those below the tolerance are dropped. The plainest such problem has $H_i = 0$ and
# $\varepsilon = 1$: every step adds $-hB$, and the singular values of $B$ are halved from one to the next. The arrays have room
# for every rank. What truncation loses is the distance between the same steps with tolerance $\tau$ and with tolerance zero,
# which leaves the other two terms out. We do the same with $H_i$ as above, for comparison.
#
# The slope is over all pairs in which something is lost and directions beyond the first three survive. If none survive there is
# nothing more to lose, however large $\tau/h$ is.

# %%
LARGE = (10, 10, 10)
turning = quadratic(LARGE, epsilon=1.0, decay=0.5)
graded = turning._replace(H=tuple(jnp.zeros_like(H) for H in turning.H))
tolerances = np.geomspace(2e-4, 1e-2, 3 if SMALL else 5)


def lost_by_truncation(sigma, problem, counts):
    """Rows of tau / h, what is lost, and whether the pair is in the regression."""
    W, rows = tdlrt_jax.resize(kernel_with(sigma, LARGE), LARGE), []
    for n in counts:
        whole, _ = follow(W, n, problem)
        for tau in tolerances:
            Y, rank = follow(W, n, problem, tau=tau)
            lost = norm(Y - whole)
            rows.append((tau * n / END, lost, lost > 1e-10 and rank.min() > 3))
    return np.array(rows)


tau_term = {s: lost_by_truncation(s, graded, [16, 64] if SMALL else [16, 32, 64]) for s in SIGMAS}
turning_term = {s: lost_by_truncation(s, turning, [64]) for s in SIGMAS}

# %% [markdown]
# All terms together, with the slopes and the constants (the largest ratio of error and abscissa):

# %%
rows = {
    "epsilon": {s: (epsilons, eps_term[s]) for s in SIGMAS},
    "h, quadratic": {s: (END / counts, h_term[s]) for s in SIGMAS},
    "h, coupled": {s: (END / counts, coupled_term[s]) for s in SIGMAS},
    "tau / h": {s: tuple(tau_term[s][tau_term[s][:, 2] > 0][:, :2].T) for s in SIGMAS},
    "tau / h, H_i": {s: tuple(turning_term[s][turning_term[s][:, 2] > 0][:, :2].T) for s in SIGMAS},
}
print("term           expected   slope for sigma = 1e-1, 1e-12   constant for sigma = 1e-1, 1e-12")
for name, series in rows.items():
    slopes = "   ".join(f"{slope(x, y):5.2f}" for x, y in series.values())
    constants = "   ".join(f"{np.max(y / x):.1e}" for x, y in series.values())
    print(f"{name:13}  1          {slopes}                   {constants}")
worst = {s: np.max(tau_term[s][:, 1] / tau_term[s][:, 0]) for s in SIGMAS}
print("tau / h, constant over all pairs, those where no new direction survives too:", end=" ")
print("   ".join(f"{value:.1e}" for value in worst.values()))

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
for sigma, style in zip(SIGMAS, ({"marker": "o"}, {"marker": "x", "linestyle": "--"})):
    label = rf"$\sigma = 10^{{{round(np.log10(sigma))}}}$"
    left.loglog(epsilons, eps_term[sigma], color="C0", label=label, **style)
    middle.loglog(END / counts, coupled_term[sigma], color="C1", label="coupled" if sigma == 0.1 else None, **style)
    middle.loglog(END / counts, h_term[sigma], color="C0", label="quadratic" if sigma == 0.1 else None, **style)
    ratio, lost, used = tau_term[sigma].T
    for chosen, color in ((used > 0, "C0"), ((used == 0) & (lost > 1e-10), "0.6")):
        right.loglog(ratio[chosen], lost[chosen], color=color, marker=style["marker"], linestyle="")


def guide(ax, x, y, order):
    """A dashed line of a given order through a point."""
    x = np.asarray(x)
    ax.loglog(x, y * (x / x[-1]) ** order, color="0.3", linestyle=":", linewidth=1)
    ax.annotate(f"order {order}", (x[0], y * (x[0] / x[-1]) ** order), va="bottom", fontsize="small", color="0.3")


guide(left, epsilons, 2.2 * eps_term[0.1][-1], 1)
guide(middle, (END / counts)[::-1], 2.5 * coupled_term[0.1][0], 1)
guide(middle, (END / counts)[::-1], 2.5 * h_term[0.1][0], 2)
guide(right, np.geomspace(5e-3, 1, 9), 1.0, 1)
left.set(title="error over $\\varepsilon$", xlabel=r"$\varepsilon$", ylabel=r"$\|W(t) - Y(t)\|$")
middle.set(title="error over $h$, $\\varepsilon = 0$", xlabel="$h$")
right.set(title=r"lost by truncation, over $\tau/h$", xlabel=r"$\tau / h$", ylim=(1e-4, 2))
right.text(0.97, 0.05, "grey: no new\ndirection survives", ha="right", transform=right.transAxes, fontsize="small")
left.legend()
middle.legend(fontsize="small", loc=(0.03, 0.52))
plt.show()

# %% [markdown]
# The errors grow with $\varepsilon$, with $h$ and with $\tau/h$, and for a smallest singular value of $10^{-12}$ slopes and
# constants are close to those for $10^{-1}$. In $\varepsilon$ and, for the coupled loss, in $h$ the order is 1. In $\tau/h$ it is
# 1 up to some scatter, which has a reason: singular values come one at a time, so what a step drops is a staircase in $\tau$ and
# not a straight line. With the $H_i$ (the row below) the slope is clearly larger. They turn what was added while more is added,
# and small tolerances find less to drop. The bound allows this: what it needs is that the ratio of what is lost to $\tau/h$ has
# a bound, and the largest ratio is of the same size in both cases.
#
# ## 5. Exact sub-steps and Euler steps
#
# The theorems assume that the flows of $K_i$ and $C$ are solved exactly over a step. Training does one descent step for each: an
# Euler step, which is `inner="euler"`. The library has three integrators: `bug` is Algorithm 1, `parallel` does all descent steps
# from one evaluation of the gradient, and `fixed_rank` leaves out the augmentation. The quadratic loss, $\varepsilon = 0$ and
# rank 3:

# %%
methods = [(integrator, inner) for integrator in ("bug", "parallel", "fixed_rank") for inner in ("exact", "euler")]
if SMALL:
    methods = methods[::5]
orders = {}
for method in methods:
    follow_method = follow if method == ("bug", "exact") else runner(quadratic_loss, *method)
    for sigma in SIGMAS:
        W = kernel_with(sigma)
        orders[method, sigma] = np.array(
            [norm(follow_method(W, n, problem)[0] - full_solution(W, problem)) for n in counts]
        )

print("integrator   inner   sigma   order   order of the last two   error at the smallest h")
for ((integrator, inner), sigma), errors in orders.items():
    last = slope(END / counts[-2:], errors[-2:])
    print(
        f"{integrator:12} {inner:6}  {sigma:.0e}   {slope(END / counts, errors):.2f}    {last:.2f}                    "
        f"{errors[-1]:.1e}"
    )

fig, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
markers = {"bug": "o", "parallel": "s", "fixed_rank": "^"}
for ax, sigma in zip(panels, SIGMAS):
    for number, (integrator, inner) in enumerate(methods):
        style = {
            "color": f"C{number // 2}",
            "marker": markers[integrator],
            "linestyle": "--" if inner == "euler" else "-",
        }
        ax.loglog(END / counts, orders[(integrator, inner), sigma], label=f"{integrator}, {inner}", **style)
    ax.set(title=rf"$\sigma = 10^{{{round(np.log10(sigma))}}}$", xlabel="$h$")
panels[0].set_ylabel(r"$\|W(t) - Y(t)\|$")
panels[1].legend(fontsize="x-small", ncols=2, loc=(0.02, 0.43), handlelength=3.5)
plt.show()

# %% [markdown]
# With Euler sub-steps all three are of order 1: an Euler step is of order 1 by itself, and nothing that the integrator does
# around it can be better. (The errors of `bug` and `parallel` then agree so well that their lines coincide.) With exact sub-steps
# `fixed_rank` is of order 1, and `parallel` too, although for the tiny $\sigma$ its order comes down to 1 only slowly: the table
# has the order of the last two points beside that of all. Only `bug` profits from this loss, for the reason in section 4.
#
# So Euler steps cost training no *order* against `parallel` and `fixed_rank`, nor against `bug` for a loss like the coupled one,
# but a larger constant; and $\sigma$ hardly matters to them either. The price of `exact` is many gradients a step.
#
# ## 6. Which step size for a tolerance?
#
# For a given $\tau$ the bound has its minimum where its last two terms are equal:
#
# $$h^* = \sqrt{c_3\,\tau / c_2} .$$
#
# Shorter steps than this make matters *worse*, since more of them truncate. Do the errors themselves show it? We use tolerances
# that section 4 did not use, with $c_3$ from there, and $c_2$ from steps with $\tau = 0$. For $c_3$ there are two choices: the
# largest ratio of all, which the bound needs, and the median of those in the regression, which is what usually happens. The
# picture has a band between the two values of $h^*$.

# %%
W = tdlrt_jax.resize(kernel_with(1e-12, LARGE), LARGE)
exact = full_solution(W, graded)
many = np.unique(np.round(np.geomspace(2, 64 if SMALL else 160, 5 if SMALL else 11))).astype(int)
sizes = END / many
chosen = (5e-4, 2e-3, 8e-3)
without_cut = np.array([norm(follow(W, n, graded)[0] - exact) for n in many])
with_cut = {tau: [follow(W, n, graded, tau=tau) for n in many] for tau in chosen}
c2 = np.max(without_cut / sizes)
c3 = worst[1e-12]
ratio, lost, used = tau_term[1e-12].T
c3_median = np.median((lost / ratio)[used > 0])

fig, ax = plt.subplots(figsize=(7, 3.8))
ax.loglog(sizes, without_cut, color="0.4", linewidth=1, label=r"$\tau = 0$")
print(f"c2 = {c2:.2f}, c3 = {c3:.2f}, median {c3_median:.2f}")
print("tau     best h   h* for median c3   h* for c3   error at best h   least value of the bound")
for color, (tau, found) in zip(("C0", "C1", "C2"), with_cut.items()):
    errors = np.array([norm(Y - exact) for Y, _ in found])
    empty = np.array([rank.max() <= 3 for _, rank in found])
    best = errors.argmin()
    usual, worst_case = np.sqrt(c3_median * tau / c2), np.sqrt(c3 * tau / c2)
    print(
        f"{tau:.0e}   {sizes[best]:.4f}   {usual:.4f}             {worst_case:.4f}      {errors[best]:.3f}",
        end="             ",
    )
    print(f"{2 * np.sqrt(c2 * c3 * tau):.3f}")
    ax.loglog(sizes, errors, color=color, marker="o", markersize=5, label=rf"$\tau = {tau:g}$")
    ax.loglog(sizes[empty], errors[empty], color="w", marker="o", markersize=3, linestyle="")
    ax.loglog(sizes, c2 * sizes + c3 * tau / sizes, color=color, linestyle="--", linewidth=1)
    ax.axvspan(usual, worst_case, color=color, alpha=0.15, linewidth=0)
ax.set(xlabel="$h$", ylabel=r"$\|W(t) - Y(t)\|$", ylim=(1e-3, 2))
ax.legend(fontsize="small", title=r"dashed: the bound; bands: $h^*$")
plt.show()

# %% [markdown]
# The errors are U-shaped, with the minimum near $h^*$. To the right of it they follow $\tau = 0$: the step size decides. To the
# left they grow about like $\tau / h$, and then bend: the hollow marks are those at which $Y(t)$ ends with rank 3 at most. There
# every step adds less than the tolerance in each new direction, and all of it is dropped, every time. The bound goes on to rise;
# the error cannot. (The height of the dashed curves is fitted: $c_2$ and $c_3$ are the largest ratios measured, though $c_3$ at
# other tolerances. Where the minimum is was not fitted.)
#
# For training this says: a tolerance goes with a learning rate. With $\tau$ fixed, a much smaller learning rate does not give a
# more accurate kernel but one whose ranks no longer grow. To let the error fall with $h$, let $\tau$ fall like $h^2$. And a small
# singular value is no reason for small steps.
