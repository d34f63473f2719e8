"""A pattern of your own in ten lines, checked against dense attention at a full budget.

python examples/custom_pattern.py
"""

from __future__ import annotations

import torch

import spcomp as sp


@sp.pattern
def best_and_near(q, k, v, *, block=64, keep=4, near=128):
    """Read the blocks with the largest maximum score, a window, and the first tokens."""
    units = sp.downsample(k, block=block, by="minmax")
    scores = sp.score(q, units, heads="group", reduce="max")
    best = sp.topk(scores, k=keep, always=sp.own())
    seen = best | sp.window(near) | sp.sink(16)
    return sp.attend(q, sp.gather(k, seen), sp.gather(v, seen))


def main() -> None:
    """Run the pattern on random tensors and print what it keeps."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(1, 8, 1000, 64, device=device)
    k, v = torch.randn(2, 1, 2, 1000, 64, device=device)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for keep in (2, 4, 16):
        attention = sp.compile(best_and_near(keep=keep))
        out, lse = attention(q, k, v, return_lse=True)
        density = attention.to_mask(q, k).float().mean() / (0.5 + 0.5 / 1000)
        print(
            f"keep {keep:>2}: {density:6.1%} of the causal pairs, "
            f"error {(out - dense).abs().max():.4f}, lse {tuple(lse.shape)}"
        )


if __name__ == "__main__":
    main()
