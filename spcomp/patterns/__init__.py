"""The shipped patterns, one file a system; each reads beside its paper."""

from spcomp.patterns.block_topk import block_topk
from spcomp.patterns.flexprefill import flexprefill
from spcomp.patterns.infllm_v2 import infllm_v2
from spcomp.patterns.minference import minference
from spcomp.patterns.moba import moba
from spcomp.patterns.nsa import nsa
from spcomp.patterns.quest import quest
from spcomp.patterns.spargeattn import spargeattn
from spcomp.patterns.streaming_llm import streaming_llm
from spcomp.patterns.xattention import xattention

SHIPPED = {
    p.name: p
    for p in (
        block_topk,
        flexprefill,
        infllm_v2,
        minference,
        moba,
        nsa,
        quest,
        spargeattn,
        streaming_llm,
        xattention,
    )
}

__all__ = [
    "SHIPPED",
    "block_topk",
    "flexprefill",
    "infllm_v2",
    "minference",
    "moba",
    "nsa",
    "quest",
    "spargeattn",
    "streaming_llm",
    "xattention",
]
