"""Judges that have to be fetched: models that are downloaded (`--download`), and a grader elsewhere (`--judge`).

Nothing here is used unless it is asked for. Published figures of speech are by Whisper-large-v3 (Paraformer for
Chinese), by WavLM-large fine-tuned on speakers and by UTMOS; `--download` takes the nearest that `transformers` and
`torch.hub` offer, and what it took is written beside the result.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import cache
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import torch

from antiphon.errors import InputError
from antiphon.evaluate.asking import Response, Sound
from antiphon.evaluate.items import Item
from antiphon.evaluate.judges import RATE, heard
from antiphon.evaluate.scoring import Counts, Judges, Scorer

WHISPER = "openai/whisper-large-v3"
SPEAKERS = "microsoft/wavlm-base-plus-sv"  # the official script's WavLM-large is on no hub
UTMOS = ("tarepan/SpeechMOS:v1.2.0", "utmos22_strong")
PATIENCE = 120.0  # seconds that a grader may take
RATINGS = 5  # of the grader's scale


def with_downloads(judges: Judges) -> Judges:
    """Whisper for the ear, and WavLM and UTMOS besides the offline judges; each is fetched when it is first needed.

    Raises:
        InputError: `transformers` is missing.
    """
    _transformers()
    voices = {**judges.voices, "similarity, WavLM-base-plus-SV": alike, "UTMOS": utmos}
    notes = (*judges.notes, f"{WHISPER}, {SPEAKERS} and {UTMOS[1]} were downloaded")
    return replace(judges, ear=whisper, ear_name=WHISPER, voices=voices, notes=notes)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise InputError("judges that are downloaded need transformers; pip install 'antiphon[verify]'") from None
    return transformers


@cache
def _ear() -> Any:
    return _transformers().pipeline("automatic-speech-recognition", WHISPER)


def whisper(sound: Sound, language: str | None) -> str:
    """What Whisper hears in a sound."""
    options = {"task": "transcribe"} | ({"language": language} if language else {})
    clip = {"raw": heard(*sound), "sampling_rate": RATE}
    return _ear()(clip, return_timestamps=True, generate_kwargs=options)["text"].strip()


@cache
def _speakers() -> tuple[Any, Any]:
    package = _transformers()
    return package.AutoFeatureExtractor.from_pretrained(SPEAKERS), package.WavLMForXVector.from_pretrained(SPEAKERS)


@torch.inference_mode()
def alike(response: Response) -> float | None:
    """Cosine of the voices of a sound and its recording, by WavLM."""
    if response.sound is None or response.like is None:
        return None
    extractor, model = _speakers()
    waves = [heard(*sound) for sound in (response.sound, response.like)]
    prints = [model(**extractor(wave, sampling_rate=RATE, return_tensors="pt")).embeddings[0] for wave in waves]
    return float(torch.cosine_similarity(*prints, dim=0))


@cache
def _utmos() -> Any:
    return torch.hub.load(*UTMOS, trust_repo=True)  # type: ignore[arg-type]  # stated as a text alone


@torch.inference_mode()
def utmos(response: Response) -> float | None:
    """How a voice sounds, by UTMOS."""
    if response.sound is None:
        return None
    return float(_utmos()(torch.from_numpy(np.ascontiguousarray(heard(*response.sound)))[None], RATE))


# --------------------------------------------------------------------------------------------------- a grader

RATE_IT = (
    "A voice assistant was asked, in speech: {said}\n\nIt answered: {text}\n\nGrade the answer from 1 (irrelevant or "
    "wrong) through 3 (mostly right, yet wordy or incomplete) to 5 (right, complete and to the point). "
    "Reply with the number alone."
)
CHECK_IT = (
    "Question: {said}\n\nReference answer: {right}\n\nGiven answer: {text}\n\nIs the given answer correct, judged by "
    "the reference? Reply with Yes or No alone."
)


def with_grader(judges: Judges, url: str, model: str) -> Judges:
    """A chat model at an OpenAI-compatible address, for answers that no rule can count."""

    def rating(item: Item, text: str) -> Counts:
        said = ask(url, model, RATE_IT.format(said=item.said, text=text))
        found = re.search(rf"[1-{RATINGS}]", said)
        return {"rating": (int(found[0]) / RATINGS, 1)} if found else {}

    def correct(item: Item, text: str) -> Counts:
        said = ask(url, model, CHECK_IT.format(said=item.said, right=item.text, text=text))
        return {"accuracy": (said.strip().lower().startswith("yes"), 1)}

    scorers: dict[str, Scorer] = {"rating": rating, "correct": correct}
    return replace(judges, answers={**judges.answers, **scorers}, notes=(*judges.notes, f"graded by {model}"))


def ask(url: str, model: str, text: str) -> str:
    """What a chat model says.

    Raises:
        InputError: nobody is there, or what is there is no chat model.
    """
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    address = f"{url.rstrip('/')}/chat/completions"
    try:
        with urlopen(Request(address, json.dumps(body).encode(), headers), timeout=PATIENCE) as reply:
            return json.load(reply)["choices"][0]["message"]["content"] or ""
    except (URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"the grader at {address} did not answer ({error}); check --judge") from None
