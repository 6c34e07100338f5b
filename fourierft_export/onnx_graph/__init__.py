"""Everything that touches an ONNX graph."""
