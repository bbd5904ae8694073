"""`python -m benchmarks.train_step ARCHITECTURE --context N`: a full update of a named model with random weights."""
