"""When somebody speaks: silero's probability of speech every 32 ms, and what follows from it for the turn.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.audio import Resampler, Samples
from antiphon.errors import InputError

STEP = 0.032  # seconds that are judged at once
RATE, WINDOW, CONTEXT = 16000, 512, 64  # Hz, and samples
CONFIRMED = 2  # steps of speech that begin a turn: a click is none
RELEASE = 0.15  # below the threshold by so much is silence
PAUSE_MS = 150  # of silence, after which the answer is begun in case the turn is over
QUICK_MS = 200  # of silence, that end a turn which is judged to be over
EAGERNESS = {"low": (0.7, 8000), "medium": (0.6, 4000), "auto": (0.6, 4000), "high": (0.3, 2000)}  # see `of_eagerness`


@dataclass(frozen=True)
class TurnTaking:
    """When a turn begins and ends, as in OpenAI's `server_vad` and `semantic_vad`."""

    threshold: float = 0.5
    padding_ms: int = 300  # before the first speech, that belong to the turn
    silence_ms: int = 500  # that end it
    create: bool = True  # answer when it ends
    interrupt: bool = True  # stop an answer when it begins
    idle_ms: int | None = None  # after an answer, until the model asks whether somebody is there
    likely: float | None = None  # an end that is so likely, by what was said, is one after QUICK_MS of silence

    @classmethod
    def of_eagerness(cls, eagerness: str, create: bool, interrupt: bool) -> TurnTaking:
        """`semantic_vad`: how likely an end has to be, and the silence that ends a turn which does not sound ended."""
        likely, silence_ms = EAGERNESS[eagerness]
        return cls(silence_ms=silence_ms, create=create, interrupt=interrupt, likely=likely)


class Sign(Enum):
    """What a step changed."""

    STARTED = "started"
    PAUSED = "paused"
    RESUMED = "resumed"
    STOPPED = "stopped"


class Detector:
    """Tells the turns in a stream at `rate` Hz."""

    def __init__(self, taking: TurnTaking, rate: int) -> None:
        self.taking, self.step = taking, round(STEP * rate)  # samples to be given at once
        self._vad = Silero(rate)
        self.speaking = self.paused = False
        self._run = 0  # steps of speech in a row, before a turn
        self._quiet_ms = 0.0
        self._is_likely = False  # the end, by what was said before this pause

    @property
    def before_ms(self) -> int:
        """Milliseconds up to now that belong to a turn which begins now."""
        return self.taking.padding_ms + round(1000 * STEP * CONFIRMED)

    def push(self, samples: Samples) -> Sign | None:
        """What `step` more samples change."""
        speech = self._vad.push(samples)
        if not self.speaking:
            self._run = self._run + 1 if speech >= self.taking.threshold else 0
            self.speaking = self._run >= CONFIRMED
            return Sign.STARTED if self.speaking else None
        if speech >= max(self.taking.threshold - RELEASE, 0.01):
            resumed, self.paused, self._quiet_ms, self._is_likely = self.paused, False, 0.0, False
            return Sign.RESUMED if resumed else None
        self._quiet_ms += 1000 * STEP
        if self._quiet_ms >= (QUICK_MS if self._is_likely else self.taking.silence_ms):
            self.reset()
            return Sign.STOPPED
        if self._quiet_ms >= PAUSE_MS and not self.paused:
            self.paused = True
            return Sign.PAUSED
        return None

    def judged(self, ended: float) -> None:
        """How likely the turn has ended with this pause, by what was said."""
        self._is_likely = self.paused and self.taking.likely is not None and ended >= self.taking.likely

    def reset(self) -> None:
        """Nobody is speaking."""
        self.speaking = self.paused = self._is_likely = False
        self._run, self._quiet_ms = 0, 0.0


class Silero:
    """The probability of speech in a stream at `rate` Hz."""

    def __init__(self, rate: int) -> None:
        self._model = silero_model()
        self._resample = Resampler(rate, RATE)
        self._wave = self._resample.init_state(1, torch.device("cpu"), torch.float32)
        self._state = np.zeros((2, 1, 128), np.float32)
        self._held = np.zeros(CONTEXT, np.float32)  # what comes before the next window, and its beginning
        self.speech = 0.0

    def push(self, samples: Samples) -> float:
        """The probability after these samples [N]: that of the last whole window."""
        x = self._resample(torch.from_numpy(samples)[None], self._wave)[0].numpy()
        self._held = np.concatenate([self._held, x])
        while len(self._held) >= CONTEXT + WINDOW:
            given = {"input": self._held[None, : CONTEXT + WINDOW], "state": self._state, "sr": np.array(RATE)}
            speech, state = self._model(given)
            self.speech, self._state = float(np.asarray(speech)[0, 0]), np.asarray(state, np.float32)
            self._held = self._held[WINDOW:]
        return self.speech


@cache
def silero_model() -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """The model in silero-vad's wheel, without its package, which would ask for more.

    Raises:
        InputError: it is not installed.
    """
    import onnxruntime

    found = find_spec("silero_vad")
    if found is None or found.origin is None:
        raise InputError("voice activity detection needs pip install 'antiphon[serve]'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    path = Path(found.origin).parent / "data" / "silero_vad_16k_op15.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)
