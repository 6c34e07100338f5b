"""Training: rows of data and a model to an adapter, on one process or many."""
