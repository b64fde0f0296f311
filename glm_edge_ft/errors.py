"""Errors in the user's input, collected over the whole run and shown at once without a traceback; runs that stop.

Code that finds an error adds a `Problem` to a `ProblemList`, which is raised as one `UserError` when a step is
complete. `cli.py` prints it on stderr and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2


@dataclass(frozen=True)
class Problem:
    """One error in the user's input.

    Attributes:
        where: `train.jsonl:2:2`, a config key such as `training_args.learning_rate`, or a path.
        what: what is wrong there, with the value that was seen.
        fix: what to write or do instead; may be empty where `what` says it.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        """Return the message, which stays short whatever its texts quote."""
        text = f"{elide(self.where, 300)}: {elide(self.what, 1000)}"
        return f"{text}\n    -> {elide(self.fix, 3000)}" if self.fix else text


def elide(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters; a longer one loses its middle."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[: limit - 3 - half]}...{text[-half:]}"


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's error says, or its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shorten(text: str, limit: int = 200) -> str:
    """Return a text of the user for a message: printable, on one line, of at most `limit` characters."""
    text = elide(text, limit)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """The user's input is wrong; carries every problem found so far."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def single(cls, where: str, what: str, fix: str = "") -> UserError:
        """Return an error with one problem, where nothing further can be checked."""
        return cls([Problem(where, what, fix)])

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        return (UserError, (self.problems,))  # pickled by a worker process


class ProblemList:
    """Collects problems until `raise_if_any`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, where: str, what: str, fix: str = "") -> None:
        """Note a problem and go on."""
        self.problems.append(Problem(where, what, fix))

    def extend(self, error: UserError) -> None:
        """Add the problems of a caught error, each of them once."""
        self.problems += [problem for problem in error.problems if problem not in self.problems]

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Take over the problems of a UserError raised inside, and go on after the block."""
        try:
            yield
        except UserError as error:
            self.extend(error)

    def raise_if_any(self) -> None:
        """Raise one `UserError` with everything noted so far, if there is anything."""
        if self.problems:
            raise UserError(self.problems)


class RunStopped(Exception):
    """A run cannot go on, and not because of its input; the message says why and what to do."""


class ProcessLost(RunStopped):
    """Another process of the run failed or is gone; where that one could still say why, this adds nothing."""
