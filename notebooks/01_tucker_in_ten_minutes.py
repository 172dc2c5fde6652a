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
# # Tucker kernels in ten minutes
#
# This notebook explains what the library trains and how it trains it. Every step is done once by hand, with a few lines of
# array code, and compared with the function of the library that does the same.
#
# 1. A kernel is stored as a small core and one basis for each mode.
# 2. A truncated higher-order SVD finds such a kernel for a given error.
# 3. A convolution with it is three small convolutions.
# 4. Theorem 1 says which gradients to take, and one backward pass gives all of them.
# 5. Algorithm 1 turns these gradients into the next kernel and chooses its ranks.
# 6. Repeated, this is training with ranks that fall.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Rectangle
from sklearn.datasets import load_digits

import tdlrt_jax
from tdlrt_jax.conv import count_work
from tdlrt_jax.tucker import multi_mode_product, unfold

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
MODES = ("height", "width", "in", "out")

# %% [markdown]
# ## 1. A core and four bases
#
# The kernel of a 2-D convolution is a tensor $W$ with four modes. This library stores them in JAX's order, height, width,
# in-channels and out-channels, with sizes $n_1, \dots, n_4$. In Tucker format it is
#
# $$W = C \times_1 U_1 \times_2 U_2 \times_3 U_3 \times_4 U_4, \qquad
# W_{ijkl} = \sum_{a,b,c,d} C_{abcd}\,(U_1)_{ia}\,(U_2)_{jb}\,(U_3)_{kc}\,(U_4)_{ld}.$$
#
# The *core* $C$ has the sizes $r_1, \dots, r_4$, the *ranks*. Each *factor* $U_i$ is a matrix of $n_i$ rows and $r_i$
# orthonormal columns: a basis of the subspace in which the slices of $W$ along mode $i$ lie.

# %%
shape, rank = (5, 5, 32, 64), (3, 3, 8, 12)
rng = np.random.default_rng(0)
core = jnp.asarray(rng.normal(size=rank), jnp.float32)
factors = tuple(jnp.asarray(np.linalg.qr(rng.normal(size=(n, r)))[0], jnp.float32) for n, r in zip(shape, rank))
kernel = tdlrt_jax.TuckerTensor(core, factors)

W = tdlrt_jax.to_dense(kernel)
by_definition = jnp.einsum("abcd,ia,jb,kc,ld->ijkl", core, *factors)
print("shape:", W.shape, " ranks:", tdlrt_jax.active_rank(kernel))
print("same tensor as by the definition:", bool(jnp.allclose(W, by_definition, atol=1e-5)))

# %% [markdown]
# What is stored is $r_1 r_2 r_3 r_4 + \sum_i n_i r_i$ numbers in the place of $n_1 n_2 n_3 n_4$. The picture is to scale: the
# area of every rectangle is the count of numbers in it.

# %%
dense_count, tucker_count = W.size, tdlrt_jax.parameter_count(shape, rank)
print(f"dense {dense_count:,}, Tucker {tucker_count:,}: compression {1 - tucker_count / dense_count:.1%}")

fig, ax = plt.subplots(figsize=(8, 4))
side, core_side = dense_count**0.5, core.size**0.5
ax.add_patch(Rectangle((0, 0), side, side, facecolor="C0", alpha=0.5))
ax.text(side / 2, side / 2, f"$W$\n{dense_count:,}", ha="center", va="center")
x = side + 30
rectangles = {"C": (core_side, core_side)} | {f"U_{i}": u.shape for i, u in enumerate(factors, 1)}
for name, (height, width) in rectangles.items():
    ax.add_patch(Rectangle((x, 0), width, height, facecolor="C1", alpha=0.8))
    ax.text(x + width / 2, -8, f"${name}$\n{round(height * width):,}", ha="center", va="top")
    x += width + 30
ax.set(xlim=(-5, x), ylim=(-40, side + 5), aspect="equal", title="numbers stored, to scale")
ax.axis("off")
plt.show()

# %% [markdown]
# The core grows with the *product* of the ranks, so halving all ranks of a large layer saves much more than half. The example
# of the paper is a kernel of 256 × 256 channels and 3 × 3 pixels with ranks (76, 76, 3, 3):

# %%
channels = np.arange(4, 257, 4)
counts = [tdlrt_jax.parameter_count((3, 3, 256, 256), (3, 3, r, r)) for r in channels]
paper = tdlrt_jax.parameter_count((3, 3, 256, 256), (3, 3, 76, 76))

fig, ax = plt.subplots(figsize=(5.5, 3))
ax.plot(channels, np.array(counts) / (9 * 256**2), label="core and factors")
ax.axhline(1, color="0.4", linestyle="--", label="dense kernel")
ax.plot(76, paper / (9 * 256**2), "o", color="C3", label=f"rank 76: {1 - paper / (9 * 256**2):.1%} saved")
ax.set(xlabel="rank of both channel modes", ylabel="numbers stored / dense", ylim=(0, 1.35))
ax.legend()
plt.show()

# %% [markdown]
# ## 2. Truncation: which ranks does a kernel need?
#
# The singular values of the unfolding $\mathrm{Mat}_i(W)$ (the matrix whose rows are the slices along mode $i$) say how well
# mode $i$ can be compressed: those of a trained kernel fall, those of a random one hardly do. To see this we train a small dense
# network on the handwritten digits that come with scikit-learn, with weight decay, which shrinks what the task does not need.
# `tucker_conv` takes an array as well, and is an ordinary convolution then, so the same function is our network for dense and
# for Tucker kernels.

# %%
digits = load_digits()
images = jax.image.resize(digits.images.astype(np.float32) / 16, (len(digits.images), 16, 16), "linear")
images = ((images - images.mean()) / images.std())[..., None]
labels = jnp.asarray(digits.target)
order = np.random.default_rng(0).permutation(len(labels))
train, test = order[:1437], order[1437:]


def max_pool(x):
    """The largest of every 2 × 2 pixels."""
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def network(params, x):
    """Two convolutions with ReLU and pooling, and a linear classifier."""
    for name in ("conv1", "conv2"):
        x = max_pool(jax.nn.relu(tdlrt_jax.tucker_conv(x, params[name]) + params[f"{name}_bias"]))
    return x.reshape(len(x), -1) @ params["linear"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


@jax.jit
def accuracy(params):
    return (network(params, images[test]).argmax(1) == labels[test]).mean()


def initial(seed=0):
    """Fresh dense parameters."""
    keys = jax.random.split(jax.random.key(seed), 3)
    he = jax.nn.initializers.he_normal()
    return {
        "conv1": he(keys[0], (5, 5, 1, 16)),
        "conv1_bias": jnp.zeros(16),
        "conv2": he(keys[1], (5, 5, 16, 32)),
        "conv2_bias": jnp.zeros(32),
        "linear": he(keys[2], (4 * 4 * 32, 10)),
    }


def batches(epochs, size=128, seed=0):
    """Shuffled training batches."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = rng.permutation(train)
        for start in range(0, len(train) - size + 1, size):
            chosen = shuffled[start : start + size]
            yield images[chosen], labels[chosen]


# %%
descent = optax.chain(optax.add_decayed_weights(0.04), optax.sgd(0.05, momentum=0.9))
dense = initial()
opt_state = descent.init(dense)


@jax.jit
def dense_step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, opt_state = descent.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for x, y in batches(epochs=12):
    dense, opt_state, loss = dense_step(dense, opt_state, x, y)
print(f"test accuracy of the dense network: {float(accuracy(dense)):.1%}")

# %%
fig, panels = plt.subplots(1, 4, figsize=(11, 2.6), sharey=True)
for mode, ax in enumerate(panels):
    for params, label in ((initial(), "random"), (dense, "trained")):
        values = np.linalg.svd(unfold(params["conv2"], mode), compute_uv=False)
        ax.semilogy(np.arange(1, len(values) + 1), values / values[0], marker=".", label=label)
    ax.set(title=f"mode {mode + 1}: {MODES[mode]}", xlabel="index")
panels[0].set_ylabel("relative singular value")
panels[0].legend()
plt.show()

# %% [markdown]
# The *higher-order SVD* (HOSVD) takes the leading left singular vectors of each unfolding as $U_i$ and puts
# $C = W \times_1 U_1^\top \cdots \times_4 U_4^\top$. What it loses is bounded by the singular values dropped,
#
# $$\|W - \hat W\|^2 \;\le\; \sum_{i=1}^{4} \sum_{k > r_i} \big(\sigma^{(i)}_k\big)^2 .$$
#
# So for a relative tolerance $\tau$ each mode may drop a tail of norm $\tau \|W\| / \sqrt 4$. `hosvd(W, tolerance=tau)` takes
# the smallest such ranks, one mode after the other.

# %%
W = dense["conv2"]
tolerances = np.geomspace(0.02, 0.7, 13)
found = [tdlrt_jax.hosvd(W, tolerance=float(tau)) for tau in tolerances]
errors = [float(jnp.linalg.norm((tdlrt_jax.to_dense(k) - W).ravel()) / jnp.linalg.norm(W.ravel())) for k in found]
ranks = np.array([tdlrt_jax.active_rank(k) for k in found])
stored = np.array([tdlrt_jax.parameter_count(W.shape, r) for r in ranks])

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3))
left.loglog(tolerances, errors, marker="o", label="error of the HOSVD")
left.loglog(tolerances, tolerances, color="0.4", linestyle="--", label=r"$\tau$")
left.set(xlabel=r"tolerance $\tau$", ylabel="relative error", ylim=(3e-3, 1))
left.legend()
for mode, name in enumerate(MODES):
    middle.semilogx(tolerances, ranks[:, mode] / W.shape[mode], marker=".", label=name)
middle.set(xlabel=r"tolerance $\tau$", ylabel="rank / size of the mode")
middle.legend()
right.plot(1 - stored / W.size, errors, marker="o")
right.set(xlabel="compression", ylabel="relative error", xlim=(-0.2, 1))
plt.show()

# %% [markdown]
# The error stays under the diagonal, as promised. (For the smallest tolerances nothing can be dropped, and the error is that of
# rounding, below the picture.) What does it mean for the network?

# %%
print(" tau   ranks             compression   test accuracy without further training")
for tau in (0.1, 0.3, 0.5, 0.7):
    cut = tdlrt_jax.hosvd(W, tolerance=tau)
    r = tuple(np.asarray(tdlrt_jax.active_rank(cut)).tolist())
    saved = 1 - tdlrt_jax.parameter_count(W.shape, r) / W.size
    print(f"{tau:4.1f}   {r!s:17} {saved:9.1%}       {float(accuracy(dense | {'conv2': cut})):.1%}")

# %% [markdown]
# On this small task much can be cut after training before the network notices. But it has to be trained at full size first,
# with the memory and time that this takes, and it cannot adapt to what is cut. Sections 4 to 6 truncate a little in every
# training step instead: then the network is small while it trains.
#
# ## 3. Convolution by a Tucker kernel
#
# The kernel need not be rebuilt. A channel mode commutes with the convolution over pixels, so
#
# $$Z * W \;=\; \Big( (Z\,U_3) * M \Big)\, U_4^\top, \qquad M = C \times_1 U_1 \times_2 U_2 ,$$
#
# three small convolutions: 1 × 1 from $n_3$ to $r_3$ channels, 5 × 5 from $r_3$ to $r_4$, and 1 × 1 from $r_4$ to $n_4$.

# %%
Z = jnp.asarray(rng.normal(size=(8, 16, 16, 32)), jnp.float32)
U1, U2, U3, U4 = kernel.factors


def conv(z, w):
    return jax.lax.conv_general_dilated(z, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


M = jnp.einsum("abcd,ia,jb->ijcd", kernel.core, U1, U2)
three = conv(conv(conv(Z, U3[None, None]), M), U4.T[None, None])
one = conv(Z, tdlrt_jax.to_dense(kernel))
print("kernels of the three:", U3[None, None].shape, M.shape, U4.T[None, None].shape)
print("same as the dense convolution:", bool(jnp.allclose(three, one, atol=1e-4)))
print("same as tucker_conv:          ", bool(jnp.allclose(three, tdlrt_jax.tucker_conv(Z, kernel), atol=1e-4)))

# %% [markdown]
# How many multiplications and additions this takes depends on the ranks. At ranks near the full ones the three stages cost more
# than the one dense convolution. The library counts the work of four *plans* and takes the cheapest: both channel modes
# streamed as above (`factored`), one of them merged into the middle kernel, or the kernel rebuilt (`dense`).

# %%
layer, image = (3, 3, 256, 256), (1, 16, 16, 256)
channels = np.arange(8, 257, 8)
fig, ax = plt.subplots(figsize=(6, 3.2))
reference = count_work("dense", layer, (None,) * 4, image).forward
for plan in ("factored", "merge_in", "merge_out", "dense"):
    work = [count_work(plan, layer, (3, 3, int(r), int(r)), image).forward for r in channels]
    ax.plot(channels, np.array(work) / reference, label=plan, linestyle=":" if plan == "merge_out" else "-")
ax.set(xlabel="rank of both channel modes (of 256)", ylabel="multiply-adds / dense", ylim=(0, 1.4))
ax.legend()
plt.show()

# %% [markdown]
# ## 4. Which gradients? Theorem 1
#
# Tensors of fixed ranks form a manifold. Training on it follows the gradient projected onto the tangent space at $W$. Written
# for the factors, this flow is equation (7) of the paper,
#
# $$\dot U_i = -(I - U_i U_i^\top)\, \mathrm{Mat}_i\big(\nabla_W L \times_{j \ne i} U_j^\top\big)\, \mathrm{Mat}_i(C)^\dagger ,
# \qquad \dot C = -\nabla_W L \times_j U_j^\top ,$$
#
# and the pseudoinverse $\mathrm{Mat}_i(C)^\dagger$ divides by the singular values of the kernel. Exactly where a kernel is
# about to lose a rank, the smallest of them is tiny, and a step explodes. The remedy is another variable. Decompose
# $\mathrm{Mat}_i(C)^\top = Q_i S_i^\top$ (QR) and take $K_i = U_i S_i$ in the place of $U_i$. Then (Theorem 1)
#
# $$\dot K_i = -\nabla_{K_i} L\big(\mathrm{Ten}_i(Q_i^\top) \times_{j \ne i} U_j \times_i K_i\big), \qquad
# \dot C = -\nabla_C L\big(C \times_j U_j\big),$$
#
# in which nothing is inverted. By the chain rule, these gradients are
#
# $$\nabla_{K_i} L = \mathrm{Mat}_i\big(\nabla_W L \times_{j \ne i} U_j^\top\big)\, Q_i, \qquad
# \nabla_C L = \nabla_W L \times_j U_j^\top .$$
#
# First a picture of why this matters. We let the smallest singular value of a kernel shrink and look at how fast $U_i$ and
# $K_i$ want to move, for one and the same gradient.

# %%
G = rng.normal(size=(5, 5, 32, 64))  # some gradient with respect to the full kernel
bases = [np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in G.shape]
inside = np.einsum("ijkl,ia,jb,kc->abcl", G, *bases[:3])  # G ×_j U_j^T for all modes but the last
turns = np.linalg.qr(rng.normal(size=(27, 3)))[0]

smallest = np.geomspace(1, 1e-8, 9)
speed_U, speed_K = [], []
for sigma in smallest:
    unfolding = np.diag([1, 0.5, sigma]) @ turns.T  # Mat_4(C)
    Q, _ = np.linalg.qr(unfolding.T)
    projected = np.moveaxis(inside, -1, 0).reshape(64, 27)
    outside = projected - bases[3] @ (bases[3].T @ projected)
    speed_U.append(np.linalg.norm(outside @ np.linalg.pinv(unfolding, rcond=1e-14)))
    speed_K.append(np.linalg.norm(projected @ Q))

fig, ax = plt.subplots(figsize=(5.5, 3))
ax.loglog(smallest, speed_U, marker="o", label=r"$\|\dot U_4\|$, equation (7)")
ax.loglog(smallest, speed_K, marker="s", label=r"$\|\dot K_4\|$, Theorem 1")
ax.set(xlabel="smallest singular value of the kernel", ylabel="norm of the velocity")
ax.invert_xaxis()
ax.legend()
plt.show()

# %% [markdown]
# Now the gradients themselves. `tdlrt_jax.value_and_grad` works like `jax.value_and_grad` and gives Theorem 1's gradients for
# every Tucker kernel in its first argument: an object of the kernel's structure with $\nabla_C L$ as the core and
# $\nabla_{K_i} L$ in the places of the factors. We compare it with the formulas above, for which the gradient with respect to
# the full kernel has to be formed.

# %%
params = initial() | {"conv2": tdlrt_jax.hosvd(initial()["conv2"], rank=(3, 3, 6, 8))}
x, y = images[train[:128]], labels[train[:128]]
_, grads = jax.jit(tdlrt_jax.value_and_grad(loss_fn))(params, x, y)

kernel = params["conv2"]
loss_of = lambda kernel, x, y: loss_fn(params | {"conv2": kernel}, x, y)  # of this one kernel, the others stay
full_gradient = jax.jit(jax.grad(loss_of))
full = full_gradient(tdlrt_jax.to_dense(kernel), x, y)
frame = tdlrt_jax.lift(kernel)  # C, K_i, U_i and Ten_i(Q_i^T)


def difference(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


by_hand = multi_mode_product(full, kernel.factors, transpose=True)
print(f"core:       shape {grads['conv2'].core.shape}, agrees: {difference(grads['conv2'].core, by_hand) < 1e-4}")
for mode in range(4):
    Q = unfold(frame.Q[mode], mode).T
    by_hand = unfold(multi_mode_product(full, kernel.factors, transpose=True, skip=mode), mode) @ Q
    agrees = difference(grads["conv2"].factors[mode], by_hand) < 1e-4
    print(f"K_{mode + 1}: {MODES[mode]:6}  shape {grads['conv2'].factors[mode].shape}, agrees: {agrees}")

# %% [markdown]
# The full gradient was formed for the comparison alone. The library never does that: all the gradients are the partial
# derivatives of *one* function at one point, the affine chart of the tangent space,
#
# $$W(C, K_1, \dots, K_4) = C \times_j U_j + \sum_i \mathrm{Ten}_i(Q_i^\top) \times_{j \ne i} U_j \times_i (K_i - U_i S_i),$$
#
# with $U_j$, $Q_i$, $S_i$ held constant. So a single backward pass gives all of them. `lift` makes this chart, a `Frame`, and
# ordinary automatic differentiation through it gives the same numbers:


# %%
def loss_at(C, K, x, y):
    return loss_of(frame._replace(core=C, K=K), x, y)


dC, dK = jax.jit(jax.grad(loss_at, argnums=(0, 1)))(frame.core, frame.K, x, y)
pairs = [(dC, grads["conv2"].core), *zip(dK, grads["conv2"].factors)]
print("the same by differentiating through the chart:", all(difference(a, b) < 1e-4 for a, b in pairs))

# %% [markdown]
# ## 5. One step of Algorithm 1 by hand
#
# A training step has to do two things: move the kernel along these gradients, and find out which directions are worth keeping.
# Algorithm 1 of the paper does both. The comments give its line numbers.

# %%
h, tau = 0.05, 0.1

# 1-4: a descent step for every K_i, all from the gradients above.
K_new = [K - h * dK for K, dK in zip(frame.K, grads["conv2"].factors)]

# 5-7: a basis of the old and the new directions together, up to twice as many columns.
U_new = [jnp.linalg.qr(jnp.concatenate([U, K], axis=1))[0] for U, K in zip(frame.U, K_new)]

# 8: the core in these bases. The old directions are among them, so the network does not change.
turned = [new.T @ old for new, old in zip(U_new, frame.U)]
C_augmented = multi_mode_product(kernel.core, turned)
augmented = params | {"conv2": tdlrt_jax.TuckerTensor(C_augmented, tuple(U_new))}
print(
    f"loss before {loss_fn(params, x, y):.6f}, in the augmented bases {loss_fn(augmented, x, y):.6f}: the same network"
)

# 9: a descent step for the augmented core.
full = full_gradient(tdlrt_jax.to_dense(augmented["conv2"]), x, y)
C_new = C_augmented - h * multi_mode_product(full, U_new, transpose=True)

# 11-12: truncate to a relative error of tau, and return to the original sizes.
small = tdlrt_jax.hosvd(C_new, tolerance=tau)
next_kernel = tdlrt_jax.TuckerTensor(small.core, tuple(U @ P for U, P in zip(U_new, small.factors)))

print("ranks before     ", tdlrt_jax.active_rank(kernel))
print("ranks augmented  ", np.array(C_augmented.shape))
print("ranks truncated  ", tdlrt_jax.active_rank(next_kernel))
print(f"loss after {loss_fn(params | {'conv2': next_kernel}, x, y):.6f}")

# %% [markdown]
# The library's transformation does the same. `tdlrt` wraps any optax optimizer, which takes the descent steps of lines 4 and 9;
# here plain gradient descent, for this one kernel. The second gradient, of line 9, is taken by `value_and_grad_fn`. The arrays
# get room for larger ranks beforehand (`resize`): inside a compiled program arrays cannot change their shapes, so columns and
# slices beyond the rank are zero.

# %%
start = tdlrt_jax.resize(kernel, (5, 5, 16, 32))
tx = tdlrt_jax.tdlrt(optax.sgd(h), tolerance=tau)


@jax.jit
def one_step(kernel, state, x, y):
    gradient = lambda kernel: tdlrt_jax.value_and_grad(loss_of)(kernel, x, y)
    _, grads = gradient(kernel)
    updates, state = tx.update(grads, state, kernel, value_and_grad_fn=gradient)
    return optax.apply_updates(kernel, updates), state


by_library, _ = one_step(start, tx.init(start), x, y)

print("ranks by the library:", tdlrt_jax.active_rank(by_library))
print("same kernel:", difference(tdlrt_jax.to_dense(by_library), tdlrt_jax.to_dense(next_kernel)) < 1e-4)

# %% [markdown]
# A direction enters the kernel if one step makes it larger than the tolerance allows to drop, and leaves when it has become
# smaller. We chose the tolerance, and the ranks followed.
#
# ## 6. Training with ranks that fall
#
# `tdlrt_step` makes such steps for whole networks, compiled, with momentum carried from basis to basis. We start the second
# convolution at full ranks, with the same random weights as the dense network, and train with the same optimizer.

# %%
tx = tdlrt_jax.tdlrt(descent, tolerance=0.25)
step = tdlrt_jax.tdlrt_step(loss_fn, tx)
params = initial()
params["conv2"] = tdlrt_jax.hosvd(params["conv2"])  # lossless: the same network
opt_state = tx.init(params)

history = []
for x, y in batches(epochs=12):
    params, opt_state, info = step(params, opt_state, x, y)
    history.append((float(info.loss), *np.asarray(info.rank["conv2"])))
history = np.array(history)

# %%
saved = [1 - tdlrt_jax.parameter_count(W.shape, r) / W.size for r in history[:, 1:].astype(int)]
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3))
left.semilogy(history[:, 0])
left.set(xlabel="step", ylabel="training loss")
for mode, name in enumerate(MODES):
    middle.plot(history[:, 1 + mode], label=f"{name} (of {W.shape[mode]})", linestyle=("-", "--")[mode % 2])
middle.set(xlabel="step", ylabel="rank", ylim=(0, None))
middle.legend()
right.plot(saved)
right.set(xlabel="step", ylabel="compression of the layer", ylim=(None, 1))
plt.show()

print(f"test accuracy: dense {float(accuracy(dense)):.1%}, Tucker {float(accuracy(params)):.1%}")
print(f"numbers in the second convolution: {W.size:,} dense, {round((1 - saved[-1]) * W.size):,} in Tucker format")

# %% [markdown]
# Most of the random initial weights are not needed for the task. Weight decay shrinks them in both networks. The Tucker network
# drops them, a little in every step, and from then on neither stores them nor computes with them.
#
# Next: [compress a network of your own](04_compress_your_own_network.ipynb), where a budget takes the place of the tolerance.
