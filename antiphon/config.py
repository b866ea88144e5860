"""The released config.json as frozen dataclasses: every size and rate of the system is derived here, once.

Fields are named as in the release and have no defaults, except the few that it does not have because its classes fix
them (the number of stride-2 convolutions). Reading them from a file is in config_json.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from antiphon.errors import ConfigError

MOST = 10_000  # layers, experts or codebooks
TALKER_SPECIALS = 1024  # the last ids of the Talker's vocabulary are control ids, never codes
CODEC_IDS = (
    "codec_pad_id",
    "codec_bos_id",
    "codec_eos_token_id",
    "codec_nothink_id",
    "codec_think_bos_id",
    "codec_think_eos_id",
)


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
        ids = {k: getattr(self, k) for k in CODEC_IDS} | {f"speaker_id.{k}": v for k, v in self.speaker_id.items()}
        for name, value in ids.items():
            _in_vocab(f"{where}.{name}", value, self.text.vocab_size)


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
