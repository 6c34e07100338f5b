"""Runs exported graphs in ONNX Runtime, with adapters that are loaded and unloaded. Without torch.

All that is known of a graph's adapter inputs comes from its metadata.
"""
