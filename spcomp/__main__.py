"""`python -m spcomp` is `spcomp`."""

from spcomp.cli import main

if __name__ == "__main__":
    main(prog_name="spcomp")
