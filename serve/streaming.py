"""What of a reply may be shown while it is still being written: only what is certain to stand.

An answer that is withdrawn (no support, or not sure enough) or replaced (an abstention in other words), and a
sentence that is dropped, must never have been on the screen. A student writes its quotes first, so by the
``Answer:`` line they can be checked, and after the characters that an abstention would show itself in, the
rest is shown as it comes; sentence by sentence where each must stand for itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from domains.config import OnUnsupported
from domains.records import Passage
from rag.answers import ABSTENTION_CHARS, Reply, is_abstention, one_reply, parse_reply
from rag.citations import check_quotes
from rag.sentences import link_sentences

# White space, and the beginning of what may become a second "Answer:" line, at the end of a text.
_UNSETTLED = re.compile(r"\s*\**(?:a(?:n(?:s(?:w(?:e(?:r\**\s*)?)?)?)?)?)?\Z", re.IGNORECASE)


class ReplyStream:
    """Takes a reply in pieces and gives out the part of the final answer that is already certain.

    The pieces given out and the `rest` are together exactly the text of the checked answer.

    Args:
        passages: what the student saw, [1] first.
        question: what was asked.
        abstain: the sentence that says "I don't know" in this domain.
        unsupported: what becomes of text that no passage supports, see ``[serve]``.
        hold_back: give nothing out before the end: whether the answer stands is known only then.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        question: str,
        abstain: str,
        unsupported: OnUnsupported,
        hold_back: bool = False,
    ) -> None:
        self.text = ""
        self.over = False
        self._passages = passages
        self._question = question
        self._abstain = abstain
        self._unsupported = unsupported if passages else "keep"
        self._hold_back = hold_back
        self._shown = ""

    def feed(self, piece: str) -> str:
        """Text that may be shown now, often empty. Sets ``over`` where the reply begins to repeat itself."""
        if self.over or not piece:
            return ""
        self.text += piece
        reply = one_reply(self.text)
        if len(reply) < len(self.text):
            self.text, self.over = reply, True
        return "" if self._hold_back else self._show(self._settled_answer())

    def rest(self, final: str) -> str:
        """What of ``final``, the checked answer's text, has not been given out yet."""
        assert final.startswith(self._shown), "text was shown that is not part of the answer"
        return final[len(self._shown) :]

    def _settled_answer(self) -> str:
        reply = parse_reply(self.text)
        if not reply.has_answer_line:
            return ""
        answer = _UNSETTLED.sub("", reply.answer)
        long_enough = len(answer) > ABSTENTION_CHARS and len(" ".join(answer.split())) > len(self._abstain)
        if not long_enough or is_abstention(answer, abstain=self._abstain):
            return ""
        if self._unsupported in {"drop", "mark"}:
            return self._supported_beginning(answer, reply)
        if self._unsupported == "withdraw" and not check_quotes(reply.quotes, self._passages)[0]:
            return ""
        return answer

    def _supported_beginning(self, answer: str, reply: Reply) -> str:
        """The sentences up to the first that is not supported yet; a later quote may still support it.

        The last sentence may go on, so it is not among them.
        """
        linked = link_sentences(
            answer,
            question=self._question,
            rationale=reply.rationale,
            citations=check_quotes(reply.quotes, self._passages)[0],
            passages=self._passages,
            search=True,
        )
        certain = 0
        for unit, supported in zip(linked.units[:-1], linked.supported, strict=False):
            if not supported:
                break
            certain = unit.stop
        return answer[:certain].rstrip()

    def _show(self, settled: str) -> str:
        fresh = settled[len(self._shown) :]
        self._shown += fresh
        return fresh
