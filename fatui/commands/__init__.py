"""The commands, one file each: `EXAMPLE`, `add_arguments(parser)` and `run(arguments)`."""
