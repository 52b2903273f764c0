"""The one exception of gankern.data."""


class DataError(ValueError):
    """Input that cannot be used; the message is one line meant for the user."""
