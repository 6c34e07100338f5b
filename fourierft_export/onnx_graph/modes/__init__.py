"""Adapters written into a graph: one file per mode, used by `export_onnx` and `apply_onnx` alike.

Each mode has `write(edits, adapters, sites, saved)`; `write.write_adapters` calls it, and adds what
every mode needs: checks before and after, and the metadata.
"""
