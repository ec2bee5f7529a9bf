"""How Sphinx builds these pages: ``python -m sphinx -W -b html docs output/docs``."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from stanford_alpaca import __version__  # noqa: E402

project = "stanford-alpaca-emo"
copyright = "the authors of stanford-alpaca-emo, Apache-2.0"
author = "the authors of stanford-alpaca-emo"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "EMO fine-tuning"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
nitpicky = False
