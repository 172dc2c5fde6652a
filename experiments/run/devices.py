"""Where a job computes: on one device, on several of this machine, or on those of several processes.

Batches are spread over the axis ``"data"`` of a mesh, and everything else is held by every device. Nothing more is said: the
partitioner of ``jit`` finds what each device computes and what they exchange. Every process does the same on the host, from
numbers that all have; the first one alone writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.options import DeviceConfig

__all__ = ["ONE_DEVICE", "Devices", "first_says", "join_processes", "on_the_host", "onto_the_device", "take_devices"]


def on_the_host() -> contextlib.AbstractContextManager[Any]:
    """In it small computations of the host's run on the CPU, where compiling each takes the least; if JAX may use it."""
    try:
        return contextlib.nullcontext() if jax.default_backend() == "cpu" else jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS=cuda
        return contextlib.nullcontext()


def onto_the_device(tree: Any) -> Any:
    """Arrays that were made on the host, on the default device."""
    return tree if jax.default_backend() == "cpu" else jax.device_put(tree, jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a job.

    Example:
      >>> devices = Devices(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)))
      >>> devices.replicate(jnp.ones(3)).is_fully_replicated, devices.count, devices.leads
      (True, 1, True)
    """

    mesh: Mesh | None = None  # one-dimensional, with the axis "data"; None where all is on the default device

    @property
    def count(self) -> int:
        """How many, in all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files."""
        return jax.process_index() == 0

    @property
    def spread(self) -> NamedSharding | None:
        """Of arrays whose first axis is the batch."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))

    @property
    def same(self) -> NamedSharding | None:
        """Of arrays that every device has."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def replicate(self, tree: Any) -> Any:
        """A pytree on every device, in buffers of its own, so that it may be donated.

        Args:
          tree: arrays, PRNG keys among them, with the same numbers in all processes.
        """
        sharding = self.same
        if sharding is None:
            return tree
        # Placing alone may share a buffer with what is placed.
        copy = jax.jit(lambda placed: jax.tree.map(jnp.copy, placed), out_shardings=sharding)
        return copy(jax.tree.map(lambda leaf: _place(leaf, sharding), tree))

    def local(self, tree: Any) -> Any:
        """What one device of this process has of a pytree held by every device: arrays to look at on the host."""
        return tree if self.mesh is None else jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def largest(self, number: int) -> Array | int:
        """The largest of the processes' numbers; an array of all of them, not waited for, where there are several."""
        if self.mesh is None or jax.process_count() == 1:
            return number
        here = np.full(self.mesh.local_mesh.size, number, np.int32)
        numbers = jax.make_array_from_process_local_data(NamedSharding(self.mesh, PartitionSpec("data")), here)
        return _largest(numbers, self.mesh)

    def wait(self) -> None:
        """Waits until every process has come here."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("tdlrt_jax")

    def __str__(self) -> str:
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{self.count} device{'s' * (self.count > 1)}{processes}"


ONE_DEVICE = Devices()


def join_processes(config: DeviceConfig) -> None:
    """Makes this process one of several, if the options say so. Before the first computation.

    Raises:
      ValueError: if JAX has computed already, and so cannot join others any more.
    """
    if config.coordinator is None or jax.distributed.is_initialized():
        return
    # What the address alone does not say, JAX finds in the environment of a cluster: Slurm, Kubernetes, TPU pods and others.
    address = None if config.coordinator == "auto" else config.coordinator
    try:
        jax.distributed.initialize(address, num_processes=config.processes, process_id=config.process)
    except RuntimeError as error:
        raise ValueError(f"--coordinator {config.coordinator}: {error}") from error


def take_devices(config: DeviceConfig, batch_size: int) -> Devices:
    """The devices that the options name.

    Args:
      config: the options.
      batch_size: images that every step spreads over them.

    Raises:
      ValueError: if there are not so many, or they cannot share a batch or belong to the processes evenly.
    """
    there, processes = jax.devices(), jax.process_count()
    count = config.devices or (len(there) if processes > 1 else 1)
    if count > len(there):
        on_cpu = f" On the CPU, XLA_FLAGS=--xla_force_host_platform_device_count={count} makes as many of one"
        raise ValueError(
            f"--devices {count}: there are {len(there)}, of the kind {there[0].device_kind}. Ask for as many or fewer."
            + on_cpu * (there[0].platform == "cpu" and processes == 1)
        )
    if count % processes:
        raise ValueError(f"--devices {count}: expected a multiple of the {processes} processes, each has as many")
    if batch_size % count:
        below, above = batch_size // count * count, -(-batch_size // count) * count
        remedy = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"--batch-size {batch_size}: {count} devices cannot share it evenly; take {remedy}")
    if count == 1:
        return ONE_DEVICE
    mine = [
        [device for device in there if device.process_index == index][: count // processes]
        for index in range(processes)
    ]
    if any(len(devices) < count // processes for devices in mine):
        counts = ", ".join(str(sum(device.process_index == index for device in there)) for index in range(processes))
        raise ValueError(f"--devices {count}: the {processes} processes have {counts} devices, not as many each")
    return Devices(
        jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=list(itertools.chain(*mine)))
    )


def first_says(problem: Exception | None) -> bool:
    """Whether the first process has no problem; every process asks, with its own or ``None``, and hears of the first one's."""
    if jax.process_count() == 1:
        return problem is None
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(problem is None)))


def _place(leaf: Any, sharding: NamedSharding) -> Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _largest(numbers: Array, mesh: Mesh) -> Array:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(numbers)
