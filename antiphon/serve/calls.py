"""What of an answer's text is for people and what is for programs: text and tool calls, told apart as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon.chat import ToolCall, parse_tool_calls
from antiphon.guide import Guide
from antiphon.serve.refusals import Refused
from antiphon.tokenizer import Tokenizer

CALL = ("<tool_call>", "</tool_call>")
THOUGHT = ("<think>", "</think>")


@dataclass
class Splitter:
    """Text in, text without tool calls and thoughts out, and the calls once they are whole. Nothing else is held."""

    held: str = ""
    span: tuple[str, str] | None = None  # that the text is inside of
    begun: bool = False  # some text was given: spaces before the first are left out
    after_span: bool = False  # spaces after a span are, too

    def push(self, text: str) -> Iterator[str | ToolCall]:
        """What is certain now."""
        self.held += text
        while True:
            if self.span is None:
                start, span = min(
                    ((self.held.find(s[0]), s) for s in (CALL, THOUGHT) if s[0] in self.held), default=(-1, CALL)
                )
                if start < 0:
                    keep = _may_open(self.held)
                    yield from self._say(self.held[: len(self.held) - keep])
                    self.held = self.held[len(self.held) - keep :]
                    return
                yield from self._say(self.held[:start])
                self.held, self.span = self.held[start + len(span[0]) :], span
            else:
                body, end, rest = self.held.partition(self.span[1])
                if not end:
                    return
                yield from self._close(body)
                self.held = rest

    def flush(self) -> Iterator[str | ToolCall]:
        """The rest, at the end of the answer: a call that was cut off is none."""
        if self.span is None:
            yield from self._say(self.held)
        self.held = ""

    def _say(self, text: str) -> Iterator[str]:
        if self.after_span or not self.begun:
            text = text.lstrip()
        if text:
            self.begun, self.after_span = True, False
            yield text

    def _close(self, body: str) -> Iterator[ToolCall]:
        if self.span == CALL:
            yield from parse_tool_calls(f"{CALL[0]}{body}{CALL[1]}")
        self.span, self.after_span = None, True


def guide_of(
    tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, param: str
) -> Guide | None:
    """What holds an answer to the functions of `tools`; `choice` is auto, none, required, or a function's name.

    Raises:
        Refused: there is no such function. InputError: parameters that are no JSON schema.
    """
    if choice == "none" or (not tools and choice == "auto"):
        return None
    if not tools:
        raise Refused(f"tool_choice is {choice}, but there are no tools", code="invalid_value", param=param)
    named = [tool for tool in tools if choice in ("auto", "required", tool["function"]["name"])]
    if not named:
        raise Refused(f"no function {choice!r} is among the tools", code="invalid_value", param=param)
    return Guide(tokenizer, named, choice != "auto", parallel)


def arguments_text(call: ToolCall) -> str:
    """A call's arguments as OpenAI has them: JSON text; what the model wrote, where that is none."""
    return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)


def _may_open(text: str) -> int:
    """Characters at the end of `text` that may be the beginning of a mark."""
    marks = (CALL[0], THOUGHT[0])
    longest = max(map(len, marks)) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in marks)), 0)
