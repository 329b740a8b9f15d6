"""The screens of the app, one per file, each with its style sheet beside it."""
