"""What a training step, a prediction and their parts cost, side by side: ``python -m benchmarks.run``."""
