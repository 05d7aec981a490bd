"""A small Transformer language model and what it needs to train on one device."""
