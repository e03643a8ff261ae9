"""The one error that users are meant to see."""


class UserError(Exception):
    """Something the user can mend; the command line prints its text alone, without a traceback, and exits with 2."""
