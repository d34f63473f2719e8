"""The AscendC that a generated kernel may use: what the emulator has, and nothing else.

Written from the published API of arch 2201 and from what the templates need, not from the
emulator's headers; a test holds the two against each other. An identifier that is not here makes
`source_rules` refuse the file."""

from __future__ import annotations

from collections.abc import Mapping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


QUALIFIERS = _names("__global__ __aicore__ __gm__ __ubuf__ __vector__ __cube__ __mix__")
"""What stands before a function or a pointer; keywords of the device's compiler."""

MACROS = _names("GM_ADDR ASCEND_IS_AIC ASCEND_IS_AIV KERNEL_TASK_TYPE_DEFAULT")

KERNEL_KINDS = _names(
    """
    KERNEL_TYPE_AIV_ONLY KERNEL_TYPE_AIC_ONLY KERNEL_TYPE_MIX_AIV_1_0 KERNEL_TYPE_MIX_AIC_1_0
    KERNEL_TYPE_MIX_AIC_1_1 KERNEL_TYPE_MIX_AIC_1_2
    """
)

PIPES = _names("PIPE_S PIPE_V PIPE_MTE1 PIPE_MTE2 PIPE_MTE3 PIPE_M PIPE_FIX PIPE_ALL")

FUNCTIONS = _names(
    """
    GetBlockIdx GetBlockNum GetSubBlockIdx GetTaskRatio GetTPipePtr InitSocState

    SetFlag WaitFlag PipeBarrier CrossCoreSetFlag CrossCoreWaitFlag SyncAll
    DataCacheCleanAndInvalid SetAtomicAdd SetAtomicNone

    DataCopy DataCopyPad LoadData Fixpipe Mmad

    Add Sub Mul Div Max Min Adds Muls Maxs Mins Exp Ln Abs Sqrt Relu Reciprocal And Or Not
    Cast Duplicate Brcb CreateVecIndex Gather GatherMask Sort32 MrgSort
    ReduceMax ReduceMin ReduceSum WholeReduceMax WholeReduceMin WholeReduceSum
    BlockReduceMax BlockReduceSum Compare CompareScalar Select
    """
)

TYPES = _names(
    """
    half bfloat16_t pipe_t TEventID KernelType
    TPipe TQue TBuf LocalTensor GlobalTensor LocalMemAllocator
    DataCopyParams DataCopyExtParams DataCopyPadExtParams Nd2NzParams LoadData2DParams
    FixpipeParamsV220 FixpipeConfig MmadParams
    UnaryRepeatParams BinaryRepeatParams BrcbRepeatParams GatherMaskParams
    MrgSort4Info MrgSortSrcList
    """
)
"""Parameter structs are made by their constructors: their members are not listed."""

METHODS: Mapping[str, frozenset[str]] = {
    "TPipe": _names("InitBuffer AllocEventID ReleaseEventID FetchEventID"),
    "TQue": _names("AllocTensor EnQue DeQue FreeTensor"),
    "TBuf": _names("Get GetWithOffset"),
    "LocalMemAllocator": _names("Alloc"),
    "LocalTensor": _names("PrimType GetSize GetValue SetValue ReinterpretCast"),
    "GlobalTensor": _names("PrimType GetSize GetValue SetValue SetGlobalBuffer"),
}

ENUMS: Mapping[str, frozenset[str]] = {
    "TPosition": _names("GM A1 A2 B1 B2 C1 C2 CO1 CO2 VECIN VECOUT VECCALC"),
    "Hardware": _names("GM UB L1 L0A L0B L0C BIAS FIXBUF"),
    "HardEvent": _names(
        """
        S_V S_MTE2 S_MTE3 V_S V_MTE2 V_MTE3 MTE2_S MTE2_V MTE2_MTE3 MTE3_S MTE3_V MTE3_MTE2
        MTE2_MTE1 MTE1_MTE2 MTE1_M M_MTE1 M_FIX FIX_M MTE1_FIX FIX_MTE1 MTE2_M M_MTE2
        MTE2_FIX FIX_MTE2 MTE3_MTE1 MTE1_MTE3
        """
    ),
    "CacheLine": _names("SINGLE_CACHE_LINE ENTIRE_DATA_CACHE"),
    "DcciDst": _names("CACHELINE_ALL CACHELINE_UB CACHELINE_OUT CACHELINE_ATOMIC"),
    "RoundMode": _names("CAST_NONE CAST_RINT CAST_FLOOR CAST_CEIL CAST_ROUND CAST_TRUNC CAST_ODD"),
    "CMPMODE": _names("LT GT EQ LE GE NE"),
    "SELMODE": _names("VSEL_CMPMASK_SPR VSEL_TENSOR_SCALAR_MODE VSEL_TENSOR_TENSOR_MODE"),
    "ReduceOrder": _names("ORDER_VALUE_INDEX ORDER_INDEX_VALUE ORDER_ONLY_VALUE ORDER_ONLY_INDEX"),
    "CO2Layout": _names("NZ ROW_MAJOR"),
    "QuantMode_t": _names("NoQuant F322F16 F322BF16"),
}

ALIASES: Mapping[str, str] = {"QuePosition": "TPosition"}
"""A second name of an enumeration."""

UNSCOPED_ENUMS = _names("QuantMode_t")
"""Enumerations whose values are used without their name."""

CONSTANTS = _names("CFG_NZ CFG_ROW_MAJOR")

NAMESPACE = "AscendC"

BUILTINS = _names("__builtin_inff")
"""Functions of every compiler that the device's has too."""

STANDARD = _names(
    """
    int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t size_t
    """
)
"""Types of <cstdint> and <cstddef>."""

TYPE_NAMES = TYPES | ENUMS.keys() | ALIASES.keys() | STANDARD | {"GM_ADDR"}
"""What a declaration may begin with."""

ANYWHERE = (
    QUALIFIERS
    | MACROS
    | KERNEL_KINDS
    | PIPES
    | FUNCTIONS
    | TYPE_NAMES
    | CONSTANTS
    | BUILTINS
    | {NAMESPACE}
    | frozenset().union(*(ENUMS[name] for name in UNSCOPED_ENUMS))
)
"""Names that may stand by themselves."""

MEMBERS = frozenset().union(*METHODS.values())
"""Names that may stand behind a dot."""
