"""`python -m edgeblocks.cli` is the `edgeblocks` command."""

from edgeblocks.cli.main import main

main()
