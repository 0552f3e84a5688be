"""What a user can get wrong, each with the command that mends it.

The command line turns a LowsearchError into one line on stderr and exit code 2; everything else is a bug and shows its traceback.
Also carried to machines that lowsearch is not installed on (latency/bundle.py): standard library only, and Python 3.8.
"""

from __future__ import annotations


class LowsearchError(ValueError):
    """A mistake in what the user gave: what is wrong, and `hint`, the next command or edit that mends it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; hint: {self.hint}"


class InvalidArchError(LowsearchError):
    """An architecture that cannot exist: a width, stride or resolution that does not fit the others."""


class SpaceError(LowsearchError):
    """A search-space file that cannot be used; the message names the file and the line."""


class NotInSpaceError(LowsearchError):
    """An architecture or genome that the search space does not contain; the message names the gene at fault."""


class TableError(LowsearchError):
    """A latency table that is missing, damaged, or belongs to another target."""


class MissingBlockError(TableError):
    """A block that a latency table holds no measurement of."""


class BundleError(LowsearchError):
    """A folder that is no bundle, is damaged, or does not hold all measurements; or a machine that could not be given one."""


class DeviceError(LowsearchError):
    """A device or runtime that this machine cannot measure."""


class ParityError(LowsearchError):
    """A runtime whose output differs from torch's: its time must not enter a table."""


class CheckpointError(LowsearchError):
    """Weights that are missing, damaged, or do not fit the network; the message names the key at fault."""


class DataError(LowsearchError):
    """A data set that cannot be read or does not fit the task."""


class StudyError(LowsearchError):
    """A study that does not exist, is in use, or was made with other settings."""


class NothingLeftError(StudyError):
    """No untried network that keeps the limits was found. That none exists is proven only for a list of candidates."""


class UsageError(LowsearchError):
    """Command-line values that are malformed or contradict each other."""
