"""Safetensors checkpoints: read by position, written in a stream, staged and renamed. No torch."""
