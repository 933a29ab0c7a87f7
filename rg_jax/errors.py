"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in a config, flag, file or data set.

    Its text is one line that names the culprit and says what to do. Entry points print that line
    and exit with code 2; a traceback is kept for mistakes of ours.
    """
