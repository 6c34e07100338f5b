"""From nn.Linear to FourierLinear and back: inject, attach, capture, fuse, restore."""
