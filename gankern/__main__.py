"""`python -m gankern`, the same as the command `gankern`."""

from gankern.cli import main

main(prog_name="python -m gankern")
