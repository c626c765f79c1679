"""From trained blocks to ONNX and back to pictures. Installed as `edgeblocks.export`, not importable otherwise."""

if __name__ != "edgeblocks.export":
    raise ImportError(
        f"this package is edgeblocks.export, not {__name__}; install the project and import it from there"
    )
