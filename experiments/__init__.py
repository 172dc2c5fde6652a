"""Training jobs and published rows: ``python -m experiments.train`` is the main one."""

import os

# LAPACK on the CPU comes from SciPy's OpenBLAS, whose threads spin while they wait: small factorizations on busy cores then take a
# hundred times longer (measured: 97 ms against 0.5 ms for the QR decompositions of one kernel). It is read when SciPy loads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
