"""Everything that touches an ONNX graph: export from torch, and adapters written into graphs."""
