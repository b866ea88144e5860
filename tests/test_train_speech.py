"""What training lays out and scores is what inference lays out and scores."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

import antiphon.generate
from antiphon.audio import from_pcm16, pcm16, read_audio, write_audio
from antiphon.chat import TurnWriter
from antiphon.codec import Codec
from antiphon.config_json import parse_codec_config
from antiphon.errors import ConfigError, InputError
from antiphon.files import write_safetensors
from antiphon.generate import Session, collect
from antiphon.sampling import THINKER_CODEBOOK
from antiphon.speaker import load_speaker
from antiphon.train.codes import key_of
from antiphon.train.data import Example, load_samples, read_cuts
from antiphon.train.dialog import load_phrases
from antiphon.train.export import export
from antiphon.train.following import first_rows, places, text_of
from antiphon.train.loop import BEST, train
from antiphon.train.losses import likeness
from antiphon.train.recipe import Recipe, read_fields
from antiphon.train.stages.aut import IGNORED
from antiphon.train.stages.codec import CODEC_SIZES
from antiphon.train.stages.common import Setting
from antiphon.train.stages.speech import SpeechStage, spoken_in
from antiphon.train.stages.thinker import ThinkerStage, collate_talks, read_talk, spelling_losses
from antiphon.train.stages.turn import TurnStage
from antiphon.train.talks import QUESTIONS, lay_out, with_blanks
from tests.models import CPU, IDS, VOCAB, config_json, omni, script
from tests.models import sound as exact_sound
from tests.test_train_codec import CODEC, FRAME, RATE
from tests.tiny_tokenizer import write_tokenizer

SPEAKER = {"channels": 16, "scale": 4, "attention": 8, "num_mel_bins": 16}
SAYINGS = ["one two three", "hello there", "the rain is loud", "what is it"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "audio", "supervision": 0}, {"type": "text", "text": "What was that?"}]},
    {"role": "assistant", "content": "one two three", "supervision": 1, "voice": "ethan"},
    {"role": "user", "content": [{"type": "audio", "supervision": 2}]},
    {"role": "assistant", "content": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
    {"role": "tool", "content": '{"ok": true}'},
    {"role": "assistant", "content": "hello there", "supervision": 3, "voice": "ethan"},
]
MODEL = omni(seed=41)


def sound(seconds: float, rate: int, seed: int) -> np.ndarray:
    """As a file of 16 bits holds it."""
    return from_pcm16(pcm16(exact_sound(seconds, rate, seed)))


def cut(folder: Path, name: str, seconds: list[float], texts: list[str], custom: dict | None, speaker: str) -> MonoCut:
    parts = [sound(s, RATE, seed=i) for i, s in enumerate(seconds)]
    write_audio(folder / f"{name}.wav", np.concatenate(parts), RATE)
    recording = Recording.from_file(folder / f"{name}.wav", recording_id=name)
    starts = np.cumsum([0, *seconds])
    said = [
        SupervisionSegment(f"{name}-{i}", name, float(starts[i]), s, text=t, language="en", speaker=speaker)
        for i, (s, t) in enumerate(zip(seconds, texts, strict=True))
    ]
    return MonoCut(name, 0, recording.duration, 0, said, recording=recording, custom=custom)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of cuts and of the runs that come before speech: a tokenizer, a Thinker, a codec."""
    cuts, runs = tmp_path_factory.mktemp("cuts"), tmp_path_factory.mktemp("runs")
    talk = cut(cuts, "talk", [1.2, 0.72, 0.8, 0.64], SAYINGS, {"messages": MESSAGES}, "ethan")
    CutSet.from_cuts([talk]).to_jsonl(cuts / "talk.jsonl.gz")
    alone = [cut(cuts, f"say{i}", [0.6 + i / 10], [t], None, "chelsie") for i, t in enumerate(SAYINGS)]
    CutSet.from_cuts(alone).to_jsonl(cuts / "say.jsonl.gz")
    for name in ("tokenizer", "thinker", "codec"):
        (runs / name).mkdir()
    write_tokenizer(runs / "tokenizer", vocab_size=VOCAB)
    speakers = {"talker_config.speaker_id": {"chelsie": 68, "ethan": 69}}
    (runs / "tokenizer/config.json").write_text(json.dumps(config_json(IDS, speakers)))
    (runs / "tokenizer" / CODEC_SIZES).write_text(json.dumps(CODEC))
    best = {f"thinker.{n}": t for n, t in MODEL.thinker.state_dict().items()}
    best |= {f"aut.{n}": t for n, t in MODEL.aut.state_dict().items()}
    write_safetensors(runs / "thinker" / BEST, best, {"run": "a"})
    torch.manual_seed(3)
    codec = Codec(parse_codec_config(CODEC))
    for name, tensor in codec.named_buffers():
        if name.endswith("embed_sum"):
            tensor.normal_()
    write_safetensors(runs / "codec" / BEST, {f"codec.{n}": t for n, t in codec.state_dict().items()}, {"run": "b"})
    return cuts, runs


def setting(place: tuple[Path, Path], stage: str, init: dict[str, str], sources: list[dict], **options: Any) -> Setting:
    plan = {"steps": 4, "lr": 1e-3, "warmup": 1, "dtype": "float32"}
    data = {"mix": sources, "validation": sources[:1], "batch_seconds": 8.0}
    table = {"name": stage, "stage": stage, "data": data, "optimization": plan, "init": init, "options": options}
    return Setting(read_fields(Recipe, table, stage), *place, CPU)


@pytest.fixture(scope="module")
def stage(place) -> SpeechStage:
    sources = [{"cuts": "talk.jsonl.gz", "task": "talk"}, {"cuts": "say.jsonl.gz", "task": "say"}]
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec"}
    stage = SpeechStage(setting(place, "speech", init, sources, speaker=SPEAKER))
    speech = MODEL.speaking()
    stage.boxes.speaking().talker.load_state_dict(speech.talker.state_dict())
    stage.boxes.speaking().mtp.load_state_dict(speech.mtp.state_dict())
    stage.modules.eval()
    return stage


def examples(stage: SpeechStage, task: str) -> list:
    return [e for row in stage.mix.cells for cell in row for e in cell if e.task == task]


def test_a_conversation_has_the_ids_of_a_session(stage):
    """Training reads what a session would have read by the end of the conversation."""
    (example,) = examples(stage, "talk")
    talk = read_talk(example, MODEL.tokenizer, MODEL.config)
    session = Session(MODEL, "Be brief.")
    samples = [sound(s, RATE, seed=i) for i, s in enumerate([1.2, 0.72, 0.8, 0.64])]
    for message in MESSAGES[1:]:
        content: Any = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "audio", "audio": (samples[p["supervision"]], RATE)} if p["type"] == "audio" else p
                for p in content
            ]
        session.append_message({"role": message["role"], "content": content})
    session.commit()
    assert talk.ids == session.ids
    said = MODEL.tokenizer.decode(i for i, mine in zip(talk.ids, talk.said, strict=True) if mine)
    assert said == "".join(str(m["content"]) for m in MESSAGES if m["role"] == "assistant")
    assert [r.supervision for r in talk.replies] == [1, 3]
    assert len(talk.before(talk.replies[0].start).clips) == 1
    assert len(talk.clips) == 2


def test_tasks_ask_and_answer(stage):
    example = examples(stage, "say")[0]
    for task, answer in (("transcribe", example.text), ("language", "English"), ("describe", example.text)):
        talk = lay_out(
            type(example)(example.cut, task), MODEL.tokenizer, lambda clip: clip[:, None], lambda frames: 3, 16000
        )
        end = MODEL.config.im_end_token_id
        said = [i for i, mine in zip(talk.ids, talk.said, strict=True) if mine]
        assert said == [*MODEL.tokenizer.encode(answer), end]
        assert talk.ids.count(MODEL.config.audio_token_id) == 3
        assert talk.ids[:2] == TurnWriter(MODEL.tokenizer).open("user")


def test_music_and_sounds_are_asked_about_in_writing(stage):
    """What is asked goes with the clip's name, half of it in English; what is right is what its labels say."""
    labels = {"instrument": "flute", "mode": "minor", "notes": 5, "direction": "up", "tempo": 141}
    answers = {"instrument": "a flute", "mode": "minor", "notes": "five", "direction": "up", "tempo": "one four one"}
    heard, languages = MonoCut("m", 0, 1.0, 0), set[bool]()
    for i in range(40):
        said = SupervisionSegment("m-0", "m", 0, 1.0, text="flute, minor", custom=labels)
        heard = replace(heard, id=f"music-{i}", supervisions=[said])
        for kind, wanted in answers.items():
            question, answer = QUESTIONS[kind](Example(heard, kind))
            assert QUESTIONS[kind](Example(heard, kind)) == (question, answer)
            english = question in load_phrases("en").questions.values()
            languages.add(english)
            assert not english or wanted in answer, (kind, answer)
    assert languages == {True, False}
    with pytest.raises(InputError, match="does not say its sound"):
        QUESTIONS["sound"](Example(heard, "sound"))


def test_equal_tokens_have_a_blank_between_them_and_silence_has_none_but_blanks():
    for name in map(str, range(40)):
        spaced = with_blanks([5, 5, 7, 7, 7], 0, name)
        assert [i for i, before in zip(spaced, [0, *spaced], strict=False) if i not in (before, 0)] == [5, 5, 7, 7, 7]
        assert spaced == with_blanks([5, 5, 7, 7, 7], 0, name)
        assert not any(with_blanks([], 0, name))


def test_what_is_heard_perfectly_is_the_text_with_blanks(stage):
    """The task "heard" needs no sound, and differs from a real conversation in the places of its clips only."""
    (example,) = examples(stage, "talk")
    real = read_talk(example, MODEL.tokenizer, MODEL.config)
    heard = read_talk(replace(example, task="heard"), MODEL.tokenizer, MODEL.config)
    blank, start, end = (
        MODEL.config.audio_token_id,
        MODEL.config.audio_start_token_id,
        MODEL.tokenizer.audio_end_token_id,
    )
    assert not heard.clips
    assert not any(heard.sound)
    assert heard == read_talk(replace(example, task="heard"), MODEL.tokenizer, MODEL.config)

    def clips(ids: list[int]) -> list[list[int]]:
        ends = [i for i, token in enumerate(ids) if token == end]
        return [ids[ids.index(start, before) + 1 : stop] for before, stop in zip([0, *ends], ends, strict=False)]

    read = [
        [i for i, before in zip(c, [blank, *c], strict=False) if i not in (before, blank)] for c in clips(heard.ids)
    ]
    assert read == real.texts
    assert MODEL.tokenizer.decode(real.texts[0]) == SAYINGS[0]
    assert blank in clips(heard.ids)[0]
    assert all(set(clip) == {blank} for clip in clips(real.ids))
    assert [i for i, mine in zip(heard.ids, heard.said, strict=True) if mine] == [
        i for i, mine in zip(real.ids, real.said, strict=True) if mine
    ]


def test_rows_that_read_like_the_text_spell_it(stage):
    """Rows that are embeddings of the text and of the blank cost next to nothing; of another text, much."""
    (example,) = examples(stage, "talk")
    talk = read_talk(example, MODEL.tokenizer, MODEL.config)
    batch = collate_talks([talk], 8)
    assert batch.lengths.tolist() == [len(MODEL.tokenizer.encode(SAYINGS[i])) for i in (0, 2)]
    blank, thinker = MODEL.config.audio_token_id, deepcopy(MODEL.thinker)
    torch.nn.init.normal_(thinker.model.embed_tokens.weight, std=3.0)
    rows = int(max(MODEL.config.audio.tokens(int(n)) for n in batch.frames))
    costs = []
    for texts in (talk.texts, talk.texts[::-1]):
        ids = torch.full((2, rows), blank)
        for line, text in zip(ids, texts, strict=True):
            doubled = zip(text, [None, *text], strict=False)  # of the same token twice, a blank makes two
            spelled = [i for token, before in doubled for i in ([blank, token] if token == before else [token])]
            line[: len(spelled)] = torch.tensor(spelled)
        embedded = thinker.embed(ids)
        for own in (embedded, 5 * embedded):  # longer ones spell as well, and are not what the Thinker knows
            costs.append([float(x) for x in spelling_losses(thinker, MODEL.aut, own, batch, blank)])
    (right, apart), (loud, far), (wrong, _), _ = costs
    assert right < 0.01
    assert apart < 0.01
    assert loud < 0.01
    assert far > 4
    assert wrong > 1


@pytest.mark.parametrize("task", ["talk", "say"])
def test_the_loss_is_the_likelihood_that_generation_assigns(stage, task, monkeypatch):
    """Codes forced frame by frame through the readable loop score what teacher forcing scores."""
    example = examples(stage, task)[0]
    (answer,) = stage.answers([example], 0)
    batch = stage.lay_out([answer], 0)
    with torch.no_grad():
        voice = stage.voices(batch)[0]
        loss = stage.loss("speech", batch, 0)
    model = omni(seed=41)
    row = model.speaker("ethan")
    kept = model.speaking().talker.model.codec_embedding.weight.data[row].clone()
    scores: dict[tuple[int, int], float] = {}
    eos = model.speaking().talker.config.codec_eos_token_id
    draw = antiphon.generate.choose

    def forced(logits: torch.Tensor, sampling: Any, key: Any, *rest: Any) -> torch.Tensor:
        if key.codebook == THINKER_CODEBOOK:
            return draw(logits, sampling, key, *rest)
        wanted = eos if key.frame == len(answer.codes) else int(answer.codes[key.frame, key.codebook])
        scores[key.frame, key.codebook] = float(logits[0].double().log_softmax(-1)[wanted])
        return torch.tensor([wanted])

    monkeypatch.setattr(antiphon.generate, "choose", forced)
    try:
        model.speaking().talker.model.codec_embedding.weight.data[row] = voice
        session = Session(model, "Be brief." if task == "talk" else None)
        if answer.talk is None:
            events = session.speak([example.text], voice="ethan", verbatim=True)
        else:
            _ask(session, answer.talk)
            script(monkeypatch, model, answer.text)
            events = session.respond(voice="ethan", verbatim=True)
        frames = [e for e in events if type(e).__name__ == "AudioDelta"]
    finally:
        model.speaking().talker.model.codec_embedding.weight.data[row] = kept
    assert len(frames) == len(answer.codes) > 5
    first = [-s for (_, codebook), s in scores.items() if codebook == 0]
    rest = [-s for (_, codebook), s in scores.items() if codebook > 0]
    assert len(first) == len(answer.codes) + 1
    assert float(loss.figures["code0"]) == pytest.approx(np.mean(first), rel=1e-5)
    assert float(loss.figures["residual"]) == pytest.approx(np.mean(rest), rel=1e-5)
    assert float(loss.total) == pytest.approx(np.mean(first) + np.mean(rest), rel=1e-5)


def _ask(session: Session, talk: Any) -> None:
    """The conversation before an answer, as the session's own messages."""
    samples = [sound(s, RATE, seed=i) for i, s in enumerate([1.2, 0.72, 0.8, 0.64])]
    last = 2 if len(talk.clips) == 1 else 6
    for message in MESSAGES[1:last]:
        content: Any = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "audio", "audio": (samples[p["supervision"]], RATE)} if p["type"] == "audio" else p
                for p in content
            ]
        session.append_message({"role": message["role"], "content": content})


def test_the_talker_learns_which_token_it_said_last(place, tmp_path):
    """It is read off the Talker's states better after a few steps; answers that are not looked up change nothing."""
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec"}
    sources = [{"cuts": "talk.jsonl.gz", "task": "talk"}, {"cuts": "say.jsonl.gz", "task": "say"}]
    s = setting(place, "followed", init, sources, speaker=SPEAKER, follow=1)
    s = replace(s, recipe=replace(s.recipe, optimization=replace(s.recipe.optimization, steps=40, lr=1e-2)))
    stage = SpeechStage(s)
    batch = stage.batch(0)
    assert (batch.said >= 0).all()
    assert len(batch.said) == len(batch.codes) == batch.counts.sum()
    before = stage.loss("speech", batch, 0)
    assert before.total.item() == pytest.approx(sum(before.figures[n].item() for n in ("loss", "following")), rel=1e-5)
    train(stage, s.recipe, tmp_path, quiet=True)
    assert stage.loss("speech", batch, 0).figures["following"] < 0.85 * before.figures["following"]
    unknown = replace(batch, said=torch.full_like(batch.said, IGNORED))
    assert stage.loss("speech", unknown, 0).figures["following"] == 0


def test_what_is_listened_through_is_held_as_short_as_the_recipe_says(place, tmp_path):
    """In bfloat16, and only the embeddings where nothing is heard; it comes to nearly the same, and it speaks."""
    code2wav = {f"code2wav.{n}": t for n, t in MODEL.speaking().code2wav.state_dict().items()}
    (place[1] / "voice").mkdir()
    write_safetensors(place[1] / "voice" / BEST, code2wav, {"run": "c"})
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec", "code2wav": "voice"}
    say, talk = {"cuts": "say.jsonl.gz", "task": "say"}, {"cuts": "talk.jsonl.gz", "task": "talk"}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        for name, sources in (("alone", [say]), ("heard", [talk, say])):
            s = setting(place, name, init, sources, speaker=SPEAKER, follow=0.3)
            s = replace(s, recipe=replace(s.recipe, optimization=replace(s.recipe.optimization, dtype=dtype)))
            stage = SpeechStage(s)
            thinker = stage.boxes.thinker
            assert {p.dtype for box in (thinker, stage.boxes.aut) for p in box.parameters()} == {getattr(torch, dtype)}
            assert {p.dtype for p in stage.modules.parameters()} == {torch.float32}
            assert torch.equal(
                thinker.model.embed_tokens.weight, MODEL.thinker.model.embed_tokens.weight.to(getattr(torch, dtype))
            )
            assert bool(thinker.model.layers) == (name == "heard")
            losses[name, dtype] = stage.validate()["loss"]
            if dtype == "float32":
                continue
            train(stage, s.recipe, tmp_path / name / dtype, quiet=True)
            stage.modules.eval()
            with torch.inference_mode():
                stage.sample(tmp_path / name / dtype / "samples", Mock())
            assert float(np.abs(read_audio(tmp_path / name / dtype / "samples" / "0-said.wav")[0]).max()) > 0.01
    for name in ("alone", "heard"):
        assert losses[name, "bfloat16"] == pytest.approx(losses[name, "float32"], rel=0.02)


def test_frames_are_fed_back_as_the_talker_draws_them(place):
    """Some frames, another share of them in each answer, have codes drawn from scores; the others stay as recorded."""
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec"}
    stage = SpeechStage(
        setting(place, "drawn", init, [{"cuts": "say.jsonl.gz", "task": "say"}], speaker=SPEAKER, drawn=0.5)
    )
    speech = stage.boxes.speaking()
    codes = torch.zeros(4000, speech.mtp.codebooks, dtype=torch.long)
    before, counts = torch.randn(len(codes), stage.talker_config.text.hidden_size), torch.tensor([len(codes)])
    shares = []
    for seed in range(8):
        made, again = (stage.drawn(codes, before, counts, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert torch.equal(made, again)
        moved = (made != codes).any(1)
        shares.append(float(moved.float().mean()))
        seen = torch.bincount(made[moved, 0], minlength=speech.mtp.config.vocab_size) / len(codes)
        chances = speech.talker.codec_head(before)[:, : len(seen)].softmax(-1).mean(0) * shares[-1]
        assert (seen - chances)[1:].abs().max() < 0.03
    assert min(shares) < 0.3
    assert max(shares) > 0.7
    batch = stage.batch(0)
    stage.modules.train()
    fed = stage.scores(batch)
    stage.modules.eval()
    recorded = stage.scores(batch)
    assert torch.equal(fed[1], recorded[1])  # what is wanted is what was recorded
    assert not torch.equal(fed[0], recorded[0])


def test_frames_that_are_not_fed_back_tell_nothing(place):
    """In training, with a share of 1, no score depends on the codes before it; elsewhere all are fed."""
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec"}
    stage = SpeechStage(
        setting(place, "deaf", init, [{"cuts": "say.jsonl.gz", "task": "say"}], speaker=SPEAKER, deaf=1)
    )
    batch = stage.batch(0)
    other = replace(batch, codes=(batch.codes + 1) % 8)
    with torch.no_grad():
        for training in (True, False):
            stage.modules.train(training)
            assert torch.equal(stage.scores(batch)[0], stage.scores(other)[0]) == training


def test_places_are_where_an_encoder_reads_the_tokens(stage):
    """Rows that read like the text, two for each token and a blank between, say each token when they come to it."""
    blank = MODEL.config.audio_token_id
    ids = MODEL.tokenizer.encode("to the tree")
    ids += ids[-1:]  # once more: only a blank parts it from the one before
    rows = [i for token in ids for i in (blank, token, token)]
    table = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(1))
    scores = likeness(table[rows], table[[blank, *ids]])
    other = ids[::2]  # beside a shorter one, of which the rest is padding
    scores = torch.stack(
        [
            scores,
            F.pad(
                likeness(table[other], table[[blank, *other]]), (0, len(ids) - len(other), 0, len(rows) - len(other))
            ),
        ]
    )
    texts = torch.stack([torch.tensor(ids), F.pad(torch.tensor(other), (0, len(ids) - len(other)))])
    sizes = torch.tensor([len(ids), len(other)])
    first, second = first_rows(scores, texts, torch.tensor([len(rows), len(other)]), sizes).tolist()
    assert first == [3 * i + 1 for i in range(len(ids))]
    assert second[: len(other)] == list(range(len(other)))
    few = len(ids) - 2
    evenly = first_rows(scores[:1, :few], texts[:1], torch.tensor([few]), sizes[:1])
    assert evenly[0].tolist() == [i * few // len(ids) for i in range(len(ids))]
    (example,) = examples(stage, "talk")
    spoken = spoken_in(example)
    assert [text_of(one) for one in spoken] == ["one two three", "hello there"]
    codec = stage.codec.config
    found = places(
        MODEL.aut, MODEL.thinker, MODEL.tokenizer, stage.codes, codec, spoken, stage.setting.runs, quiet=True
    )
    for one in spoken:
        place, text = found[key_of(one)], MODEL.tokenizer.encode(text_of(one))
        assert len(place) == len(stage.codes[key_of(one)])
        assert place.diff().min() >= 0
        assert 0 <= place[0] <= place[-1] <= len(text)


def test_codes_fill_the_frames(stage):
    for task in ("talk", "say"):
        for example in examples(stage, task):
            for one in spoken_in(example):
                codes = stage.codes[key_of(one)]
                assert len(codes) == -(-round(example.cut.supervisions[one[1]].duration * RATE) // FRAME)


def test_the_encoder_learns_to_spell_while_the_thinker_lends_its_embeddings(place, tmp_path):
    """With `answer` 0 nothing is asked of the Thinker, and the same clips are spelled better after a few steps."""
    heard = [{"cuts": "talk.jsonl.gz", "task": "talk"}, {"cuts": "say.jsonl.gz", "task": "transcribe"}]
    s = setting(place, "encoder", {"thinker": "thinker", "aut": "thinker"}, heard, answer=0, spell=1)
    plan = replace(s.recipe.optimization, steps=60, lr=1e-2)
    s = replace(s, recipe=replace(s.recipe, freeze=("thinker",), optimization=plan))
    stage = ThinkerStage(s)
    before = stage.loss("thinker", stage.batch(0), 0).total.item()
    kept = {name: tensor.clone() for name, tensor in stage.thinker.state_dict().items()}
    train(stage, s.recipe, tmp_path, quiet=True)
    assert stage.loss("thinker", stage.batch(0), 0).total.item() < 0.9 * before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in stage.thinker.state_dict().items())
    with pytest.raises(ConfigError, match="both 0"):
        ThinkerStage(setting(place, "none", {}, heard, answer=0))


def test_only_what_is_heard_is_blurred(place):
    """Tokens in the place of a clip, another time in every step, the same in the same one; blanks and text stay."""
    heard = [{"cuts": "talk.jsonl.gz", "task": "heard"}, {"cuts": "say.jsonl.gz", "task": "transcribe"}]
    stage = ThinkerStage(setting(place, "blurred", {"thinker": "thinker", "aut": "thinker"}, heard, blur=1.0))
    talks = [stage.read(e) for row in stage.mix.cells for cell in row for e in cell]
    batch = stage.collate(talks, 8)
    x = stage.thinker.embed(batch.ids)
    made = stage.blurred(x, batch, 0)
    assert torch.equal(made, stage.blurred(x, batch, 0))
    assert not torch.equal(made, stage.blurred(x, batch, 4))
    start, stop = MODEL.config.audio_start_token_id, MODEL.tokenizer.audio_end_token_id
    for talk, row in zip(talks, (made - x).norm(dim=-1), strict=True):
        inside = [talk.ids[:at].count(start) > talk.ids[: at + 1].count(stop) for at in range(len(talk.ids))]
        wanted = torch.tensor(inside) & ~torch.tensor(talk.sound)
        wanted &= torch.tensor(talk.ids) != MODEL.config.audio_token_id
        assert torch.equal(row[: len(talk.ids)] > 0, wanted)
        assert not row[len(talk.ids) :].any()
    spread = stage.thinker.model.embed_tokens.weight.var(0).mean()
    apart = [
        (n.square().sum() / (n != 0).sum() / spread).item() for n in (stage.blurred(x, batch, i) - x for i in range(30))
    ]
    assert 0.3 < np.mean(apart) < 1.2
    assert max(apart) < 2.5


def test_stages_train_and_export_a_checkpoint_that_speaks(place, tmp_path):
    _, runs = place
    sources = [{"cuts": "talk.jsonl.gz", "task": "talk"}, {"cuts": "say.jsonl.gz", "task": "say"}]
    init = {"thinker": "thinker", "aut": "thinker", "codec": "codec"}
    speech = setting(place, "speech", init, sources, speaker=SPEAKER, follow=0.3)
    train(SpeechStage(speech), speech.recipe, runs / "speech", quiet=True)
    heard = [{"cuts": "talk.jsonl.gz", "task": "talk"}, {"cuts": "say.jsonl.gz", "task": "transcribe"}]
    thinker = setting(place, "thinker", {"thinker": "thinker", "aut": "thinker"}, heard, spell=0.5)
    train(ThinkerStage(thinker), thinker.recipe, runs / "again", quiet=True)
    code2wav = {f"code2wav.{n}": t for n, t in MODEL.speaking().code2wav.state_dict().items()}
    (runs / "code2wav").mkdir()
    write_safetensors(runs / "code2wav" / BEST, code2wav, {"run": "c"})
    heard = SpeechStage(setting(place, "heard", init | {"code2wav": "code2wav"}, sources[1:], speaker=SPEAKER))
    heard.modules.eval()
    with torch.inference_mode():
        heard.sample(tmp_path / "samples", Mock())
    assert {path.suffix for path in (tmp_path / "samples").iterdir()} == {".wav", ".png"}
    made, _ = read_audio(tmp_path / "samples" / "0-said.wav")
    assert len(made) % FRAME == 0
    assert float(np.abs(made).max()) > 0.01
    parts = {"aut": "again", "thinker": "again", "talker": "speech", "mtp": "speech", "speaker": "speech"}
    parts |= {"codec": "codec", "code2wav": "code2wav"}
    export(setting(place, "export", parts, sources, speaker=SPEAKER), tmp_path)
    model = antiphon.load(tmp_path)
    reply = collect(model.speak("hello there", voice="ethan", max_frames=3))
    assert 0 < len(reply.audio) <= 3 * FRAME
    assert len(reply.audio) == len(reply.codes) * FRAME
    assert load_speaker(tmp_path / "speaker.safetensors").config.channels == SPEAKER["channels"]
    assert antiphon.load(tmp_path).voices == ["chelsie", "ethan"]
    voice = model.clone(load_samples(read_cuts(place[0] / "say.jsonl.gz")[0], RATE).repeat(2), RATE)
    assert len(collect(model.speak("hello there", voice=voice, max_frames=3)).codes) <= 3
    grown = tmp_path / "grown"  # box by box, from two recipes: the same files
    for names in (("aut", "thinker", "codec", "code2wav"), ("talker", "mtp", "speaker")):
        some = {name: parts[name] for name in names}
        export(setting(place, "export", some, sources, speaker=SPEAKER, into=str(grown)), tmp_path / "unused")
    for path in tmp_path.glob("*.safetensors"):
        assert path.read_bytes() == (grown / path.name).read_bytes(), path.name
    assert antiphon.load(grown).voices == ["chelsie", "ethan"]
    cooled = setting(place, "export", parts, sources, speaker=SPEAKER, temperature=0.5, into=str(tmp_path / "cooled"))
    export(cooled, tmp_path / "unused")
    usual, cooler = model.speaking(), antiphon.load(tmp_path / "cooled").speaking()
    assert torch.equal(cooler.talker.codec_head.weight, 2 * usual.talker.codec_head.weight)
    for head, as_trained in zip(cooler.mtp.lm_head.parameters(), usual.mtp.lm_head.parameters(), strict=True):
        assert torch.equal(head, 2 * as_trained)
    assert torch.equal(cooler.talker.model.codec_embedding.weight, usual.talker.model.codec_embedding.weight)
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match="temperature"):
        export(setting(place, "export", parts, sources, speaker=SPEAKER, temperature=0.0), tmp_path / "unused")


def test_the_end_of_a_turn_is_learnt_and_the_ear_stands(place, tmp_path):
    sources = [{"cuts": "say.jsonl.gz"}, {"cuts": "talk.jsonl.gz", "task": "talk"}]
    stage = TurnStage(setting(place, "turn", {"aut": "thinker"}, sources, head={"hidden": 16}))
    before = {n: t.clone() for n, t in stage.aut.state_dict().items()}
    step = next(step for step in range(50) if len(set(stage.batch(step).ended.tolist())) == 2)
    batch = stage.batch(step)
    assert torch.equal(batch.mel, stage.batch(step).mel)
    first = float(stage.loss("turn", batch, 0).total.detach())
    optimizer = torch.optim.Adam(stage.turn.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        stage.loss("turn", batch, step).total.backward()
        optimizer.step()
    assert float(stage.loss("turn", batch, 0).total.detach()) < 0.5 * first
    assert all(torch.equal(t, before[n]) for n, t in stage.aut.state_dict().items())
    figures = stage.validate()
    assert figures["wrong"] == pytest.approx((figures["cut_off"] + figures["kept_waiting"]) / 2)
    stage.sample(tmp_path, Mock())
    assert (tmp_path / "judged.png").exists()
