"""The one exception that is a message to the person at the keyboard."""


class InputError(ValueError):
    """Something that came from outside (a file, an option, a model) cannot be used.

    The message says what is wrong, what was expected, what was found and what to do about it. The command line prints
    it as the last line on stderr, without a traceback, and exits with 2. Every other exception is a bug and keeps its
    traceback.
    """
