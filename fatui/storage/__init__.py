"""Files of the user: run history, presets, settings, result files, and where they live."""
