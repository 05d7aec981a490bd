"""The project's commands: train a model from text, and compare kernels and wrappers."""
