"""The one error class of this room for mistakes in data or its configuration."""


class DataError(ValueError):
    """A user's mistake in the data or its configuration: one line saying what, where and what is allowed."""
