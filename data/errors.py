"""The one error class of this room for mistakes in data or its configuration."""


class DataError(ValueError):
    """A user's mistake in the data or its configuration: one line saying what, where and what is allowed."""


def one_line(message: object) -> str:
    """Another library's message, for the line of a DataError."""
    return " ".join(str(message).split())
