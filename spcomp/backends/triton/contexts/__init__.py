"""Contexts of the Triton templates: one frozen dataclass per kernel, and what derives it."""
