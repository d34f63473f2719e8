"""The reports: records of figures, and their pages in HTML, JSON and Markdown.

`record` holds the values of a model's report and what may be claimed of them, `json_text` and
`tuning_json` the file forms, `tables`, `plots` and their `tuning_` sisters the appearance, `pages`
and `tuning_pages` the writers. Plots and pages need plotly; the others do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from spcomp.errors import MissingPackage


@contextmanager
def needs_plotly() -> Iterator[None]:
    """Import pages in here: without plotly, which is an extra, the error names the way out.

    Raises: MissingPackage.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "plotly":
            raise
        raise MissingPackage(
            feature="a report", package="plotly", install="spcomp[report]"
        ) from None
