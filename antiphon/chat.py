"""The chat template and tool calls: the one file that knows how a conversation is spelled.

The template is ChatML, written as ids and not as text, so that nothing a user types can close a turn:

    <|im_start|>user\\n<|audio_start|><|audio_pad|>…<|audio_end|>text<|im_end|>\\n<|im_start|>assistant\\n

The wording of the tool section is a wire format: what Qwen3 was trained on, to the letter (Qwen3's chat template).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from antiphon.errors import InputError
from antiphon.tokenizer import Tokenizer

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


@dataclass
class TurnWriter:
    """Writes turns as ids while they happen. Each method returns the ids that are certain by then, in order.

    Text waits in `pending` until something that is not text follows, because neighbouring pieces of text, the line
    end after the role among them, merge into tokens: the ids are those of the whole ChatML string. Usage:

        ids = writer.open("user") + writer.audio(13)
        writer.text("What was that?")
        ids += writer.close() + writer.open_reply()
    """

    tokenizer: Tokenizer
    pending: str = ""

    def open(self, role: str) -> list[int]:
        """Begin a turn of "system", "user" or "assistant".

        Raises:
            InputError: another role.
        """
        roles = self.tokenizer.roles
        if role not in roles:
            raise InputError(f"there is no role {role!r}; expected one of {', '.join(roles)}")
        ids = [*self.flush(), self.tokenizer.config.im_start_token_id, roles[role]]
        self.pending = "\n"
        return ids

    def open_reply(self) -> list[int]:
        """Begin the assistant's turn for the Thinker to go on with."""
        return self.open("assistant") + self.flush()

    def text(self, text: str) -> None:
        """Add text to the open turn; its ids come with the next call."""
        self.pending += text

    def audio(self, tokens: int) -> list[int]:
        """A whole clip: `tokens` audio placeholders between their marks."""
        return self.open_audio() + [self.tokenizer.config.audio_token_id] * tokens + self.close_audio()

    def open_audio(self) -> list[int]:
        """Begin a clip whose length is not known yet; the caller puts its audio placeholders after this."""
        return [*self.flush(), self.tokenizer.config.audio_start_token_id]

    def close_audio(self) -> list[int]:
        """End the clip begun by `open_audio`."""
        return [self.tokenizer.audio_end_token_id]

    def flush(self) -> list[int]:
        """Ids of the text that waits: from here on nothing merges with it."""
        text, self.pending = self.pending, ""
        return self.tokenizer.encode(text) if text else []

    def close(self) -> list[int]:
        """End the turn."""
        return [*self.flush(), self.tokenizer.config.im_end_token_id, *self.tokenizer.encode("\n")]

    def turn(self, role: str, text: str) -> list[int]:
        """A whole turn of text."""
        ids = self.open(role)
        self.text(text)
        return ids + self.close()


# ---------------------------------------------------------------------------------------------- tools


@dataclass(frozen=True)
class ToolCall:
    """A function the assistant wants called; `arguments` is the raw text where the model's JSON is broken."""

    name: str  # empty where the model's JSON does not tell
    arguments: dict[str, Any] | str


def system_text(text: str | None, tools: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Text of the system turn: the instructions and the declared tools; None if there is nothing to say.

    Args:
        text: the instructions, or None.
        tools: OpenAI's form, {"type": "function", "function": {"name": …, "parameters": …}}.

    Raises:
        InputError: a tool of another form.
    """
    if not tools:
        return text
    head = "" if text is None else f"{text}\n\n"
    declared = map(_declaration, tools if isinstance(tools, Iterable) else [tools])
    return head + TOOLS_BEFORE + "\n".join(declared) + TOOLS_AFTER


def assistant_text(text: str, calls: Iterable[ToolCall]) -> str:
    """Text of an assistant turn that calls tools, as the model would have written it."""
    return "\n".join([text] * bool(text) + [_call_text(call) for call in calls])


def tool_results_text(results: Iterable[str]) -> str:
    """Text of the user turn that returns tool results; results of one round of calls share one turn."""
    return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Tool calls in the assistant's text, in order; a call that is cut off or is not JSON is kept as raw text."""
    return [_parse_call(body.strip()) for body in re.findall(r"<tool_call>(.*?)(?=</?tool_call>|\Z)", text, re.DOTALL)]


def _parse_call(body: str) -> ToolCall:
    try:
        call = json.loads(body, strict=False)  # models write line ends inside strings
        name, arguments = call["name"], call.get("arguments") or {}
        if isinstance(name, str) and isinstance(arguments, dict | str):
            return ToolCall(name, arguments)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    spelled = re.search(r'"name"\s*:\s*"([^"]*)"', body)
    return ToolCall(spelled[1] if spelled else "", body)


def _call_text(call: ToolCall) -> str:
    arguments = call.arguments if isinstance(call.arguments, str) else _json(call.arguments)
    return f'<tool_call>\n{{"name": {_json(call.name)}, "arguments": {arguments}}}\n</tool_call>'


def _declaration(tool: Mapping[str, Any]) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError('a tool must have the form {"type": "function", "function": {"name": …, "parameters": …}}')
    return _json(tool)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"a tool must be plain JSON: {error}") from None
