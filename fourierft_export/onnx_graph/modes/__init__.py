"""Adapters into an open graph, in every mode, and the graph into a file.

Works on what `find` found; knows neither torch nor ONNX Runtime. From plain operators up: `ops`,
tables and transforms, side branches and functions, one module per mode, the writing at the end.
"""
