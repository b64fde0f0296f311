"""What the user did wrong: collected over the whole run, shown at once, never as a traceback.

Code that finds a mistake in the user's input adds a `Problem` to a `ProblemList`; the list is raised as one `UserError`
when a step is complete. `cli.py` prints it on stderr and exits with code 2.
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
    """One mistake in the user's input.

    Attributes:
        where: the place: `train.jsonl:2:2`, a config key such as `training_args.learning_rate`, or a path.
        what: what is wrong there, with the value that was seen.
        fix: what to write or do instead; may be empty where `what` says it already.
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        """Return it for the user; whatever its texts quote, it stays short."""
        text = f"{elide(self.where, 300)}: {elide(self.what, 1000)}"
        return f"{text}\n    -> {elide(self.fix, 3000)}" if self.fix else text


def elide(text: str, limit: int) -> str:
    """Return a text of at most `limit` characters: of a longer one the middle is left out."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[: limit - 3 - half]}...{text[-half:]}"


def shorten(text: str, limit: int = 200) -> str:
    """Return a text that the user wrote, such as a path, for a message: on one line, of at most `limit` characters."""
    text = elide(text, limit)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """The user's input is wrong; carries every mistake found so far."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def single(cls, where: str, what: str, fix: str = "") -> UserError:
        """Return an error with one problem, for a place where nothing further can be checked."""
        return cls([Problem(where, what, fix)])

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        return (UserError, (self.problems,))  # so that it crosses from a worker process whole


class ProblemList:
    """Collects problems until `raise_if_any`."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, where: str, what: str, fix: str = "") -> None:
        """Note one mistake and go on."""
        self.problems.append(Problem(where, what, fix))

    def extend(self, error: UserError) -> None:
        """Take over the problems of an error that was caught."""
        self.problems.extend(error.problems)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Take over the problems of a UserError raised inside, and go on after the block."""
        try:
            yield
        except UserError as error:
            self.extend(error)

    def raise_if_any(self) -> None:
        """Raise one `UserError` that lists everything noted so far; do nothing when the list is empty."""
        if self.problems:
            raise UserError(self.problems)


class RunStopped(Exception):
    """A run that cannot go on, for a reason that is no mistake in the input; the message says why and what to do."""


class ProcessLost(RunStopped):
    """Another process of the run failed or is gone; where that one could still say why, this adds nothing."""
