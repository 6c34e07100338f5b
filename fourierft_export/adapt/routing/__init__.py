"""Several adapters in one batch: each row goes through its own."""
