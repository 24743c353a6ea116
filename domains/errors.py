"""Errors that a user can act on.

    PreceptorError            what happened, what was expected, the next command
    ├── ConfigError           domain.toml is wrong (all problems at once)
    ├── DataError             a document, question or record can't be used
    ├── IndexMismatch         the index was built by another embedder or format
    ├── ModelError            a model file is missing, corrupt or unsuitable
    ├── ContextOverflow       a question does not fit into the model's context
    ├── TeacherError          the teacher can't be reached or answers nonsense
    ├── BudgetExceeded        the hard cap on teacher spending was reached
    ├── StageError            a stage can't go on ("0 of N kept", missing input)
    ├── RunLocked             another process works on this run folder
    └── ParityError           the served file does not behave like the trained student

Only the front door (``preceptor.py``) and the HTTP service catch them.
"""


class PreceptorError(Exception):
    """An error whose message is meant for the user; printed without a traceback.

    Args:
        what: what happened, with the offending value and where it stands.
        expected: what would have been right.
        next_step: the command or edit that repairs it.
    """

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", next_step: str = "") -> None:
        self.what = what
        self.expected = expected
        self.next_step = next_step
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.expected:
            lines.append(f"Expected: {self.expected}")
        if self.next_step:
            lines.append(f"Next: {self.next_step}")
        return "\n".join(lines)


class ConfigError(PreceptorError):
    """``domain.toml`` (or a prompt beside it) is wrong; ``what`` lists every problem."""

    exit_code = 2


class DataError(PreceptorError):
    """A document, question file or record can't be used."""


class IndexMismatch(PreceptorError):
    """The index on disk was built with another embedder, or by another format version."""


class ModelError(PreceptorError):
    """A model file is missing, corrupt, or lacks something that is needed."""


class ContextOverflow(PreceptorError):
    """The prompt does not fit into the context; nothing is ever cut silently."""


class TeacherError(PreceptorError):
    """The teacher can't be reached, refuses the credentials, or answers nonsense for good."""


class BudgetExceeded(PreceptorError):
    """The hard cap on teacher spending was reached; everything paid for is in the ledger."""

    exit_code = 3


class StageError(PreceptorError):
    """A stage can't go on: an input is missing or nothing was kept."""


class RunLocked(PreceptorError):
    """Another process works on this run folder."""

    exit_code = 4


class ParityError(PreceptorError):
    """The exported file does not behave like the trained student; names the step that broke it."""
