"""From a torch model to an ONNX file: the graph traced, adapters put in by `modes`.

The only folder of this room that imports torch.
"""
