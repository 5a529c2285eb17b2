"""What tells a mistake of the user's from a fault of ours."""


class UserError(ValueError):
    """A mistake of the user's: shown as one line without a traceback; the process exits with code 2."""
