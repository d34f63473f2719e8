"""Speed and fidelity: what was tried, what was chosen, and what it keeps of dense attention."""

if __name__ != "spcomp.autotune":
    raise ImportError(
        "import spcomp.autotune, not autotune: the folder is the package spcomp.autotune by a link"
    )
