"""From stages to launches: what the pass `cut` is made of."""
