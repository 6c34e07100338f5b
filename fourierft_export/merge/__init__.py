"""Checkpoint + bundles -> checkpoint: streamed, rounded once, staged and renamed. No torch."""
