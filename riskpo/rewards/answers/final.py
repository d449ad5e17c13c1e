r"""Which part of a response is its final answer. Every scan here is linear in the response.

What a model thought is no answer: text up to the last closing tag is dropped, and so is what
follows a tag that never closes. In the rest, the first rule that finds something:

  1. the last \boxed{...}, with the boxes that only a comma, "and" or "or" (or blanks within the
     line) sets apart from it: "\boxed{1} and \boxed{2}" is the list 1, 2. A base model that runs
     on into a question of its own is graded on what it boxed there, hence mostly wrong: stopping
     is part of the task. An empty, unclosed or endless last box is no answer.
  2. the last "#### x" line (GSM8K).
  3. the last "answer": "x" of a JSON object; no JSON parser: models write LaTeX into it.
  4. the last "Answer: x", "A: x" or "the answer is x".
  5. the last paragraph (1,000 characters at most). No more than that: further back it is a guess
     at some step of the way.
"""

from __future__ import annotations

import re

from riskpo.data.boxes import BOX, box_at
from riskpo.rewards.answers.writing import ascii_writing

TAIL_CHARACTERS = 1000
MOSTBOXES = 32  # of one answer

_THOUGHT = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|scratchpad)"
_OPENED = re.compile(
    rf"<{_THOUGHT}>|<\|begin_of_{_THOUGHT}\|>|\[THINK\]|\u25c1think\u25b7", re.IGNORECASE
)
_CLOSED = re.compile(
    rf"</{_THOUGHT}>|<\|end_of_{_THOUGHT}\|>|\[/THINK\]|\u25c1/think\u25b7", re.IGNORECASE
)
_FRAME = re.compile(r"\\fbox(?![A-Za-z])")
_WORD_BETWEEN = r"(?:\\(?:text|mathrm|mbox)\s*\{[\s,]*(?:and|or)\s*\}|\b(?:and|or)\b|[,;])"
_BETWEEN = re.compile(rf"(?:[\s$&~]|\\[()\[\],;:! \\]|\\q?quad\b|{_WORD_BETWEEN})*")
_JOINED = re.compile(_WORD_BETWEEN)
_BETWEEN_CHARACTERS = 60
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_JSON = re.compile(r'"answer"\s*:\s*(?:"((?:[^"\\\n]|\\.)*)"|(-?[\d.,]+))', re.IGNORECASE)
_MARKED = re.compile(
    # A:b is a ratio, A: b an answer.
    r"(?:\banswer(?:\s+is)?[*\s]*:|\banswer\s+is\b|^[* \t]*(?-i:A):(?![A-Za-z](?![A-Za-z])))"
    r"[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)


def after_thinking(response: str) -> str:
    """What a response says when it has thought; empty while it still thinks."""
    closed = 0
    for match in _CLOSED.finditer(response):
        closed = match.end()
    opened = _OPENED.search(response, closed)
    return response[closed : opened.start() if opened else len(response)]


def extract(response: str) -> tuple[str, bool]:
    """The final answer of a response, and whether it was marked as such (rules 1 to 4)."""
    text = ascii_writing(after_thinking(response))
    for command in (BOX, _FRAME):
        starts = [match.end() for match in command.finditer(text)]
        if starts:
            return ", ".join(_joined_boxes(text, starts)), True
    for pattern in (_HASHES, _JSON, _MARKED):
        found = list(pattern.finditer(text))
        if found:
            return next(g for g in found[-1].groups() if g is not None).strip(), True
    return text.rstrip()[-TAIL_CHARACTERS:].rpartition("\n\n")[2].strip(), False


def boxes(text: str) -> list[str]:
    """The different boxed answers of a text in order, where they are few and all of them close."""
    text = ascii_writing(after_thinking(text))
    starts = [match.end() for match in BOX.finditer(text)]
    if not 1 < len(starts) <= MOSTBOXES:
        return []
    found = [box_at(text, start)[0] for start in starts]
    return list(dict.fromkeys(found)) if all(found) else []


def final(gold: str) -> str:
    """The answer inside a gold that may be a whole worked solution; all of its boxes."""
    found, marked = extract(gold)
    return ", ".join(boxes(gold)) or (found if marked else ascii_writing(gold).strip())


def _joined_boxes(text: str, starts: list[int]) -> list[str]:
    """The last box, after those that belong to the same list."""
    content, _ = box_at(text, starts[-1])
    found = [content] if content else []
    for start, later in zip(starts[-2::-1], starts[:0:-1], strict=True):
        content, end = box_at(text, start)
        between = text[end : later - len("\\boxed")] if end else "?"
        if not content or len(found) == MOSTBOXES or not _belong(between):
            break
        found.insert(0, content)
    return list(dict.fromkeys(found))


def _belong(between: str) -> bool:
    """Whether two boxes with this text between them are one answer."""
    if len(between) > _BETWEEN_CHARACTERS or not _BETWEEN.fullmatch(between):
        return False
    return "\n" not in between or _JOINED.search(between) is not None
