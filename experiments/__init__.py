"""Training jobs and published rows: ``python -m experiments.train`` is the main one."""
