"""`python -m tinycomp`, and `torchrun -m tinycomp`."""

from tinycomp.cli import app

app()
