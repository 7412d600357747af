"""python -m fastff, the command line."""

from fastff.cli import main

main()
