"""Entry point of `python -m fatui`, the same as `fatui`."""

import sys

from fatui.cli.main import main

sys.exit(main())
