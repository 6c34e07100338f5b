"""Adapters in transformers' Trainer and in accelerate: what they save and resume from."""
