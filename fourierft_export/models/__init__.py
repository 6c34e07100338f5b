"""What a base model is: module paths and tensor names, prefixes, heads, tied weights, tasks."""
