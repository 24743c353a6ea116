"""Threshold and weights that were fitted to a student lie in its bundle and stand in for those of ``[reflect]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from domains.config import ReflectSection
from domains.errors import DataError
from domains.records import Record
from serve.manifest import FITTED_REFLECTION

Weight = Annotated[float, Field(ge=0)]


class FittedReflection(Record):
    """What decides in Self-RAG's inference (arXiv 2310.11511 §3.3), as fitted on development questions.

    ``score`` is the mean outcome there with these settings, ``before`` with those of ``[reflect]``; both in [0, 1].
    ``score`` is of the questions that were fitted to, so no measure of what to expect of others: that is ``gain``
    (mean, low, high), what a fit to other documents is worth above ``before``.
    """

    threshold: Annotated[float, Field(ge=0, le=1)]
    relevance_weight: Weight
    support_weight: Weight
    utility_weight: Weight
    sequence_weight: Weight
    questions: int
    score: float
    before: float
    retrieval_rate: float
    gain: list[float] = Field(min_length=3, max_length=3)


def fitted(reflect: ReflectSection, bundle: Path) -> ReflectSection:
    """``reflect`` with the settings that were fitted to the student in ``bundle``, where it has such.

    Raises:
        DataError: the file is damaged.
    """
    path = bundle / FITTED_REFLECTION
    if reflect.backend != "tokens" or not reflect.fit or not path.is_file():
        return reflect
    try:
        found = FittedReflection.model_validate_json(path.read_text("utf-8"))
    except ValidationError as error:
        raise DataError(
            f"{path} is damaged or of an older version: {'.'.join(map(str, error.errors()[0]['loc']))}: "
            f"{error.errors()[0]['msg']}",
            expected="the fitted threshold and weights, and what they gained",
            next_step="preceptor calibrate DOMAIN --force",
        ) from None
    return with_fit(reflect, found)


def with_fit(reflect: ReflectSection, found: FittedReflection) -> ReflectSection:
    """``reflect`` with the settings that were found."""
    names = ("threshold", "relevance_weight", "support_weight", "utility_weight", "sequence_weight")
    return reflect.model_copy(update={name: getattr(found, name) for name in names})
