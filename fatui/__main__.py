"""Entry point of `fatui` and of `python -m fatui`."""

import signal
import sys


def main() -> int:
    """Run the command line; until its command is loaded, Ctrl-C ends the process, without an exception in an import."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fatui.cli.main import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
