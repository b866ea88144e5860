"""Make the clips of this folder: questions from tiny's test sets, none of which was trained on, and tiny's replies.

antiphon evaluate tiny --only size     # makes the test sets in cuts/tiny
python examples/make.py [cuts/tiny]    # `replies` in the place of the folder: those alone
"""

import sys
from pathlib import Path

import numpy as np
import torch

import antiphon
from antiphon.audio import Samples, read_audio, write_audio
from antiphon.train.data import Example, load_samples, read_cuts, resample
from antiphon.train.stages.codec import picture
from antiphon.train.talks import cut_out

RATE = 16000
QUESTIONS = {"en": "question", "zh": "question-zh", "de": "question-de", "ja": "question-ja", "fr": "question-fr"}


REPLIES = {"question": "ethan", "question-zh": "chelsie", "question-de": "aiden"}  # in which voice each is answered


def main() -> None:
    """Write every clip and print what is in it."""
    here = Path(__file__).parent
    if sys.argv[1:] != ["replies"]:
        clips(Path(sys.argv[1] if len(sys.argv) > 1 else "cuts/tiny"), here)
    replies(here)


def replies(here: Path) -> None:
    """What tiny answers, and for the first a picture: the spectrogram of the question above that of the reply."""
    model = antiphon.load("tiny")
    for name, voice in REPLIES.items():
        asked, rate = read_audio(here / f"{name}.wav")
        messages = [{"role": "user", "content": [{"type": "audio", "audio": (asked, rate)}]}]
        reply = model.generate(messages, voice=voice)
        path = here / f"{name.replace('question', 'reply')}.wav"
        write_audio(path, reply.audio, reply.sample_rate)
        print(f"{path.name}: {reply.text}")
        if name == "question":
            both = [resample(asked, rate, reply.sample_rate), reply.audio]
            longest = max(map(len, both))
            above, below = (torch.from_numpy(np.pad(samples, (0, longest - len(samples)))) for samples in both)
            picture(here / "reply.png", above, below, reply.sample_rate)


def clips(cuts: Path, here: Path) -> None:
    """Questions and sounds."""
    for language, name in QUESTIONS.items():
        cut = next(
            c
            for c in read_cuts("test-dialog.jsonl.gz", cuts)
            if (c.custom["language"], c.custom["kind"]) == (language, "calendar")
        )
        sound = load_samples(cut, cut.sampling_rate)
        keep(here / f"{name}.wav", cut_out(Example(cut, "talk"), sound, 0, RATE), cut.supervisions[0].text)
    for name, manifest in (("melody", "test-music"), ("rain", "test-sound"), ("reference", "test-voice")):
        cut = next(
            c
            for c in read_cuts(f"{manifest}.jsonl.gz", cuts)
            if name != "reference" or (c.supervisions[0].language == "en" and c.duration > 3)
        )
        keep(here / f"{name}.wav", load_samples(cut, RATE), cut.supervisions[0].text)


def keep(path: Path, samples: Samples, text: str) -> None:
    """Write one clip."""
    write_audio(path, samples, RATE)
    print(f"{path.name}: {text}")


if __name__ == "__main__":
    main()
