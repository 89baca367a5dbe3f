"""`python -m swatfx` is the command `swatfx`."""

import sys

from swatfx.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
