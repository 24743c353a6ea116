"""``[train] kl_teacher`` as a student that an earlier run finished: which files it is, and that they are not overwritten."""

from __future__ import annotations

from pathlib import Path

from domains.errors import ModelError


def finished_student(teacher: str) -> Path | None:
    """The folder of a finished training, where a teacher's name is one; relative to the working directory."""
    folder = Path(teacher).expanduser()
    return folder if (folder / "network.json").is_file() else None


def teacher_files(teacher: str) -> list[Path]:
    """What decides a finished student that teaches; none of any other teacher, which its name identifies."""
    folder = finished_student(teacher)
    return [] if folder is None else [folder / "network.json", *sorted((folder / "adapter").iterdir())]


def check_teacher(teacher: str, folder: Path) -> None:
    """A training must not write over its own teacher.

    Args:
        teacher: its name.
        folder: of the training.

    Raises:
        ModelError: the teacher lies in ``folder``.
    """
    finished = finished_student(teacher)
    if finished is not None and finished.resolve() == folder.resolve():
        raise ModelError(
            f"[train] kl_teacher {teacher!r} is the folder that this training writes",
            expected="the train folder of another run",
            next_step="preceptor run DOMAIN --run NAME   (a run of its own for the student that is to be taught)",
        )
