"""How Sphinx builds the pages of this folder: `sphinx-build -n -W docs build/docs`."""

from importlib import metadata

project = "edgeblocks"
copyright = "the edgeblocks authors"
release = metadata.version("edgeblocks")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]  # as GitHub draws it, too
mermaid_height = "auto"
exclude_patterns = ["_build"]

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"exclude-members": "__init__"}
nitpick_ignore_regex = [
    # Types in signatures whose pages are not here: other projects', and our own that no user makes.
    ("py:.*", r"(?!edgeblocks\.(errors|progress)\.).*"),
]

html_theme = "furo"
html_title = "edgeblocks"
