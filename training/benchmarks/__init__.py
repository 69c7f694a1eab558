"""What generalized residuals cost, next to the plain transformer: `python -m training.benchmarks.run --help`."""
