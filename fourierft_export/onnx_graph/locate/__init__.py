"""Finds an adapter's layers, heads and biases in a graph, float or quantised.

Start at `finder.Finder`. The graph is not changed, but where `parts` joins products.
"""
