"""Everything that touches an ONNX graph: export from torch, and adapters written into graphs.

Data flows one way, and each folder imports only from those before it:

1. what all of it shares, no graph in it: the adapter inputs (`interface`) and what an adapter feeds
   them (`feeds`), the bundles by name (`adapters`), mode names, metadata, reports;
2. `graph`: ONNX files read and written, nodes and constants changed;
3. `locate`: where an adapter's layers are in a graph that another tool made;
4. `modes`: adapters into a graph, one file per mode (`modes/write_mode.py` is the way in);
5. `trace`: from torch to a graph whose layers are known (the only folder that needs torch), then
   the same modes; `runtime`: a graph in ONNX Runtime. Neither imports the other;
6. the verbs on files: `apply`, `describe`.
"""
