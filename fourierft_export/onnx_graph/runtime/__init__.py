"""A graph in ONNX Runtime, with adapters that come and go. No torch and no onnx_ir.

Knows what the graph's metadata says of the adapter inputs, and nothing of how they came there.
"""
