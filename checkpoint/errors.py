"""The errors of this room."""


class CheckpointError(ValueError):
    """A checkpoint that can't be used: one line saying which, what differs and what to do."""


class CheckpointWriteError(OSError):
    """A checkpoint that couldn't be written (full disk); earlier ones are whole."""


class SaveCancelled(RuntimeError):
    """A save in the background that nobody waits for any more; earlier checkpoints are whole."""
