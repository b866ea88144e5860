"""Text as token ids and back.

Qwen's tokenizer is a byte-level BPE: a token is a run of bytes, and a character may be split over several tokens.
How ids become a conversation is in chat.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from antiphon.config import OmniConfig
from antiphon.config_json import read_json
from antiphon.errors import InputError

# Contractions, words with the mark before them, single digits, punctuation with its line ends, line ends, spaces.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BPE_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
SPELLING = {  # how Qwen3-Omni spells the ids that the template takes from the config
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "system_token_id": "system",
    "user_token_id": "user",
    "assistant_token_id": "assistant",
    "audio_token_id": "<|audio_pad|>",
    "audio_start_token_id": "<|audio_start|>",
}


class Tokenizer:
    """Text to ids and back. Ids are those of the Thinker's vocabulary.

    Raises:
        InputError: the tokenizer does not belong to `config`, or no id is known for the end of audio.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: OmniConfig) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "<|im_end|>" typed by a user is plain text
        self.backend, self.config = backend, config
        for name, spelling in SPELLING.items():
            if backend.token_to_id(spelling) not in (None, getattr(config, name)):
                raise InputError(
                    f"config.json has {name} = {getattr(config, name)}, but the tokenizer has {spelling} = "
                    f"{backend.token_to_id(spelling)}; use the tokenizer files of this checkpoint"
                )
        audio_end = config.audio_end_token_id
        audio_end = backend.token_to_id("<|audio_end|>") if audio_end is None else audio_end
        if audio_end is None:
            raise InputError(
                "neither audio_end_token_id in config.json nor a token <|audio_end|> says where audio ends"
            )
        self.audio_end_token_id: int = audio_end
        self.roles = {role: getattr(config, f"{role}_token_id") for role in ("system", "user", "assistant")}
        self._added = backend.get_added_tokens_decoder()
        self._bytes = _byte_alphabet()
        by_byte = sorted(self._bytes, key=self._bytes.__getitem__)
        self._byte_ids = [i for char in by_byte if (i := backend.token_to_id(char)) is not None]
        if len(self._byte_ids) < 256:
            raise InputError("the tokenizer is not a byte-level one, as Qwen's are: it has no token for every byte")

    @classmethod
    def from_folder(cls, folder: str | Path, config: OmniConfig) -> Tokenizer:
        """The tokenizer of a checkpoint: `tokenizer.json`, or the three files of the release (BPE_FILES).

        Raises:
            InputError: no tokenizer files, unreadable ones, or those of another model.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), config)
            if all((folder / name).is_file() for name in BPE_FILES):
                return cls(_qwen_bpe(folder), config)
        except InputError:
            raise
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise InputError(f"the tokenizer in {folder} cannot be read: {error}") from error
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.json, or {', '.join(BPE_FILES)}")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Control tokens in it stay plain text; `<tool_call>` and its kind are single tokens.

        Raises:
            InputError: `text` is not Unicode text (half a surrogate pair).
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError(f"cannot tokenise {text[:40]!r}: it is not valid Unicode text") from None

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of UTF-8 bytes; bytes that are only a part of a character become one token each."""
        try:
            return self.encode(data.decode())
        except UnicodeDecodeError:
            return [self._byte_ids[byte] for byte in data]

    def piece(self, token: int) -> bytes:
        """UTF-8 bytes that the id `token` adds to a text; none for control tokens and for ids past the vocabulary."""
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else added.content.encode()
        return bytes(self._bytes[char] for char in self.backend.id_to_token(token) or "")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without control tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode(errors="replace")

    def token_id(self, name: str) -> int | None:
        """Id of the token spelled `name`, None if there is none."""
        return self.backend.token_to_id(name)


@dataclass
class StreamDecoder:
    """`Tokenizer.decode`, one id at a time: the deltas joined are the decoded text, and none cuts a character."""

    tokenizer: Tokenizer
    held: bytes = b""  # the beginning of a character

    def push(self, token: int) -> str:
        """Text that is certain after `token`; empty inside a character."""
        return self._decode(self.tokenizer.piece(token), final=False)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, else nothing."""
        return self._decode(b"", final=True)

    def _decode(self, more: bytes, final: bool) -> str:
        data = self.held + more
        text, used = codecs.utf_8_decode(data, "replace", final)
        self.held = data[used:]
        return text


def byte_tokenizer(config: OmniConfig) -> Tokenizer:
    """One token per byte, for random checkpoints that came without a tokenizer; every other id reads as its number.

    Raises:
        InputError: the vocabulary has no room for 256 bytes beside the control ids.
    """
    control = {value for name, value in vars(config).items() if name.endswith("_token_id")}
    free = [i for i in range(min(config.text.vocab_size, 256 + len(control))) if i not in control]
    if len(free) < 256:
        raise InputError(f"a vocabulary of {config.text.vocab_size} ids has no room for bytes; add tokenizer files")
    spelled = dict(zip(_byte_alphabet(), free, strict=False))
    others = set(range(config.text.vocab_size)) - control - set(spelled.values())
    spelled |= {f"Ġ{i}": i for i in others}  # a space and the number; without merges no text becomes one of them
    backend = tokenizers.Tokenizer(models.BPE(spelled, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    end = config.audio_start_token_id if config.audio_end_token_id is None else config.audio_end_token_id
    return Tokenizer(backend, replace(config, audio_end_token_id=end))


def _byte_alphabet() -> dict[str, int]:
    # byte-level BPE files write a printable byte as the Latin-1 character, the others in order from U+0100 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _qwen_bpe(folder: Path) -> tokenizers.Tokenizer:
    vocab, merges, settings = (folder / name for name in BPE_FILES)
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = {int(i): AddedToken(**entry) for i, entry in read_json(settings)["added_tokens_decoder"].items()}
    backend.add_tokens([added[i] for i in sorted(added)])
    for i, token in added.items():
        if backend.token_to_id(token.content) != i:  # the library numbers added tokens itself
            raise InputError(f"{folder}: {token.content} should be id {i}; vocab.json is not the one it was made for")
    return backend
