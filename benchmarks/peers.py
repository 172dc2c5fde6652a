"""Asks PyTorch, in a process and an environment of its own, for the same work, so that both are timed in turn in one run.

``scripts/peers`` makes the environment. The process is ``torch_peer.py`` beside this file; requests and replies are lines of
JSON on its standard streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

__all__ = ["Peer", "available"]

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(__file__).with_name("torch_peer.py")
ENVIRONMENT = ROOT / ".venv-peers"
REMEDY = "`make peers` makes its environment"
_ERROR_LINES = 12  # of a dead process's standard error, in the message


def available(python: Path | None = None) -> Path | None:
    """The interpreter of the peers' environment, if there is one that imports torch.

    Args:
      python: the interpreter to look at; by default the one that ``TDLRT_PEERS_PYTHON`` names, or else that of
        ``.venv-peers``.

    Returns:
      Its path, or ``None``.
    """
    python = Path(python or os.environ.get("TDLRT_PEERS_PYTHON") or ENVIRONMENT / "bin" / "python")
    try:
        found = subprocess.run([python, "-I", "-c", "import torch"], capture_output=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return python if found.returncode == 0 else None


class Peer:
    """A PyTorch process, to be used in a ``with`` statement, which starts and ends it.

    It waits idle between requests, so that what is timed beside it has the cores to itself.

    Args:
      python: its interpreter, see ``available``.
      threads: of PyTorch's; ``None`` for as many as there are cores.
      timeout: seconds after which a request is given up and the process ended.
      script: what it runs.

    Attributes:
      versions: of Python and the packages, by name.
      threads: of PyTorch's.

    Raises:
      RuntimeError: from every method, naming the peer and the request: if PyTorch refuses it, and then the process goes on; if
        the process cannot be started, has died, does not answer in time or not in the protocol, and then it is ended.

    Example:
      with Peer(python) as peer:
          peer.build("dense", mode="train", model="vgg16", method="dense", batch=32)
          seconds = peer.run("dense", steps=3)
    """

    versions: dict[str, str]

    def __init__(self, python: Path, threads: int | None = None, timeout: float = 600, *, script: Path = SCRIPT):
        self.python = Path(python)
        self.threads = threads
        self.timeout = timeout
        self._script = script
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> Peer:
        """Starts the process."""
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        try:
            # Isolated: neither the modules beside the script nor PYTHONPATH, made for another environment, are in its way.
            self._process = subprocess.Popen(
                [self.python, "-I", self._script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._end()
            raise RuntimeError(f"{self._name} cannot be started: {error}; {REMEDY}") from error
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            hello = self.request("hello", threads=self.threads)
            self.versions, self.threads = hello["versions"], hello["threads"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it is dead already
                self._process.stdin.write('{"op": "quit"}\n')
                self._process.stdin.flush()
        self._end(patience=5)

    def build(self, id: str, **spec: Any) -> dict[str, Any]:
        """Makes a network with its data and its optimizer, and takes a first step, in place of an earlier one of this name.

        Args:
          id: its name in later requests.
          spec: ``mode``, ``"train"`` or ``"infer"``; ``model``, ``"vgg16"``, ``"alexnet"`` or ``"resnet18"``; ``method``,
            ``"dense"``, ``"factorized"`` (the core between convolutions of 1x1) or ``"tensorly"`` (tensorly-torch's layer);
            ``ranks``, a mapping of the paths of convolutions in our network, such as ``"blocks/0/conv1"``, to
            ``[height, width, in, out]``, where those left out stay dense; ``width``, ``num_classes``, ``image``, ``batch``,
            ``learning_rate``, ``momentum``, ``seed``, and ``channels_last``, which is chosen by method unless it is given.

        Returns:
          ``parameters`` of the network and ``conv_parameters`` of its convolutions, in numbers; ``convolutions``, the same by
          path; ``state_bytes`` of parameters, gradients and optimizer.
        """
        return self.request("build", id=id, **spec)

    def run(self, id: str, steps: int = 1) -> list[float]:
        """Takes steps, of training or of evaluation, all with the same batch; seconds of each."""
        return self.request("run", id=id, steps=steps)["seconds"]

    def memory(self, id: str) -> dict[str, Any]:
        """Memory in bytes.

        Returns:
          ``parameter_bytes``, ``gradient_bytes``, ``optimizer_bytes`` and ``buffer_bytes`` (BatchNorm's averages), exact, of
          this network; ``peak_rss_bytes``, the most that the process has held since its start, PyTorch itself, activations
          and other networks included.
        """
        return self.request("memory", id=id)

    def drop(self, id: str) -> None:
        """Frees a network."""
        self.request("drop", id=id)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Sends any request of the protocol, waits, and returns the reply without its ``ok``."""
        if self._process is None or self._process.stdin is None:
            raise RuntimeError(
                f"{self._name} is not running: expected it in a `with` statement, and no earlier failure"
            )
        line = json.dumps({"op": op, **fields})
        asked = f"the request {line if len(line) < 300 else line[:300] + '...'}"
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            text = self._replies.get(timeout=self.timeout)
        except OSError:
            text = None
        except queue.Empty:
            self._end()
            raise RuntimeError(f"{self._name} did not answer {asked} in {self.timeout:g} s and was ended") from None
        except BaseException:  # an interruption: a late reply would be taken for that to the next request
            self._end()
            raise
        if text is None:
            status, errors = self._end(patience=5)
            raise RuntimeError(
                f"{self._name} ended with status {status} at {asked}; {REMEDY}. Its last words:\n{errors}"
            )
        try:
            reply = json.loads(text)
            ok = reply.pop("ok")
        except (ValueError, KeyError, AttributeError, TypeError):
            self._end()
            raise RuntimeError(f"{self._name} answered {asked} with {text[:300]!r}, no reply, and was ended") from None
        if not ok:
            remedy = f"; {REMEDY}" if "ModuleNotFoundError" in reply.get("error", "") else ""
            raise RuntimeError(f"{self._name} refused {asked}: {reply.get('error', 'no reason given')}{remedy}")
        return reply

    @property
    def _name(self) -> str:
        return f"the PyTorch peer {self.python}"

    def _end(self, patience: float = 0) -> tuple[int | None, str]:
        """Waits for the process's end, or else ends it; its status and the last lines of its standard error."""
        status, lines = None, []
        if self._process is not None:
            try:
                status = self._process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                status = self._process.wait()
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):  # what was not sent
                    self._process.stdin.close()
            self._process = None
        if self._errors is not None:
            self._errors.seek(0)
            lines = self._errors.read().splitlines()[-_ERROR_LINES:]
            self._errors.close()
            self._errors = None
        return status, "\n".join(lines) or "(nothing)"


def _pass_on(stream: IO[str], replies: queue.Queue[str | None]) -> None:
    """Puts lines into a queue, ``None`` at their end: a queue can be waited for with a timeout on every platform."""
    with stream:
        for line in stream:
            replies.put(line)
    replies.put(None)
