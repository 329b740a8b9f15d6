"""Why the kernel cannot run here."""


class KernelUnavailable(RuntimeError):
    """The CPU kernel cannot be used; `str(error)` is the reason, in one line."""
