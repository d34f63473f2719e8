"""Tuning: from a pattern and a sample to the schedule that is fastest on this card.

`tuner` is `sp.tune`, `report` what it gives, `sample` the tensors, `worker` and `trial` the process
that measures, `checking` what counts as right. The search itself is in `spcomp.autotune`."""

from spcomp.tuning.report import TuningReport
from spcomp.tuning.tuner import tune

__all__ = ["TuningReport", "tune"]
