"""Reads safetensors checkpoints by position, and writes outputs that are complete or absent."""
