"""Entry point of `python -m fatui`, the same as `fatui`."""

import sys

from fatui.cli import main

sys.exit(main())
