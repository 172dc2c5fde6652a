"""Fresh processes with any number of host devices, for what :mod:`tests.many_devices.programs` has."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 8


def start(code, *arguments, devices=DEVICES):
    """A fresh process with that many host devices and the programs at hand as ``t``."""
    command = [sys.executable, "-c", f"import sys; from tests.many_devices import programs as t; {code}"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, code=0, timeout=500):
    """What they print, once all have ended with that exit code; nothing outlives this."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs):
        assert process.returncode == code, out[-3000:] + err[-3000:]
    return [out for out, _ in outputs]


def last_line(output):
    return json.loads(output.strip().splitlines()[-1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
