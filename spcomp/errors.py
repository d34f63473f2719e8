"""Every error a user can meet: what is wrong with both figures, where, and the way out.

The class is the two sentences. `message` and `help` are format strings over the keyword arguments
the error is raised with, so a test can compare the whole text and no wording hides in the middle of
a pass."""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a user's file: the line that made a node."""

    file: str
    line: int

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{self.file}:{self.line}" + (f":  {text}" if text else "")


class SpcompError(ValueError):
    """Base of all errors that are the user's to mend.

    Text: ``message``, then ``  --> file:line:  source`` when the place is known, then ``  help:
    …``."""

    message: ClassVar[str] = "{detail}"
    help: ClassVar[str] = ""

    def __init__(self, *, where: Where | None = None, **figures: Any) -> None:
        self.where = where
        self.figures = figures
        lines = [f"{type(self).__name__}: {self.message.format(**figures)}"]
        if where is not None:
            lines.append(f"  --> {where}")
        if self.help:
            lines.append(f"  help: {self.help.format(**figures)}")
        super().__init__("\n".join(lines))


# ---- the pattern -------------------------------------------------------------------------------


class ForcedSetTooLarge(SpcompError):
    message = "topk keeps {k} {units}, but its forced set alone has {parts} = {forced}."
    help = "raise k to {forced} or more, or shrink the forced set."


class NegativeCount(SpcompError):
    message = "{verb} was given {name} = {value}, which is below {least}."
    help = "{name} counts {counts}; give {least} or more."


class NotANumber(SpcompError):
    message = "{verb} was given {name} = {value!r} of type {kind}, where {wanted} is needed."
    help = "pass {wanted}."


class UnknownChoice(SpcompError):
    message = "{verb} was given {name} = {value!r}."
    help = "choose one of {choices}."


class PatternReturnsNothing(SpcompError):
    message = "the pattern '{pattern}' returned {value}, not the result of attend() or merge()."
    help = "end the function with `return attend(q, ...)`."


class WrongArguments(SpcompError):
    message = "the pattern '{pattern}' {problem}."
    help = "its signature is {signature}."


class BadDeclaration(SpcompError):
    message = "{what} {problem}."
    help = "give {form}."


class WrongStage(SpcompError):
    message = "{verb} takes {wanted} as its {argument}, but was given {given}."
    help = "{way_out}"


class NotAPermutation(SpcompError):
    message = (
        "{verb} was given an order of {tokens} tokens that does not hold each of 0 to "
        "{tokens} - 1 once: sorted, it differs from them at place {missing}."
    )
    help = "give each token one place, as torch.randperm(tokens) does."


class ControlFlowOnData(SpcompError):
    message = (
        "'{callable}' branches on a value that is known only when the kernel runs ({expression})."
    )
    help = (
        "use torch.where(condition, a, b), or combine conditions with & and | instead of "
        "`if`, `and`, `or`, `not`."
    )


class NotTraceable(SpcompError):
    message = "'{callable}' calls {operation}, which has no element expression."
    help = (
        "use + - * // % comparisons & | ~, torch.where, minimum, maximum, abs, exp, log, "
        "tanh, and tensor[index]."
    )


class UnknownPattern(SpcompError):
    message = "there is no pattern '{name}'{place}."
    help = "{choices}"


# ---- the IR ------------------------------------------------------------------------------------


class IRText(SpcompError):
    message = "line {line} of the IR text {problem}: {text}"
    help = "`spcomp show PATTERN --at pattern` prints the form that reads back."


class RuleBroken(SpcompError):
    message = "after {step}, rule '{rule}' does not hold: {problem}."
    help = (
        "this is a fault of spcomp or of a hand-written IR file, not of your pattern; please "
        "report it with the output of `spcomp show`."
    )


class CannotLower(SpcompError):
    message = "{what} cannot be lowered: {why}."
    help = "{way_out}"


# ---- the call ----------------------------------------------------------------------------------


class ShapeMismatch(SpcompError):
    message = "{left} and {right} do not agree: {problem}."
    help = "{way_out}"


class MissingTensor(SpcompError):
    message = "the pattern '{pattern}' takes the tensor {name} {form}, and the call gives {given}."
    help = "pass {name}=... by keyword."


class UnknownTensor(SpcompError):
    message = "the call gives the tensor {name}, which the pattern '{pattern}' does not take."
    help = "{takes}."


class WrongDtype(SpcompError):
    message = "{name} is {dtype}, where the pattern takes {wanted}."
    help = "cast it before the call."


class SizeUnknown(SpcompError):
    message = "the pattern '{pattern}' names the dim {name}, and nothing says how large it is."
    help = "give its size: --dim {name}=64, or a call with its tensors."


class HeadsDoNotDivide(SpcompError):
    message = "q has {hq} heads and k has {hkv}: {hq} is not a multiple of {hkv}."
    help = "grouped-query attention needs Hq = G * Hkv; query head h uses KV head h // G."


class DtypeMix(SpcompError):
    message = "{left} is {left_dtype} and {right} is {right_dtype}."
    help = "cast them to one of float32, float16, bfloat16 before the call."


class DtypeUnsupported(SpcompError):
    message = "{name} is {dtype}, which the {backend} backend does not compute in."
    help = "use one of {choices}."


class DeviceClash(SpcompError):
    message = "{left} is on {left_device} and {right} is on {right_device}."
    help = "move them to one device."


class HeadDimTooLarge(SpcompError):
    message = "{name} is {value}, above the {limit} that the {backend} backend holds on chip."
    help = "use the reference backend (backend='reference'), or split the head."


class LastStrideNotOne(SpcompError):
    message = "{name} has stride {stride} in its last dimension, where 1 is needed."
    help = "call {name}.contiguous() first; other strides are free."


class StrideTooLarge(SpcompError):
    message = "the rows of {name} are {stride} elements apart, and a tile holds at most {limit}."
    help = "call {name}.contiguous() first, or use the reference backend."


class MaskOfOtherLength(SpcompError):
    message = "{mask} was built for {built}, but q and k are {given}."
    help = "build it again for these lengths."


class WrongLengths(SpcompError):
    message = "{name} {problem}."
    help = "{way_out}"


class LengthMissing(SpcompError):
    message = "{name} is not given, and reading it off {source} would wait for {device}."
    help = "pass {name}=, at least the longest length of a sequence."


class CannotPack(SpcompError):
    message = "{what} cannot be used with packed sequences: {why}."
    help = "{way_out}"


class NeedsGradient(SpcompError):
    message = "{name} requires a gradient, and the {backend} backend has no backward."
    help = "use backend='reference', or call under torch.no_grad()."


class UnknownTarget(SpcompError):
    message = "there is no target '{name}'."
    help = "choose one of {choices}."


class UnknownBackend(SpcompError):
    message = "there is no backend '{name}'."
    help = "choose one of {choices}."


class TritonMissing(SpcompError):
    message = "{name} is on {device}, but Triton cannot be imported ({reason})."
    help = "pip install 'spcomp[triton]', or use backend='reference'."


class NotOnThisDevice(SpcompError):
    message = "the {backend} backend cannot run on {device}{why}."
    help = "{way_out}"


class Refused(SpcompError):
    message = "the {backend} backend refuses {what}: {reason}."
    help = "{way_out}"


class BadSetting(SpcompError):
    message = "{variable} is {value!r}, which is not {wanted}."
    help = "set it to {wanted}, or unset it."


class CacheNotWritable(SpcompError):
    message = "the cache folder {folder} set by {variable} cannot be written ({reason})."
    help = (
        "give a folder you may write, or unset {variable}. SPCOMP_CACHE_READ_ONLY=1 says that "
        "nothing is meant to be written there."
    )


class NotAnArchive(SpcompError):
    message = "{path} is not an archive of cache entries: {problem}."
    help = "write one with `spcomp cache export FILE.tar`. Nothing of it was taken."


class EntryDamaged(SpcompError):
    message = "the cache entry {folder}."
    help = (
        "`spcomp cache verify` lists what is damaged; a call that needs the entry makes it again."
    )


class NoSuchEntry(SpcompError):
    message = "no cache entry begins with '{digest}'."
    help = "`spcomp cache list` shows those there are."


class NotWarmedUp(SpcompError):
    message = "{what}, and a CUDA graph is being captured."
    help = "make the same call once before the capture{more}."


class UnknownHandle(SpcompError):
    message = "the graph names the compiled pattern '{handle}', which this process does not hold."
    help = (
        "compile the same pattern with the same options, `spcomp.compile(...)`, and keep it until "
        "the graph has run once."
    )


class TuneInCapture(SpcompError):
    message = "tune was called while {what}, which it would disturb."
    help = "tune before, and compile with the line that the report prints."


class NothingToTune(SpcompError):
    message = "{pattern} cannot be tuned: {why}."
    help = "{way_out}"


# ---- integrations and tools --------------------------------------------------------------------


class MaskNotUnderstood(SpcompError):
    message = "the attention mask {what} {problem}."
    help = "{way_out}"


class OptionNotUnderstood(SpcompError):
    message = "the model passes {option} = {value}, which the pattern '{pattern}' does not compute."
    help = "{way_out}"


class MissingPackage(SpcompError):
    message = "{feature} needs the package '{package}', which is not installed."
    help = "pip install '{install}'."


class NotAReport(SpcompError):
    message = "{path} is not a report of spcomp: {problem}."
    help = "write one with `spcomp tune` or `make demo`."
