"""config.json: both spellings, no defaults, and a plain sentence for every number that cannot be."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from antiphon.config import AudioConfig, OmniConfig
from antiphon.config_json import parse_config, read_config, read_json
from antiphon.errors import CapacityError, ConfigError
from antiphon.generate import Omni, load
from antiphon.tokenizer import Tokenizer
from antiphon.weights import build
from tests.models import CODEBOOK, CPU, IDS, VOCAB, config_json, sound
from tests.test_full_size import RELEASED
from tests.tiny_tokenizer import tiny_backend

MISSING = object()
# what is not read: images and video, training, sizes of buffers
UNUSED = {
    *("thinker_config.image_token_id", "thinker_config.video_token_id", "thinker_config.vision_start_token_id"),
    *("thinker_config.vision_end_token_id", "thinker_config.position_id_per_seconds"),
    *("thinker_config.seconds_per_chunk", "thinker_config.audio_config.conv_chunksize"),
    *("thinker_config.audio_config.max_source_positions", "talker_config.audio_start_token_id"),
    *("talker_config.audio_end_token_id", "talker_config.audio_token_id", "talker_config.image_token_id"),
    *("talker_config.video_token_id", "talker_config.vision_start_token_id", "talker_config.position_id_per_seconds"),
    *("talker_config.seconds_per_chunk", "talker_config.spatial_merge_size"),
    *("code2wav_config.max_position_embeddings", "code2wav_config.attention_dropout"),
    "thinker_config.text_config.shared_expert_intermediate_size",  # the Thinker has none
    "talker_config.text_config.tie_word_embeddings",  # and the Talker nothing to tie
    *(f"{box}_config.text_config.rope_scaling" for box in ("thinker", "talker")),  # 1-D without images
}
# what transformers leaves out where it is the only value there is, or follows from the others
IMPLIED = {
    *("thinker_config.audio_config.activation_function", "thinker_config.audio_config.scale_embedding"),
    *(f"{box}_config.text_config.hidden_act" for box in ("thinker", "talker")),
    *("talker_config.code_predictor_config.hidden_act", "code2wav_config.hidden_act"),
    *("talker_config.code_predictor_config.num_code_groups", "thinker_config.text_config.tie_word_embeddings"),
}
DERIVED = {f"{box}_config.text_config.head_dim" for box in ("thinker", "talker")}  # hidden_size / heads


def paths(section: dict[str, Any], above: str = "") -> list[str]:
    """Dotted paths of all fields, sections included."""
    found: list[str] = []
    for name, value in section.items():
        found.append(above + name)
        if isinstance(value, dict) and name not in ("speaker_id", "rope_scaling"):
            found += paths(value, f"{above}{name}.")
    return found


PATHS = paths(RELEASED)


def changed(path: str, value: Any = MISSING, source: dict[str, Any] = RELEASED) -> dict[str, Any]:
    """The config with another value at `path`, or without it."""
    config = copy.deepcopy(source)
    *above, last = path.split(".")
    section = config
    for name in above:
        section = section[name]
    if value is MISSING:
        del section[last]
    else:
        section[last] = value
    return config


def refusal(config: Any) -> str:
    """The one sentence with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        parse_config(config)
    text = str(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 300
    return text


# ----------------------------------------------------------------------------------------- what is released


def test_the_release_in_numbers() -> None:
    c = parse_config(RELEASED)
    assert c.talker is not None
    assert c.code2wav is not None
    assert c.audio.mel.frame_rate == 100
    assert (c.audio.chunk_frames, c.audio.chunk_tokens, c.audio.window_chunks, c.audio.conv_bins) == (100, 13, 8, 16)
    assert c.audio.tokens(3000) == 390
    assert [c.audio.tokens(n) for n in (0, 1, 8, 50, 99, 100, 101, 200, 800)] == [0, 1, 1, 7, 13, 13, 14, 26, 104]
    assert c.code2wav.frame_samples == 1920
    assert c.code2wav.frame_rate == 12.5
    assert c.code2wav.frame_ms == 80
    assert c.code2wav.sample_rate == 24000
    assert c.code2wav.head_dim == 64
    assert c.talker.codebook_size == 2048
    assert c.talker.resize_dim == 2048
    assert c.talker.num_code_groups == c.code2wav.num_quantizers == 16
    assert c.talker.speaker_id == {"chelsie": 2301, "ethan": 2302, "aiden": 2303}
    assert (c.talker.text.rope_theta, c.talker.mtp.rope_theta, c.code2wav.rope_theta) == (1e6, 1e6, 1e4)
    assert c.talker.accept_hidden_layer == 24
    assert c.text.shared_expert_intermediate_size is None
    assert c.talker.text.shared_expert_intermediate_size == 768
    assert c.talker.mtp.num_experts == 0
    assert (c.text.num_experts_per_tok, c.talker.text.num_experts_per_tok) == (8, 6)
    assert all(c.text.sparse(i) for i in range(48))
    assert not c.text.dense_layers
    assert c.talker.mtp.dense_layers
    assert not c.text.tie_word_embeddings
    assert dict(c.raw) == RELEASED


@pytest.mark.parametrize(("layers", "tokens", "bins"), [(1, 50, 64), (2, 25, 32), (3, 13, 16), (4, 7, 8)])
def test_other_rates_of_the_encoder(layers: int, tokens: int, bins: int) -> None:
    c = parse_config(changed("thinker_config.audio_config.conv_layers", layers)).audio
    assert (c.chunk_tokens, c.conv_bins) == (tokens, bins)
    assert c.tokens(3000) == 30 * tokens


def test_other_rates_of_the_decoder() -> None:
    config = changed("code2wav_config.upsample_rates", [6, 5, 4])
    decoder = parse_config(config).code2wav
    assert decoder is not None
    assert (decoder.frame_samples, decoder.frame_rate, decoder.frame_ms) == (480, 50, 20)


def test_a_name_is_found_in_any_case() -> None:
    c = parse_config(changed("talker_config.speaker_id", {"Ethan": 2302, "CHELSIE": 2301}))
    assert c.talker is not None
    assert c.talker.speaker_id == {"ethan": 2302, "chelsie": 2301}


def as_transformers_spells_it() -> dict[str, Any]:
    config = copy.deepcopy(RELEASED)
    talker = config["talker_config"]
    talker["text_config"]["num_local_experts"] = talker["text_config"].pop("num_experts")
    sections = [config["thinker_config"]["text_config"], talker["text_config"]]
    for section in (*sections, talker["code_predictor_config"], config["code2wav_config"]):
        rope = section.pop("rope_scaling", {"rope_type": "default"})
        section["rope_parameters"] = {"rope_theta": float(section.pop("rope_theta")), **rope}
    return config


def test_both_spellings_are_the_same_config() -> None:
    theirs = as_transformers_spells_it()
    assert "rope_theta" not in theirs["code2wav_config"]
    assert parse_config(theirs) == parse_config(RELEASED)
    assert parse_config(theirs) != parse_config(changed("code2wav_config.rope_theta", 10001))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_read_may_be_missing(path: str) -> None:
    if path in UNUSED | IMPLIED:
        assert parse_config(changed(path)) == parse_config(RELEASED)


@pytest.mark.parametrize("form", ["missing", "null"])
@pytest.mark.parametrize("path", [p for p in PATHS if p not in UNUSED | IMPLIED | DERIVED])
def test_every_missing_field_is_named(path: str, form: str) -> None:
    if path == "thinker_config.audio_end_token_id":  # transformers does not write it: the tokenizer knows it
        assert parse_config(changed(path)).audio_end_token_id is None
        return
    text = refusal(changed(path, MISSING if form == "missing" else None))
    if path == "model_type":
        assert text.startswith("model_type is None; Antiphon loads 'qwen3_omni_moe' checkpoints")
        return
    shown = path.replace("rope_theta", "rope_parameters")
    dense = path == "talker_config.code_predictor_config.intermediate_size"  # no experts: every layer needs it
    rest = "; this model has dense layers that need it" if dense else " from config.json; expected "
    assert text.startswith(f"{shown} is missing{rest}")


@pytest.mark.parametrize("path", sorted(DERIVED))
def test_a_head_size_that_is_left_out_is_derived_as_transformers_does(path: str) -> None:
    assert parse_config(changed(path)) != parse_config(RELEASED)  # 64, and 128 in the release
    box = path.removesuffix(".head_dim")
    whole = changed(path)
    heads = {"thinker_config.text_config": 16, "talker_config.text_config": 8}[box]
    assert parse_config(changed(f"{box}.num_attention_heads", heads, whole)) == parse_config(
        changed(f"{box}.num_attention_heads", heads)
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", ["12", [7], {"a": 1}, 2.5, True, [[1]], ""], ids=repr)
def test_a_value_of_another_type(path: str, value: Any) -> None:
    """Either refused by name, or of the type that the field has."""
    here = RELEASED
    for name in path.split("."):
        here = here[name]
    numbers = isinstance(value, float) and isinstance(here, int | float) and "rope_theta" in path
    if path in UNUSED or type(value) is type(here) or numbers:
        return
    text = refusal(changed(path, value))
    assert path in text or f"{path.rpartition('.')[0]}.rope_" in text


def test_numbers_may_be_integers() -> None:
    assert parse_config(changed("code2wav_config.layer_scale_initial_scale", 1)) != parse_config(RELEASED)
    assert parse_config(changed("code2wav_config.rope_theta", 10000.0)) == parse_config(RELEASED)


IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("thinker_config.audio_config.d_model", 1281, "expected a multiple of encoder_attention_heads = 20"),
    ("thinker_config.audio_config.d_model", 0, "expected a number above zero"),
    ("thinker_config.audio_config.encoder_attention_heads", 3, "expected a multiple of encoder_attention_heads = 3"),
    ("thinker_config.audio_config.n_window", 0, "n_window is 0; expected a number above zero"),
    ("thinker_config.audio_config.n_window", 1000, "n_window_infer is 800; expected a multiple"),
    ("thinker_config.audio_config.n_window_infer", 150, "expected a multiple of 2 * n_window = 100 frames"),
    ("thinker_config.audio_config.n_window_infer", 0, "expected a multiple of 2 * n_window"),
    ("thinker_config.audio_config.output_dim", 1024, "expected the Thinker's width 2048"),
    ("thinker_config.audio_config.conv_layers", 0, "conv_layers is 0"),
    ("thinker_config.audio_config.activation_function", "relu", "only 'gelu' is implemented"),
    ("thinker_config.audio_config.scale_embedding", True, "only False is implemented"),
    ("thinker_config.text_config.hidden_size", -2048, "expected a number above zero"),
    ("thinker_config.text_config.num_key_value_heads", 5, "expected a multiple of num_key_value_heads = 5"),
    ("thinker_config.text_config.num_key_value_heads", 64, "expected a multiple of num_key_value_heads = 64"),
    ("thinker_config.text_config.head_dim", 127, "rotary positions need an even number"),
    ("thinker_config.text_config.head_dim", 0, "head_dim is 0; expected a number above zero"),
    ("thinker_config.text_config.num_experts_per_tok", 129, "expected 1 to num_experts = 128"),
    ("thinker_config.text_config.num_experts_per_tok", 0, "expected 1 to num_experts = 128"),
    ("thinker_config.text_config.num_experts", 0, "intermediate_size is missing; this model has dense layers"),
    ("thinker_config.text_config.num_experts", -1, "num_experts"),
    ("thinker_config.text_config.mlp_only_layers", [3], "intermediate_size is missing; this model has dense layers"),
    ("thinker_config.text_config.decoder_sparse_step", 2, "intermediate_size is missing; this model has dense layers"),
    ("thinker_config.text_config.decoder_sparse_step", 0, "expected a number above zero"),
    ("thinker_config.text_config.moe_intermediate_size", 0, "expected a number above zero"),
    ("thinker_config.text_config.rms_norm_eps", 0, "must be above zero"),
    ("thinker_config.text_config.rope_theta", -1, "must be above zero"),
    ("thinker_config.text_config.rope_theta", float("inf"), "rope_theta"),
    ("thinker_config.text_config.rope_theta", 10**400, "rope_theta"),
    ("thinker_config.text_config.rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("thinker_config.text_config.rms_norm_eps", float("inf"), "rms_norm_eps"),
    ("thinker_config.text_config.hidden_act", "gelu", "only 'silu' is implemented"),
    ("thinker_config.text_config.vocab_size", 151675, "audio_token_id is 151675; expected an id below the vocabulary"),
    ("thinker_config.text_config.rope_scaling", {"rope_type": "yarn", "factor": 4}, "rope_type"),
    ("thinker_config.text_config.rope_scaling", {"type": "linear", "factor": 2}, "'linear'"),
    ("thinker_config.text_config.rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e6}, "rope_type"),
    ("thinker_config.audio_end_token_id", 152064, "audio_end_token_id is 152064; expected an id below the vocabulary"),
    ("thinker_config.audio_end_token_id", -1, "audio_end_token_id"),
    ("im_end_token_id", 152064, "im_end_token_id is 152064; expected an id below the vocabulary size 152064"),
    ("tts_eos_token_id", -1, "tts_eos_token_id is -1"),
    ("talker_config.accept_hidden_layer", 49, "expected 0 to 48, the Thinker's layers"),
    ("talker_config.accept_hidden_layer", -1, "expected 0 to 48"),
    ("talker_config.num_code_groups", 1, "num_code_groups"),
    ("talker_config.num_code_groups", 15, "num_code_groups"),
    ("talker_config.thinker_hidden_size", 1024, "expected the Thinker's width, 2048"),
    ("talker_config.codec_eos_token_id", 3072, "expected an id below the vocabulary size 3072"),
    ("talker_config.speaker_id", {"ethan": 2302, "loud": 3072}, "talker_config.speaker_id.loud is 3072"),
    ("talker_config.speaker_id", {"ethan": -1}, "speaker_id.ethan is -1"),
    ("talker_config.speaker_id", {"ethan": "2302"}, "must map voice names to integers"),
    ("talker_config.speaker_id", {"ethan": True}, "must map voice names to integers"),
    ("talker_config.text_config.vocab_size", 2048, "expected at least the codebook (2048) and 1024 control ids"),
    ("talker_config.text_config.intermediate_size", 0, "talker_config"),
    ("talker_config.text_config.num_attention_heads", 0, "expected a number above zero"),
    ("talker_config.text_config.shared_expert_intermediate_size", -1, "shared_expert_intermediate_size"),
    ("talker_config.code_predictor_config.num_code_groups", 15, "only 16 is implemented"),
    ("talker_config.code_predictor_config.vocab_size", 1024, "code2wav_config.codebook_size is 2048"),
    ("talker_config.code_predictor_config.intermediate_size", 0, "intermediate_size is 0"),
    ("talker_config.code_predictor_config.hidden_size", 2048, "hidden_size is 2048; expected the Talker's width, 1024"),
    ("code2wav_config.num_quantizers", 15, "expected num_code_groups, 16"),
    ("code2wav_config.codebook_size", 1024, "expected the codebook size, 2048"),
    ("code2wav_config.decoder_dim", 1544, "expected a multiple of 16, since every upsampling block halves it"),
    ("code2wav_config.upsample_rates", [8, 5, 4, 0], "must be lists of numbers above zero"),
    ("code2wav_config.upsample_rates", [8, 5, "4"], "expected a list of integers"),
    ("code2wav_config.upsample_rates", [True, True], "expected a list of integers"),
    ("code2wav_config.upsampling_ratios", [-2, 2], "must be lists of numbers above zero"),
    ("code2wav_config.sliding_window", 0, "expected a number above zero"),
    ("code2wav_config.num_attention_heads", 24, "expected a multiple of num_key_value_heads = 16"),
    ("code2wav_config.hidden_size", 1008, "head size 63; rotary positions need an even number"),
    ("code2wav_config.rope_theta", 0, "must be above zero"),
    ("code2wav_config.layer_scale_initial_scale", float("nan"), "layer_scale_initial_scale"),
    # counts that would keep a machine busy for years
    ("thinker_config.audio_config.encoder_layers", 2**63, "expected at most 10000"),
    ("thinker_config.audio_config.conv_layers", 2**63, "expected at most 10000"),
    ("thinker_config.text_config.num_hidden_layers", 2**63, "expected at most 10000"),
    ("thinker_config.text_config.num_experts", 2**63, "expected at most 10000"),
    ("talker_config.num_code_groups", 2**63, "num_code_groups"),
    ("talker_config.text_config.num_hidden_layers", 2**63, "expected at most 10000"),
    ("talker_config.code_predictor_config.num_hidden_layers", 2**63, "expected at most 10000"),
    ("code2wav_config.num_hidden_layers", 2**63, "expected at most 10000"),
]


@pytest.mark.parametrize(("path", "value", "says"), IMPOSSIBLE, ids=lambda x: str(x)[-40:])
def test_an_impossible_number(path: str, value: Any, says: str) -> None:
    assert says in refusal(changed(path, value))


def test_both_empty_upsamplings() -> None:
    config = changed("code2wav_config.upsample_rates", [], changed("code2wav_config.upsampling_ratios", []))
    assert "must be lists of numbers above zero" in refusal(config)


@pytest.mark.parametrize("kind", ["qwen3_asr", "qwen2_5_omni", "", None, 3, ["qwen3_omni_moe"]])
def test_another_model(kind: Any) -> None:
    text = refusal(changed("model_type", kind))
    assert text == f"model_type is {kind!r}; Antiphon loads 'qwen3_omni_moe' checkpoints (Qwen3-Omni)"


def test_text_only_configs_need_no_talker() -> None:
    config = changed("enable_audio_output", False)
    for name in ("talker_config", "code2wav_config"):
        del config[name]
    c = parse_config(config)
    assert c.talker is None
    assert c.code2wav is None
    assert parse_config(changed("enable_audio_output", False)) == c
    assert parse_config(changed("tts_pad_token_id", 10**9, config)).tts_pad_token_id == 10**9  # nothing looks it up


# ---------------------------------------------------------------------------------------------- the file


def test_from_a_folder_or_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert read_config(tmp_path) == read_config(str(tmp_path / "config.json")) == parse_config(RELEASED)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not readable as JSON"),
        (b"{", "is not readable as JSON"),
        (b"model_type: qwen3_omni_moe\n", "is not readable as JSON"),
        (b'{"a": 1,}', "is not readable as JSON"),
        (b"\xff\xfe{\x00}\x00", "is not readable as JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not readable as JSON"),
        (b"[" * 100_000, "is not readable as JSON"),
        (b"[]", "holds list; expected a JSON object"),
        (b"null", "holds NoneType; expected a JSON object"),
        (b'"config"', "holds str; expected a JSON object"),
        (b"{}", "model_type is None"),
    ],
    ids=lambda x: repr(x)[:24],
)
def test_a_file_that_is_no_config(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist; expected a folder with a Qwen3-Omni config"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="is not readable as JSON"):
        read_json(tmp_path / "config.json")


# ----------------------------------------------------------------------------------------------- anything


JUNK = st.one_of(
    st.just(MISSING),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**400, "", [], {}, [0], [None], float("inf"), -0.0]),
    st.lists(st.integers(-2, 9) | st.none() | st.text(max_size=2), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers() | st.none(), max_size=3),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(PATHS), JUNK), min_size=1, max_size=3))
@example([("thinker_config.text_config.rope_theta", 10**400)])
@example([("talker_config.speaker_id", {"": None})])
def test_junk_is_refused_or_makes_a_config(changes: list[tuple[str, Any]]) -> None:
    config: Any = copy.deepcopy(RELEASED)
    for path, value in sorted(changes, key=lambda change: -change[0].count(".")):  # deep ones first
        config = changed(path, value, config) if _there(config, path) else config
    try:
        parsed = parse_config(config)
    except ConfigError:
        return
    assert isinstance(parsed, OmniConfig)
    parsed.check()
    hash((parsed.audio, parsed.text))  # every value is of a plain type
    assert parse_config(json.loads(json.dumps(config))) == parsed


def _there(config: dict[str, Any], path: str) -> bool:
    for name in path.split("."):
        if not isinstance(config, dict) or name not in config:
            return False
        config = config[name]
    return True


SMALL = config_json(IDS)
SMALL_PATHS = [path for path in paths(SMALL) if not path.endswith(("_token_id", "model_type", "_config"))]
SIZES = [0, 1, 2, 3, 4, 5, 8, 12, 24, 48, 100, CODEBOOK + 1024, [1], [3], [2, 2], [4, 15], MISSING, 0.5]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(SMALL_PATHS), st.sampled_from(SIZES)), min_size=1, max_size=2))
@example([("code2wav_config.sliding_window", 1)])
@example([("thinker_config.audio_config.conv_layers", 1)])
@example([("code2wav_config.upsample_rates", [1])])
@example([("thinker_config.text_config.num_experts", 0), ("thinker_config.text_config.intermediate_size", 5)])
def test_a_config_that_is_accepted_works(changes: list[tuple[str, Any]]) -> None:
    """It can be built, listens and speaks; or it is refused."""
    config = SMALL
    for path, value in changes:
        config = changed(path, value, config) if value is not MISSING or _there(config, path) else config
    try:
        parsed = parse_config(config)
    except ConfigError:
        return
    model = build(Omni, parsed, Tokenizer(tiny_backend(VOCAB), parsed), CPU, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    content = [{"type": "audio", "audio": (sound(1.1), 16000)}, {"type": "text", "text": "Hello."}]
    try:
        reply = model.generate([{"role": "user", "content": content}], max_text_tokens=3, max_frames=2)
    except CapacityError:  # a context of two positions, say
        return
    assert len(reply.text_ids) <= 3
    assert parsed.code2wav is not None
    assert len(reply.audio) == len(reply.codes) * parsed.code2wav.frame_samples


def test_token_counts_are_those_of_the_convolutions() -> None:
    """Counted by the encoder's own arithmetic, one stride after another."""
    c = AudioConfig(80, 32, 1, 2, 64, 8, 40, 50, 800)
    for frames in range(1, 401):
        conv = torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)
        full, rest = divmod(frames, 100)
        length = rest
        for _ in range(3):
            length = conv(torch.zeros(1, 1, length)).shape[-1] if length else 0
        assert c.tokens(frames) == 13 * full + length
