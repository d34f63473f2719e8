"""From frozen contexts to source text: the Jinja environment and the header of generated files."""
