"""The errors that are meant for people: what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Something the user gave is wrong: the command line, the config or the input. Exit code 2."""


class RunError(Exception):
    """The job itself failed, though its input was accepted. Exit code 1."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop, and did
    """A signal asked the run to stop, and its state was saved. Exit code 128 + the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


class UnusableClip(Exception):  # noqa: N818 - a finding about a file, turned into a Problem
    """A clip cannot be used; the message is the reason, in words for the person who owns the clip."""
