"""Hyper-parameters of patterns from samples of a model's tensors, and from the files of others."""
