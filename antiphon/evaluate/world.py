"""How well a model does in the world of `recipes/tiny/corpus.yaml`: what it hears, answers, says and clones.

Everything goes the way of the product, through sessions. Test sets are those that no recipe trains on. Every function
gives rows for one table; `antiphon evaluate` prints them.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.audio import Samples
from antiphon.codec import Codec
from antiphon.error_rates import BY_CHARACTER, error_rates, normalize_text
from antiphon.errors import AntiphonError
from antiphon.generate import Omni, Reply, collect
from antiphon.train.data import Example, load_samples, read_cuts, resample
from antiphon.train.dialog import DIALOG_LANGUAGES, load_phrases
from antiphon.train.talks import WHICH_LANGUAGE, cut_out, messages_of
from antiphon.train.world import LANGUAGES, number_words
from antiphon.transcripts import PROMPTS, transcribe
from antiphon.weights import load_codec

PIECE = 0.08  # seconds of sound that arrive at once in a stream
WINDOWS = (1, 2, 4, 8)
TEMPO = 0.04  # relative error of a tempo that counts as right
Track = Callable[[Sequence[Any], str], Iterable[Any]]  # goes over items and shows how far it is


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, what came out, and what it should be."""

    what: str
    seen: str
    target: str = ""


@dataclass(frozen=True)
class Trial:
    """A model, the test sets and how many clips of each language to take."""

    model: Omni
    cuts: Path
    limit: int
    track: Track

    def examples(self, name: str, languages: Sequence[str] = (), task: str = "transcribe") -> list[Example]:
        """The first clips of each language of a set, in order."""
        taken: dict[str, int] = {}
        found = []
        for cut in read_cuts(f"{name}.jsonl.gz", self.cuts):
            example = Example(cut, task)
            language = (cut.custom or {}).get("language") or example.language or ""
            taken[language] = taken.get(language, 0) + 1
            if taken[language] <= self.limit and (not languages or language in languages):
                found.append(example)
        return found

    def hear(self, examples: Sequence[Example], what: str, **options: Any) -> list[tuple[str, str, str | None]]:
        """(said, heard, language) of each example."""
        return [(e.text, self.heard(*sound(e), e.language, **options), e.language) for e in self.track(examples, what)]

    def heard(
        self, samples: Samples, rate: int, language: str | None, window: int | None = None, streamed: bool = False
    ) -> str:
        """The transcript of samples [N]: of a whole clip, or of one that arrives in pieces of 80 ms."""
        if not streamed:
            return transcribe(self.model, samples, rate, language=language or "", window=window).text
        session = self.model.session(window=window)
        for start in range(0, len(samples), round(PIECE * rate)):
            session.append_audio(samples[start : start + round(PIECE * rate)], rate)
        session.append_text(PROMPTS.get(language or "", PROMPTS[""]))
        return collect(session.respond(audio=False)).text.strip()

    def ask(self, example: Example, question: str) -> str:
        """The answer to a written question about a clip."""
        session = self.model.session()
        session.append_clip(*sound(example))
        session.append_text(question)
        return collect(session.respond(audio=False, max_text_tokens=64)).text


def sound(example: Example) -> tuple[Samples, int]:
    """Samples of an example at its own rate."""
    return load_samples(example.cut, example.cut.sampling_rate), example.cut.sampling_rate


def percent(share: float) -> str:
    """As a percentage."""
    return f"{100 * share:.1f} %"


def mean(rates: dict[str, float]) -> float:
    """Mean over languages."""
    return sum(rates.values()) / max(1, len(rates))


def by_language(rates: dict[str, float]) -> str:
    """All rates, in percent."""
    return " ".join(f"{language} {100 * rate:.1f}" for language, rate in rates.items())


def rates_of(trial: Trial, name: str, window: int | None = None) -> Iterator[Row]:
    """Error rates on somebody's cuts, by language; of the units that `error_rates.units` counts."""
    examples = [Example(cut, "transcribe") for cut in read_cuts(name, trial.cuts)][: trial.limit]
    for language, rate in error_rates(trial.hear(examples, name, window=window)).items():
        unit = "characters" if language in BY_CHARACTER else "words"
        yield Row(f"{name}, {language}", f"{percent(rate)} of {unit}")


# --------------------------------------------------------------------------------------------- listening

LISTENING = {
    "test-sentence": ("listening, new sentences, known voices", "<= 4 %"),
    "test-voice": ("voices never heard", "<= 8 %"),
    "test-template": ("sentence templates never seen", "<= 10 %"),
    "test-engine": ("English from another speech engine", "low"),
    "test-zh-en": ("zh and en, new sentences", "<= 2 %"),
}


def listening(trial: Trial) -> Iterator[Row]:
    """Error rates of what is written down, over the languages of each test set."""
    for name, (what, target) in LISTENING.items():
        if not (trial.cuts / f"{name}.jsonl.gz").exists():
            yield Row(what, "not measured: the set was not made", target)
            continue
        rates = error_rates(trial.hear(trial.examples(name), what))
        yield Row(what, f"{percent(mean(rates))} ({by_language(rates)})", target)


def windows(trial: Trial) -> Iterator[Row]:
    """The same clips in every window size, whole and as they arrive."""
    examples = trial.examples("test-sentence", ("zh", "en", "de", "ja", "ar"))
    for window in WINDOWS:
        whole = trial.hear(examples, f"window of {window} s", window=window)
        live = trial.hear(examples, f"window of {window} s, streamed", window=window, streamed=True)
        same = np.mean([a[1] == b[1] for a, b in zip(whole, live, strict=True)])
        seen = f"{percent(mean(error_rates(whole)))} whole, {percent(mean(error_rates(live)))} streamed"
        yield Row(f"window of {window} s", f"{seen}, {percent(float(same))} the same text", "within 1 point; same text")


def languages(trial: Trial) -> Iterator[Row]:
    """The share of clips whose language is named."""
    examples = trial.examples("test-sentence")
    named = [
        trial.ask(e, WHICH_LANGUAGE).strip() == LANGUAGES[e.language or "en"].name
        for e in trial.track(examples, "languages")
    ]
    yield Row("language identified", percent(float(np.mean(named))), ">= 99 %")


def scenes(trial: Trial) -> Iterator[Row]:
    """Instrument, mode, tempo and everyday sounds: right answers to questions in English."""
    phrases = load_phrases("en")
    music, sounds = trial.examples("test-music"), trial.examples("test-sound")
    for kind, examples in (("instrument", music), ("mode", music), ("sound", sounds)):
        wanted = [phrases.answers[kind].format(**{kind: phrases.labels[kind][e.custom(kind)]}) for e in examples]
        said = [trial.ask(e, phrases.questions[f"{kind}.1"]) for e in trial.track(examples, kind)]
        right = [normalize_text(a) == normalize_text(b) for a, b in zip(wanted, said, strict=True)]
        yield Row(kind, percent(float(np.mean(right))), ">= 90 %")
    said = [tempo_in(trial.ask(e, phrases.questions["tempo.1"])) for e in trial.track(music, "tempo")]
    right = [abs(t - e.custom("tempo")) <= TEMPO * e.custom("tempo") for t, e in zip(said, music, strict=True)]
    yield Row("tempo within 4 %", percent(float(np.mean(right))), ">= 90 %")


def tempo_in(answer: str) -> float:
    """The number whose digits an English answer says one by one; infinite where it says none."""
    digits = {number_words(d, "en"): str(d) for d in range(10)}
    said = "".join(digits.get(word, "") for word in normalize_text(answer).split())
    return float(said) if said else float("inf")


def answers(trial: Trial) -> Iterator[Row]:
    """The share of right answers to spoken questions, by language and by kind."""
    right: dict[tuple[str, str], list[bool]] = {}
    for example in trial.track(trial.examples("test-dialog", task="talk"), "answers"):
        about = example.cut.custom
        *before, last = messages_of(example)
        said = collect(asked(trial.model, example, before).respond(audio=False, max_text_tokens=96)).text
        right.setdefault((about["language"], about["kind"]), []).append(
            normalize_text(said) == normalize_text(last["content"])
        )
    for place, what in enumerate(("language", "kind")):
        shares: dict[str, list[bool]] = {}
        for key, found in right.items():
            shares.setdefault(key[place], []).extend(found)
        for name, found in sorted(shares.items()):
            yield Row(f"answers right, {what} {name}", percent(float(np.mean(found))), ">= 90 %" if not place else "")


def asked(model: Omni, example: Example, messages: Sequence[Any]) -> Any:
    """A session that was told the messages of a cut."""
    session, rate = model.session(), model.config.audio.mel.sample_rate
    whole = load_samples(example.cut, example.cut.sampling_rate)
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "audio", "audio": (cut_out(example, whole, int(part["supervision"]), rate), rate)}
                if part["type"] == "audio"
                else part
                for part in content
            ]
        session.append_message({"role": message["role"], "content": content})
    return session


# -------------------------------------------------------------------------------------------- speaking


def codec_of(model: Omni) -> Codec | None:
    """The codec's encoder beside the checkpoint, in the model's type; None where it has none."""
    try:
        return load_codec(model.beside or ".").to(model.dtype)
    except AntiphonError:
        return None


@torch.inference_mode()
def again(model: Omni, codec: Codec, samples: Samples, rate: int) -> tuple[Samples, int]:
    """Samples [N] encoded to codes and decoded by Code2Wav, and their rate."""
    wave = torch.from_numpy(resample(samples, rate, codec.config.sampling_rate))[None].to(model.dtype)
    made = model.speaking().code2wav(codec.encode(wave))[0].float().numpy()
    return made[: wave.shape[1]], codec.config.sampling_rate


def say(model: Omni, text: str, voice: Any, seed: int = 0) -> Reply:
    """`text` in a voice, at most three times as long as text is spoken."""
    return collect(model.speak(text, voice=voice, seed=seed, max_frames=50 + 6 * len(text)))


def speaking(trial: Trial) -> Iterator[Row]:
    """What is said, read back by the model itself, beside the same sentences through the codec alone."""
    model, codec = trial.model, codec_of(trial.model)
    examples = trial.examples("test-sentence", DIALOG_LANGUAGES)
    said, coded = [], []
    for i, e in enumerate(trial.track(examples, "speaking")):
        reply = say(model, e.text, model.voices[i % len(model.voices)])
        heard = trial.heard(reply.audio, reply.sample_rate, e.language) if len(reply.audio) else ""
        said.append((e.text, heard, e.language))
        if codec is not None:
            coded.append((e.text, trial.heard(*again(model, codec, *sound(e)), e.language), e.language))
    plain = error_rates(trial.hear(examples, "the same, as recorded"))
    rates, ceiling = error_rates(said), error_rates(coded)
    yield Row("speaking, read back", f"{percent(mean(rates))} ({by_language(rates)})", "<= ceiling + 5 points")
    yield Row("its ceiling: encoded and decoded", f"{percent(mean(ceiling))} ({by_language(ceiling)})")
    yield Row("error added by the codec", f"{100 * (mean(ceiling) - mean(plain)):.1f} points", "<= 3 points")


# ------------------------------------------------------------------------------------------------ costs


def size(trial: Trial) -> Iterator[Row]:
    """Bytes of everything in the checkpoint's folder."""
    files = [path for path in Path(trial.model.beside or ".").rglob("*") if path.is_file()]
    yield Row("size of everything shipped", f"{sum(p.stat().st_size for p in files) / 1e6:.1f} MB", "<= 48 MB")


def speed(trial: Trial) -> Iterator[Row]:
    """Seconds of computing per second of speech, and from the question's end to the first sound."""
    ratios, first = [], []
    for example in trial.track(trial.examples("test-dialog", ("en", "zh"), "talk")[:12], "speed"):
        if "supervision" not in (last := messages_of(example)[-1]) or not last["content"]:
            continue
        session = trial.model.session()
        samples = cut_out(example, sound(example)[0], 0, 16000)
        for start in range(0, len(samples), 1280):
            session.append_audio(samples[start : start + 1280])
        reply = collect(session.respond(max_frames=100))
        if len(reply.audio):
            ratios.append(reply.timings["total"] * reply.sample_rate / len(reply.audio))
            first.append(1000 * reply.timings["first_audio"])
    seen = f"RTF {np.median(ratios):.2f}, first sound {np.median(first):.0f} ms" if ratios else "nothing was said"
    yield Row(f"speed, {torch.get_num_threads()} threads", seen, "RTF <= 0.5, first sound <= 300 ms")


TABLES: dict[str, Callable[[Trial], Iterator[Row]]] = {
    **{f.__name__: f for f in (listening, windows, languages, scenes, answers, speaking, size, speed)},
}
