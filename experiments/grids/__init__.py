"""Many runs under one protocol: Table 1 and the figures.

:mod:`~experiments.grids.protocol` says how networks are trained at each scale, :mod:`~experiments.grids.grid` plans the runs and
does what is missing (``execution``, ``pace``), and ``tables`` and ``figures`` show the results that are there.
"""
