"""Reads, edits and writes ONNX graphs; nothing here knows of adapters."""
