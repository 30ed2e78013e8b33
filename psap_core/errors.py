"""The one exception of the suite that is meant for a person."""


class InputError(ValueError):
    """Bad input, refused at the boundary; the message is one sentence: what is wrong, where, and what to do."""
