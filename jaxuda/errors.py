"""The one error that users are meant to see, and how a run says that it was asked to stop."""


class UserError(Exception):
    """Something the user can mend; the command line prints its text alone, without a traceback, and exits with 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the same command continues it."""
