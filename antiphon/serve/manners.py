"""OpenAI's session configuration: what a client sets, merged and checked, and the Manner that a Talk is held in.

The configuration stays as it is on the wire, so that it is echoed as it was set; `manner_of` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from antiphon.generate import Options
from antiphon.serve.calls import guide_of
from antiphon.serve.happenings import Manner
from antiphon.serve.house import House
from antiphon.serve.refusals import Refused
from antiphon.serve.sounds import TELEPHONE, WIRE_RATE, Wire
from antiphon.serve.vad import EAGERNESS, TurnTaking
from antiphon.transcripts import HEARD, check_language
from antiphon.turn import TURN_FILE

Config = dict[str, Any]  # a session as JSON
VAD: Config = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "create_response": True,
    "interrupt_response": True,
    "idle_timeout_ms": None,
}
SEMANTIC: Config = {"type": "semantic_vad", "eagerness": "auto", "create_response": True, "interrupt_response": True}
DETECTION = {"server_vad": VAD, "semantic_vad": SEMANTIC}
PCM: Config = {"type": "audio/pcm", "rate": WIRE_RATE}
INPUT: Config = {"format": PCM, "transcription": None, "noise_reduction": None, "turn_detection": VAD}
OF_AN_ANSWER = (
    *("output_modalities", "instructions", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens"),
)
SETTABLE = (*OF_AN_ANSWER, "truncation")
OLD_NAMES = {  # of the protocol before it was stable: passed over, they would seem to be set
    "modalities": "output_modalities",
    "voice": "audio.output.voice",
    "input_audio_format": "audio.input.format",
    "output_audio_format": "audio.output.format",
    "input_audio_transcription": "audio.input.transcription",
    "turn_detection": "audio.input.turn_detection",
    "max_response_output_tokens": "max_output_tokens",
}
MOST_TOKENS = 4096  # of an answer, that a client may ask for
IDLE_MS = (1000, 300_000)
LONGEST_RETENTION = 0.9


def first_config(house: House, id: str, model: str, kind: str) -> Config:
    """A session before the client has set anything."""
    config: Config = {"type": kind, "object": f"realtime.{kind}_session", "id": id, "audio": {"input": deepcopy(INPUT)}}
    if kind == "transcription":
        config["audio"]["input"]["transcription"] = {"model": model}
        return config
    voice = next(iter(house.model.voices), None)
    config["object"] = "realtime.session"
    config["audio"]["output"] = {"format": dict(PCM), "voice": voice, "speed": 1.0}
    return config | {
        "model": model,
        "output_modalities": ["audio" if house.model.speech is not None else "text"],
        "instructions": "",
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "max_output_tokens": "inf",
        "truncation": "auto",
    }


def merged(config: Config, update: Mapping[str, Any]) -> Config:
    """A session after an update: what is named is set, all else stays.

    Raises:
        Refused: it would become a session of another kind, or a field has its old name.
    """
    new = deepcopy(config)
    if update.get("type", config["type"]) != config["type"]:
        raise Refused(
            f"this session is of type {config['type']} and stays so", param="session.type", code="invalid_value"
        )
    for old in OLD_NAMES.keys() & update.keys():
        told = f"{old} is a name of an older protocol; set session.{OLD_NAMES[old]}"
        raise Refused(told, param=f"session.{old}", code="unknown_parameter")
    if update.get("prompt") is not None:
        raise Refused("prompt is not supported; send instructions", param="session.prompt", code="unsupported_value")
    for name in SETTABLE:
        if name in update:
            new[name] = update[name]
    for side in ("input", "output"):
        for name, value in ((update.get("audio") or {}).get(side) or {}).items():
            if name in new["audio"].get(side, ()):
                new["audio"][side][name] = value
    taking = new["audio"]["input"]["turn_detection"]
    if taking is not None and (usual := DETECTION.get(taking.get("type", ""))):
        given = {name: value for name, value in taking.items() if value is not None}
        new["audio"]["input"]["turn_detection"] = usual | given
    new["audio"]["input"]["noise_reduction"] = None  # there is none, and the client sees it
    return new


def for_answer(config: Config, wanted: Mapping[str, Any]) -> Config:
    """A session as one answer is to be given, by `response.create`: what is named replaces the session's, once.

    Raises:
        Refused: a prompt that is kept elsewhere.
    """
    if wanted.get("prompt") is not None:
        raise Refused("prompt is not supported; send instructions", param="response.prompt", code="unsupported_value")
    new = config | {name: wanted[name] for name in OF_AN_ANSWER if wanted.get(name) is not None}
    said = (wanted.get("audio") or {}).get("output") or {}
    output = config["audio"]["output"] | {name: said[name] for name in ("format", "voice") if said.get(name)}
    return new | {"audio": config["audio"] | {"output": output}}


def manner_of(house: House, who: str, config: Config) -> Manner:
    """How a session of this configuration is held.

    Raises:
        Refused, InputError: something that cannot be done.
    """
    heard = config["audio"]["input"]
    transcription = heard["transcription"]
    language = None if transcription is None else transcription.get("language") or ""
    check_language(language or "", HEARD)
    manner = Manner(
        heard_as=_format(heard["format"], "input"), taking=_taking(house, heard["turn_detection"]), language=language
    )
    if config["type"] == "transcription":
        if manner.taking is not None and manner.taking.likely is not None:
            raise Refused(
                "semantic_vad needs a session that answers; use server_vad here",
                param="session.audio.input.turn_detection.type",
                code="unsupported_value",
            )
        return replace(manner, answers=False, language=language or "")
    said = config["audio"]["output"]
    if said["speed"] not in (None, 1, 1.0):
        raise Refused("the model speaks at its own speed; leave it at 1", param="session.audio.output.speed")
    tools, choice = tuple(map(_tool, config["tools"] or ())), _choice(config["tool_choice"])
    options = options_of(house, who, config["output_modalities"], said["voice"], config["max_output_tokens"])
    guide = guide_of(house.model.tokenizer, tools, choice, config["parallel_tool_calls"], "session.tool_choice")
    return replace(
        manner,
        instructions=config["instructions"] or None,
        tools=tools,
        choice=choice,
        options=replace(options, guide=guide),
        said_as=_format(said["format"], "output"),
        retention=_retention(config["truncation"]),
    )


def options_of(house: House, who: str, modalities: list[str] | None, voice: Any, most: int | str | None) -> Options:
    """How to answer.

    Raises:
        Refused: both text and sound, a checkpoint that cannot speak, or a voice that there is not.
    """
    if modalities not in (["audio"], ["text"]):
        raise Refused(
            'output_modalities is ["audio"], which has a transcript, or ["text"]',
            param="session.output_modalities",
            code="invalid_value",
        )
    audio = modalities == ["audio"]
    if audio:
        house.check_speech("session.output_modalities")
    name = voice.get("id") if isinstance(voice, Mapping) else voice
    found = house.voices.find(name, who, house.model, "session.audio.output.voice") if audio else None
    if isinstance(most, int) and not 1 <= most <= MOST_TOKENS:
        raise Refused(
            f'max_output_tokens lies between 1 and {MOST_TOKENS}, or is "inf"',
            param="session.max_output_tokens",
            code="invalid_value",
        )
    options = Options(voice=found, audio=audio)
    return replace(options, max_text_tokens=most, max_frames=most) if isinstance(most, int) else options


def _taking(house: House, taking: Mapping[str, Any] | None) -> TurnTaking | None:
    where = "session.audio.input.turn_detection"
    if taking is None:
        return None
    if taking.get("type") not in DETECTION:
        raise Refused(
            f"there is no turn_detection of type {taking.get('type')}; use server_vad, semantic_vad, or null for "
            "push-to-talk",
            param=f"{where}.type",
            code="unsupported_value",
        )
    if taking["type"] == "semantic_vad":
        return _semantic(house, taking, where)
    idle, shortest, longest = taking["idle_timeout_ms"], *IDLE_MS
    if not 0 <= taking["threshold"] <= 1:
        raise Refused("threshold lies between 0 and 1", param=f"{where}.threshold", code="invalid_value")
    for name in ("prefix_padding_ms", "silence_duration_ms"):
        if not 0 <= taking[name] <= 10_000:
            raise Refused(f"{name} lies between 0 and 10000", param=f"{where}.{name}", code="invalid_value")
    if idle is not None and not shortest <= idle <= longest:
        raise Refused(
            f"idle_timeout_ms lies between {shortest} and {longest}",
            param=f"{where}.idle_timeout_ms",
            code="invalid_value",
        )
    return TurnTaking(
        taking["threshold"],
        taking["prefix_padding_ms"],
        taking["silence_duration_ms"],
        taking["create_response"],
        taking["interrupt_response"],
        idle,
    )


def _semantic(house: House, taking: Mapping[str, Any], where: str) -> TurnTaking:
    if taking["eagerness"] not in EAGERNESS:
        raise Refused(f"eagerness is one of {', '.join(EAGERNESS)}", param=f"{where}.eagerness", code="invalid_value")
    if not house.model.hears_turns:
        raise Refused(
            f"this checkpoint has no {TURN_FILE}, so it cannot tell whether a turn has ended; use server_vad",
            param=f"{where}.type",
            code="unsupported_value",
        )
    return TurnTaking.of_eagerness(taking["eagerness"], taking["create_response"], taking["interrupt_response"])


def _format(form: Mapping[str, Any] | None, side: str) -> Wire:
    kind = (form or PCM).get("type")
    if kind == "audio/pcm" and (form or PCM).get("rate", WIRE_RATE) == WIRE_RATE:
        return "audio/pcm"
    if kind in TELEPHONE:
        return "audio/pcmu" if kind == "audio/pcmu" else "audio/pcma"
    raise Refused(
        f"sound is audio/pcm at {WIRE_RATE} Hz, audio/pcmu or audio/pcma",
        param=f"session.audio.{side}.format",
        code="invalid_value",
    )


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function as the chat template declares it."""
    if tool.get("type") != "function" or not tool.get("name"):
        told = "a tool is {type: function, name, description, parameters}, all on one level; give it these"
        raise Refused(told, param="session.tools", code="unsupported_value")
    about = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": about}


def _choice(choice: Any) -> str:
    if isinstance(choice, Mapping):
        if choice.get("type") != "function" or not choice.get("name"):
            raise Refused("tool_choice names a function", param="session.tool_choice", code="invalid_value")
        return choice["name"]
    return choice or "auto"


def _retention(truncation: Any) -> float | None:
    if truncation in (None, "auto"):
        return 0.8
    if truncation == "disabled":
        return None
    if truncation.get("token_limits"):
        raise Refused(
            "token_limits are not supported; the limit is the model's positions",
            param="session.truncation.token_limits",
            code="unsupported_value",
        )
    ratio = truncation.get("retention_ratio", 0.8)
    if not 0 < ratio <= LONGEST_RETENTION:
        raise Refused(
            f"retention_ratio lies above 0 and up to {LONGEST_RETENTION}",
            param="session.truncation",
            code="invalid_value",
        )
    return ratio
