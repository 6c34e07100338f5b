"""Rows of data and a model -> a `TrainingTask`."""
