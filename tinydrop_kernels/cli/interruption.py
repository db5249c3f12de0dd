"""The signals that end a run early: SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 128 + signal.SIGINT  # exit status that shells use for Ctrl-C
CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # None on Windows


class Interruption:
    """A context manager in which SIGINT and SIGTERM raise KeyboardInterrupt. It works in the main thread alone.

    Signals that the parent process ignores stay ignored, such as SIGINT of a job in the background.

    Attributes:
        status: exit status that shells use for the signal that came, 128 + its number; None if none came.
    """

    def __init__(self) -> None:
        self.status: int | None = None

    def __enter__(self) -> "Interruption":
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.status = 128 + number
        if CHILD_ENDED is not None:
            # Loading processes get SIGTERM too if it goes to the process group. Torch's handler would raise an error
            # when they end, in the midst of the work that ends the run.
            self._before.setdefault(CHILD_ENDED, signal.signal(CHILD_ENDED, signal.SIG_DFL))
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came.

        Python drops an exception that is raised while a destructor runs, so the one from the signal may be lost.
        """
        if self.status is not None:
            raise KeyboardInterrupt
