"""The one exception type whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A problem the user can solve: one line that says what, where, and what to do.

    Command-line entry points print it as `error: ...` and exit with status 2; every
    other exception is a defect of this package and keeps its traceback.
    """
