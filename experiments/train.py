"""The main job: ``python -m experiments.train``.

Without options it trains LeNet5 in Tucker format on handwritten digits that need no download, adapting the ranks of
every kernel. ``--help`` lists the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from experiments.config import TrainConfig
from experiments.run.process import start_over

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job for a command line.

    Args:
      argv: arguments without the program's name; default those of the process.

    Returns:
      The exit code: 0 when trained to the end, 1 when stopped by a number that is not finite or a file that cannot be written,
      2 for options or data that cannot work, 130 and 143 when interrupted by SIGINT and SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        config = tyro.cli(
            TrainConfig,
            prog="python -m experiments.train",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        # Imported only now, so that --help and mistyped options answer at once.
        from experiments.run import job

        return job.run(config, argv=argv).exit_code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once, without saving; the last checkpoint stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    start_over()
    sys.exit(main())
