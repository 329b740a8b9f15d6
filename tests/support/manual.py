"""Write the manual page from the parsers of the commands: `python -m tests.support.manual`."""

import os
from pathlib import Path

from fatui import __version__
from fatui.cli.main import whole_parser

PAGE = Path(__file__).parents[2] / "docs" / "fatui.1"


def manual() -> str:
    """Return the page in roff."""
    from argparse_manpage.manpage import Manpage  # of the extra `release`

    os.environ["COLUMNS"] = "100"
    page = Manpage(whole_parser(), format="single-commands-section")
    page.description = "a terminal lab for attention kernels on MLX"
    page.version, page.manual, page.source, page.date = __version__, "fatui", f"fatui {__version__}", ""
    return str(page)


if __name__ == "__main__":
    PAGE.write_text(manual())
