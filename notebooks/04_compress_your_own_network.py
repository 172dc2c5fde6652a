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
# # Compress a network of your own
#
# This notebook takes an ordinary flax.nnx model and trains it at a tenth of its convolutions' weights:
#
# 1. define the model and look at what its layers cost,
# 2. say which layers are to be compressed, and how far,
# 3. train, and watch the ranks fall,
# 4. let the arrays follow the ranks,
# 5. compare with the dense twin,
# 6. make a network of plain flax layers of it, and a file that runs without this library.
#
# What a Tucker kernel is and how it is trained is the subject of [the first notebook](01_tucker_in_ten_minutes.ipynb).

# %%
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import tdlrt_jax
from tdlrt_jax import Budget, export
from tdlrt_jax.nn import resize, tdlrt, tdlrt_step

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## The data
#
# Handwritten digits that come with scikit-learn, enlarged from 8 × 8 to 16 × 16 pixels. A fifth is kept for testing.

# %%
digits = load_digits()
images = jax.image.resize(digits.images.astype(np.float32) / 16, (len(digits.images), 16, 16), "linear")
images = ((images - images.mean()) / images.std())[..., None]
labels = jnp.asarray(digits.target)
order = np.random.default_rng(0).permutation(len(labels))
train, test = order[:1437], order[1437:]

fig, panels = plt.subplots(1, 10, figsize=(9, 1.2))
for digit, ax in enumerate(panels):
    ax.imshow(images[int(np.flatnonzero(digits.target == digit)[0]), ..., 0], cmap="gray_r")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## 1. The model
#
# Nothing in it knows of this library: convolutions with batch normalization, and a linear classifier.


# %%
class Network(nnx.Module):
    """Three convolutions with batch normalization, and a classifier."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (5, 5), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), use_bias=False, rngs=rngs)
        self.conv3 = nnx.Conv(64, 64, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.norm2 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.norm3 = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.norm2(self.conv2(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm3(self.conv3(x)))
        return self.head(x.mean((1, 2)))


model = Network(nnx.Rngs(0))
image = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
print(tdlrt_jax.summarize(model, image))

# %% [markdown]
# Almost all weights and most of the work are in `conv2` and `conv3`. The first convolution has one in-channel and few weights,
# so we leave it as it is, and the classifier too.
#
# ## 2. Which layers, and how far
#
# *Rules* map regular expressions on the layers' paths to what is wanted. The first pattern found in a path decides. `"dense"`
# leaves a layer as it is. `rank` is what to start with, one entry a mode: here three quarters of the in- and out-channels, while
# `None` leaves height and width whole, since little can be saved in three pixels. `tuckerize` returns a new model, and the
# original stays as it is.

# %%
rules = {"conv1|head": "dense", ".*": {"rank": (None, None, 0.75, 0.75)}}
tucker = tdlrt_jax.tuckerize(model, rules)
print(tdlrt_jax.summarize(tucker, image))

# %% [markdown]
# At these ranks the kernels store three quarters of the numbers. A `Budget` in the place of the tolerance says what to reach and
# by when: here 90% of the Tucker kernels' weights saved after two thirds of the steps. It falls along a schedule, fast at first,
# and every few steps the singular values of all kernels together decide which layer may keep how much.

# %%
epochs, batch_size = 14, 128
if os.environ.get("TDLRT_NOTEBOOK_SMALL"):  # for a quick test of this notebook
    epochs = 5
steps = epochs * (len(train) // batch_size)
budget = Budget(0.9, steps=int(0.65 * steps))


def descent():
    """The optimizer of both networks: SGD with momentum and a cosine schedule."""
    schedule = optax.cosine_decay_schedule(0.1, steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batches(epoch):
    """The shuffled batches of an epoch."""
    shuffled = np.random.default_rng(epoch).permutation(train)
    for start in range(0, len(train) - batch_size + 1, batch_size):
        chosen = shuffled[start : start + batch_size]
        yield images[chosen], labels[chosen]


@nnx.jit
def hits(model, x, y):
    return (model(x).argmax(1) == y).sum()


def accuracy(model):
    """The part of the test images that a network in evaluation mode gets right."""
    model.eval()
    right = hits(model, images[test], labels[test])
    model.train()
    return float(right) / len(test)


# %% [markdown]
# ## 3. and 4. Train, and let arrays follow the ranks
#
# The optimizer is an ordinary `nnx.Optimizer`, with `tdlrt` around the descent. `tdlrt_step` is a compiled training step that
# changes model and optimizer in place.
#
# Ranks fall *inside* the compiled step: columns of the factors become zero, while the arrays keep their shapes. Memory and time
# fall when the arrays are cut, and then the step is compiled anew. So this is done now and then, here after every fourth epoch.
# `fit_capacity` proposes sizes for the network as a whole, and proposes the present ones as long as a change does not pay.
# `resize` cuts or pads kernels and optimizer state alike.


# %%
def fit_arrays(model, optimizer):
    """Lets the arrays of model and optimizer follow the ranks; returns whether anything changed."""
    kernels = tdlrt_jax.kernel_paths(nnx.as_pure(nnx.state(model, nnx.Param)))
    wanted = tdlrt_jax.fit_capacity(kernels)
    if wanted == {name: kernel.core.shape for name, kernel in kernels.items()}:
        return False
    resize(model, optimizer, wanted)
    return True


def kernel_numbers(model):
    """Per Tucker layer: what its arrays hold."""
    kernels = tdlrt_jax.kernel_paths(nnx.as_pure(nnx.state(model, nnx.Param)))
    return {name.split("/")[0]: tdlrt_jax.array_bytes(kernel) // 4 for name, kernel in kernels.items()}


optimizer = nnx.Optimizer(tucker, tdlrt(descent(), tolerance=budget, rules=rules), wrt=nnx.Param)
step = tdlrt_step(loss_fn)

history = []  # of every step
cuts = []  # steps after which the arrays were cut
evaluated = []  # after every epoch
for epoch in range(epochs):
    for x, y in batches(epoch):
        held = sum(kernel_numbers(tucker).values())
        info = step(tucker, optimizer, x, y)
        ranks = {name.split("/")[0]: np.asarray(rank) for name, rank in info.rank.items()}
        history.append({"loss": float(info.loss), "held": held, **ranks})
        assert not tdlrt_jax.describe_status(info.status & ~tdlrt_jax.status.RANK_AT_CAPACITY)
    if (epoch + 1) % 4 == 0 and fit_arrays(tucker, optimizer):
        cuts.append(len(history))
    evaluated.append(accuracy(tucker))
print(f"the arrays were cut after steps {cuts}")

# %%
whole = (True, True, False, False)
shapes = {"conv2": (3, 3, 32, 64), "conv3": (3, 3, 64, 64)}
full_size = sum(int(np.prod(shape)) for shape in shapes.values())
stored = [
    sum(tdlrt_jax.parameter_count(shape, record[name], whole) for name, shape in shapes.items()) for record in history
]

fig, panels = plt.subplots(1, 4, figsize=(13, 3.2))
for ax, (name, shape) in zip(panels, shapes.items()):
    for mode, label, line in ((2, "in", "-"), (3, "out", "--")):
        ax.plot([record[name][mode] for record in history], line, label=f"{label} (of {shape[mode]})")
    ax.set(title=f"ranks of {name}", xlabel="step", ylim=(0, None))
    ax.legend(fontsize="small")
panels[2].plot([record["held"] / full_size for record in history], label="arrays", color="C1")
panels[2].plot(np.array(stored) / full_size, label="ranks in use", color="C0")
panels[2].axhline(1 - budget.compression, linestyle=":", color="0.3", label="budget")
panels[2].set(title="numbers in the kernels / dense", xlabel="step", ylim=(0, None))
panels[2].legend(fontsize="small")
panels[3].semilogy([record["loss"] for record in history])
panels[3].set(title="training loss", xlabel="step")
plt.show()

# %% [markdown]
# The ranks follow the budget, and the arrays follow the ranks in a few cuts. Both layers share one budget: it is `conv3` that
# gives up more of its weights. The arrays keep room for ranks to rise again (half as much more, rounded up to a multiple of
# eight); `to_plain` below cuts them to the ranks in use.

# %%
summary = tdlrt_jax.summarize(tucker, image)
print(summary)
print(f"\nTucker kernels: {1 - stored[-1] / full_size:.1%} of the numbers saved")

# %% [markdown]
# ## 5. The dense twin
#
# The same model, batches and optimizer, without compression.

# %%
dense = nnx.clone(model)
dense_optimizer = nnx.Optimizer(dense, descent(), wrt=nnx.Param)


@nnx.jit
def dense_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


dense_evaluated = []
for epoch in range(epochs):
    for x, y in batches(epoch):
        dense_step(dense, dense_optimizer, x, y)
    dense_evaluated.append(accuracy(dense))

# %%
fig, ax = plt.subplots(figsize=(6, 3))
for values, label in ((dense_evaluated, "dense"), (evaluated, f"Tucker, budget {budget.compression:.0%}")):
    ax.plot(np.arange(1, epochs + 1), values, marker=".", label=label)
ax.axvline(budget.steps / (steps / epochs), linestyle=":", color="0.3", label="the budget is reached")
ax.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
ax.legend()
plt.show()

weights = summary.weights
print(f"dense : {dense_evaluated[-1]:.1%} with {weights.dense:,} weights")
print(f"Tucker: {evaluated[-1]:.1%} with {weights.stored:,} weights, {weights.compression:.1%} fewer")

# %% [markdown]
# One run on 360 test images says little about a difference of a percent, since one image is 0.3%. It does say that the small
# network learned the task.
#
# ## 6. Ship it
#
# `to_plain` puts `nnx.Conv` layers in the place of the Tucker layers: three in a row, two, or one merged, whichever has the
# cheapest forward pass at the ranks in use. Nothing of this library is needed to run the result.

# %%
tucker.eval()
plain = tdlrt_jax.to_plain(tucker, image)
for name in shapes:
    layer = getattr(plain, name)
    stages = layer.layers if isinstance(layer, nnx.Sequential) else [layer]
    print(f"{name}:", "  then  ".join(f"{type(stage).__name__} {stage.kernel.shape}" for stage in stages))

logits = tucker(images[test])
print("same outputs:", bool(jnp.allclose(plain(images[test]), logits, atol=1e-3)))

# %% [markdown]
# `export.save` writes the network with its weights as one file, for CPU and CUDA and for any batch size. `export.load` reads it
# here. Where only JAX and flatbuffers are installed, `jax.export.deserialize` does.

# %%
with tempfile.TemporaryDirectory() as directory:
    path = export.save(Path(directory) / "digits.jaxexport", tucker, image)
    size = path.stat().st_size
    program = export.load(path)

print(program)
print(f"{size / 1000:.0f} kB")
predictions = program(images[test])
print("same outputs:", bool(jnp.allclose(predictions, logits, atol=1e-3)))
print(f"test accuracy of the exported program: {float((predictions.argmax(1) == labels[test]).mean()):.1%}")

# %%
fig, panels = plt.subplots(1, 8, figsize=(9, 1.6))
for index, ax in zip(test[:8], panels):
    ax.imshow(images[index, ..., 0], cmap="gray_r")
    ax.set_title(f"says {int(program(images[index][None]).argmax())}", fontsize="medium")
    ax.axis("off")
plt.show()
