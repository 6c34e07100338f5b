"""Where an adapter's layers are in a graph, float or quantised. Nothing here changes a graph.

Knows nothing of what is done with what is found: `edit` comes after it.
"""
