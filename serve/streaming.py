"""What of a reply may be shown while it is still being written: only what is certain to stand.

An answer that is withdrawn (no support) or replaced (an abstention in other words) must never have been
on the screen. A student writes its quotes first, so by the ``Answer:`` line they can be checked, and
after the characters that an abstention would show itself in, the rest is shown as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.records import Passage
from rag.answers import ABSTENTION_CHARS, is_abstention, one_reply, parse_reply
from rag.citations import check_quotes

# White space, and the beginning of what may become a second "Answer:" line, at the end of a text.
_UNSETTLED = re.compile(r"\s*\**(?:a(?:n(?:s(?:w(?:e(?:r\**\s*)?)?)?)?)?)?\Z", re.IGNORECASE)


class ReplyStream:
    """Takes a reply in pieces and gives out the part of the final answer that is already certain.

    The pieces given out and the `rest` are together exactly the text of the checked answer.

    Args:
        passages: what the student saw, [1] first.
        abstain: the sentence that says "I don't know" in this domain.
        withdraw_unsupported: an answer without support will be withdrawn.
    """

    def __init__(self, passages: Sequence[Passage], *, abstain: str, withdraw_unsupported: bool) -> None:
        self.text = ""
        self.over = False
        self._passages = passages
        self._abstain = abstain
        self._certain = not passages or not withdraw_unsupported
        self._shown = ""

    def feed(self, piece: str) -> str:
        """Text that may be shown now, often empty. Sets ``over`` where the reply begins to repeat itself."""
        if self.over or not piece:
            return ""
        self.text += piece
        reply = one_reply(self.text)
        if len(reply) < len(self.text):
            self.text, self.over = reply, True
        return self._show(self._settled_answer())

    def rest(self, final: str) -> str:
        """What of ``final``, the checked answer's text, has not been given out yet."""
        assert final.startswith(self._shown), "text was shown that is not part of the answer"
        return final[len(self._shown) :]

    def _settled_answer(self) -> str:
        reply = parse_reply(self.text)
        if not reply.has_answer_line:
            return ""
        self._certain = self._certain or bool(check_quotes(reply.quotes, self._passages)[0])
        answer = _UNSETTLED.sub("", reply.answer)
        long_enough = len(answer) > ABSTENTION_CHARS and len(" ".join(answer.split())) > len(self._abstain)
        if not self._certain or not long_enough or is_abstention(answer, abstain=self._abstain):
            return ""
        return answer

    def _show(self, settled: str) -> str:
        fresh = settled[len(self._shown) :]
        self._shown += fresh
        return fresh
