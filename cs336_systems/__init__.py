"""The systems half of training a language model: attention kernels, data parallelism, training."""
