"""Everything that touches an ONNX graph: export from torch, and adapters written into graphs.

Data flows one way, and each folder knows only those before it:

1. what all of it shares, no graph in it: the adapter inputs and how an adapter fits them (`groups`,
   `fit`, `weight_input`, `several`), modes, metadata, reports, file names;
2. `find`: where an adapter's layers are in a graph;
3. `edit`: adapters into a graph, and the graph into a file;
4. `trace`: from torch to a graph (the only folder that needs torch); `runtime`: a graph in ONNX
   Runtime. Neither knows the other;
5. the verbs on files: `apply` (with its `search`), `recover`, `describe`.
"""
