"""Antiphon: the audio side of Qwen3-Omni. It listens, understands and answers aloud in real time.

model = antiphon.load("Qwen/Qwen3-Omni-30B-A3B-Instruct", device="cuda")
reply = model.generate([{"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]}], voice="ethan")
"""

from antiphon.errors import AntiphonError, AudioError, CapacityError, ConfigError, InputError, WeightsError
from antiphon.generate import AudioDelta, Done, Event, Omni, Options, Reply, Session, TextDelta, load
from antiphon.sampling import Sampling

__all__ = [
    "AntiphonError",
    "AudioDelta",
    "AudioError",
    "CapacityError",
    "ConfigError",
    "Done",
    "Event",
    "InputError",
    "Omni",
    "Options",
    "Reply",
    "Sampling",
    "Session",
    "TextDelta",
    "WeightsError",
    "load",
]
