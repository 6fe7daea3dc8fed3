"""The one exception that users are meant to see."""


class UserError(Exception):
    """Input that cannot work, told in one line that names the fix; the command line exits with code 2."""
