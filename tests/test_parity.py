"""Stage by stage the same as transformers' released classes, on random checkpoints of six shapes."""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import antiphon.generate
from antiphon.audio import Samples, normalize
from antiphon.code2wav import Code2Wav
from antiphon.errors import AudioError, ConfigError, InputError, WeightsError
from antiphon.evaluate.parity import Difference, compare, largest, typical, verify
from antiphon.evaluate.reference import causal_waveform, reference_stages
from antiphon.evaluate.stages import COMPARED, STAGES, Case, Choices, Follower, ensure_tokenizer, spelled, trace
from antiphon.files import read_safetensors, write_safetensors
from antiphon.generate import Omni, Reply, collect, load
from antiphon.model import Boxes, Speech
from antiphon.sampling import Sampling, choose
from antiphon.talker import Rows, talker_prompt, trailing_text
from antiphon.thinker import Thinker
from tests.conftest import Pair
from tests.shapes import SHAPES, write_shape

Pairs = Callable[[str], Pair]
Checkpoints = Callable[[str], Path]
Note = Callable[[list[Difference]], None]

# seconds; silence is exact zeros
DURATIONS = {"0.05": 0.05, "0.99": 0.99, "1": 1.0, "8": 8.0, "16": 16.0, "31.7": 31.7, "silence": 2.0}
LAYOUTS = ("before", "after", "between", "bare")  # where the text of a turn stands
TEXTS = (
    "What did you hear?",
    "Который час?",
    "今天天气很好，",
    "and then, 12 345 times <|im_end|>",
    "  two\n\nlines\n",
)
ANSWERS = ("It was a voice.", "Sieben 🙂 o'clock.")
VOICES = ("chelsie", "ethan", "aiden")


def sound(seconds: float, rate: int = 16000, seed: int = 0) -> Samples:
    """A tone that wanders in noise. The first third is so quiet that the floor of the log-mel decides about it."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t))
    x = 0.4 * np.sin(2 * np.pi * (180 + 37 * seed + 60 * np.sin(5 * t)) * t) + 0.05 * noise
    x *= 0.6 + 0.4 * np.sin(2 * np.pi * 3.3 * t)
    x[: len(x) // 3] *= 3e-5
    return x.astype(np.float32)


def clip(duration: str, rate: int, seed: int) -> tuple[Samples, int]:
    x = sound(DURATIONS[duration], rate, seed)
    return (x * 0 if duration == "silence" else x), rate


# ------------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Spec:
    """A case in words."""

    shape: str
    turns: int  # of the user; answers stand between them
    clips: int  # in every turn
    other_window: bool  # not the checkpoint's own
    layout: str
    rate: int
    system: bool
    penalty: float
    durations: tuple[str, ...]  # of the clips in order
    number: int = 0

    def __str__(self) -> str:
        window = f"window{self.window}" if self.other_window else "released"
        system = "-system" if self.system else ""
        durations = ",".join(self.durations)
        return (
            f"{self.shape}-{self.turns}x{self.clips}-{window}-{self.layout}-{self.rate}-{self.penalty}"
            f"{system}-{durations}"
        )

    @property
    def window(self) -> int | None:
        """Seconds, None for the checkpoint's own."""
        own = SHAPES[self.shape].get("window", 800) // 100
        return [w for w in (1, 2, 4, 8) if w != own][self.number % 3] if self.other_window else None

    def pairs(self) -> set[frozenset[tuple[str, Any]]]:
        """The pairs of circumstances that it puts to the test."""
        common = [(name, getattr(self, name)) for name in ("shape", "turns", "clips", "other_window")]
        return {frozenset(p) for d in self.durations for p in combinations([*common, ("duration", d)], 2)}

    def case(self) -> Case:
        turns: list[list[str | tuple[Samples, int]]] = []
        for turn in range(self.turns):
            texts = [TEXTS[(self.number + turn + i) % len(TEXTS)] for i in range(self.clips)]
            heard = self.durations[turn * self.clips : (turn + 1) * self.clips]
            sounds = [clip(d, self.rate, self.number + i) for i, d in enumerate(heard)]
            if self.layout == "between":
                parts = [part for together in zip(sounds, texts, strict=True) for part in together]
            else:
                before, after = texts[:1] * (self.layout == "before"), texts[:1] * (self.layout == "after")
                parts = [*before, *sounds, *after]
            turns += [parts, [ANSWERS[turn % 2]]]
        system = "You listen, and you answer briefly." if self.system else None
        voice = VOICES[self.number % 3]
        return Case(turns[:-1], system, voice, 6, 6, self.penalty, self.window)


def pairwise() -> list[Spec]:
    """Cases in which every pair of shape, turns, clips, window and duration occurs, chosen greedily."""
    rng, specs = random.Random(0), list[Spec]()
    levels = (SHAPES, (1, 2, 3), (1, 2, 3), (False, True), DURATIONS)
    names = ("shape", "turns", "clips", "other_window", "duration")
    values = [[(name, value) for value in level] for name, level in zip(names, levels, strict=True)]
    missing = {frozenset(p) for a, b in combinations(values, 2) for p in product(a, b)}
    while missing:
        number = len(specs)
        choices = [_random_spec(rng, number) for _ in range(600)]
        specs.append(max(choices, key=lambda spec: (len(spec.pairs() & missing), -len(spec.durations))))
        missing -= specs[-1].pairs()
    return specs


def _random_spec(rng: random.Random, number: int) -> Spec:
    turns, clips = rng.randint(1, 3), rng.randint(1, 3)
    durations = tuple(rng.choice([*DURATIONS]) for _ in range(turns * clips))
    if sum(DURATIONS[d] for d in durations) > 45:  # keeps the default suite short
        return _random_spec(rng, number)
    penalty, rate = (1.0, 1.05)[number // 2 % 2], (16000, 24000)[number % 2]
    shape, layout, system = rng.choice([*SHAPES]), LAYOUTS[number % 4], number // 4 % 2 == 1
    return Spec(shape, turns, clips, rng.random() < 0.5, layout, rate, system, penalty, durations, number)


def whole_product() -> list[Spec]:
    """Every shape x duration x turns x clips x window, the other circumstances taking turns."""
    kinds, specs = [*DURATIONS], list[Spec]()
    for shape, first, turns, clips, other in product(SHAPES, range(len(kinds)), (1, 2, 3), (1, 2, 3), (False, True)):
        n = len(specs)
        durations = tuple(kinds[(first + i) % len(kinds)] for i in range(turns * clips))
        penalty, rate = (1.0, 1.05)[n // 3 % 2], (16000, 24000)[n // 2 % 2]
        specs.append(Spec(shape, turns, clips, other, LAYOUTS[n % 4], rate, n % 3 == 1, penalty, durations, n))
    return specs


PAIRWISE = pairwise()


def test_the_cases_are_pairwise_and_few() -> None:
    occur = set[frozenset[tuple[str, Any]]]().union(*(spec.pairs() for spec in PAIRWISE))
    shapes, lengths = [("shape", s) for s in SHAPES], [("duration", d) for d in DURATIONS]
    turns, clips = [("turns", n) for n in (1, 2, 3)], [("clips", n) for n in (1, 2, 3)]
    windows = [("other_window", False), ("other_window", True)]
    for a, b in combinations((shapes, lengths, turns, clips, windows), 2):
        assert {frozenset(p) for p in product(a, b)} <= occur
    assert len(PAIRWISE) <= 24
    for name, levels in (("layout", LAYOUTS), ("rate", (16000, 24000)), ("penalty", (1.0, 1.05))):
        assert {getattr(spec, name) for spec in PAIRWISE} == set(levels)
    assert {spec.system for spec in PAIRWISE} == {True, False}


# ----------------------------------------------------------------------------------------------- proofs


def table(rows: list[Difference]) -> str:
    lines = [f"{r.stage:16} {list(r.shape)!s:14} {r.difference:9.1e} <= {r.tolerance:.0e} {r.note}" for r in rows]
    return "\n" + "\n".join(line + ("" if row.agrees else "  <-") for line, row in zip(lines, rows, strict=True))


def agreed(pair: Pair, case: Case, note: Note) -> dict[str, Tensor]:
    """Our stages, after both implementations, each choosing by itself, were found to agree on every one."""
    ours = trace(pair.ours, case)
    ended = int(ours["text_ids"][-1]) == pair.ours.config.im_end_token_id
    assert not ended or pair.ours.config.im_end_token_id not in ours["text_ids"][:-1]
    assert torch.equal(ours["prompt_ids"], spelled(case, pair.ours.config, pair.ours.tokenizer))
    theirs = reference_stages(pair.theirs, case, ours["prompt_ids"])
    rows = compare(ours, {name: theirs[name] for name in STAGES if name in theirs}, torch.float32)
    note(rows)
    assert all(row.agrees for row in rows), table(rows)
    return ours


def assert_means_something(stages: dict[str, Tensor]) -> None:
    """Comparing zeros, constants or a clamped waveform would prove nothing."""
    assert set(stages) == set(STAGES)
    assert len(stages["text_ids"].unique()) > 1
    assert len(stages["codes"].unique(dim=0)) > 1
    assert len(stages["codes"][:, 0].unique()) > 1
    wave = stages["waveform"]
    assert float((wave.abs() >= 1).float().mean()) < 0.01
    assert 0.05 < float(wave.square().mean().sqrt()) < 0.6
    for name in ("audio_features", "thinker_hidden", "thinker_logits", "talker_inputs", "talker_logits"):
        assert 0.05 < float(stages[name].std()) < 50, name


def closest_decision(model: Omni, case: Case) -> float:
    """How far the best id was ahead of the next one where that was least, over the largest score."""
    margins: list[float] = []

    def watching(
        logits: Tensor, sampling: Sampling, noise: Any = None, seen: Any = None, suppress: Any = None
    ) -> Tensor:
        best, penalty = choose(logits, sampling, noise, seen, suppress), sampling.repetition_penalty
        scores = logits
        if seen is not None:
            scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        others = scores.scatter(1, best[:, None], -torch.inf)
        others = others if suppress is None else others.masked_fill(suppress, -torch.inf)
        margins.append(float((scores[0, best] - others.amax()) / logits.abs().amax()))
        return best

    with patch.object(antiphon.generate, "choose", watching):
        trace(model, case)
    return min(margins)


def agreed_without_ties(pair: Pair, spec: Spec, note: Note) -> dict[str, Tensor]:
    """As `agreed`. Where two ids score alike to the last bits, rounding decides, and another sound is taken."""
    noted: list[list[Difference]] = []
    try:
        stages = agreed(pair, spec.case(), noted.append)
    except AssertionError:
        if closest_decision(pair.ours, spec.case()) > 1e-6:
            raise
        stages = agreed(pair, replace(spec, number=spec.number + 12_000).case(), noted.append)
    note(noted[-1])
    return stages


@pytest.mark.parametrize("spec", PAIRWISE, ids=str)
def test_equal_to_transformers(spec: Spec, pair: Pairs, note: Note) -> None:
    stages = agreed_without_ties(pair(spec.shape), spec, note)
    assert_means_something(stages)
    assert len(stages["text_ids"]) == 6


@pytest.mark.long
@pytest.mark.parametrize("spec", whole_product(), ids=str)
def test_equal_to_transformers_everywhere(spec: Spec, pair: Pairs, note: Note) -> None:
    agreed_without_ties(pair(spec.shape), spec, note)


def test_ties_are_seen(pair: Pairs) -> None:
    """A tie excuses a difference, so it must be one: ids that score a thousandth apart are none."""
    model, case = pair("base").ours, one_turn()
    first = int(trace(model, case)["text_ids"][0])
    other = 5 if first != 5 else 6
    assert closest_decision(model, case) > 1e-5
    head = model.thinker.lm_head.weight
    kept = head[other].clone()
    with torch.no_grad():
        head[other] = head[first]
        assert closest_decision(model, case) < 1e-6
        head[other] = head[first] * 0.999
        assert closest_decision(model, case) > 1e-5
        head[other] = kept


def one_turn(*parts: str | tuple[Samples, int], **changes: Any) -> Case:
    options = {"voice": "ethan", "max_text_tokens": 6, "max_frames": 6} | changes
    return Case([parts or [clip("1", 16000, 1), TEXTS[0]]], **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_without_any_sound(shape: str, pair: Pairs, note: Note) -> None:
    case = Case([["Say something."], ["Something."], ["More of it!"]], "Be brief.", "aiden", 6, 6)
    stages = agreed(pair(shape), case, note)
    assert set(STAGES) - set(stages) == {"mel", "audio_features"}


def test_equal_where_only_one_turn_has_sound(pair: Pairs, note: Note) -> None:
    turns = [["Listen:"], ["Yes?"], [clip("1", 16000, 1)], [ANSWERS[0]], ["And what else?"]]
    agreed(pair("base"), Case(turns, None, "chelsie", 6, 6), note)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_answer_depends_on_the_sound(shape: str, pair: Pairs) -> None:
    """Else everything after AuT would be compared over one and the same input."""
    model = pair(shape).ours
    quiet, loud = (trace(model, one_turn((sound(1.0, seed=seed), 16000), "What?")) for seed in (1, 5))
    for name in ("mel", "audio_features", "thinker_hidden", "talker_inputs"):
        assert float((quiet[name] - loud[name]).abs().max() / quiet[name].abs().max()) > 0.01, name
    assert float((quiet["thinker_logits"][0] - loud["thinker_logits"][0]).abs().max()) > 0.01


def test_the_floor_of_the_mel_is_the_whole_files(pair: Pairs) -> None:
    """The start of the clips is quieter than the floor that their loudest part sets, but not than its own."""
    model = pair("base").ours
    x = torch.from_numpy(sound(31.7))
    mel = model.log_mel(x[None])[0]
    start = mel[:800]
    assert float((normalize(start, mel.amax()) - normalize(start, start.amax())).abs().max()) > 0.1


@pytest.mark.parametrize("shape", ["base", "dense"])
def test_equal_with_any_repetition_penalty(shape: str, pair: Pairs, note: Note) -> None:
    cases = [one_turn(max_frames=20, repetition_penalty=penalty) for penalty in (0.8, 1.0, 1.3)]
    less, plain, more = (agreed(pair(shape), case, note)["codes"].tolist() for case in cases)
    assert less != plain != more


# ------------------------------------------------------------------------------------- where answers end


@contextmanager
def swapped(i: int, j: int, *heads: Any) -> Iterator[None]:
    """Rows `i` and `j` of each head change places: the model says the one id where it would have said the other."""

    def swap() -> None:
        with torch.no_grad():
            for head in heads:
                head.weight[[i, j]] = head.weight[[j, i]]

    swap()
    try:
        yield
    finally:
        swap()


def reply_of(model: Omni, case: Case) -> Reply:
    session = model.session(case.system)
    for turn, parts in enumerate(case.turns):
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "audio", "audio": p} for p in parts]
        session.append_message({"role": ("user", "assistant")[turn % 2], "content": content})
    return collect(session.respond(case.options))


def answer_ending_at(pair: Pair, place: int, **changes: Any) -> tuple[Case, Any]:
    """A case, and what makes the Thinker end its answer to it where token `place` would stand."""
    for seed in range(20):
        case = one_turn(clip("1", 16000, seed), TEXTS[0], **changes)
        ids, end = trace(pair.ours, case)["text_ids"], pair.ours.config.im_end_token_id
        if int(ids[place]) not in ids[:place]:
            return case, swapped(int(ids[place]), end, pair.ours.thinker.lm_head, pair.theirs.thinker.lm_head)
    raise AssertionError("every answer repeats itself")


def speech_ending_at(pair: Pair, frame: int) -> tuple[Case, Any]:
    """A case, and what makes the Talker end its speech where `frame` would stand."""
    speech = pair.ours.speaking()
    for seed in range(20):
        case = one_turn(clip("1", 16000, seed), TEXTS[0])
        codes, end = trace(pair.ours, case)["codes"][:, 0], speech.talker.config.codec_eos_token_id
        if len(codes) > frame and int(codes[frame]) not in codes[:frame]:
            return case, swapped(int(codes[frame]), end, speech.talker.codec_head, pair.theirs.talker.codec_head)
    raise AssertionError("every speech repeats itself")


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize("shape", ["base", "deep"])
def test_an_answer_that_ends_is_spoken_without_its_end(shape: str, place: int, pair: Pairs, note: Note) -> None:
    both = pair(shape)
    case, ending = answer_ending_at(both, place, max_frames=8)
    with ending:
        stages = agreed(both, case, note)
        reply = reply_of(both.ours, case)
    assert len(stages["text_ids"]) == place + 1
    assert int(stages["text_ids"][-1]) == both.ours.config.im_end_token_id
    assert reply.text_ids == stages["text_ids"][:-1].tolist()
    assert torch.equal(reply.codes, stages["codes"])


def test_the_token_that_reaches_the_limit_is_not_spoken(pair: Pairs, note: Note) -> None:
    """Of n tokens the Talker gets n - 1, so the same words come out whatever the last token is."""
    both = pair("base")
    case, ending = answer_ending_at(both, 3, max_text_tokens=4, max_frames=8)
    stages = agreed(both, case, note)
    with ending:
        ended = agreed(both, case, note)
    assert stages["text_ids"][3] != ended["text_ids"][3]
    assert torch.equal(stages["codes"], ended["codes"])
    more = agreed(both, replace(case, max_text_tokens=5), note)
    assert torch.equal(more["text_ids"][:4], stages["text_ids"])
    assert not torch.equal(more["codes"], stages["codes"])


@pytest.mark.parametrize("shape", ["base", "routed"])
def test_no_words_no_sound(shape: str, pair: Pairs, note: Note) -> None:
    both = pair(shape)
    case, ending = answer_ending_at(both, 0)
    with ending:
        stages = agreed(both, case, note)
        reply = reply_of(both.ours, case)
    assert stages["text_ids"].tolist() == [both.ours.config.im_end_token_id]
    assert (reply.text, reply.text_ids, reply.finish) == ("", [], "stop")
    assert reply.codes.shape == (0, both.ours.config.talker.num_code_groups if both.ours.config.talker else 0)
    assert reply.audio.shape == (0,)
    assert reply.audio.dtype == np.float32


def test_a_limit_of_one_token_gives_text_and_no_sound(pair: Pairs, note: Note) -> None:
    both, case = pair("base"), one_turn(max_text_tokens=1)
    stages = agreed(both, case, note)
    reply = reply_of(both.ours, case)
    assert "codes" not in stages
    assert reply.text_ids == stages["text_ids"].tolist()
    assert (len(reply.text_ids), len(reply.audio), reply.finish) == (1, 0, "length")


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_speech_that_ends_early(frame: int, pair: Pairs, note: Note) -> None:
    both = pair("base")
    case, ending = speech_ending_at(both, frame)
    with ending:
        stages = agreed(both, case, note)
        reply = reply_of(both.ours, case)
    assert ("codes" in stages) == (frame > 0)
    assert len(reply.codes) == frame
    assert len(reply.audio) == 1920 * frame
    assert len(reply.text_ids) == 6  # the text goes on


@torch.no_grad()
def test_an_audio_id_that_the_model_says_takes_no_sound(pair: Pairs) -> None:
    """Ids stand for sound where sound was heard; in an answer the same id is a token like any other."""
    model, case = pair("base").ours, one_turn(max_text_tokens=3, max_frames=2)
    heard, said = model.config.audio_token_id, int(trace(model, case)["text_ids"][2])
    record: dict[str, list[Tensor]] = {}
    with swapped(said, heard, model.thinker.lm_head):
        session = model.session(record=record)
        session.append_clip(*clip("1", 16000, 1))
        session.append_text(TEXTS[0])
        first = collect(session.respond(case.options))
        assert first.text_ids[-1] == heard
        session.append_clip(*clip("1", 16000, 2))
        second = collect(session.respond(case.options))
        ids = torch.tensor(session.ids[: len(session.ids) - len(second.text_ids) + 1])
        x = model.thinker.embed(ids)
        user = torch.zeros(len(ids), dtype=torch.bool)
        user[user_positions(model, ids.tolist())] = True
        x[user & (ids == heard)] = torch.cat(record["audio_features"])
        logits = model.thinker.logits(model.thinker(x[None])[0][0, -1])
    assert_close(logits, record["thinker_logits"][3][0])


# --------------------------------------------------------------------------------------- boxes by themselves


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> float:
    assert ours.shape == theirs.shape
    gap = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    assert gap <= tolerance
    return gap


FRAMES = (5, 37, 99, 100, 101, 200, 370, 800, 801, 1650, 2000)  # of mel: 0.05 s to 20 s


@pytest.mark.parametrize("window", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_aut_at_every_window(shape: str, window: int, pair: Pairs) -> None:
    both = pair(shape)
    tower = both.theirs.thinker.model.audio_tower
    whole, released = both.ours.log_mel(torch.from_numpy(sound(20.5))[None]), tower.n_window_infer
    try:
        tower.n_window_infer = 100 * window
        for frames in FRAMES:
            mel = whole[:, 2050 - frames :]
            normal = normalize(mel, mel.amax())[0].T
            theirs = tower(normal, feature_lens=torch.tensor([frames])).last_hidden_state
            ours = both.ours.aut(mel, window=window, peak=mel.amax((1, 2)))[0]
            assert_close(ours, theirs)
            assert len(ours) == 13 * (frames // 100) + -(-(frames % 100) // 8)
    finally:
        tower.n_window_infer = released


def test_windows_differ(pair: Pairs) -> None:
    model = pair("base").ours
    mel = model.log_mel(torch.from_numpy(sound(20.5))[None])
    with torch.no_grad():
        narrow, wide = (model.aut(mel, window=window, peak=mel.amax((1, 2)))[0] for window in (1, 8))
    assert float((narrow - wide).abs().max() / wide.abs().max()) > 1e-3


def random_codes(speech: Speech, frames: int, seed: int = 0) -> Tensor:
    """[1, T, Q]."""
    c = speech.code2wav.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, c.codebook_size, (1, frames, c.num_quantizers), generator=generator)


def frame_by_frame(decoder: Code2Wav, codes: Tensor) -> Tensor:
    state = decoder.init_state(1, codes.device, torch.float32)
    return torch.cat([decoder(frame, state) for frame in codes.split(1, 1)], 1)


@pytest.mark.parametrize("frames", [1, 2, 30, 100])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_code2wav_every_sample(shape: str, frames: int, pair: Pairs) -> None:
    both = pair(shape)
    speech = both.ours.speaking()
    codes = random_codes(speech, frames)
    theirs = causal_waveform(both.theirs, codes.mT)
    assert theirs.shape == (1, frames * speech.code2wav.config.frame_samples)
    assert_close(speech.code2wav(codes), theirs)
    assert_close(frame_by_frame(speech.code2wav, codes), theirs)
    assert float((theirs.abs() >= 1).float().mean()) < 0.01
    assert frames < 30 or 0.1 < float(theirs.square().mean().sqrt()) < 0.4


@pytest.mark.parametrize("shape", ["base", "odd", "deep"])
@torch.no_grad()
def test_code2wav_is_the_published_decoder_moved(shape: str, pair: Pairs) -> None:
    """transformers' own crop loses the first samples of every stage; past the start both say the same.

    The start is as long as the decoder looks back: at these rates up to 14 frames.
    """
    both = pair(shape)
    decoder = both.ours.speaking().code2wav
    rates = decoder.config.upsample_rates
    early = sum(rate * int(np.prod(rates[i + 1 :])) for i, rate in enumerate(rates))
    codes = random_codes(both.ours.speaking(), 40)
    published, ours = both.theirs.code2wav(codes.mT)[:, 0], decoder(codes)
    assert published.shape[1] == ours.shape[1] - early
    assert shape != "base" or early == 555
    start = 16 * decoder.config.frame_samples
    assert_close(ours[:, start + early :], published[:, start:])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_mtp_scores(shape: str, pair: Pairs) -> None:
    """Teacher-forced as training sees them: transformers' scores, and those that generation chooses from."""
    both, frames = pair(shape), 5
    speech = both.ours.speaking()
    mtp, predictor = speech.mtp, both.theirs.talker.code_predictor
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(frames, mtp.config.hidden_size, generator=generator)
    codes = random_codes(speech, frames)[0]
    first = speech.talker.model.codec_embedding(codes[:, 0])
    scores = mtp.logits(hidden, first, codes[:, 1:])
    assert scores.shape == (frames, mtp.codebooks - 1, mtp.config.vocab_size)

    tables = predictor.get_input_embeddings()
    embedded = [tables[i](codes[:, i + 1]) for i in range(mtp.codebooks - 2)]
    for i in range(mtp.codebooks - 1):  # its class scores the last of a whole prefix
        prefix = torch.stack([hidden, first, *embedded[:i]], 1)
        assert_close(scores[:, i], predictor(inputs_embeds=prefix).logits[:, -1])

    chosen_from: list[Tensor] = []

    def choose(logits: Tensor, codebook: int) -> Tensor:
        assert codebook == len(chosen_from) + 1
        chosen_from.append(logits)
        return codes[:, codebook]

    state = mtp.init_state(frames, hidden.device, hidden.dtype)
    for _ in range(2):  # a frame leaves nothing behind
        chosen_from.clear()
        drawn, total = mtp.predict(hidden, first, choose, state)
        assert torch.equal(drawn, codes[:, 1:])
        assert_close(torch.stack(chosen_from, 1), scores)
        assert_close(first + total, speech.frame_embedding(codes))


def user_positions(model: Boxes, ids: list[int]) -> list[int]:
    """Positions of the user turns, from <|im_start|> to the line end."""
    c, places, role = model.config, list[int](), None
    for place, token in enumerate(ids):
        if token == c.im_start_token_id:
            role = ids[place + 1]
        if role == c.user_token_id:
            places.append(place)
    return places


class Watched(torch.nn.Module):
    """Stands in a layer's place and keeps what goes into it."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part, self.fed = part, list[Tensor]()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.fed.append(x)
        return self.part(x, *rest)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_talker_prompt_is_what_a_session_feeds(shape: str, pair: Pairs) -> None:
    """The layout that training sees at once is what a conversation feeds turn by turn and frame by frame."""
    model = pair(shape).ours
    speech, talker = model.speaking(), model.config.talker
    assert talker is not None
    turns = [["Who?", clip("1", 24000, 2)], [ANSWERS[1]], [clip("0.05", 16000, 3), clip("8", 16000, 4), "And who?"]]
    layers = speech.talker.model.layers
    layers[0] = watched = Watched(layers[0])
    try:
        stages = trace(model, Case(turns, "You are kind.", "chelsie", 4, 8))
    finally:
        layers[0] = watched.part
    fed = torch.cat(watched.fed)[None]

    ids, codes = stages["prompt_ids"].tolist(), stages["codes"]
    places = user_positions(model, ids)
    assert len(places) < len(ids) - 10  # without the system's and the assistant's turns
    text, frames = stages["text_ids"].tolist()[:-1], fed.shape[1] - len(places) - 9
    assert frames in (len(codes) - 1, len(codes))  # of all codes where the Talker ended its speech
    newline, speaker = model.tokenizer.encode("\n")[0], talker.speaker_id["chelsie"]
    user = [ids[i] for i in places]
    rows = talker_prompt(model.config, user, newline, speaker, text, frames)
    accept = torch.zeros(len(rows.text), stages["thinker_hidden"].shape[1])
    accept[: len(places)] = stages["thinker_hidden"][places]
    assert model.config.audio_token_id in user
    assert model.config.audio_token_id not in rows.text[len(user) :]
    expected = model.embed_rows(rows, accept)
    expected[:, len(user) + 9 :] += speech.frame_embedding(codes[:frames])
    assert_close(fed, expected)
    assert_close(stages["talker_inputs"][None], expected[:, : len(user) + 9])

    hidden = speech.talker(expected)[0, len(user) + 8 :][: len(codes)]  # at once, as in training
    assert_close(speech.talker.codec_head(hidden), stages["talker_logits"])
    scores = speech.mtp.logits(hidden, speech.talker.model.codec_embedding(codes[:, 0]), codes[:, 1:])
    assert torch.equal(scores.argmax(-1), codes[:, 1:])


def test_talker_prompt_in_numbers(pair: Pairs) -> None:
    """The table of the released prefill, spelled out."""
    c = pair("base").ours.config
    talker = c.talker
    assert talker is not None
    rows = talker_prompt(c, [5, 6], 198, 84, [11, 12, 13], 5)
    opening = [c.im_start_token_id, c.assistant_token_id, 198, *[c.tts_pad_token_id] * 4, c.tts_bos_token_id, 11]
    assert rows.text == [5, 6, *opening, 12, 13, c.tts_eos_token_id, c.tts_pad_token_id, c.tts_pad_token_id]
    control = [talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id, 84]
    assert rows.codec == [-1] * 5 + [*control, talker.codec_pad_id, talker.codec_bos_id] + [-1] * 5
    assert rows == Rows(rows.text[:4], rows.codec[:4]) + Rows(rows.text[4:], rows.codec[4:])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_thinker_scores_a_whole_answer_as_it_gave_it(shape: str, pair: Pairs) -> None:
    model = pair(shape).ours
    stages = trace(model, one_turn())
    ids = torch.cat([stages["prompt_ids"], stages["text_ids"][:-1]])
    assert model.config.audio_token_id not in stages["text_ids"]
    hidden = model.thinker(model.embed_prompt(ids, stages["audio_features"])[None])[0][0]
    assert_close(model.thinker.logits(hidden[len(stages["prompt_ids"]) - 1 :]), stages["thinker_logits"])


# ---------------------------------------------------------------------------------------------- verify


def copied(source: Path, target: Path, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    return target


def perturb(folder: Path, name: str, factor: float) -> None:
    """Every value of one tensor on disk is multiplied by `factor`."""
    for path in folder.glob("*.safetensors"):
        tensors = read_safetensors(path)
        if name in tensors:
            tensors[name] *= factor
            write_safetensors(path, tensors)
            return
    raise AssertionError(f"there is no {name}")


QUICK = one_turn()


@pytest.fixture(scope="module")
def golden(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """A golden file of the base shape in each type, written by a comparison that agreed."""
    folder = tmp_path_factory.mktemp("golden")

    @cache
    def written(dtype: torch.dtype) -> Path:
        path = folder / f"{dtype}.safetensors"
        rows, ours, used = verify(checkpoint("base"), QUICK, dtype=dtype, write_golden=path)
        assert used == dtype
        assert [row.stage for row in rows] == list(COMPARED) == list(ours)
        assert all(row.agrees for row in rows), table(rows)
        return path

    return written


Golden = Callable[[torch.dtype], Path]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", SHAPES)
def test_verify_agrees(shape: str, dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    rows, ours, used = verify(checkpoint(shape), None if dtype == torch.bfloat16 else QUICK, dtype=dtype)
    assert used == dtype
    assert all(row.agrees for row in rows), table(rows)
    assert set(ours) == set(COMPARED)
    assert len(ours["codes"].unique(dim=0)) > 1
    if dtype == torch.float32:
        assert not any(row.parted for row in rows), table(rows)
    else:  # it was computed in bfloat16
        assert {row.stage for row in rows if row.difference > 1e-4} >= {"thinker_logits", "mtp_logits", "waveform"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_verify_agrees_in_other_types(dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    rows, _, used = verify(checkpoint("base"), QUICK, dtype=dtype)
    assert used == dtype
    assert all(row.agrees for row in rows), table(rows)


def test_verify_with_a_golden_file(golden: Golden, checkpoint: Checkpoints) -> None:
    assert set(read_safetensors(golden(torch.float32))) == set(COMPARED)
    rows, _, used = verify(checkpoint("base"), QUICK, golden=golden(torch.float32))
    assert used == torch.float32
    assert all(row.agrees for row in rows), table(rows)


@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_coarser_of_two_types_sets_the_tolerance(
    ours: torch.dtype, theirs: torch.dtype, golden: Golden, checkpoint: Checkpoints
) -> None:
    rows, _, used = verify(checkpoint("base"), QUICK, dtype=ours, golden=golden(theirs))
    assert used == torch.bfloat16
    assert all(row.agrees for row in rows), table(rows)
    assert max(row.difference for row in rows) > 1e-4
    assert {row.tolerance for row in rows if row.stage not in ("mel", "prompt_ids")} == {0.1, 0.4}  # floats, choices


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("thinker.audio_tower.conv2d2.weight", "audio_features"),
        ("thinker.audio_tower.proj2.bias", "audio_features"),
        ("thinker.model.layers.0.mlp.gate.weight", "thinker_hidden"),
        ("thinker.model.layers.1.self_attn.k_norm.weight", "thinker_hidden"),
        ("thinker.model.layers.2.post_attention_layernorm.weight", "thinker_logits"),  # past the accept layer, 2
        ("thinker.lm_head.weight", "thinker_logits"),
        ("talker.text_projection.linear_fc1.bias", "talker_inputs"),
        ("talker.hidden_projection.linear_fc2.weight", "talker_inputs"),
        ("talker.model.layers.1.mlp.shared_expert_gate.weight", "talker_logits"),
        ("talker.codec_head.weight", "talker_logits"),
        ("talker.code_predictor.model.layers.1.mlp.up_proj.weight", "mtp_logits"),
        ("talker.code_predictor.lm_head.2.weight", "mtp_logits"),
        ("code2wav.decoder.1.block.0.alpha", "waveform"),
        ("code2wav.pre_transformer.layers.1.self_attn_layer_scale.scale", "waveform"),
    ],
)
def test_verify_names_the_first_stage_that_differs(
    tensor: str, stage: str, golden: Golden, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoint("base"), tmp_path / "perturbed")
    perturb(folder, tensor, 1.01)
    rows, _, _ = verify(folder, QUICK, golden=golden(torch.float32))
    assert next(row.stage for row in rows if not row.agrees) == stage, table(rows)


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("thinker.audio_tower.proj2.bias", "audio_features"),
        ("thinker.model.layers.1.self_attn.v_proj.weight", "thinker_hidden"),
        ("thinker.model.layers.0.mlp.experts.2.down_proj.weight", "thinker_hidden"),  # one expert of four
        ("thinker.lm_head.weight", "thinker_logits"),
        ("talker.hidden_projection.linear_fc2.weight", "talker_inputs"),
        ("talker.codec_head.weight", "talker_logits"),
        ("talker.code_predictor.model.layers.1.mlp.up_proj.weight", "mtp_logits"),
        ("talker.code_predictor.lm_head.2.weight", "mtp_logits"),  # which chooses the same codes
        ("code2wav.pre_transformer.layers.1.self_attn_layer_scale.scale", "waveform"),
    ],
)
def test_a_wrong_weight_is_found_in_bfloat16(
    tensor: str, stage: str, golden: Golden, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    folder = copied(checkpoint("base"), tmp_path / "perturbed")
    perturb(folder, tensor, 1.5)
    rows, _, _ = verify(folder, QUICK, dtype=torch.bfloat16, golden=golden(torch.bfloat16))
    assert next(row.stage for row in rows if not row.agrees) == stage, table(rows)


def late_text(config: Any, rest: Iterator[int]) -> Iterator[int]:
    """Text that reaches the Talker one frame late."""
    yield config.tts_pad_token_id
    yield from trailing_text(config, rest)


def shifted(self: Thinker, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
    """The Thinker, with every position from the tenth on one too far."""
    positions = torch.arange(state.filled, state.filled + x.shape[1])[None]
    return self.model(x, state, positions + (positions >= 10), self.accept_layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("place", "wrong", "stage"),
    [
        ("antiphon.thinker.Thinker.forward", shifted, "thinker_hidden"),
        ("antiphon.generate.trailing_text", late_text, "talker_logits"),
    ],
)
def test_a_shifted_position_is_found(
    place: str, wrong: Any, stage: str, dtype: torch.dtype, golden: Golden, checkpoint: Checkpoints, monkeypatch: Any
) -> None:
    reference = golden(dtype)
    monkeypatch.setattr(place, wrong)
    rows, _, _ = verify(checkpoint("base"), QUICK, dtype=dtype, golden=reference)
    assert next(row.stage for row in rows if not row.agrees) == stage, table(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_choice_is_found_though_its_consequences_are_not_followed(
    dtype: torch.dtype, golden: Golden, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Scores of a head turned round choose the worst codes; everything else is computed along the right ones."""
    folder = copied(checkpoint("base"), tmp_path / "wrong")
    perturb(folder, "talker.code_predictor.lm_head.2.weight", -1)
    rows, _, _ = verify(folder, QUICK, dtype=dtype, golden=golden(dtype))
    assert {row.stage for row in rows if not row.agrees} == {"mtp_logits", "codes"}
    codes = next(row for row in rows if row.stage == "codes")
    assert codes.choices == QUICK.max_frames * 4
    assert QUICK.max_frames <= codes.parted < 2 * QUICK.max_frames  # in bfloat16 a tie may be among the others
    assert codes.difference > 0.5


def test_a_wrong_route_is_found(golden: Golden, checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoint("base"), tmp_path / "wrong")
    perturb(folder, "thinker.model.layers.2.mlp.gate.weight", -1)  # past the accept layer
    rows, _, _ = verify(folder, QUICK, dtype=torch.bfloat16, golden=golden(torch.bfloat16))
    experts = next(row for row in rows if row.stage == "thinker_experts")
    assert not experts.agrees
    assert experts.parted > experts.choices / 6  # of three layers
    assert next(row for row in rows if row.stage == "thinker_hidden").agrees


def test_speech_that_does_not_end_where_it_should_is_found(golden: Golden, pair: Pairs, tmp_path: Path) -> None:
    """The reference ends its speech; ours would have gone on, is stopped there, and is told so."""
    both = pair("base")
    case, ending = speech_ending_at(both, 3)
    with ending:
        theirs = reference_stages(both.theirs, case, spelled(case, both.ours.config, both.ours.tokenizer))
    assert len(theirs["codes"]) == 3
    follower = Follower(theirs, both.ours.speaking().talker.config.codec_eos_token_id)
    ours = trace(both.ours, case, follower)
    rows = compare(ours, theirs, torch.float32, follower.choices)
    codes = next(row for row in rows if row.stage == "codes")
    assert not codes.agrees
    assert (codes.parted, codes.choices) == (1, 3 * 4 + 1)
    assert codes.shape == (3, 4)


def test_what_is_missing_or_of_another_length_disagrees() -> None:
    a, b = {"mel": torch.ones(3, 4), "codes": torch.ones(2, 4).long()}, {"mel": torch.ones(3, 5)}
    rows = compare(a, b, torch.float32)
    assert [(row.stage, row.note) for row in rows] == [
        ("mel", "reference has [3, 5]"),
        ("codes", "missing in the reference"),
    ]
    assert not any(row.agrees for row in rows)
    assert compare({}, b, torch.float32)[0].note == "missing in antiphon"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0), (1.0001, 1.0), (0.0, 1.0), (1.0, 0.0)],
)
def test_what_differs_or_is_no_number_disagrees(ours: float, theirs: float) -> None:
    a, b = {"mel": torch.tensor([0.5, ours])}, {"mel": torch.tensor([0.5, theirs])}
    assert not compare(a, b, torch.float32)[0].agrees
    assert compare(b, b, torch.float32)[0].agrees == (theirs == theirs)


def test_a_typical_difference_is_one_of_positions_in_their_own_size() -> None:
    """Where one position is a thousand times as large, the largest difference sees nothing else."""
    b = torch.ones(4, 8).double()
    b[0] *= 1000
    a = b.clone()
    a[2:] = 0  # two of four positions are wrong
    assert largest(a, b) == pytest.approx(1e-3)
    assert typical(a, b) == pytest.approx(0.5**0.5)
    assert typical(b, b) == largest(b, b) == typical(b[:0], b[:0]) == 0
    assert typical(1.01 * b, b) == pytest.approx(0.01)
    assert typical(a, a) == 0  # positions without any size
    assert typical(b, a) > 0.5
    assert typical(b.flatten() + 1, b.flatten()) == pytest.approx(32**0.5 / float(b.norm()))


def test_choices_keep_the_largest_lead() -> None:
    choices = Choices()
    choices.add(torch.tensor([True, False, True]), torch.tensor([0.1, 9.0, 0.3]))
    choices.add(torch.tensor([True]), torch.tensor([0.2]))
    assert (choices.made, choices.parted, choices.gap) == (4, 3, pytest.approx(0.3))
    choices.add(torch.tensor([True]), torch.tensor([float("nan")]))
    choices.add(torch.tensor([True]), torch.tensor([0.2]))
    assert np.isnan(choices.gap)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (replace(QUICK, max_frames=4), "max_frames: 6, and now it is 4"),
        (replace(QUICK, voice="aiden"), "voice: 'ethan'"),
        (one_turn(clip("1", 16000, 2), TEXTS[0]), "turns"),
        (one_turn(clip("1", 16000, 1), TEXTS[1]), TEXTS[1]),
        (replace(QUICK, repetition_penalty=1.0), "repetition_penalty"),
    ],
)
def test_a_golden_file_is_for_one_question(case: Case, words: str, golden: Golden, checkpoint: Checkpoints) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        verify(checkpoint("base"), case, golden=golden(torch.float32))


def test_a_golden_file_is_for_one_checkpoint(golden: Golden, checkpoint: Checkpoints) -> None:
    with pytest.raises(InputError, match="those of another checkpoint"):
        verify(checkpoint("deep"), QUICK, golden=golden(torch.float32))


def test_verify_refuses_another_file_as_golden(checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"other\.safetensors is not a golden file"):
        verify(checkpoint("base"), QUICK, golden=path)
    write_safetensors(path, {"mel": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"other\.safetensors holds no case"):
        verify(checkpoint("base"), QUICK, golden=path)


def test_verify_refuses_what_is_wrong_before_a_model_is_loaded(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("antiphon.evaluate.parity.load_reference", never)
    monkeypatch.setattr("antiphon.evaluate.parity.load", never)
    base, short = checkpoint("base"), (sound(1.0)[:100], 16000)
    with pytest.raises(AudioError, match=r"12\.5 ms"):
        verify(base, one_turn(short, "What?"))
    with pytest.raises(InputError, match="aiden, chelsie, ethan"):
        verify(base, replace(QUICK, voice="nobody"))
    with pytest.raises(InputError, match="Unicode"):
        verify(base, one_turn("half \ud800 a pair"))
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        verify(tmp_path)
    folder = copied(base, tmp_path / "cut")
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="cut short"):
        verify(folder)


def test_verify_without_tokenizer_files(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoint("mixed"), tmp_path / "bare", ("tokenizer*",))
    model = load(folder)
    assert ensure_tokenizer(model)
    assert not ensure_tokenizer(model)
    assert model.tokenizer.decode(model.tokenizer.encode("Ça va? 🙂")) == "Ça va? 🙂"
    rows, ours, _ = verify(folder, QUICK)
    assert all(row.agrees for row in rows), table(rows)
    assert set(ours) == set(COMPARED)


def test_a_reference_is_left_as_it_was(pair: Pairs) -> None:
    both = pair("mixed")
    names = [module for module in both.theirs.modules() if hasattr(module, "left_pad")]
    before = [module.left_pad for module in names], both.theirs.thinker.model.audio_tower.n_window_infer
    agreed(both, one_turn(window=8), lambda rows: None)
    after = [module.left_pad for module in names], both.theirs.thinker.model.audio_tower.n_window_infer
    assert before == after
    assert any(before[0])
    for owner in (both.theirs.thinker, both.theirs.talker):
        assert "generate" not in vars(owner)


def test_a_shape_is_reproducible(checkpoint: Checkpoints, tmp_path: Path) -> None:
    again = write_shape("deep", tmp_path)
    for path in checkpoint("deep").glob("*.safetensors"):
        first, second = read_safetensors(path), read_safetensors(again / path.name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
