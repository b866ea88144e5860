"""What of the Thinker's text is said aloud: the seam between Thinker and Talker.

Left out are tool calls, thoughts and Markdown's marks: emphasis, backticks, fenced code, headings, bullets, quotes,
rules, the grid of a table, the target of a link. A token whose text stays whole passes as the same id.

A mark is told by the characters around it, so "2 * 3", "x**2", "snake_case", "C#" and "5 - 3" stay as they are. Text
waits only while it could still be a mark: for the next character after `*`, `_`, a backtick or, at the start of a
line, one of `#-+>|`; after `[` for at most LINK_TEXT bytes of one line, until `](` tells a link from brackets.

Everything works on the bytes of the text, so a token may end inside a character or a mark; all marks are ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from antiphon.tokenizer import Tokenizer

LINK_TEXT = 80
SPANS = (("<tool_call>", "</tool_call>"), ("<think>", "</think>"))
DROPPED = b"\0"  # stands in `said` for a byte that is not said, so that `said` and `text` stay aligned


def spoken(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[int]:
    """The ids to be said of the text `ids`, each as soon as it is certain; takes ids only when asked for one."""
    speech = Spoken(tokenizer)
    for token in ids:
        yield from speech.push(token)
    yield from speech.flush()


@dataclass
class Spoken:
    """The filter as a value: `push` ids as they come, `flush` at the end of the turn. `copy.copy` forks it."""

    tokenizer: Tokenizer
    tokens: tuple[tuple[int, int], ...] = ()  # ids that wait, with their lengths in bytes
    text: bytes = b""  # the bytes of these tokens
    said: bytes = b""  # what becomes of the first bytes of text
    space: bytes = b""  # all that a mark left of its token; goes into the next token, as words are spelled with theirs
    until: int | None = None  # the token that ends the span being dropped
    spans: dict[int, int | None] = field(init=False, repr=False)  # opening token -> closing token -> None

    # where the next byte stands
    before: bytes = b"\n"  # the byte before it
    line_start: bool = True  # only spaces and bullets are before it in its line
    after_span: bool = False  # only spaces are between it and a dropped span
    emphasis: frozenset[bytes] = frozenset()  # the marks that are open
    code: int = 0  # backticks that opened the inline code it is in
    fence: int = 0  # backticks that opened the code block it is in
    row: bool = False  # in a table
    link: bool = False  # in the text of a link
    target: int = 0  # parentheses open in the target of a link

    def __post_init__(self) -> None:
        known = [[self.tokenizer.token_id(name) for name in span] for span in SPANS]
        pairs = [(opening, closing) for opening, closing in known if opening is not None and closing is not None]
        self.spans = dict(pairs) | {closing: None for _, closing in pairs}

    def push(self, token: int) -> list[int]:
        """Ids that are certain to be said after `token`."""
        if self.until is not None:
            self.until = None if token == self.until else self.until
            return []
        if token in self.spans:
            ids = self._judge(final=True)
            self.until = self.spans[token]
            self.before, self.line_start, self.after_span = b"\n", True, True
            return ids
        piece = self.tokenizer.piece(token)
        self.tokens += ((token, len(piece)),)
        self.text += piece
        return self._judge(final=False)

    def flush(self) -> list[int]:
        """Ids held back, at the end of the text."""
        ids = self._judge(final=True) + self.tokenizer.encode_bytes(self.space)
        self.space = b""
        return ids

    def _judge(self, final: bool) -> list[int]:
        while rest := self.text[len(self.said) :]:
            verdict = self._verdict(rest, final)
            if not verdict:
                break
            self.said += verdict
            self._move(rest[: len(verdict)])
        return list(self._release())

    def _release(self) -> Iterator[int]:
        """Ids of the tokens at the front whose bytes are all judged."""
        while self.tokens and self.tokens[0][1] <= len(self.said):
            (token, size), *rest = self.tokens
            text, said = self.text[:size], self.said[:size]
            self.tokens, self.text, self.said = tuple(rest), self.text[size:], self.said[size:]
            words = self.space + said.replace(DROPPED, b"")
            if text == said and not (text and self.space):
                yield from self.tokenizer.encode_bytes(self.space)
                yield token
                words = b""
            elif words.strip():
                yield from self.tokenizer.encode_bytes(words)
                words = b""
            self.space = words

    def _move(self, passed: bytes) -> None:
        if passed.endswith(b"\n"):
            if self.line_start:  # a paragraph ends: nothing stays open, so one stray mark spoils no more than its own
                self.emphasis, self.code = frozenset(), 0
            self.row, self.link, self.target = False, False, 0
        self.before = passed[-1:]
        self.line_start = self.before == b"\n" or (self.line_start and self.before.isspace())
        self.after_span = self.after_span and self.before.isspace()

    # Verdicts: what becomes of the first bytes of `rest`, byte for byte; empty while that hangs on what follows.

    def _verdict(self, rest: bytes, final: bool) -> bytes:
        mark = rest[:1]
        if self.target and mark != b"\n":
            self.target += (mark == b"(") - (mark == b")")
            return DROPPED
        if mark not in self._marks():
            return DROPPED if self.fence or (self.after_span and mark.isspace()) else mark
        run = rest[: len(rest) - len(rest.lstrip(mark))]
        after = rest[len(run) : len(run) + 1] or (b"\n" if final else b"")
        if not after:
            return b""
        if mark == b"`":
            return self._backticks(run, rest, final)
        if mark == b"[":
            return self._bracket(rest, final)
        if mark == b"]":
            self.link, self.target = False, 1
            return DROPPED * len(b"](")
        if mark == b"|":
            return self._pipe(after)
        if self.row and mark in b"-:":
            return self._table_rule(rest, final)
        if self.line_start and after == b" " and (run in (b"-", b"+", b"*", b">") or (mark == b"#" and len(run) <= 6)):
            return DROPPED * (len(run) + 1)
        if mark == b"-" and len(run) >= 3 and after in b"\r\n":
            return DROPPED * len(run)
        return self._emphasis(mark, run, after) if mark in b"*_" else run

    def _marks(self) -> bytes:
        """The characters that can be marks here."""
        if self.fence or self.code:
            return b"`]" if self.link else b"`"
        return b"*_`[" + b"]" * self.link + b"#-+>|" * self.line_start + b"|-:" * self.row

    def _backticks(self, run: bytes, rest: bytes, final: bool) -> bytes:
        if self.line_start and len(run) >= (self.fence or 3):
            line, end, _ = rest.partition(b"\n")
            if not end and not final:
                return b""
            if b"`" not in line[len(run) :]:  # else it is inline code
                self.fence = 0 if self.fence else len(run)
                return DROPPED * len(line + end)
        if not self.fence and self.code in (0, len(run)):
            self.code = len(run) - self.code
        return DROPPED * len(run)

    def _bracket(self, rest: bytes, final: bool) -> bytes:
        text = re.match(rb"\[[^\[\]\n]{0,%d}" % LINK_TEXT, rest)
        assert text is not None
        after = rest[text.end() : text.end() + 2]
        if after in (b"", b"]") and not final:
            return b""
        self.link = after == b"]("
        return DROPPED if self.link else b"["

    def _pipe(self, after: bytes) -> bytes:
        self.row = True
        if self.before.isspace():
            return DROPPED * (2 if after == b" " else 1)
        return DROPPED if after.isspace() else b" "

    def _table_rule(self, rest: bytes, final: bool) -> bytes:
        rule = rest[: len(rest) - len(rest.lstrip(b"-:"))]
        after = rest[len(rule) : len(rule) + 1] or (b"\n" if final else b"")
        if not after:
            return b""
        fills_cell = len(rule) > 1 and self.before in b"| " and after in b"| \r\n"
        return DROPPED * len(rule) if fills_cell else rule

    def _emphasis(self, mark: bytes, run: bytes, after: bytes) -> bytes:
        is_open = run in self.emphasis
        inside_word = self.before.isalnum() and after.isalnum()  # in ASCII: Chinese has no spaces around its words
        if mark == b"_" and len(run) not in (2, 3):
            said = True
        elif len(run) == 1:
            said = inside_word or (after.isspace() and not (is_open and not self.before.isspace()))
        else:
            alone = self.before.isspace() and after.isspace() and not self.line_start
            said = alone or (inside_word and not is_open)
        if said:
            return run
        self.emphasis ^= {run}
        return DROPPED * len(run)
