"""A small tokenizer of Qwen's kind, trained on the spot: byte-level BPE with the control tokens of Qwen3-Omni."""

import json
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from antiphon.config import AudioConfig, DecoderConfig, OmniConfig
from antiphon.tokenizer import Tokenizer

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
    "<|audio_pad|>",
]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
TEXT = """\
The quick brown fox jumps over the lazy dog, and then it sleeps until morning in the warm winter sun.
Speech is heard, thought about and answered. What time is it? It's five to seven, we'll be there soon.
Every sentence that people speak carries more than words: a voice, a mood, a question left open for someone else.
Music plays quietly while rain falls on the old bridge; nobody listens, though everybody would recognise the song.
Please tell me about the weather tomorrow, because I don't know whether to travel by train or by car.
Съешь же ещё этих мягких французских булок, да выпей чаю. Который час? Без пяти семь, скоро пойдём домой.
Погода сегодня хорошая, поэтому мы гуляем в парке и разговариваем о музыке, книгах и старых друзьях.
今天天气很好，我们去公园散步吧。你想听什么音乐？明天可能会下雨，请记得带伞。这首歌叫什么名字？
오늘 날씨가 좋네요. 음악을 들을까요? 내일은 비가 올 것 같아요. 今日はいい天気ですね。何を聞きますか。
ما الوقت الآن؟ أريد أن أسمع الموسيقى. Où est la gare, s'il vous plaît ? Das Frühstück wäre um acht Uhr fertig.
¿Qué hora es, señor? São três horas. 🙂🎉👍🏽 12 345,67 × 8 = 98 − 5
def answer(question):\n    return question + 1  # one more\n\n\n
{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}
or **bold** or bold or **bold** or bold, *soft*
**bold** and *soft*, `code`, [link](https://example.com/page)\n\n- one\n- two\n\n# Title\n\n| a | b |\n|---|---|
"""
NAMES = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "tts_pad_token_id": "<tts_pad>",
    "tts_bos_token_id": "<tts_text_bos>",
    "tts_eos_token_id": "<tts_text_eod>",
    "user_token_id": "user",
    "assistant_token_id": "assistant",
    "system_token_id": "system",
    "audio_token_id": "<|audio_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "audio_end_token_id": "<|audio_end|>",
}


def write_tokenizer(folder: Path, form: str = "json", vocab_size: int = 768) -> dict[str, int]:
    """Write a tokenizer of `vocab_size` ids, added tokens last as in the release; returns the ids a config needs.

    `form` is "json" (tokenizer.json) or "bpe" (vocab.json, merges.txt and tokenizer_config.json, as released).
    """
    backend = tiny_backend(vocab_size)
    if form == "json":
        backend.save(str(folder / "tokenizer.json"))
    else:
        model = json.loads(backend.to_str())["model"]
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    added = {i: _entry(token) for i, token in sorted(backend.get_added_tokens_decoder().items())}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return token_ids(backend)


def token_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """The ids a config needs."""
    ids = {name: i for name, spelling in NAMES.items() if (i := backend.token_to_id(spelling)) is not None}
    assert ids.keys() == NAMES.keys()
    return ids


def tiny_backend(vocab_size: int = 768) -> tokenizers.Tokenizer:
    """A tokenizer of `vocab_size` ids, added tokens last as in the release; trained once, and each time a copy."""
    return tokenizers.Tokenizer.from_str(_trained(vocab_size))


def tiny_tokenizer(folder: Path, form: str = "json", vocab_size: int = 768) -> Tokenizer:
    """A tokenizer written to `folder` and loaded from it."""
    ids = write_tokenizer(folder, form, vocab_size)
    return Tokenizer.from_folder(folder, text_config(ids, vocab_size))


def text_config(ids: dict[str, int], vocab_size: int = 768) -> OmniConfig:
    """The smallest configuration with these ids: a Thinker without a voice."""
    text = DecoderConfig(8, 1, 1, 1, 8, vocab_size, 1e-6, 1e6, 64, False, intermediate_size=8)
    return OmniConfig(AudioConfig(8, 8, 1, 1, 8, 8, 8, 50, 800), text, None, None, **ids, raw={})


@lru_cache
def _trained(vocab_size: int) -> str:
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(TAGS), initial_alphabet=alphabet, show_progress=False
    )
    roles = "user\nassistant\nsystem\n" * 99  # often enough to become single tokens
    backend.train_from_iterator([roles, *[TEXT] * 4], trainer)
    backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    assert backend.get_vocab_size() == vocab_size, "the training text is good for about 300 to 1200 ids"
    return backend.to_str()


def _entry(token: AddedToken) -> dict[str, str | bool]:
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content} | {flag: getattr(token, flag) for flag in flags}
