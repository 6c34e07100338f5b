"""Bundles recovered from merged checkpoints and from ONNX files."""
