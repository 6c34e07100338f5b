"""FourierFT adapters, from training to deployment: pack, merge, export, validate.

The public names load on first use, so that `import fourierft_export`, the command line's `--help`
and `inspect` cost no import of torch, onnx or transformers.
"""

from __future__ import annotations

__version__ = "0.1.0"
