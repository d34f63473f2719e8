"""The candidates of one meaning, tried: by the measuring process, or by asking the cost model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from spcomp import api
from spcomp.autotune import price, record_text, space
from spcomp.autotune.record import Candidate, Kept, Row, Status
from spcomp.autotune.search import expected
from spcomp.dsl.pattern import Pattern
from spcomp.ir.text import print_program
from spcomp.tuning import checking
from spcomp.tuning import sample as samples
from spcomp.tuning.setting import Setting
from spcomp.tuning.worker import TRIAL, Died, NotStarted, Worker

BY_MODEL = "ranked by the cost model, not timed"
NO_CHOICE = "it has one schedule alone, so there was nothing to choose"
RANDOM = "the sample is random: what it keeps of attention says nothing of a model"
GRAPHED = "times are of CUDA graphs: the device's work, without that of the host"
NOT_GRAPHED = "could not be captured in a CUDA graph; its time includes the host's"
NO_PROCESS = "the measuring process could not be got ready"
MEASURED = "torch's scaled_dot_product_attention, measured"


class Trials:
    """Gives the row of a candidate; what it learns of the call beside that goes into the record.

    The measuring process starts with the first candidate, so a search that knows all rows starts
    none. `tried`: how many candidates were asked for."""

    def __init__(
        self,
        pattern: Pattern,
        setting: Setting,
        found: space.Space,
        recorder: record_text.Recorder,
        *,
        module: str = TRIAL,
        try_timeout_s: float | None = None,
    ) -> None:
        self._pattern, self._setting, self._space = pattern, setting, found
        self._recorder = recorder
        self._module, self._try_timeout_s = module, try_timeout_s
        self._worker: Worker | None = None
        self._refused: NotStarted | None = None  # it would be refused to every candidate
        self.tried = 0

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._worker is not None:
            self._worker.close()

    def __call__(self, candidate: Candidate) -> Row:
        """Try a candidate."""
        if self.tried == 0 and not self._setting.is_timed:
            self._say_untimed()
        if self.tried == 0 and not self._has_choice():
            self._note(NO_CHOICE)
        self.tried += 1
        predicted_ms = self._space.judge(candidate).predicted_ms
        if not self._setting.runs:
            return Row(candidate, "ok", "emitted", predicted_ms=predicted_ms)
        try:
            answer = self._asked(candidate)
        except NotStarted as problem:
            reason = f"{NO_PROCESS}: {problem}"
            return Row(candidate, "skipped", "emitted", reason, predicted_ms)
        except Died as death:
            status: Status = "timeout" if death.is_timeout else "failed"
            return Row(candidate, status, "emitted", str(death), predicted_ms=predicted_ms)
        is_graphed = answer.pop("is_graphed", None)
        if is_graphed is not None:
            self._note(GRAPHED if is_graphed else f"{_name(candidate)} {NOT_GRAPHED}")
        return Row(candidate, predicted_ms=predicted_ms, **answer)

    def _asked(self, candidate: Candidate) -> dict[str, Any]:
        if self._refused is not None:
            raise self._refused
        if self._worker is None:
            try:
                self._worker = self._made()
            except NotStarted as problem:
                self._refused = problem
                raise
        return self._worker.attempt(_request(candidate))

    def _made(self) -> Worker:
        """Start the measuring process; what it says of the call goes into the record.

        Raises: NotStarted.
        """
        setting, pattern = self._setting, self._pattern
        load = {
            "pattern": print_program(pattern.program, comments=False),
            "backend": setting.backend.name,
            "device": setting.device,
            "shape": dict(setting.shape),
            "dtype": setting.spec.dtype,
            "seed": setting.seed,
            "ahead": [_request(c) for c in expected(self._space, setting.seed)],
        }
        worker = Worker(load, module=self._module, try_timeout_s=self._try_timeout_s)
        try:
            given = setting.sample or ()
            samples.save(worker.folder / "sample", dict(zip("qkv", given, strict=False)))
            samples.save(worker.folder / "tables", pattern.tensors)
            self._learn(worker.start())
        except BaseException:
            worker.close()
            raise
        return worker

    # ---- what is known of the call beside its candidates ----

    def _learn(self, answer: Mapping[str, Any]) -> None:
        for note in answer["notes"]:
            self._note(note)
        if answer["dense_ms"] is not None:
            self._recorder.dense(answer["dense_ms"], MEASURED)
        if answer["kept"] is not None:
            self._recorder.kept(Kept(**answer["kept"]))
            if self._setting.sample is None:
                self._note(RANDOM)

    def _say_untimed(self) -> None:
        """Say that nothing is timed, and work out what needs no card."""
        setting = self._setting
        self._note(BY_MODEL)
        figures = price.dense_ms(setting.shape, setting.spec, setting.target)
        self._recorder.dense(figures, price.roofline_name(setting.target))
        if setting.runs or setting.sample is None or self._recorder.tuning().kept is not None:
            return
        reference = api.compile(self._pattern, backend="reference")
        kept, why = checking.kept_of(reference, *setting.sample)
        if kept is None:
            self._note(why)
        else:
            self._recorder.kept(Kept(int(kept.pop("tokens")), **kept))

    def _has_choice(self) -> bool:
        found = self._space
        return len(found.candidates()) > 1 or any(row.status == "pruned" for row in found.rows)

    def _note(self, text: str) -> None:
        if text not in self._recorder.tuning().notes:
            self._recorder.note(text)


def _request(candidate: Candidate) -> dict[str, Any]:
    return {"order": candidate.order, "axes": candidate.axes}


def _name(candidate: Candidate) -> str:
    if not candidate.axes:
        return "the default schedule"
    return ", ".join(
        f"{kernel} {' '.join(f'{n}={v}' for n, v in axes)}" for kernel, axes in candidate.axes
    )
