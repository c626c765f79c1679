"""What machines can do. Installed as `edgeblocks.targets`; under another name it would be a second copy."""

if __name__ != "edgeblocks.targets":
    raise ImportError(
        f"this package is edgeblocks.targets, not {__name__}; install the project and import it from there"
    )
