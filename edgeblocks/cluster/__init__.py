"""Blocks of a run on the nodes of a Ray cluster, each in a copy of the run that is trained by the ordinary command."""
