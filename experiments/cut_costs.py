"""What cutting directions costs the loss, and what was expected: ``python -m experiments.cut_costs RUN``.

Restores the last checkpoint of a run. In every mode of every Tucker kernel the quarter of the directions with the smallest
singular values is cut, one mode at a time, and the training loss is measured again. Beside how far it rises stand the energy that
was cut, which is what one relative tolerance for all kernels looks at, and the prediction of :mod:`tdlrt_jax.sensitivity`, by
which ``Budget(importance="loss")`` shares what may be stored. Writes JSON and a figure, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.run.process import start_over

__all__ = ["main", "markdown", "measure"]

_PARTS = {
    "energy": "energy cut",
    "expected": "expected rise",
    "expected_by_direction": "expected, direction by direction",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement for a command line; returns the exit code, 2 for a run without Tucker kernels or not finished."""
    parser = argparse.ArgumentParser(prog="python -m experiments.cut_costs", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--batches", type=int, default=48, help="batches whose gradients are looked at")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="directory of prepared tfds data sets")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where to write the numbers as JSON; a figure goes beside it"
    )
    options = parser.parse_args(argv)
    try:
        result = measure(options.run, batches=options.batches, data_dir=options.data_dir, progress=print)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output:
        from experiments.grids.figures import plot_cut_costs
        from experiments.run.plots import save_figure

        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
        save_figure(plot_cut_costs(result["cuts"]), options.output.parent, options.output.stem)
    print(markdown(result))
    return 0


def measure(
    directory: Path,
    *,
    batches: int = 48,
    data_dir: Path | None = None,
    progress: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measures all modes of four ranks and more, and spatial modes, of a finished run.

    Args:
      directory: of the run, trained with Tucker kernels.
      batches: of the run's batch size, whose gradients make the predictions; at least 4. A quarter as many others, the same for
        every cut, give the losses.
      data_dir: directory of prepared tfds data sets; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      progress: is given a line a layer.

    Returns:
      ``{"hardware", "settings", "versions", "commit", "run", "loss", "cuts", "rank_correlation"}``. A cut has the ``layer``, the
      ``mode`` (as in the paper's order), ``rank``, how many directions went (``cut``), their ``energy`` relative to the kernel,
      the ``expected`` rise of the loss in nats, the same from every direction's own gradients (``expected_by_direction``), and
      the ``rise``. Correlations are Spearman's, with the rise.

    Raises:
      ValueError: for a directory that holds no finished run, or one of a method other than TDLRT.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from scipy.stats import spearmanr

    from experiments.results_table import is_adaptive
    from experiments.run.directory import environment
    from tdlrt_jax import active_rank, kernel_paths, sensitivity, value_and_grad
    from tdlrt_jax.report import layer_name
    from tdlrt_jax.tucker import fold, unfold

    if batches < 4:
        raise ValueError(f"batches={batches} must be 4 or more")
    network = _Network(directory, data_dir)
    # Plain gradients leave no orthonormal factors, by which cuts of the core are those of the kernel.
    if not is_adaptive(network.options) or not network.kernels:
        raise ValueError(
            f"{directory} holds a run without Tucker kernels of orthonormal factors: expected one of --method tdlrt"
        )
    gradient_of = jax.jit(value_and_grad(network.loss))
    loss_of = jax.jit(network.loss)
    directions = {name: _directions(kernel) for name, kernel in network.kernels.items()}

    by_mode: dict[str, Any] = dict.fromkeys(network.kernels, 0.0)
    by_direction: dict[tuple[str, int], Any] = dict.fromkeys(
        ((name, mode) for name, modes in directions.items() for mode in modes), 0.0
    )
    for index in range(batches):
        _, gradients = gradient_of(network.params, *network.batch(0, index))
        for name, gradient in kernel_paths(gradients).items():
            kernel = network.kernels[name]
            by_mode[name] = by_mode[name] + np.asarray(sensitivity.measure(kernel, gradient.core)) / batches
            for mode, (basis, _) in directions[name].items():
                core, slope = (np.asarray(unfold(c, mode), np.float64) for c in (kernel.core, gradient.core))
                of_direction = np.sum((basis.T @ core) * (basis.T @ slope), axis=1)
                by_direction[name, mode] = by_direction[name, mode] + of_direction**2 / batches

    others = [network.batch(1, index) for index in range(batches // 4)]

    def mean_loss(params: Any) -> float:
        return float(np.mean([loss_of(params, *batch) for batch in others]))

    before, half = mean_loss(network.params), network.batch_size / 2
    cuts = []
    for name, kernel in network.kernels.items():
        ranks = np.asarray(active_rank(kernel))
        for mode, (basis, energies) in directions[name].items():
            rank = int(ranks[mode])
            count = max(1, rank // 4)
            kept = basis[:, : rank - count]
            rows = kept @ (kept.T @ np.asarray(unfold(kernel.core, mode), np.float64))
            less = fold(jnp.asarray(rows, kernel.core.dtype), mode, kernel.core.shape)
            energy = float(np.sum(energies[rank - count : rank]))
            cuts.append(
                {
                    "layer": layer_name(name),
                    "mode": _mode_name(mode, kernel.core.ndim),
                    "rank": rank,
                    "cut": count,
                    "energy": energy,
                    "expected": half * energy * float(by_mode[name][mode]),
                    "expected_by_direction": half * float(np.sum(by_direction[name, mode][rank - count : rank])),
                    "rise": mean_loss(network.replaced(name, kernel._replace(core=less))) - before,
                }
            )
        progress(
            f"{layer_name(name)}: "
            + ", ".join(f"{c['mode']} {c['rise']:.4f}" for c in cuts if c["layer"] == layer_name(name))
        )
    rises = [cut["rise"] for cut in cuts]
    stored = environment([])
    return {
        **{key: stored[key] for key in ("hardware", "settings", "versions", "commit")},
        "run": network.options,
        "batches": batches,
        "loss": before,
        "cuts": cuts,
        "rank_correlation": {part: float(spearmanr(rises, [cut[part] for cut in cuts])[0]) for part in _PARTS},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table, with the correlations under it."""
    lines = [
        "| layer | mode | rank, cut | energy cut [%] | expected rise | by direction | rise of the loss |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cut['layer']} | {cut['mode']} | {cut['rank']}, {cut['cut']} | {100 * cut['energy']:.1f} | {cut['expected']:.4f} | "
        f"{cut['expected_by_direction']:.4f} | {cut['rise']:.4f} |"
        for cut in result["cuts"]
    ]
    found = ", ".join(f"{title} {result['rank_correlation'][part]:.2f}" for part, title in _PARTS.items())
    return "\n".join([*lines, "", f"Rank correlation with the rise of the loss ({result['loss']:.3f} before): {found}"])


def _directions(kernel: Any) -> dict[int, tuple[Any, Any]]:
    """Of the modes that can be cut the principal directions of the core, and their energies relative to it."""
    import numpy as np

    from tdlrt_jax import active_rank
    from tdlrt_jax.tucker import unfold

    found = {}
    for mode, rank in enumerate(np.asarray(active_rank(kernel))):
        spatial = mode < kernel.core.ndim - 2
        if kernel.factors[mode] is None or rank < (2 if spatial else 4):
            continue
        basis, values, _ = np.linalg.svd(np.asarray(unfold(kernel.core, mode), np.float64), full_matrices=False)
        found[mode] = (basis, values**2 / np.sum(values**2))
    return found


def _mode_name(mode: int, order: int) -> str:
    from experiments.run.metrics import paper_order
    from experiments.run.plots import mode_names

    return mode_names(order)[paper_order(tuple(range(order))).index(mode)]


class _Network:
    """The network of a run at its last checkpoint, its loss in training, and batches."""

    def __init__(self, directory: Path, data_dir: Path | None):
        from flax import nnx

        from experiments.config import LOCATIONS
        from experiments.run.batches import to_device, transform_of
        from experiments.run.build import build_model
        from experiments.run.finished import bring_back
        from experiments.run.metrics import cross_entropy
        from tdlrt_jax.paths import flatten_kernels

        config, result, loaded, work = bring_back(directory, data_dir)
        self.options = {name: value for name, value in result["options"].items() if name not in LOCATIONS}
        self.params, state = work.state.params, work.state.model_state
        self._tree = flatten_kernels(self.params)
        self.kernels = dict(zip(self._tree.names, self._tree.kernels))
        self.batch_size, self._epochs, self._seed = (
            config.optimizer.batch_size,
            config.optimizer.epochs,
            config.run.seed,
        )
        self._data = to_device(loaded.train)
        self._transform = transform_of(loaded, crop=config.data.crop, flip=config.data.flip)
        model = build_model(config.model, loaded, config.run.seed)
        model.train()
        graphdef = nnx.graphdef(model)

        def loss(params: Any, images: Any, labels: Any) -> Any:
            return cross_entropy(nnx.merge(graphdef, params, state, copy=True)(images), labels).mean()

        self.loss = loss

    def replaced(self, name: str, kernel: Any) -> Any:
        """The parameters with another kernel of that name."""
        return self._tree.replace([kernel if n == name else k for n, k in self.kernels.items()])

    def batch(self, epoch: int, index: int) -> tuple[Any, Any]:
        """A batch, augmented as in training, of an epoch after the last one; batches beyond its end begin anew."""
        import jax.numpy as jnp

        from experiments.run.batches import epoch_order, training_batch

        number = self._epochs + epoch
        order = epoch_order(self._seed, number, len(self._data.labels), self.batch_size)
        index = index % len(order)
        return training_batch(self._data, order, self._transform, self._seed, number, jnp.int32(index))


if __name__ == "__main__":
    start_over()
    sys.exit(main())
