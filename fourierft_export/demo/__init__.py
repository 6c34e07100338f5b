"""The whole job on real data: train, adapt, pack, merge, export and prove, with no download."""
