"""The released config.json as frozen dataclasses: every size and rate of the system is derived here, once.

Both spellings are read: the release's (`rope_theta`, `num_experts`) and the one transformers 5.x writes
(`rope_parameters`, `num_local_experts`). A field that is missing is an error and never a default. The few
fields the release does not have, because its classes fix them (the number of stride-2 convolutions), are
optional and are marked so.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from antiphon.errors import ConfigError

MODEL_TYPE = "qwen3_omni_moe"
MOST = 10_000  # layers, experts or codebooks
TALKER_SPECIALS = 1024  # the last ids of the Talker's vocabulary are control ids, never codes


@dataclass(frozen=True)
class MelConfig:
    """The released front end (Whisper's): 16 kHz, 25 ms periodic Hann window, 10 ms hop, power, slaney mel."""

    num_mel_bins: int
    sample_rate: int = 16000
    n_fft: int = 400
    hop: int = 160

    @property
    def frame_rate(self) -> int:
        """Mel frames per second."""
        return self.sample_rate // self.hop


@dataclass(frozen=True)
class AudioConfig:
    """AuT, the audio encoder (`thinker_config.audio_config`)."""

    num_mel_bins: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    downsample_hidden_size: int
    output_dim: int
    n_window: int  # half a chunk, in mel frames
    n_window_infer: int  # attention window, in mel frames
    conv_layers: int = 3  # stride-2 convolutions; the release fixes 3 (8x), 2 and 4 give 4x and 16x

    @property
    def mel(self) -> MelConfig:
        """The front end this encoder listens through."""
        return MelConfig(self.num_mel_bins)

    @property
    def chunk_frames(self) -> int:
        """Mel frames convolved together: one second."""
        return 2 * self.n_window

    @property
    def chunk_tokens(self) -> int:
        """Tokens that a full chunk becomes (13 in the release)."""
        return self.downsampled(self.chunk_frames)

    @property
    def window_chunks(self) -> int:
        """Chunks per attention window as released (8, i.e. 8 s)."""
        return self.n_window_infer // self.chunk_frames

    @property
    def conv_bins(self) -> int:
        """Mel bins left after the convolutions."""
        return self.downsampled(self.num_mel_bins)

    def downsampled(self, n: int) -> int:
        """Length of `n` steps after the stride-2 convolutions."""
        for _ in range(self.conv_layers):
            n = (n + 1) // 2
        return n

    def tokens(self, frames: int) -> int:
        """Tokens for a clip of `frames` mel frames."""
        full, rest = divmod(frames, self.chunk_frames)
        return full * self.chunk_tokens + self.downsampled(rest)

    def check(self, where: str) -> None:
        """Raise ConfigError unless the numbers can be built."""
        _positive(self, where, "num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads")
        _positive(self, where, "encoder_ffn_dim", "downsample_hidden_size", "output_dim", "n_window", "conv_layers")
        _few(self, where, "encoder_layers", "conv_layers")
        _divides(where, "encoder_attention_heads", self.encoder_attention_heads, "d_model", self.d_model)
        if self.d_model % 2 or self.d_model < 4:
            raise ConfigError(f"{where}.d_model is {self.d_model}; sinusoidal positions need an even number >= 4")
        if self.n_window_infer < self.chunk_frames or self.n_window_infer % self.chunk_frames:
            raise ConfigError(
                f"{where}.n_window_infer is {self.n_window_infer}; expected a multiple of "
                f"2 * n_window = {self.chunk_frames} frames"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """A causal transformer: the Thinker's, the Talker's or the code predictor's (`text_config` and the like)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool
    intermediate_size: int | None = None  # width of the dense layers; None where there are none
    num_experts: int = 0  # 0: every layer dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int | None = None  # None: no shared expert (the Thinker)
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    tie_word_embeddings: bool = False

    def sparse(self, layer: int) -> bool:
        """Whether layer `layer` routes to experts."""
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    @property
    def dense_layers(self) -> bool:
        """Whether any layer is a plain feed-forward one."""
        return not all(self.sparse(i) for i in range(self.num_hidden_layers))

    def check(self, where: str) -> None:
        """Raise ConfigError unless the numbers can be built."""
        _positive(self, where, "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        _positive(self, where, "head_dim", "vocab_size", "max_position_embeddings", "decoder_sparse_step")
        _few(self, where, "num_hidden_layers", "num_experts")
        _divides(
            where, "num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads
        )
        if self.head_dim % 2:
            raise ConfigError(f"{where}.head_dim is {self.head_dim}; rotary positions need an even number")
        if not (self.rms_norm_eps > 0 and self.rope_theta > 0):
            raise ConfigError(f"{where}.rms_norm_eps and {where}.rope_theta must be above zero")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"{where}.num_experts_per_tok is {self.num_experts_per_tok}; "
                f"expected 1 to num_experts = {self.num_experts}"
            )
        if self.num_experts:
            _positive(self, where, "moe_intermediate_size")
        if (self.shared_expert_intermediate_size or 0) < 0:
            raise ConfigError(f"{where}.shared_expert_intermediate_size is below zero")
        if self.dense_layers:
            if self.intermediate_size is None:
                raise ConfigError(f"{where}.intermediate_size is missing; this model has dense layers that need it")
            _positive(self, where, "intermediate_size")


@dataclass(frozen=True)
class TalkerConfig:
    """The Talker and its MTP module (`talker_config`)."""

    text: DecoderConfig
    mtp: DecoderConfig
    num_code_groups: int
    accept_hidden_layer: int
    thinker_hidden_size: int
    resize_dim: int  # inner width of text_projection and hidden_projection
    codec_pad_id: int
    codec_bos_id: int
    codec_eos_token_id: int
    codec_nothink_id: int
    codec_think_bos_id: int
    codec_think_eos_id: int
    speaker_id: Mapping[str, int] = field(default_factory=dict)

    @property
    def codebook_size(self) -> int:
        """Codes per codebook."""
        return self.mtp.vocab_size

    def check(self, where: str) -> None:
        """Raise ConfigError unless the numbers can be built."""
        self.text.check(f"{where}.text_config")
        self.mtp.check(f"{where}.code_predictor_config")
        _positive(self, where, "thinker_hidden_size", "resize_dim")
        _few(self, where, "num_code_groups")
        if self.num_code_groups < 2:
            raise ConfigError(f"{where}.num_code_groups is {self.num_code_groups}; expected 2 or more codebooks")
        if self.text.vocab_size < self.codebook_size + TALKER_SPECIALS:
            raise ConfigError(
                f"{where}.text_config.vocab_size is {self.text.vocab_size}; expected at least the codebook "
                f"({self.codebook_size}) and {TALKER_SPECIALS} control ids"
            )
        ids = {k: getattr(self, k) for k in _CODEC_IDS} | {f"speaker_id.{k}": v for k, v in self.speaker_id.items()}
        for name, value in ids.items():
            _in_vocab(f"{where}.{name}", value, self.text.vocab_size)


_CODEC_IDS = (
    "codec_pad_id",
    "codec_bos_id",
    "codec_eos_token_id",
    "codec_nothink_id",
    "codec_think_bos_id",
    "codec_think_eos_id",
)


@dataclass(frozen=True)
class Code2WavConfig:
    """Code2Wav, the causal decoder from codes to sound (`code2wav_config`)."""

    codebook_size: int
    num_quantizers: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    layer_scale_initial_scale: float
    rms_norm_eps: float
    rope_theta: float
    decoder_dim: int
    upsample_rates: tuple[int, ...]
    upsampling_ratios: tuple[int, ...]
    attention_bias: bool
    sample_rate: int = 24000  # the release does not spell it

    @property
    def frame_samples(self) -> int:
        """Samples that one frame of codes becomes (1920)."""
        return math.prod(self.upsample_rates) * math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Frames per second (12.5)."""
        return self.sample_rate / self.frame_samples

    @property
    def frame_ms(self) -> float:
        """Milliseconds of sound in one frame (80)."""
        return 1000 * self.frame_samples / self.sample_rate

    def check(self, where: str) -> None:
        """Raise ConfigError unless the numbers can be built."""
        _positive(self, where, "codebook_size", "num_quantizers", "hidden_size", "intermediate_size", "sliding_window")
        _few(self, where, "num_hidden_layers")
        _positive(
            self, where, "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "decoder_dim", "head_dim"
        )
        _divides(
            where, "num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads
        )
        if self.head_dim % 2:
            raise ConfigError(f"{where}: head size {self.head_dim}; rotary positions need an even number")
        if not (self.rms_norm_eps > 0 and self.rope_theta > 0):
            raise ConfigError(f"{where}.rms_norm_eps and {where}.rope_theta must be above zero")
        if min((*self.upsample_rates, *self.upsampling_ratios), default=0) < 1:
            raise ConfigError(f"{where}.upsample_rates and upsampling_ratios must be lists of numbers above zero")
        if self.decoder_dim % 2 ** len(self.upsample_rates):
            raise ConfigError(
                f"{where}.decoder_dim is {self.decoder_dim}; expected a multiple of {2 ** len(self.upsample_rates)}, "
                "since every upsampling block halves it"
            )


@dataclass(frozen=True)
class CodecConfig:
    """The codec's encoder and quantizer, in Mimi's shape; lives in a file of its own beside a checkpoint.

    Field names are those of transformers' MimiConfig; `kyutai/mimi`'s config.json reads as it is.
    """

    sampling_rate: int
    audio_channels: int
    hidden_size: int
    num_filters: int
    num_residual_layers: int
    upsampling_ratios: tuple[int, ...]
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    dilation_growth_rate: int
    compress: int
    codebook_size: int
    codebook_dim: int
    num_quantizers: int
    num_semantic_quantizers: int
    vector_quantization_hidden_dimension: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    sliding_window: int
    layer_scale_initial_scale: float
    latent_stride: int = 2  # from the SEANet rate (25 Hz) to the frame rate (12.5 Hz)

    @property
    def frame_samples(self) -> int:
        """Samples per frame of codes (1920)."""
        return math.prod(self.upsampling_ratios) * self.latent_stride

    @property
    def frame_rate(self) -> float:
        """Frames per second (12.5)."""
        return self.sampling_rate / self.frame_samples

    def check(self, where: str = "codec") -> None:
        """Raise ConfigError unless the numbers can be built."""
        sizes = [n for n, kind in CodecConfig.__annotations__.items() if kind is int]
        _positive(self, where, *sizes)
        _divides(
            where, "num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads
        )
        if self.num_semantic_quantizers >= self.num_quantizers:
            raise ConfigError(f"{where}.num_semantic_quantizers must be below num_quantizers = {self.num_quantizers}")
        if min(self.upsampling_ratios, default=0) < 1:
            raise ConfigError(f"{where}.upsampling_ratios must be a list of numbers above zero")
        _equal(f"{where}.audio_channels", self.audio_channels, "mono", 1)
        codebook = self.vector_quantization_hidden_dimension
        _equal(f"{where}.codebook_dim", self.codebook_dim, "vector_quantization_hidden_dimension", codebook)
        if self.head_dim % 2:
            raise ConfigError(f"{where}.head_dim is {self.head_dim}; rotary positions need an even number")


@dataclass(frozen=True)
class OmniConfig:
    """One checkpoint: AuT, Thinker and, unless it is a text-only release, Talker, MTP and Code2Wav."""

    audio: AudioConfig
    text: DecoderConfig
    talker: TalkerConfig | None
    code2wav: Code2WavConfig | None
    im_start_token_id: int
    im_end_token_id: int
    tts_pad_token_id: int
    tts_bos_token_id: int
    tts_eos_token_id: int
    user_token_id: int
    assistant_token_id: int
    system_token_id: int
    audio_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int | None  # transformers does not write it; the tokenizer knows it as <|audio_end|>
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def check(self) -> None:
        """Raise ConfigError unless the numbers fit together."""
        self.audio.check("thinker_config.audio_config")
        self.text.check("thinker_config.text_config")
        if self.audio.output_dim != self.text.hidden_size:
            raise ConfigError(
                f"thinker_config.audio_config.output_dim is {self.audio.output_dim}; expected the Thinker's width "
                f"{self.text.hidden_size}"
            )
        names = ["im_start", "im_end", "user", "assistant", "system", "audio", "audio_start"]
        if self.audio_end_token_id is not None:
            names.append("audio_end")
        if self.talker is not None:
            names += ["tts_pad", "tts_bos", "tts_eos"]
        for name in names:
            _in_vocab(f"{name}_token_id", getattr(self, f"{name}_token_id"), self.text.vocab_size)
        if self.talker is None or self.code2wav is None:
            return
        self.talker.check("talker_config")
        self.code2wav.check("code2wav_config")
        _equal(
            "talker_config.code_predictor_config.hidden_size",
            self.talker.mtp.hidden_size,
            "the Talker's width",
            self.talker.text.hidden_size,
        )
        _equal(
            "talker_config.thinker_hidden_size",
            self.talker.thinker_hidden_size,
            "the Thinker's width",
            self.text.hidden_size,
        )
        _equal(
            "code2wav_config.num_quantizers",
            self.code2wav.num_quantizers,
            "num_code_groups",
            self.talker.num_code_groups,
        )
        _equal(
            "code2wav_config.codebook_size", self.code2wav.codebook_size, "the codebook size", self.talker.codebook_size
        )
        if not 0 <= self.talker.accept_hidden_layer <= self.text.num_hidden_layers:
            raise ConfigError(
                f"talker_config.accept_hidden_layer is {self.talker.accept_hidden_layer}; expected 0 to "
                f"{self.text.num_hidden_layers}, the Thinker's layers"
            )


# ---------------------------------------------------------------------------------------------- reading


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
    names = ("num_code_groups", "accept_hidden_layer", "thinker_hidden_size", *_CODEC_IDS)
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


# ---------------------------------------------------------------------------------------------- checking


def _positive(section: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ConfigError(f"{where}.{name} is {getattr(section, name)}; expected a number above zero")


def _few(section: Any, where: str, *names: str) -> None:
    """What is built one by one: a wrong number should be an error and not hours of work."""
    for name in names:
        if getattr(section, name) > MOST:
            raise ConfigError(f"{where}.{name} is {getattr(section, name)}; expected at most {MOST}")


def _divides(where: str, small: str, a: int, big: str, b: int) -> None:
    if b % a:
        raise ConfigError(f"{where}.{big} is {b}; expected a multiple of {small} = {a}")


def _equal(name: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise ConfigError(f"{name} is {value}; expected {other}, {expected}")


def _in_vocab(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise ConfigError(f"{name} is {value}; expected an id below the vocabulary size {size}")
