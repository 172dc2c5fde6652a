"""One training run, from its options to its result: what :mod:`experiments.train` starts.

:mod:`~experiments.run.job` puts it together from the data (``data``, ``batches``), the network and its optimizer (``build``,
``pruning``), where it computes (``devices``, ``process``, ``memory``, ``compilation_cache``) and the compiled steps
(``programs``, ``arrays``). :mod:`~experiments.run.training` goes through the epochs; ``metrics``, ``records``, ``display``,
``events`` and ``plots`` say how it does. :mod:`~experiments.run.directory` keeps all of it, also where the run is cut off
(``interruption``, ``endings``); :mod:`~experiments.run.finished` brings a finished one back.
"""
