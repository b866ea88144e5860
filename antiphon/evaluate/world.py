"""How well a model hears and answers in the world of `recipes/tiny/corpus.yaml`, and what it costs.

Everything goes the way of the product, through sessions. Test sets are those that no recipe trains on. Every function
gives rows for one table; `antiphon evaluate` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from antiphon.chat import parse_tool_calls
from antiphon.conversation import WINDOWS
from antiphon.error_rates import BY_CHARACTER, error_rates, normalize_text
from antiphon.evaluate.judges import unmeasured
from antiphon.evaluate.tags import WITHIN, music_baseline, sound_baseline
from antiphon.evaluate.trial import PIECE, Row, Trial, asked, by_language, mean, percent, sound
from antiphon.generate import Omni, collect
from antiphon.train.data import Example, read_cuts
from antiphon.train.dialog import load_phrases
from antiphon.train.talks import WHICH_LANGUAGE, cut_out, messages_of
from antiphon.train.world import LANGUAGES, number_words

LEARNT = 600  # training clips that the baselines learn classes from


def rates_of(trial: Trial, name: str, window: int | None = None) -> Iterator[Row]:
    """Error rates on somebody's cuts, by language; of the units that `error_rates.units` counts."""
    examples = trial.first_of(read_cuts(name, trial.cuts))
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
    """Instrument, mode, tempo and everyday sounds: right answers to questions in English, and what librosa hears."""
    phrases = load_phrases("en")
    music, sounds = trial.examples("test-music"), trial.examples("test-sound")
    why = unmeasured("librosa")
    baseline = {} if why else baselines(trial, music, sounds)
    for kind, examples in (("instrument", music), ("mode", music), ("tempo", music), ("sound", sounds)):
        said = [trial.ask(e, phrases.questions[f"{kind}.1"]) for e in trial.track(examples, kind)]
        if kind == "tempo":
            wanted = [e.custom(kind) for e in examples]
            right = [abs(tempo_in(a) - b) <= WITHIN * b for a, b in zip(said, wanted, strict=True)]
        else:
            wanted = [phrases.answers[kind].format(**{kind: phrases.labels[kind][e.custom(kind)]}) for e in examples]
            right = [normalize_text(a) == normalize_text(b) for a, b in zip(said, wanted, strict=True)]
        seen = f"{percent(float(np.mean(right)))}, librosa {why or percent(baseline[kind])}"
        yield Row("tempo within 4 %" if kind == "tempo" else kind, seen, ">= 90 %, above librosa")


def baselines(trial: Trial, music: list[Example], sounds: list[Example]) -> dict[str, float]:
    """Accuracies of what is built on librosa, its classes learnt from the training sets."""
    heard = [read_cuts(f"{name}.jsonl.gz", trial.cuts)[:LEARNT] for name in ("music", "sound")]
    return music_baseline(heard[0], [e.cut for e in music]) | sound_baseline(heard[1], [e.cut for e in sounds])


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
        right.setdefault((about["language"], about["kind"]), []).append(is_answered(trial.model, example))
    for place, what in enumerate(("language", "kind")):
        shares: dict[str, list[bool]] = {}
        for key, found in right.items():
            shares.setdefault(key[place], []).extend(found)
        for name, found in sorted(shares.items()):
            yield Row(f"answers right, {what} {name}", percent(float(np.mean(found))), ">= 90 %" if not place else "")


def is_answered(model: Omni, example: Example) -> bool:
    """Whether a conversation's last answer is right, and before it every call of a tool; each after the reference."""
    messages = messages_of(example)
    for i, message in enumerate(messages):
        wanted = message["content"]
        if message["role"] != "assistant" or not (parse_tool_calls(wanted) or message is messages[-1]):
            continue
        said = collect(asked(model, example, messages[:i]).respond(audio=False, max_text_tokens=96)).text
        if not is_same(said, wanted):
            return False
    return True


def is_same(said: str, wanted: str) -> bool:
    """Whether an answer is the one that is wanted: the same calls of tools, or the same words and none."""
    if calls := parse_tool_calls(wanted):
        return parse_tool_calls(said) == calls
    return normalize_text(said) == normalize_text(wanted)


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
        rate = trial.model.config.audio.mel.sample_rate
        samples, piece = cut_out(example, sound(example)[0], 0, rate), round(PIECE * rate)
        for start in range(0, len(samples), piece):
            session.append_audio(samples[start : start + piece], rate)
        reply = collect(session.respond(max_frames=100))
        if len(reply.audio):
            ratios.append(reply.timings["total"] * reply.sample_rate / len(reply.audio))
            first.append(1000 * reply.timings["first_audio"])
    seen = f"RTF {np.median(ratios):.2f}, first sound {np.median(first):.0f} ms" if ratios else "nothing was said"
    yield Row(f"speed, {torch.get_num_threads()} threads", seen, "RTF <= 0.5, first sound <= 300 ms")
