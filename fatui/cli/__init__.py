"""The command line: one command a file, with `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`."""
