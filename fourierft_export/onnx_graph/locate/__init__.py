"""Finds an adapter's layers, heads and biases in a graph, float or quantised.

Start at `search.find_layers`. The graph is not changed, but for functions that must be expanded.
"""
