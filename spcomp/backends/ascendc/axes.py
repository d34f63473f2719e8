"""The kernels this backend has. The lowering reads here what it may plan with."""

from __future__ import annotations

from spcomp.ir.schedule import KernelAxes, frozen

AXES: KernelAxes = frozen({"pool": {}, "score": {}, "topk": {}, "attend_gather": {}})
