"""Contexts of the AscendC templates: one frozen dataclass a kernel, its fields the variables."""
