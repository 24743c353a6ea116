"""What a reflecting assistant judged, as lines for people."""

from __future__ import annotations

from domains.records import JudgedSegment, Reflection

_DECISIONS = {
    "retrieve": "with a passage",
    "no_retrieval": "without a passage",
    "continue": "on the same evidence",
}
_LABELS = {"full": "fully supported", "partial": "partially supported", "none": "not supported"}


def reflection_lines(reflection: Reflection) -> list[str]:
    """The decision to look, the judgements, what was missing, and what it cost."""
    chance = "" if reflection.p_retrieve is None else f", p(retrieve) {reflection.p_retrieve:.2f}"
    lines = [
        f"Reflection ({reflection.backend}): {'retrieved' if reflection.retrieved else 'not retrieved'}{chance}"
    ]
    if reflection.relevant:
        lines.append(f"  judged relevant: {', '.join(f'[{number}]' for number in reflection.relevant)}")
    chosen = reflection.segments
    for segment in reflection.candidates or reflection.segments:
        lines.append(_segment_line(segment, chosen=bool(reflection.candidates) and segment in chosen))
    gone = {name: count for name, count in reflection.missing.items() if count}
    if gone:
        said = ", ".join(f"{name} {count} of {reflection.expected[name]}" for name, count in gone.items())
        lines.append(f"  judgements that the model did not give: {said}")
    if reflection.unparsed:
        lines.append(f"  could not be read: {reflection.unparsed}")
    lines += [f"  {note}" for note in reflection.notes]
    lines.append(f"  {reflection.passes} passes, {reflection.tokens} tokens written")
    return lines


def _segment_line(segment: JudgedSegment, *, chosen: bool) -> str:
    where = _DECISIONS[segment.decision] if segment.number is None else f"[{segment.number}]"
    judged = [
        f"{name} {value:.2f}"
        for name in ("score", "relevance", "support", "utility")
        if (value := getattr(segment, name)) is not None
    ]
    if segment.label is not None:
        judged.append(_LABELS[segment.label])
    mark = "  given: " if chosen else "  "
    return f"{mark}{where} {', '.join(judged) or 'nothing judged'}: {' '.join(segment.text.split())!r}"
