"""The one error for users, and the exception of a run that was asked to stop."""


class UserError(Exception):
    """Something that the user can fix; the command line prints only its text, without a traceback, and exits with 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the same command continues it."""
