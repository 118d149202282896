"""`python -m mrcnn` is the command `mrcnn`."""

from .cli import main

main()
