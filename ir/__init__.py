"""The two levels of spcomp's IR: patterns (what) and plans (how)."""

if __name__ != "spcomp.ir":
    raise ImportError("import spcomp.ir, not ir: the folder is the package spcomp.ir by a link")
