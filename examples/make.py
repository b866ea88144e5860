"""Make the clips of this folder from tiny's test sets, none of which was trained on.

antiphon evaluate tiny --only size     # makes the test sets in cuts/tiny
python examples/make.py [cuts/tiny]
"""

import sys
from pathlib import Path

from antiphon.audio import Samples, write_audio
from antiphon.train.data import Example, load_samples, read_cuts
from antiphon.train.talks import cut_out

RATE = 16000
QUESTIONS = {"en": "question", "zh": "question-zh", "de": "question-de", "ja": "question-ja", "fr": "question-fr"}


def main() -> None:
    """Write every clip and print what is in it."""
    cuts, here = Path(sys.argv[1] if len(sys.argv) > 1 else "cuts/tiny"), Path(__file__).parent
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
