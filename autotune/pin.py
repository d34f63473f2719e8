"""The line that pins a tuning's choice in a user's code."""

from __future__ import annotations

import ast
import json
import re

from spcomp.autotune.record import Candidate

_NEXT_PARAMETER = re.compile(r"(?:^|, )([^\W\d]\w*)=")
_TENSOR = re.compile(r"\w+\[[\d, ]*\]")


def line_to_paste(pattern: str, candidate: Candidate, name: str = "attention") -> str:
    """Give the Python line that compiles a pattern with one candidate's schedule.

    pattern: a title, as `Program.title()` and `TunedCall.pattern` hold it. A hyper-parameter that
    is a tensor stands as a variable of its own name, since its values are not in the title.
    """
    arguments = [expression_of(pattern)]
    if candidate.order is not None:
        arguments.append(f'order="{candidate.order}"')
    if candidate.axes:
        axes = {kernel: dict(values) for kernel, values in candidate.axes}
        arguments.append(f"axes={json.dumps(axes)}")
    return f"{name} = sp.compile({', '.join(arguments)})"


def expression_of(pattern: str) -> str:
    """Turn a title into the Python expression that makes the pattern: texts get their quotes."""
    function, _, inner = pattern.partition("(")
    parts = _NEXT_PARAMETER.split(inner.removesuffix(")"))[1:]
    written = [
        f"{key}={_value(key, text)}" for key, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    return f"{function}({', '.join(written)})"


def _value(name: str, text: str) -> str:
    if _TENSOR.fullmatch(text):
        return name
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return json.dumps(text, ensure_ascii=False)
    return text
