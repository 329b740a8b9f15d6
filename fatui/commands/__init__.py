"""The commands, one per file; each defines `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`."""
