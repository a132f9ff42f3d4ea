"""What goes wrong with the embedded stack, in words that say what to do."""


class StackError(Exception):
    """The stack or one of its parts cannot run; the message says why, and what to install, free or set."""
