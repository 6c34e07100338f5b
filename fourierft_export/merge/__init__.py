"""Merges bundles into a checkpoint, one shard at a time, without torch."""
