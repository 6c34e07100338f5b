"""Recovers bundles from merged checkpoints and from ONNX files."""
