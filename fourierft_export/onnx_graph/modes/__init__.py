"""Adapters written into a graph: one file per mode, used by `export_onnx` and `apply_onnx` alike.

Each mode has `write(source, adapters, sites, saved)`; `write_mode.write_adapters` calls it and adds
the checks and the metadata that every mode needs.
"""
