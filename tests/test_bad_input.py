"""Bad input: one clear sentence of the AntiphonError family, or a behaviour that is stated here; never a traceback of
torch and never silence."""

import base64
import copy
import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import antiphon
from antiphon import (
    AntiphonError,
    AudioError,
    CapacityError,
    ConfigError,
    InputError,
    Omni,
    Options,
    Reply,
    Sampling,
    Session,
    WeightsError,
)
from antiphon.audio import MAX_SECONDS
from antiphon.caches import KVCache
from antiphon.config_json import parse_config
from antiphon.generate import collect
from tests.models import (
    CODEBOOK,
    IDS,
    VOCAB,
    assert_same_reply,
    config_json,
    omni,
    sound,
    write_checkpoint,
)

SHORT: dict[str, Any] = {"max_text_tokens": 4, "max_frames": 3, "seed": 1}
ASK = {"role": "user", "content": "What time is it?"}


@pytest.fixture
def model() -> Omni:
    return omni()


@contextmanager
def refused(kind: type[AntiphonError], *words: str) -> Any:
    """The block raises `kind`, whose text is one sentence that holds `words` and no traceback of another library."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text.strip(), "more than one line"
    assert 10 < len(text) < 400
    for word in words:
        assert word in text, f"{text!r} does not say {word!r}"
    assert caught.value.__cause__ is None or caught.value.__suppress_context__ or "tokenizer" in text


def ask(model: Omni, audio: Any, **options: Any) -> Reply:
    return model.generate([{"role": "user", "content": [{"type": "audio", "audio": audio}]}], **(SHORT | options))


def wav(samples: np.ndarray, rate: int, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


# ------------------------------------------------------------------------------------------ sound: refused


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (np.zeros(0, np.float32), "empty"),
        ([], "empty"),
        (np.full(1600, np.nan, np.float32), "NaN"),
        (np.array([0.0, np.inf] * 800, np.float32), "NaN or infinite"),
        (np.zeros((1600, 2), np.float32), "shape [1600, 2]"),
        (np.zeros((1, 1600), np.float32), "shape [1, 1600]"),
        (np.float32(0.5), "shape []"),
        (np.zeros(1600, np.uint8), "uint8"),
        (np.zeros(1600, np.complex64), "complex64"),
        (np.full(1600, 12000.0), "full scale is 1"),
        ("speech", "shape []"),
        (None, "shape []"),
        ([[0.1, 0.2], [0.3]], "not an array of numbers"),
        (torch.zeros(2, 1600), "shape [2, 1600]"),
        (np.broadcast_to(np.float32(0), int(MAX_SECONDS * 1000) + 1), "longer than the limit of 2400 seconds"),
    ],
    ids=str,
)
def test_samples_that_are_no_sound(model, samples, words):
    rate = 1000 if isinstance(samples, np.ndarray) and samples.size > 2_000_000 else 16000
    with refused(AudioError, words):
        ask(model, (samples, rate))
    session = model.session()
    with refused(AudioError, words):
        session.append_audio(samples, rate)
    assert session.ids == []
    session.append_message(ASK)
    expected = model.session()
    expected.append_message(ASK)
    assert_same_reply(collect(session.respond(**SHORT)), collect(expected.respond(**SHORT)))


@pytest.mark.parametrize("rate", [0, -16000, 1, 999, 384001, 16000.0, "16000", None, float("nan"), True])
def test_impossible_rates(model, rate):
    with refused(AudioError, "sample rate"):
        ask(model, (sound(0.2), rate))
    with refused(AudioError, "sample rate"):
        model.session().append_audio(sound(0.2), rate)


@pytest.mark.parametrize("length", [1, 160, 200])
def test_a_clip_too_short_to_be_a_sound(model, length):
    with refused(AudioError, "too short", "12.5 ms"):
        ask(model, (sound(1)[:length], 16000))
    assert ask(model, (sound(1)[:201], 16000)).text_ids  # 12.56 ms is enough


@pytest.mark.parametrize(
    "audio",
    [5, None, {"path": "x.wav"}, (np.zeros(1600),), (np.zeros(1600), 16000, 2), [0.0, 0.1], np.zeros(1600)],
    ids=lambda value: type(value).__name__,
)
def test_audio_of_no_known_form(model, audio):
    with refused(AudioError, "audio"):
        ask(model, audio)


def test_files_that_are_no_sound(model, tmp_path):
    (tmp_path / "text.wav").write_text("This is a text that someone has named .wav, as happens.\n" * 9)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "header.wav").write_bytes(wav(sound(0.1), 16000)[:20])
    (tmp_path / "silent.wav").write_bytes(wav(np.zeros(0), 16000))
    (tmp_path / "not a number.wav").write_bytes(wav(np.full(1600, np.nan), 16000, subtype="FLOAT"))
    expected = {
        "text.wav": "is not readable sound",
        "empty.wav": "is not readable sound",
        "header.wav": "",
        "silent.wav": "is empty",
        "not a number.wav": "NaN",
        "nowhere.wav": "cannot be read",
        "": "cannot be read",  # the folder itself
    }
    for name, words in expected.items():
        with refused(AudioError, str(tmp_path / name), words):
            ask(model, str(tmp_path / name))
        with refused(AudioError, str(tmp_path / name), words):
            ask(model, tmp_path / name)
    for data in (b"", b"RIFF", b"\0" * 4000):
        with refused(AudioError, "the audio"):
            ask(model, data)
    with refused(AudioError):
        ask(model, io.StringIO("text"))


def test_a_file_over_the_limit_is_refused(model, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(int(1000 * (MAX_SECONDS + 1)), np.int16), 1000)
    with refused(AudioError, "longer than the limit of 2400 seconds"):
        ask(model, path)


@pytest.mark.parametrize("data", ["not base64!", "", 5, None, "UklGRg==", "é", b"UklGRg=="])
def test_input_audio_that_is_no_sound(model, data):
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    with refused(AudioError):
        model.generate([{"role": "user", "content": [part]}], **SHORT)
    for value in (None, {}, "UklGRg==", []):
        with refused(AudioError, "input_audio"):
            model.generate([{"role": "user", "content": [{"type": "input_audio", "input_audio": value}]}], **SHORT)


# ---------------------------------------------------------------------------------- sound: heard, and how


def test_clipped_sound_is_heard_as_it_is(model):
    hot = np.clip(20 * sound(0.5), -1, 1)
    assert np.mean(np.abs(hot) == 1) > 0.3
    reply = ask(model, (hot, 16000))
    assert np.isfinite(reply.audio).all()
    assert_same_reply(ask(model, wav(hot, 16000, subtype="FLOAT")), reply)
    over = 1.5 * sound(0.5)  # a little beyond full scale is taken as it is, too
    assert ask(model, (over, 16000)).text_ids


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 96000, 192000])
def test_other_rates_are_resampled(model, rate):
    reply = ask(model, (sound(0.6, rate), rate))
    session = model.session()
    session.append_audio(sound(0.6, rate), rate)
    assert_same_reply(collect(session.respond(**SHORT)), reply)
    assert session.ids.count(model.config.audio_token_id) == model.config.audio.tokens(60)


def test_channels_are_averaged(model):
    left, right = sound(0.5, 24000), sound(0.5, 24000, seed=1)
    stereo = np.stack([left, right], 1)
    expected = ask(model, (stereo.mean(1), 24000))
    assert_same_reply(ask(model, wav(stereo, 24000, subtype="FLOAT")), expected)


def test_silence_is_sound(model):
    reply = ask(model, (np.zeros(8000, np.float32), 16000))
    assert reply.text_ids
    assert np.isfinite(reply.audio).all()


# ------------------------------------------------------------------------------------------- clips in a session


def test_a_rate_cannot_change_inside_a_clip(model):
    session = model.session()
    session.append_audio(sound(0.3, 24000), 24000)
    with refused(AudioError, "24000 Hz", "16000 Hz", "commit"):
        session.append_audio(sound(0.3), 16000)
    session.append_audio(sound(0.2, 24000, seed=1), 24000)
    session.commit()
    session.append_audio(sound(0.3), 16000)  # the next clip may have its own
    whole = model.session()
    whole.append_audio(np.concatenate([sound(0.3, 24000), sound(0.2, 24000, seed=1)]), 24000)
    whole.commit()
    whole.append_audio(sound(0.3), 16000)
    assert_same_reply(collect(session.respond(**SHORT)), collect(whole.respond(**SHORT)))


@pytest.mark.parametrize("end", ["commit", "respond", "append_text"])
def test_a_clip_that_is_too_short_can_go_on(model, end):
    session = model.session()
    session.append_audio(sound(0.3)[:100])
    for _ in range(2):
        with refused(AudioError, "6.2 ms long", "12.5 ms"):
            session.append_text("so?") if end == "append_text" else getattr(session, end)()
    session.append_audio(sound(0.3)[100:])
    session.commit()
    whole = model.session()
    whole.append_audio(sound(0.3))
    whole.commit()
    assert session.ids == whole.ids
    assert_same_reply(collect(session.respond(**SHORT)), collect(whole.respond(**SHORT)))


def test_a_streamed_clip_over_the_limit_is_refused_and_stays_as_it_was(model, monkeypatch):
    monkeypatch.setattr("antiphon.conversation.MAX_SECONDS", 0.5)
    session, whole = model.session(), model.session()
    for one in (session, whole):
        one.append_audio(sound(0.4))
    with refused(AudioError, "longer than the limit of 0.5 seconds", "commit"):
        session.append_audio(sound(0.2))
    for one in (session, whole):
        one.append_audio(sound(0.1))
    assert_same_reply(collect(session.respond(**SHORT)), collect(whole.respond(**SHORT)))


def test_nothing_to_answer(model, tmp_path):
    model.session().save(tmp_path / "empty")
    for session in (model.session(), model.load_session(tmp_path / "empty")):
        with refused(InputError, "nothing to answer"):
            session.respond(**SHORT)
    with refused(InputError, "nothing to answer"):
        model.generate([], **SHORT)


def test_a_session_that_cannot_be_written(model, tmp_path):
    session = model.session()
    session.append_message(ASK)
    for path in (tmp_path / "no" / "folder", tmp_path):
        with refused(AntiphonError, str(path)):
            session.save(path)
    assert collect(session.respond(**SHORT)).text_ids


# --------------------------------------------------------------------------------------------- options


def test_an_unknown_voice_is_told_which_there_are(model):
    for voice in ("nobody", "chelsie ", "Элен"):
        with refused(InputError, repr(voice), "aiden, chelsie, ethan"):
            model.generate([ASK], voice=voice)
        with refused(InputError, "aiden, chelsie, ethan"):
            model.speak("Hello", voice=voice)


def test_a_model_that_cannot_speak_says_so():
    silent = omni({"enable_audio_output": False, "talker_config": None, "code2wav_config": None})
    with refused(InputError, "cannot speak"):
        silent.generate([ASK])
    with refused(InputError, "cannot speak"):
        silent.generate([ASK], voice="ethan")
    with refused(InputError, "cannot speak"):
        silent.speak("Hello")


def test_an_unknown_option_is_told_which_there_are(model):
    for name in ("temperature", "max_tokens", "Voice"):
        with refused(InputError, name, "voice, audio, seed, max_text_tokens"):
            model.generate([ASK], **{name: 1})
        with refused(InputError, name):
            model.session().speak("Hello", **{name: 1})


@pytest.mark.parametrize(
    "options",
    [
        {"max_text_tokens": 0},
        {"max_frames": 0},
        {"max_frames": -5},
        {"max_text_tokens": "many"},
        {"max_frames": None},
        {"max_frames": 2.5},
        {"seed": "lucky"},
        {"seed": 1.5},
        {"seed": None},
        {"voice": 5},
        {"text": 0.7},
        {"speech": None},
        {"residual": "greedy"},
    ],
    ids=str,
)
def test_impossible_options(model, options):
    with refused(InputError, *options):
        model.generate([ASK], **options)


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1.0, "top_p": 0.0}], ids=str
)
def test_impossible_sampling(values):
    with refused(InputError, list(values)[-1]):
        Sampling(**values)


@pytest.mark.parametrize("window", [3, 0, -1, 16, 1.5, "8"])
def test_impossible_windows(model, window):
    with refused(InputError, "window", "1, 2, 4, 8 seconds"):
        model.session(window=window)
    with refused(InputError, "1, 2, 4, 8 seconds"):
        model.generate([ASK], window=window)


def test_speak_needs_sound_and_text(model):
    with refused(InputError, "audio"):
        model.speak("Hello", audio=False)
    for words in (5, [1, 2], ["Hello", None], [b"Hello"]):
        with refused(InputError, "text"):
            collect(model.speak(words, **SHORT))


# --------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "hi"}], "'robot'"),
        ([{"role": None, "content": "hi"}], "role"),
        ([{"role": ["user"], "content": "hi"}], "role"),
        ([{"content": "hi"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": []}], "content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": {"type": "text", "text": "hi"}}], "content"),
        ([{"role": "user", "content": ["hi"]}], "part"),
        ([{"role": "user", "content": [None]}], "part"),
        ([{"role": "user", "content": [{"text": "hi"}]}], "part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "part"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "hi"}]}], "part"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url'"),
        ([{"role": "assistant", "content": [{"type": "audio", "audio": (sound(0.2), 16000)}]}], "user messages"),
        ([{"role": "system", "content": [{"type": "audio", "audio": (sound(0.2), 16000)}]}], "user messages"),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool call"),
        ([{"role": "assistant", "tool_calls": ["get"]}], "tool call"),
        ([{"role": "assistant", "tool_calls": 5}], "tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "tool call"),
        ([{"role": "tool"}], "content"),
        ([{"role": "user", "content": "half \ud800 a pair"}], "Unicode"),
        (["hi"], "message"),
        ([None], "message"),
        ("hi", "message"),
        ({"role": "user", "content": "hi"}, "message"),
        (None, "message"),
        (5, "message"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_messages_of_another_form(model, messages, words):
    with refused(InputError, words):
        model.generate(messages, **SHORT)


@pytest.mark.parametrize(
    "tools", [[{}], ["get_weather"], [{"type": "function"}], [{"type": "function", "function": {"name": 5}}], 5, [None]]
)
def test_tools_of_another_form(model, tools):
    with refused(InputError, "tool"):
        model.generate([ASK], tools=tools, **SHORT)


def test_a_bad_message_changes_nothing(model):
    session, clean = model.session(), model.session()
    parts = [{"type": "text", "text": "Listen:"}, {"type": "audio", "audio": (np.zeros(0), 16000)}]
    with refused(AudioError, "empty"):
        session.append_message({"role": "user", "content": parts})
    too_short = [{"type": "text", "text": "Listen:"}, {"type": "audio", "audio": (sound(1)[:100], 16000)}]
    with refused(AudioError, "too short"):
        session.append_message({"role": "user", "content": too_short})
    with refused(InputError):
        session.append_message({"role": "assistant", "content": "x", "tool_calls": [{}]})
    for one in (session, clean):
        one.append_message(ASK)
    assert session.ids == clean.ids
    assert_same_reply(collect(session.respond(**SHORT)), collect(clean.respond(**SHORT)))


@pytest.mark.parametrize("text", [None, 5, b"hello"])
def test_text_that_is_no_text(model, text):
    session = model.session()
    with refused(InputError, "text"):
        session.append_text(text)
    session.append_text("Hello")
    clean = model.session()
    clean.append_text("Hello")
    assert_same_reply(collect(session.respond(**SHORT)), collect(clean.respond(**SHORT)))


# --------------------------------------------------------------------------------------------- capacity


def small(thinker: int = 2048, talker: int = 2048) -> Omni:
    return omni(
        {
            "thinker_config.text_config.max_position_embeddings": thinker,
            "talker_config.text_config.max_position_embeddings": talker,
        }
    )


def caches(session: Session) -> list[KVCache]:
    return [session.thinker, session.talker]


@pytest.mark.parametrize("limits", [{"thinker": 60}, {"talker": 60}], ids=str)
def test_a_prompt_beyond_the_capacity_is_refused_before_anything_is_changed(limits):
    model = small(**limits)
    long = {"role": "user", "content": "word " * 80}
    with refused(CapacityError, "60", "shorten"):
        model.generate([long], **SHORT)
    session = model.session()
    session.append_message(ASK)
    used = [[t[..., : cache.filled, :].clone() for t in (cache.k, cache.v)] for cache in caches(session)]
    ids = list(session.ids)
    with refused(CapacityError, "60"):
        session.append_message(long)
    assert session.ids == ids
    for cache, held in zip(caches(session), used, strict=True):
        assert cache.length.tolist() == [cache.filled] == [held[0].shape[3]]
        assert all(torch.equal(t[..., : cache.filled, :], old) for t, old in zip((cache.k, cache.v), held, strict=True))
    with refused(CapacityError):  # it stays too long: nothing is left out in silence
        session.respond(**SHORT)


def test_an_answer_that_fills_the_context_is_refused_where_it_is_full():
    model = small(thinker=30)
    session = model.session()
    session.append_message(ASK)
    assert session.thinker.filled < 26
    events = session.respond(max_text_tokens=40, max_frames=2, seed=1)
    with refused(CapacityError, "30"):
        collect(events)
    assert session.thinker.length.tolist() == [30]
    session.truncate(0)  # the answer can be taken back


def test_sound_beyond_the_capacity_is_refused():
    model = small(thinker=60)
    session = model.session(window=1)
    with refused(CapacityError, "60"):
        for seed in range(9):
            session.append_audio(sound(1.0, seed=seed))
    assert len(session.ids) <= 60


# --------------------------------------------------------------------------------------------- checkpoints

IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("thinker_config.text_config.hidden_size", 0, "hidden_size"),
    ("thinker_config.text_config.hidden_size", -32, "hidden_size"),
    ("thinker_config.text_config.hidden_size", 48, "output_dim"),
    ("thinker_config.text_config.hidden_size", 3.5, "hidden_size"),
    ("thinker_config.text_config.hidden_size", "32", "hidden_size"),
    ("thinker_config.text_config.hidden_size", True, "hidden_size"),
    ("thinker_config.text_config.hidden_size", [32], "hidden_size"),
    ("thinker_config.text_config.num_hidden_layers", 0, "num_hidden_layers"),
    ("thinker_config.text_config.num_key_value_heads", 3, "num_key_value_heads"),
    ("thinker_config.text_config.num_key_value_heads", 0, "num_key_value_heads"),
    ("thinker_config.text_config.head_dim", 7, "head_dim"),
    ("thinker_config.text_config.head_dim", -8, "head_dim"),
    ("thinker_config.text_config.num_experts_per_tok", 5, "num_experts_per_tok"),
    ("thinker_config.text_config.num_experts_per_tok", 0, "num_experts_per_tok"),
    ("thinker_config.text_config.num_experts", -4, "num_experts"),
    ("thinker_config.text_config.moe_intermediate_size", 0, "moe_intermediate_size"),
    ("thinker_config.text_config.rms_norm_eps", -1e-6, "rms_norm_eps"),
    ("thinker_config.text_config.rope_theta", 0.0, "rope_theta"),
    ("thinker_config.text_config.rope_theta", float("nan"), "rope_theta"),
    ("thinker_config.text_config.max_position_embeddings", 0, "max_position_embeddings"),
    ("thinker_config.text_config.decoder_sparse_step", 0, "decoder_sparse_step"),
    ("thinker_config.text_config.mlp_only_layers", ["one"], "mlp_only_layers"),
    ("thinker_config.text_config.vocab_size", 100, "token_id"),
    ("thinker_config.text_config.hidden_act", "relu", "hidden_act"),
    ("thinker_config.text_config", None, "text_config"),
    ("thinker_config.text_config", 5, "text_config"),
    ("thinker_config", None, "thinker_config"),
    ("thinker_config.audio_config.d_model", 25, "d_model"),
    ("thinker_config.audio_config.encoder_attention_heads", 5, "encoder_attention_heads"),
    ("thinker_config.audio_config.n_window_infer", 850, "n_window_infer"),
    ("thinker_config.audio_config.n_window_infer", 0, "n_window_infer"),
    ("thinker_config.audio_config.num_mel_bins", 0, "num_mel_bins"),
    ("thinker_config.audio_config.conv_layers", 0, "conv_layers"),
    ("thinker_config.audio_token_id", VOCAB, "audio_token_id"),
    ("thinker_config.audio_token_id", -1, "audio_token_id"),
    ("im_end_token_id", 10**9, "im_end_token_id"),
    ("enable_audio_output", "yes", "enable_audio_output"),
    ("talker_config", None, "talker_config"),
    ("talker_config.accept_hidden_layer", 3, "accept_hidden_layer"),
    ("talker_config.accept_hidden_layer", -1, "accept_hidden_layer"),
    ("talker_config.num_code_groups", 1, "num_code_groups"),
    ("talker_config.num_code_groups", 5, "num_code_groups"),
    ("talker_config.thinker_hidden_size", 31, "thinker_hidden_size"),
    ("talker_config.codec_eos_token_id", CODEBOOK + 1024, "codec_eos_token_id"),
    ("talker_config.speaker_id", {"ethan": 9999}, "speaker_id"),
    ("talker_config.speaker_id", {"ethan": "2"}, "speaker_id"),
    ("talker_config.speaker_id", ["ethan"], "speaker_id"),
    ("talker_config.text_config.vocab_size", 1024, "vocab_size"),
    ("talker_config.text_config.shared_expert_intermediate_size", -1, "shared_expert_intermediate_size"),
    ("talker_config.code_predictor_config.hidden_size", 16, "hidden_size"),
    ("talker_config.code_predictor_config.vocab_size", 40, "codebook"),
    ("code2wav_config.num_quantizers", 4, "num_quantizers"),
    ("code2wav_config.upsample_rates", [16, 0], "upsample_rates"),
    ("code2wav_config.upsampling_ratios", [-4], "upsampling_ratios"),
    ("code2wav_config.upsampling_ratios", [2.5], "upsampling_ratios"),
    ("code2wav_config.decoder_dim", 18, "decoder_dim"),
    ("code2wav_config.sliding_window", 0, "sliding_window"),
    ("code2wav_config.rms_norm_eps", 0.0, "rms_norm_eps"),
    ("code2wav_config.num_attention_heads", 0, "num_attention_heads"),
]


@pytest.mark.parametrize(("path", "value", "words"), IMPOSSIBLE, ids=[f"{p}={v}" for p, v, _ in IMPOSSIBLE])
def test_a_config_with_impossible_numbers(path, value, words):
    config = config_json(IDS, {path: value})
    with refused(ConfigError, words):
        parse_config(config)


@pytest.mark.parametrize("path", ["thinker_config.text_config.hidden_size", "code2wav_config.decoder_dim"])
def test_a_config_too_large_for_any_machine(tmp_path, path):
    """The numbers are possible, the tensors on disk are not these: said before memory is asked for."""
    write_checkpoint(tmp_path, omni())
    config = json.loads((tmp_path / "config.json").read_text())
    *sections, last = path.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[last] = 2**28
    if last == "hidden_size":
        config["thinker_config"]["audio_config"]["output_dim"] = 2**28
        config["talker_config"]["thinker_hidden_size"] = 2**28
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(WeightsError, "misshapen"):
        antiphon.load(tmp_path)


def test_every_field_that_is_missing_is_named():
    ids = IDS
    whole = config_json(ids)

    def fields(section: dict[str, Any], above: str = "") -> list[str]:
        found = []
        for name, value in section.items():
            found.append(above + name)
            if isinstance(value, dict) and name != "speaker_id":
                found += fields(value, f"{above}{name}.")
        return found

    # where the release leaves a field out, its classes fix the value
    optional = {"audio_end_token_id", "head_dim", "hidden_act", "intermediate_size"}
    checked = 0
    for path in fields(whole):
        last = path.rpartition(".")[2]
        if last in optional or path == "talker_config.code_predictor_config.num_code_groups":  # said twice
            continue
        with refused(ConfigError, last.replace("rope_theta", "rope_")):
            parse_config(config_json(ids, {path: None}))
        checked += 1
    assert checked > 70


@pytest.mark.parametrize("kind", ["qwen2_5_omni", "llama", None, 5, ["qwen3_omni_moe"]])
def test_a_checkpoint_of_another_model(tmp_path, kind):
    config = config_json(IDS)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with refused(ConfigError, "model_type", repr(kind), "qwen3_omni_moe"):
        antiphon.load(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), omni())


def test_a_checkpoint_that_is_none(tmp_path, checkpoint):
    with refused(WeightsError, "does not exist"):
        antiphon.load(tmp_path / "nowhere")
    with refused(WeightsError, "is a file"):
        antiphon.load(checkpoint / "config.json")
    with refused(ConfigError, "config.json", "does not exist"):
        antiphon.load(tmp_path)
    for text in ("", "{", "[1]", "\x00\x01", '"qwen"'):
        (tmp_path / "config.json").write_text(text)
        with refused(ConfigError, "config.json"):
            antiphon.load(tmp_path)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with refused(WeightsError, "no model.safetensors"):
        antiphon.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with refused(WeightsError, "pytorch_model.bin", "pickles"):
        antiphon.load(tmp_path)


def test_a_whole_checkpoint_loads_and_answers_as_the_model_it_was_written_from(checkpoint):
    assert_same_reply(antiphon.load(checkpoint).generate([ASK], **SHORT), omni().generate([ASK], **SHORT))


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path, checkpoint):
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = antiphon.load(tmp_path)
    with refused(InputError, "has no tokenizer", "tokenizer.json"):
        model.generate([ASK], **SHORT)


def test_devices_and_types_that_are_none(checkpoint):
    impossible: list[dict[str, Any]] = [{"device": "gpu"}, {"device": "cuda:77"}]
    impossible += [{"dtype": torch.int64}, {"dtype": "float32"}]
    for wrong in impossible:
        with refused(AntiphonError, next(iter(wrong))):
            antiphon.load(checkpoint, **wrong)


# ---------------------------------------------------------------------------------------------- the family


def test_every_error_is_of_one_family():
    kinds: list[Callable[..., AntiphonError]] = [AudioError, CapacityError, ConfigError, InputError, WeightsError]
    assert all(issubclass(kind, AntiphonError) for kind in kinds)  # type: ignore[arg-type]
    assert issubclass(AntiphonError, Exception)


def test_what_is_given_is_left_as_it_was(model):
    clip, content = sound(0.3), [{"type": "text", "text": "So?"}]
    kept = clip.copy()
    messages = [{"role": "user", "content": [{"type": "audio", "audio": (clip, 16000)}, *content]}]
    system = [{"role": "system", "content": "Be brief."}, *messages]
    model.generate(system, tools=[{"type": "function", "function": {"name": "f"}}], **SHORT)
    assert len(system) == 2
    assert np.array_equal(clip, kept)
    options = Options(max_frames=2, max_text_tokens=3)
    before = copy.deepcopy(options)
    session = model.session()
    session.append_audio(clip)
    collect(session.respond(options))
    assert np.array_equal(clip, kept)
    assert options == before


def test_base64_of_a_good_file_is_heard(model):
    data = base64.b64encode(wav(sound(0.3), 16000)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    assert model.generate([{"role": "user", "content": [part]}], **SHORT).text_ids
