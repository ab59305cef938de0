"""How a run tells the launcher around it that it left before its end: its exit code is 0 both at the end and
after a save on a signal, which may have come to another host, from where no launcher saw it."""

from collections.abc import Mapping
from pathlib import Path

STOPPED_FILE = "OPENMOE_STOPPED_FILE"  # in the environment; the path of a file that is not there yet


def tell_stopped(environment: Mapping[str, str], reason: str) -> None:
    """Where a launcher wants to know. Raises OSError."""
    if STOPPED_FILE in environment:
        Path(environment[STOPPED_FILE]).write_text(f"{reason}\n")
