"""Proof: runs artifacts that must agree on the same inputs and reports where they do not.

It shares no code with what it checks, above `spectral`'s readable reference: models are loaded by
transformers, graphs are run by ONNX Runtime, and the adapted model is rebuilt here.
"""
