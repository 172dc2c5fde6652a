"""What runs in processes of its own, with eight host devices or in two processes of two each, and prints JSON.

Devices must be made before JAX starts, so a test cannot do it in its process: see :mod:`tests.many_devices.processes`.
"""

import hashlib
import json
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tdlrt_jax
from benchmarks.communication import collectives
from experiments import train
from experiments.options import DeviceConfig
from experiments.run import plots
from experiments.run.devices import join_processes, take_devices
from experiments.run.display import Display
from tdlrt_jax import checkpoint, models
from tdlrt_jax.nn import TuckerConv
from tdlrt_jax.paths import kernel_paths
from tests.helpers import dense64
from tests.many_devices.processes import DEVICES, ROOT

STEPS, IMAGES = 50, 16
INTEGRATORS = ("bug", "parallel", "fixed_rank")
# Of the kernels and the loss over all steps, relative.
SAME = {"float32": 1e-5, "float64": 1e-10}


class Network(nnx.Module):
    """Two convolutions alike, which compile as one batch, with statistics over the images between them. Smooth: where relu meets
    rounding at zero, two orders of summation part for good, on one device as on many.
    """

    def __init__(self, dtype, rngs):
        types = {"param_dtype": dtype, "rngs": rngs}
        self.first = TuckerConv(8, 8, (3, 3), rank=(3, 3, 5, 5), initialization="spectral", use_bias=False, **types)
        self.norm = nnx.BatchNorm(8, **types)
        self.second = TuckerConv(8, 8, (3, 3), rank=(3, 3, 5, 5), initialization="spectral", use_bias=False, **types)
        self.linear = nnx.Linear(8, 6, **types)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.first(x)))
        return self.linear(jnp.tanh(self.second(x)).mean((1, 2)))


def take_apart(model):
    graphdef, params, model_state = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.as_pure(params), nnx.as_pure(model_state)


def loss_of(graphdef):
    def loss_fn(params, model_state, x, y):
        network = nnx.merge(graphdef, params, model_state, copy=True)
        loss = jnp.mean((network(x) - y) ** 2)
        return loss, take_apart(network)[2]

    return loss_fn


def build(integrator, dtype=jnp.float32):
    """The step of a fresh network, and what it starts from."""
    graphdef, params, model_state = take_apart(Network(dtype, nnx.Rngs(0)))
    rising = optax.linear_schedule(0.01, 0.4, STEPS)  # so that ranks fall on the way
    tx = tdlrt_jax.tdlrt(optax.sgd(0.05, momentum=0.9), tolerance=rising, integrator=integrator)
    step = tdlrt_jax.tdlrt_step(loss_of(graphdef), tx, has_state=True, donate=False)
    return step, (params, tx.init(params), model_state)


def batch_of(step, dtype=np.float32):
    """A batch that its number decides."""
    rng = np.random.default_rng(step)
    x = rng.normal(size=(IMAGES, 6, 6, 8))
    teacher = np.random.default_rng(1000).normal(size=(8, 6))
    return x.astype(dtype), np.tanh(3 * x.mean((1, 2)) @ teacher).astype(dtype)


def mesh_of(devices):
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def sharding_of(mesh, *axes):
    return NamedSharding(mesh, PartitionSpec(*axes))


def deviation(ours, theirs):
    """The largest relative distance of two states' kernels."""
    pairs = zip(kernel_paths(ours[0]).values(), kernel_paths(theirs[0]).values(), strict=True)
    dense = [[dense64(jax.device_get(kernel)) for kernel in pair] for pair in pairs]
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in dense)


def alike_on_all_devices(tree):
    """Whether every device holds the same bits."""
    return all(
        len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def ranks_of(info):
    return {name: np.asarray(rank).tolist() for name, rank in info.rank.items()}


def train_side_by_side(integrator, dtype, mesh, place, *, alone=False):
    """Trains on one device and on those of the mesh; what differs between them over all steps. Alone: on the mesh only."""
    step, one = build(integrator, dtype)
    many, spread = place(one, sharding_of(mesh)), sharding_of(mesh, "data")
    compiled = step.lower(*many, *place(batch_of(0, dtype), spread)).compile()
    kinds = {kind: entry.operations for kind, entry in collectives(compiled.as_text()).items()}
    found = {"kernels": 0.0, "loss": 0.0, "same_ranks": True, "alike": True, "collectives": kinds, "ranks": []}
    for index in range(STEPS):
        batch = batch_of(index, dtype)
        *many, info_many = step(*many, *place(batch, spread))
        if index % 10 == 9:
            found["alike"] &= alike_on_all_devices((many, info_many))
        if alone:
            continue
        *one, info = step(*one, *batch)
        assert int(info_many.status) == int(info.status) and int(info.status) & 3 == 0
        found["loss"] = max(found["loss"], abs(float(info_many.loss) / float(info.loss) - 1))
        found["kernels"] = max(found["kernels"], deviation(local(many), one))
        found["ranks"].append(ranks_of(info))
        found["same_ranks"] &= ranks_of(info_many) == ranks_of(info)
    return found, many


def local(tree):
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def put(tree, sharding):
    """On the devices, in buffers of its own and from every process's copy."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            np.shape(leaf), sharding, lambda index: np.array(np.asarray(leaf)[index])
        ),
        tree,
    )


def eight_devices():
    """All integrators in both precisions, and a factor whose rows are spread."""
    found = {}
    for dtype in SAME:
        with jax.enable_x64(dtype == "float64"):
            for integrator in INTEGRATORS:
                found[f"{integrator} {dtype}"], _ = train_side_by_side(integrator, dtype, mesh_of(jax.devices()), put)
    print(json.dumps(found | {"spread": spread_factors()}))


def spread_factors():
    """The rows of the largest factors over four devices, through three steps: the result, and where it ends."""
    step, one = build("bug")
    mesh = mesh_of(jax.devices()[:4])

    def spread(path, leaf):
        rows = "factors" in jax.tree_util.keystr(path) and leaf.shape[0] == 8
        return put(leaf, sharding_of(mesh, "data") if rows else sharding_of(mesh))

    many = [*jax.tree_util.tree_map_with_path(spread, one[:2]), put(one[2], sharding_of(mesh))]
    before = many[0]["second"]["kernel"].factors[3]
    for index in range(3):
        *one, _ = step(*one, *batch_of(index))
        *many, _ = step(*many, *put(batch_of(index), sharding_of(mesh, "data")))
    after = many[0]["second"]["kernel"].factors[3]
    rows = [array.addressable_shards[0].data.shape[0] for array in (before, after)]
    return {"deviation": deviation(many, one), "rows": rows}


NETWORKS = {
    "alexnet": (models.AlexNet, {"width": 1 / 32}, (32, 32, 3)),
    "resnet18": (models.ResNet18, {"width": 1 / 32}, (32, 32, 3)),
    "vgg16": (models.VGG16, {"width": 1 / 32}, (32, 32, 3)),
}


def conv_of_some(channels, filters, kernel_size, **options):
    """Tucker kernels where in- and out-channels are alike, which compile as one; the first layer and others are dense."""
    if channels != filters or filters < 8:
        return nnx.Conv(channels, filters, kernel_size, **options)
    return TuckerConv(channels, filters, kernel_size, rank=(None, None, 3, 3), **options)


def network_step(name):
    """One step of a network on one device and on all."""
    make, parts, image = NETWORKS[name]
    model = make(
        conv=conv_of_some, num_classes=10, input_shape=image[:2], input_channels=image[2], rngs=nnx.Rngs(0), **parts
    )
    model.train()
    graphdef, params, model_state = take_apart(model)
    tx = tdlrt_jax.tdlrt(optax.sgd(0.01), tolerance=0.05, integrator="parallel")
    step = tdlrt_jax.tdlrt_step(loss_of(graphdef), tx, has_state=True, donate=False)
    start = (params, tx.init(params), model_state)
    mesh = mesh_of(jax.devices())
    x = jax.random.normal(jax.random.key(1), (IMAGES, *image))
    batch = (x, jax.nn.one_hot(jnp.arange(IMAGES) % 10, 10))
    *one, info = step(*start, *batch)
    *many, info_many = step(
        *jax.device_put(start, sharding_of(mesh)), *jax.device_put(batch, sharding_of(mesh, "data"))
    )
    statistics = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())
        for a, b in zip(jax.tree.leaves(many[2]), jax.tree.leaves(one[2]), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return {
        "loss": abs(float(info_many.loss) / float(info.loss) - 1),
        "statistics": statistics,
        "kernels": deviation(many, one),
        "tucker": len(info.rank),
        "same_ranks": ranks_of(info_many) == ranks_of(info),
        "alike": alike_on_all_devices(many),
    }


def networks():
    print(json.dumps({name: network_step(name) for name in NETWORKS}))


def two_processes(process, port, directory):
    """Trains in one of two processes, and saves what it has."""
    config = DeviceConfig(coordinator=f"127.0.0.1:{port}", processes=2, process=process)
    join_processes(config)
    devices = take_devices(config, IMAGES)
    result = {"devices": str(devices)}
    for dtype in SAME:
        with jax.enable_x64(dtype == "float64"):
            found, many = train_side_by_side("bug", dtype, devices.mesh, put, alone=not devices.leads)
            digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(local(many))))
            result[dtype] = found | {"digest": digest.hexdigest()}
            if dtype == "float32":
                rows = put(np.arange(24, dtype=np.float32).reshape(8, 3), devices.spread)
                checkpoint.save(directory, STEPS, {"state": many, "rows": rows}, {"process": process})
                result["steps"] = checkpoint.all_steps(directory)
    print(json.dumps(result))


def restore_everywhere(directory):
    """The checkpoint of two processes on one, two and eight devices of one process."""
    result = {}
    for count in (1, 2, 8):
        mesh = mesh_of(jax.devices()[:count])
        start = {
            "state": put(build("bug")[1], sharding_of(mesh)),
            "rows": put(np.zeros((8, 3), np.float32), sharding_of(mesh, "data")),
        }
        tree, metadata = checkpoint.restore(directory, start)
        assert jax.tree.map(lambda a: a.sharding, tree) == jax.tree.map(lambda a: a.sharding, start)
        np.testing.assert_array_equal(tree["rows"], np.arange(24).reshape(8, 3))
        state = jax.tree.leaves(local(tree["state"]))
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in state))
        result[count] = {"digest": digest.hexdigest(), "metadata": metadata}
    print(json.dumps(result))


def job(interrupted, *arguments):
    """The main job; interrupted: a signal reaches this process after so many steps, -1 for never. Its exit code."""
    original = Display.step

    def step(self, epoch, done, loss):
        original(self, epoch, done, loss)
        if done == interrupted:
            signal.raise_signal(signal.SIGTERM)

    Display.step = step
    plots.save_figure = lambda figure, directory, name: []
    sys.exit(train.main(list(arguments)))


def docs_example():
    """The code of the page about many devices."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["mesh"].size == DEVICES and float(names["info"].loss) > 0
    print(json.dumps(len(names["params"]["w"].core.addressable_shards)))
