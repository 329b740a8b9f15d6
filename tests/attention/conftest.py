"""Settings for all tests of the engine."""

from hypothesis import settings

settings.register_profile("engine", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("engine")
