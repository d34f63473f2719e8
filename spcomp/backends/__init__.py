"""Backends: one package each, which turn a plan into something that runs."""
