"""`python -m kd`."""

from kd.cli import main

main()
