"""How networks are trained at each scale, and the rows of the paper's Table 1: read from ``experiments/configs``."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.grids.grid import SCALES, GridError, Run

__all__ = ["CONFIGS", "NETWORKS", "Protocol", "Row", "Scale", "fitting", "read_protocol", "read_rows", "read_toml"]

CONFIGS = Path(__file__).parent.parent / "configs"
NETWORKS = {"vgg16": "VGG16", "alexnet": "AlexNet", "resnet18": "ResNet18", "lenet5": "LeNet5"}

_SMALL = ("digits", "mnist", "fashion_mnist")  # images of 28x28 pixels; VGG16 halves its images five times


class Scale(NamedTuple):
    """What a scale changes."""

    seeds: int
    options: dict[str, Any]  # instead of the protocol's and the row's
    methods: dict[str, dict[str, Any]]  # the same, of runs of one method
    networks: dict[str, dict[str, Any]]  # the same, of runs of one network
    rows: dict[str, dict[str, Any]]  # the same, of one row, by its name
    normalized: list[str]  # methods that are also run from kernels of the norm of :func:`tdlrt_jax.tucker_normalized`


class Protocol(NamedTuple):
    """What all runs of an experiment have in common."""

    options: dict[str, Any]  # of experiments.train
    scales: dict[str, Scale]

    def runs(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        scale: str,
        seeds: int | None = None,
        dataset: str | None = None,
        row: str | None = None,
    ) -> list[Run]:
        """One run a seed.

        Args:
          name: of the row, such as ``"vgg16/tdlrt"``; runs are called ``"vgg16/tdlrt/seed0"`` and so on.
          options: the row's, over the protocol's and under the scale's.
          scale: one of :data:`~experiments.grids.grid.SCALES`.
          seeds: how many, from 0; default as the scale says.
          dataset: another data set than the protocol's.
          row: the name of the row whose settings the scale has for these runs too; default ``name``.
        """
        chosen = self.scales[scale]
        merged = {**self.options, **options, **chosen.options}
        merged |= chosen.methods.get(merged["method"], {}) | chosen.networks.get(merged["model"], {})
        merged |= chosen.rows.get(name if row is None else row, {})
        if dataset is not None:
            merged["dataset"] = dataset
        count = chosen.seeds if seeds is None else seeds
        return [Run(f"{name}/seed{seed}", {**merged, "seed": seed}) for seed in range(count)]


class Row(NamedTuple):
    """A method on a network, and what the paper says of it."""

    network: str  # "vgg16"
    method: str  # "tdlrt"
    title: str  # as the paper's table calls the method
    accuracy: float | None  # the paper's, percent; None where it has none
    compression: float | None  # the paper's c.r., percent
    options: dict[str, Any]  # at the paper's compression
    same: dict[str, Any] | None  # what differs at the compression that the paper's TDLRT has; None where nothing does
    command: str
    expected: dict[str, str]  # by scale, what it takes, in words; only what was measured

    @property
    def name(self) -> str:
        """Of its runs, less the seed."""
        return f"{self.network}/{self.method}"

    @property
    def name_same(self) -> str:
        """Of its runs at the compression of the paper's TDLRT, less the seed."""
        return self.name if self.same is None else f"{self.name}-same"

    @property
    def name_normalized(self) -> str:
        """Of its runs at that compression from normalized kernels, less the seed."""
        return f"{self.name}-normalized"

    @property
    def options_same(self) -> dict[str, Any]:
        """At the compression of the paper's TDLRT."""
        return {**self.options, **(self.same or {})}

    @property
    def options_normalized(self) -> dict[str, Any]:
        """The same from normalized kernels."""
        return {**self.options_same, "initialization": "normalized"}


def read_toml(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
      GridError: for a file that is not there or not TOML, naming it.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise GridError(f"{path} cannot be read: {error}") from None


def read_protocol(path: Path) -> Protocol:
    """A protocol of ``[options]`` and one ``[scales.NAME]`` each with ``seeds`` and, if need be, ``options``,
    ``methods.METHOD``, ``networks.NETWORK`` and ``rows."NETWORK/METHOD"``, of which what is said later wins, and ``normalized``,
    a list of methods.

    Raises:
      GridError: if something of that is missing, or there is something else.
    """
    content = read_toml(path)
    scales = content.get("scales", {})
    if set(scales) != set(SCALES) or "options" not in content:
        raise GridError(f"{path}: expected [options] and [scales.NAME] for {', '.join(SCALES)}, found {sorted(scales)}")
    read = {}
    for name, scale in scales.items():
        parts = ("options", "methods", "networks", "rows")
        if not {"seeds"} <= scale.keys() <= {"seeds", *parts, "normalized"}:
            raise GridError(
                f"{path}: [scales.{name}] has {sorted(scale)}: expected seeds, and if need be {', '.join(parts)}, normalized"
            )
        options, methods, networks, rows = (scale.get(part, {}) for part in parts)
        read[name] = Scale(scale["seeds"], options, methods, networks, rows, scale.get("normalized", []))
    return Protocol(content["options"], read)


def read_rows(directory: Path) -> list[Row]:
    """The rows in ``NETWORK_METHOD.toml``, in the order in which ``protocol.toml`` lists ``networks`` and ``methods``.

    Raises:
      GridError: if a file is missing, or lacks something.
    """
    order = read_toml(directory / "protocol.toml")
    rows = []
    for network in order["networks"]:
        for method in order["methods"]:
            path = directory / f"{network}_{method}.toml"
            content = read_toml(path)
            try:
                options, paper = content["options"], content["paper"]
                if (options["model"], options["method"]) != (network, method):
                    raise GridError(f"{path} is about {options['method']} on {options['model']}: name it so")
                row = Row(
                    network=network,
                    method=method,
                    title=content["title"],
                    accuracy=paper.get("accuracy"),
                    compression=paper.get("compression"),
                    options=options,
                    same=content.get("same"),
                    command=content["command"],
                    expected=content.get("expected", {}),
                )
            except KeyError as error:
                raise GridError(f"{path} lacks {error}") from None
            rows.append(row)
    return rows


def fitting(networks: Sequence[str], dataset: str | None) -> list[str]:
    """The networks that take a data set's images; says on standard error which are left out."""
    kept = [network for network in networks if not (network == "vgg16" and dataset in _SMALL)]
    if len(kept) < len(networks):
        print(
            f"vgg16 is left out: it takes images of 32x32 pixels or more, those of {dataset} have 28x28",
            file=sys.stderr,
        )
    return kept
