"""The paper's experiments, each a command of its own (``python -m experiments.NAME --help``).

- ``train``: the main job, one network by one method (:mod:`~experiments.methods`, :mod:`~experiments.options`);
- ``table1``, ``figure1``, ``figure2_footprint``, ``figure2_robustness``: grids of such runs, as ``configs`` plan them;
- ``show``, ``publish``, ``results_table``, ``widths``, ``step_cost``, ``cut_costs``: to look at runs, to keep and compare their
  results, and to measure what was trained.

A single run is :mod:`experiments.run`, many are :mod:`experiments.grids`, and the theorems :mod:`experiments.dynamics`.
"""
