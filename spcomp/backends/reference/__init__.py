"""The reference backend: patterns and plans interpreted in plain torch."""
