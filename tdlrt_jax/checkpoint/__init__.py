"""Checkpoints of networks whose kernels change their shapes: arrays by path, true ranks beside them.

A checkpoint is one directory of orbax, ``DIRECTORY/STEP``, written under a temporary name and renamed when it is
complete. Arrays are stored by their path in the tree, so they are found again whatever containers the tree is made of,
and at the shapes they had; the ranks in use, a checksum of every array and the caller's own metadata are JSON beside
them. Nothing in it depends on the devices that the arrays were on: it is restored on any number of them. Of several
processes (``jax.distributed``) all call :func:`save`, on a directory that all see, and the first one writes; each reads by
itself.
"""

from tdlrt_jax.checkpoint.damage import DamagedError
from tdlrt_jax.checkpoint.directory import all_steps
from tdlrt_jax.checkpoint.store import ranks, restore, save

__all__ = ["DamagedError", "all_steps", "ranks", "restore", "save"]
