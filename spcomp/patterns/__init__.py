"""The shipped patterns, one file a system; each reads beside its paper."""

from spcomp.patterns.block_topk import block_topk
from spcomp.patterns.moba import moba
from spcomp.patterns.quest import quest
from spcomp.patterns.streaming_llm import streaming_llm
from spcomp.patterns.xattention import xattention

SHIPPED = {p.name: p for p in (block_topk, moba, quest, streaming_llm, xattention)}

__all__ = ["SHIPPED", "block_topk", "moba", "quest", "streaming_llm", "xattention"]
