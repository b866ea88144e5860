"""config.json read and checked, in both spellings: the release's (`rope_theta`, `num_experts`) and the one that
transformers 5.x writes (`rope_parameters`, `num_local_experts`).

A field that is missing is an error and never a default, except where the release itself leaves it out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from antiphon.config import (
    CODEC_IDS,
    AudioConfig,
    Code2WavConfig,
    CodecConfig,
    DecoderConfig,
    OmniConfig,
    TalkerConfig,
)
from antiphon.errors import ConfigError

MODEL_TYPE = "qwen3_omni_moe"


class _Section:
    """One JSON object with a name for error messages; every access either yields a checked value or raises."""

    def __init__(self, data: Mapping[str, Any], name: str) -> None:
        self.data, self.name = data, name

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def sub(self, key: str) -> "_Section":
        value = self.data.get(key)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._path(key)} is missing from config.json; expected an object")
        return _Section(value, self._path(key))

    def get(self, *keys: str, kind: type = int) -> Any:
        """Value of the first of `keys` that is there, checked against `kind`."""
        for key in keys:
            if self.data.get(key) is not None:
                return self._typed(key, self.data[key], kind)
        raise ConfigError(f"{self._path(keys[0])} is missing from config.json; expected {_NOUN[kind]}")

    def optional(self, *keys: str, kind: type = int) -> Any:
        """Value of the first of `keys` that is there, or None."""
        return self.get(*keys, kind=kind) if any(self.data.get(k) is not None for k in keys) else None

    def _typed(self, key: str, value: Any, kind: type) -> Any:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) < 1e300:  # nan and infinity too
                raise ConfigError(f"{self._path(key)} is out of range; expected a finite number")
            value = float(value)
        if kind is tuple and isinstance(value, list) and all(type(v) is int for v in value):
            return tuple(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self._path(key)} is {value!r}; expected {_NOUN[kind]}")
        return value

    def head_dim(self, sizes: Mapping[str, int]) -> int:
        """As given, or where it is left out as transformers derives it."""
        given = self.optional("head_dim")
        return sizes["hidden_size"] // max(sizes["num_attention_heads"], 1) if given is None else given

    def rope_theta(self) -> float:
        for name in ("rope_parameters", "rope_scaling"):  # both may name a kind, and the release's older form too
            rope = self.data.get(name)
            kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, Mapping) else None
            if kind not in (None, "default", "mrope"):
                raise ConfigError(f"{self._path(name)} has rope_type {kind!r}; only 'default' is implemented")
        if self.data.get("rope_theta") is not None:
            return self.get("rope_theta", kind=float)
        return self.sub("rope_parameters").get("rope_theta", kind=float)

    def must_be(self, key: str, expected: Any) -> None:
        """Refuse a value that would silently compute something else."""
        value = self.data.get(key, expected)
        if value != expected:
            raise ConfigError(f"{self._path(key)} is {value!r}; only {expected!r} is implemented")

    def keys_of(self, cls: type, *names: str) -> dict[str, Any]:
        kinds = cls.__annotations__
        return {name: self.get(name, kind=_KIND[str(kinds[name])]) for name in names}


_NOUN = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple: "a list of integers",
    str: "a string",
    dict: "an object",
}
_KIND = {
    repr(int): int,
    repr(float): float,
    repr(bool): bool,
    str(tuple[int, ...]): tuple,
}


def _audio(s: _Section) -> AudioConfig:
    s.must_be("activation_function", "gelu")
    s.must_be("scale_embedding", False)
    names = [n for n in AudioConfig.__annotations__ if n != "conv_layers"]
    conv_layers = s.optional("conv_layers")
    return AudioConfig(
        **s.keys_of(AudioConfig, *names), **({} if conv_layers is None else {"conv_layers": conv_layers})
    )


def _decoder(s: _Section, *, shared_expert: bool = False, routed: bool = True, tied: bool = False) -> DecoderConfig:
    s.must_be("hidden_act", "silu")
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    sizes = s.keys_of(DecoderConfig, *fields, "rms_norm_eps", "max_position_embeddings", "attention_bias")
    moe: dict[str, Any] = {}
    if routed:
        moe = {
            "num_experts": s.get("num_experts", "num_local_experts"),
            "decoder_sparse_step": s.get("decoder_sparse_step"),
            "mlp_only_layers": s.get("mlp_only_layers", kind=tuple),
        }
        if moe["num_experts"]:
            moe |= s.keys_of(DecoderConfig, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    if shared_expert:  # the released Talker routes in every layer, whatever the two fields say
        moe |= {
            "shared_expert_intermediate_size": s.get("shared_expert_intermediate_size"),
            "decoder_sparse_step": 1,
            "mlp_only_layers": (),
        }
    return DecoderConfig(
        **sizes,
        **moe,
        # the code predictor's is never derived: where transformers leaves it out it means 128
        head_dim=s.head_dim(sizes) if routed else s.get("head_dim"),
        rope_theta=s.rope_theta(),
        intermediate_size=s.optional("intermediate_size"),
        tie_word_embeddings=tied,
    )


def _talker(s: _Section) -> TalkerConfig:
    text, mtp = s.sub("text_config"), s.sub("code_predictor_config")
    names = ("num_code_groups", "accept_hidden_layer", "thinker_hidden_size", *CODEC_IDS)
    speakers = s.get("speaker_id", kind=dict)
    if not all(type(v) is int for v in speakers.values()):
        raise ConfigError(f"{s.name}.speaker_id must map voice names to integers")
    mtp.must_be("num_code_groups", s.get("num_code_groups"))
    inner = text.optional("intermediate_size")
    return TalkerConfig(
        text=_decoder(text, shared_expert=True),
        mtp=_decoder(mtp, routed=False),
        **s.keys_of(TalkerConfig, *names),
        # where a config leaves the inner width of the two projections out, it is the Thinker's (2048 as released)
        resize_dim=s.get("thinker_hidden_size") if inner is None else inner,
        speaker_id={k.lower(): v for k, v in speakers.items()},
    )


def _code2wav(s: _Section) -> Code2WavConfig:
    s.must_be("hidden_act", "silu")
    derived = ("head_dim", "rope_theta", "sample_rate")
    names = [n for n in Code2WavConfig.__annotations__ if n not in derived]
    values = s.keys_of(Code2WavConfig, *names)
    return Code2WavConfig(**values, head_dim=s.head_dim(values), rope_theta=s.rope_theta())


def parse_config(data: Mapping[str, Any]) -> OmniConfig:
    """OmniConfig of a parsed config.json.

    Raises:
        ConfigError: another model type, a missing field, a wrong type or an impossible number.
    """
    top = _Section(data, "")
    model_type = data.get("model_type")
    if model_type != MODEL_TYPE:
        raise ConfigError(f"model_type is {model_type!r}; Antiphon loads {MODEL_TYPE!r} checkpoints (Qwen3-Omni)")
    thinker = top.sub("thinker_config")
    speaks = top.get("enable_audio_output", kind=bool)
    tied = any(s.optional("tie_word_embeddings", kind=bool) for s in (thinker, thinker.sub("text_config")))
    ids = [n for n in OmniConfig.__annotations__ if n.endswith("_token_id") and not n.startswith("audio")]
    config = OmniConfig(
        audio=_audio(thinker.sub("audio_config")),
        text=_decoder(thinker.sub("text_config"), tied=tied),
        talker=_talker(top.sub("talker_config")) if speaks else None,
        code2wav=_code2wav(top.sub("code2wav_config")) if speaks else None,
        **top.keys_of(OmniConfig, *ids),
        **thinker.keys_of(OmniConfig, "audio_token_id", "audio_start_token_id"),
        audio_end_token_id=thinker.optional("audio_end_token_id"),
        raw=data,
    )
    config.check()
    return config


def parse_codec_config(data: Mapping[str, Any]) -> CodecConfig:
    """CodecConfig of a Mimi config.json (transformers' or our own file).

    Raises:
        ConfigError: a missing field, a wrong type, an impossible number or a variant that is not implemented.
    """
    s = _Section(data, "codec")
    for key, value in (
        ("use_causal_conv", True),
        ("use_conv_shortcut", False),
        ("pad_mode", "constant"),
        ("hidden_act", "gelu"),
    ):
        s.must_be(key, value)
    s.must_be("attention_bias", False)
    derived = ("head_dim", "rope_theta", "latent_stride")
    values = s.keys_of(CodecConfig, *(n for n in CodecConfig.__annotations__ if n not in derived))
    hop = math.prod(values["upsampling_ratios"])
    stride = s.optional("latent_stride")
    if stride is None:  # Mimi states the frame rate instead, or null where its downsampler halves the rate
        rate = s.optional("frame_rate", "_frame_rate", kind=float)
        stride = max(round(values["sampling_rate"] / max(hop, 1) / rate), 1) if rate else 2
    config = CodecConfig(
        **values,
        head_dim=s.head_dim(values),
        rope_theta=s.rope_theta(),
        latent_stride=stride,
    )
    config.check()
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or a ConfigError that says what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; expected a folder with a Qwen3-Omni config.json") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or an endless number
        raise ConfigError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; expected a JSON object")
    return data


def read_config(path: str | Path) -> OmniConfig:
    """OmniConfig of a folder or of a config.json itself."""
    path = Path(path)
    return parse_config(read_json(path / "config.json" if path.is_dir() else path))


def to_json(config: Any) -> str:
    """A config section as JSON text (for files of our own, such as sessions and the codec)."""
    return json.dumps(asdict(config), indent=2, sort_keys=True)
