"""Checkpoint plus bundles gives checkpoint: one tensor in memory at a time, rounded once."""
