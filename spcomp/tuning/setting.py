"""What a tuning is for: the call, checked before anything is tried."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from spcomp import arguments, compiler
from spcomp.autotune.record import TunedCall
from spcomp.autotune.survey import installed
from spcomp.backends import registry
from spcomp.backends.base import Backend, Specialisation
from spcomp.dsl.pattern import Pattern
from spcomp.errors import (
    DtypeUnsupported,
    HeadsDoNotDivide,
    NothingToTune,
    TuneInCapture,
    UnknownChoice,
)
from spcomp.ir.plan import Phase
from spcomp.ir.target import Target
from spcomp.ir.text import print_program
from spcomp.tuning import sample as samples
from spcomp.version import VERSION

Sample = tuple[Tensor, Tensor, Tensor]
DIMS = ("B", "Hq", "Hkv", "Sq", "Skv", "D", "Dv")
DEFAULT_TARGET = "sm90"
WITHOUT_DEVICE = "none"


@dataclass(frozen=True, slots=True)
class Setting:
    """What all meanings of one tuning share.

    shape: by the names of DIMS. device: of the measuring process, or WITHOUT_DEVICE where the cost
    model ranks. card: what the record calls it. sample: None for a random one drawn from `seed`."""

    backend: Backend
    target: Target
    spec: Specialisation
    shape: Mapping[str, int]
    device: str
    card: str
    sample: Sample | None
    sample_name: str
    seed: int

    @property
    def phase(self) -> Phase:
        """The phase that a call of this shape runs."""
        return compiler.phase_for(self.shape["Sq"])

    @property
    def runs(self) -> bool:
        """Whether candidates run at all."""
        return self.device != WITHOUT_DEVICE

    @property
    def is_timed(self) -> bool:
        """Whether they are timed: on a card alone."""
        return self.device.startswith("cuda")


def check_moment() -> None:
    """Refuse to tune inside of what a tuning would disturb.

    Raises: TuneInCapture.
    """
    if torch.compiler.is_compiling() or _is_called_by_compiled_code():
        raise TuneInCapture(what="torch.compile was running its caller")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise TuneInCapture(what="a CUDA graph was being captured")


def _is_called_by_compiled_code() -> bool:
    """Tell whether torch.compile runs a caller: it breaks its graph at a call it cannot trace, and
    then makes that call as it stands."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False


def setting_of(
    name: str,
    *,
    sample: Sample | None,
    shape: Mapping[str, int] | None,
    dtype: str,
    backend: str | None,
    target: str | None,
    seed: int,
) -> Setting:
    """Check the call that a pattern, here only its name, is to be tuned for.

    Raises: NothingToTune, UnknownTarget, UnknownBackend, and the errors of a call for its tensors.
    """
    if (sample is None) == (shape is None):
        given = "neither a sample nor a shape" if sample is None else "both a sample and a shape"
        raise NothingToTune(
            pattern=name,
            why=f"{given} was given",
            way_out="pass sample=(q, k, v), or shape={'B': 1, 'Hq': 32, ...}.",
        )
    if sample is not None:
        q, k, v = _three(name, sample)
        lengths = arguments.dims_of(q, k, v)
        arguments.check_tensors(q, k, v)
        spec = arguments.specialisation(q, k, v)
        where, sample = str(q.device), (q, k, v)
        sample_name = samples.digest_of({"q": q, "k": k, "v": v})
    else:
        assert shape is not None
        lengths = dict(shape)
        where = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        sample_name = f"random, seed {seed}"
        heads = lengths.get("Hq", 0), lengths.get("Hkv", 0)
        spec = Specialisation(_float(dtype), lengths.get("D", 0), lengths.get("Dv", 0), heads=heads)
    _check_lengths(name, lengths)
    is_run = where.startswith("cuda") or backend is not None
    if is_run:
        maker = registry.backend(backend or "triton")
        chip = maker.target_of(where)
        if target not in (None, chip.name):
            raise UnknownChoice(
                verb="tune on this device", name="target", value=target, choices=repr(chip.name)
            )
        card = torch.cuda.get_device_name(where) if where.startswith("cuda") else where
    else:
        chip = registry.target(target or DEFAULT_TARGET)
        maker, where = registry.backend(chip.backend), WITHOUT_DEVICE
        card = WITHOUT_DEVICE
    if sample is not None and maker.name != "reference":
        arguments.check_strides(*sample)
    return Setting(maker, chip, spec, lengths, where, card, sample, sample_name, seed)


def called(pattern: Pattern, setting: Setting) -> TunedCall:
    """Give what the result of tuning one meaning is kept under.

    Raises: MaskOfOtherLength, ShapeMismatch, DeviceClash for masks and tables that do not fit.
    """
    device = next((str(t.device) for t in pattern.tensors.values()), "")
    if setting.sample is not None:
        device = str(setting.sample[0].device)
    arguments.check_masks(pattern, setting.shape, device)
    program = print_program(pattern.program, comments=False)
    versions = {name: installed(name) for name in ("torch", "triton")}
    return TunedCall(
        pattern=pattern.program.title(),
        program_sha256=hashlib.sha256(program.encode()).hexdigest(),
        tables_sha256=samples.digest_of(pattern.tensors),
        phase=setting.phase,
        shape=dict(setting.shape),
        dtype=setting.spec.dtype,
        backend=setting.backend.name,
        target=setting.target.name,
        device=setting.card,
        toolchain={"spcomp": VERSION, **{n: v for n, v in versions.items() if v is not None}},
        sample=setting.sample_name,
    )


def _three(name: str, sample: object) -> Sample:
    if isinstance(sample, (tuple, list)) and len(sample) == 3:
        q, k, v = sample
        if all(isinstance(x, Tensor) for x in (q, k, v)):
            return q, k, v
    raise NothingToTune(
        pattern=name,
        why="its sample is not three tensors",
        way_out="pass sample=(q, k, v) with q [B,Hq,Sq,D], k [B,Hkv,Skv,D], v [B,Hkv,Skv,Dv].",
    )


def _float(dtype: str) -> str:
    known = [name for name in arguments.FLOATS if name != "float64"]
    if dtype not in known:
        raise DtypeUnsupported(
            name="the sample", dtype=dtype, backend="triton", choices=", ".join(known)
        )
    return dtype


def _check_lengths(name: str, lengths: Mapping[str, int]) -> None:
    wrong = [n for n in DIMS if not isinstance(lengths.get(n), int) or lengths[n] < 1]
    unknown = [n for n in lengths if n not in DIMS]
    if wrong or unknown:
        why = f"gives no {', '.join(wrong)}" if wrong else f"names {', '.join(unknown)}"
        raise NothingToTune(
            pattern=name,
            why=f"its shape {why}",
            way_out=f"a shape names {', '.join(DIMS)}, each 1 or more.",
        )
    if lengths["Hq"] % lengths["Hkv"]:
        raise HeadsDoNotDivide(hq=lengths["Hq"], hkv=lengths["Hkv"])
