"""Pure mathematics of FourierFT: entries from a seed, delta_W from a spectrum, and the token form.

numpy is enough for all of it; `torch_ops` holds the same for torch tensors.
"""
