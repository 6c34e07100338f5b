"""ONNX files read and written, and the graph operations that every mode needs."""
