"""The compiler passes of swatfx, one a file; `swatfx.pipeline` puts them in order."""

import swatfx as _swatfx  # noqa: F401
