"""Texts as training sees them: the tokenizer that is trained first, and how a transcript is spelled.

A transcript opens with the language that is heard, as in Qwen3-ASR: `language English<asr_text>Good morning`, and
`language None<asr_text>A piano plays.` for what is not speech.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from antiphon.errors import InputError
from antiphon.files import write_text
from antiphon.tokenizer import QWEN_WORDS
from antiphon.train.world import LANGUAGES

CONTROL = [  # in the release's order; what images and video need stays, so that the checkpoint has the release's form
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
    "<|audio_pad|>",
]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<asr_text>"]
WHOLE = ("user", "assistant", "system", "language", "None")  # must be one token each, whatever the corpus says
ASR_TEXT = "<asr_text>"
CONFIG_IDS = {  # config.json's names for ids of the vocabulary
    "": {
        "im_start_token_id": "<|im_start|>",
        "im_end_token_id": "<|im_end|>",
        "tts_pad_token_id": "<tts_pad>",
        "tts_bos_token_id": "<tts_text_bos>",
        "tts_eos_token_id": "<tts_text_eod>",
        "user_token_id": "user",
        "assistant_token_id": "assistant",
        "system_token_id": "system",
    },
    "audio": {
        "audio_token_id": "<|audio_pad|>",
        "audio_start_token_id": "<|audio_start|>",
        "audio_end_token_id": "<|audio_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
}


def transcript(text: str, language: str | None) -> str:
    """What is to be written for a clip: its language by name, then the text."""
    name = LANGUAGES[language].name if language in LANGUAGES else "None"
    return f"language {name}{ASR_TEXT}{text}"


def read_transcript(written: str) -> tuple[str, str | None]:
    """Text and language code of a transcript; None where it names no language of the world."""
    head, mark, text = written.partition(ASR_TEXT)
    if not mark:
        return written.strip(), None
    name = head.removeprefix("language ").strip()
    return text.strip(), next((code for code, known in LANGUAGES.items() if known.name == name), None)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> dict[str, int]:
    """Train a byte-level BPE of `vocab_size` ids on `texts` and write it to `folder`; ids of its special tokens.

    Raises:
        InputError: the texts are too few for so many ids.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL) - len(TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    backend.train_from_iterator([*texts, *WHOLE * (len(texts) + 1000)], trainer)
    backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    if backend.get_vocab_size() != vocab_size:
        raise InputError(
            f"the texts give {backend.get_vocab_size()} tokens, not {vocab_size}; give more text or ask for fewer"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    ids = backend.get_vocab()
    return {name: ids[name] for name in (*CONTROL, *TAGS, *WHOLE)}


def tokens_per_second(folder: Path, said: Iterable[tuple[str, str, float]]) -> dict[str, tuple[float, float]]:
    """Text tokens per second of speech by language: over all of it, and in the clip that has most.

    The Talker takes one token per frame: what has more of them than its frames a second, it cannot say as fast.

    Args:
        folder: of the tokenizer.
        said: language, text and seconds of each clip.
    """
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    counted: dict[str, list[tuple[int, float]]] = {}
    for language, text, seconds in said:
        counted.setdefault(language, []).append((len(backend.encode(text, add_special_tokens=False).ids), seconds))
    return {
        language: (sum(n for n, _ in clips) / sum(s for _, s in clips), max(n / s for n, s in clips))
        for language, clips in sorted(counted.items())
    }


def fill_ids(config: dict, ids: dict[str, int]) -> dict:
    """A config.json with the ids of a trained tokenizer."""
    audio = {name: ids[token] for name, token in CONFIG_IDS["audio"].items()}
    top = {name: ids[token] for name, token in CONFIG_IDS[""].items()}
    config = {**config, **top, "thinker_config": {**config["thinker_config"], **audio}}
    if "talker_config" in config:
        names = ("audio_token_id", "audio_start_token_id", "audio_end_token_id", "image_token_id", "video_token_id")
        talker = {name: audio[name] for name in (*names, "vision_start_token_id")}
        config["talker_config"] = {**config["talker_config"], **talker}
    return config


def write_config(config: dict, folder: Path) -> None:
    """config.json of a run."""
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
