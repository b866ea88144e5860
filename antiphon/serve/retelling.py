"""Items of a conversation, told to a call of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from antiphon.engine import Call
from antiphon.serve.happenings import Item, Part
from antiphon.serve.house import settled

UNHEARD = "…"  # for sound that is no longer there and was never written down


async def retell(call: Call, items: Sequence[Item]) -> None:
    """Tell a call what was said.

    Raises:
        AntiphonError: it cannot be read.
    """
    for message in messages(items):
        await settled(call.append_message(message))


def messages(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Items as messages: what the assistant said in a row, calls included, is one turn."""
    for is_assistant, some in groupby(items, lambda item: item.role in ("assistant", "call")):
        if is_assistant:
            yield _assistant([*some])
            continue
        for item in some:
            if item.role == "result":
                yield {"role": "tool", "content": item.text}
            elif item.role == "system":
                yield {"role": "system", "content": "".join(part.text for part in item.parts)}
            else:
                yield {"role": "user", "content": [_said(part) for part in item.parts]}


def _assistant(items: Sequence[Item]) -> dict[str, Any]:
    text = "\n".join(part.text for item in items for part in item.parts)
    calls = [{"function": {"name": i.name, "arguments": i.text}} for i in items if i.role == "call"]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def _said(part: Part) -> dict[str, Any]:
    if part.sound:
        return {"type": "audio", "audio": (part.samples, part.rate)}
    return {"type": "text", "text": part.text or UNHEARD}
