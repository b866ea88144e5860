"""Small models with random weights, made without transformers from a config.json of our own.

`omni()` is a whole Omni with its tokenizer. Its weights are those of `random_model.randomize`: a comparison over
all-zero or saturating values would prove nothing (`test_generate.py` asserts that they are neither).
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import antiphon.generate
from antiphon.config_json import parse_config
from antiphon.generate import Omni, Session, Thought
from antiphon.random_model import randomize
from antiphon.tokenizer import Tokenizer
from antiphon.weights import build, save_checkpoint
from tests.tiny_tokenizer import tiny_backend, token_ids, write_tokenizer

VOCAB, CODEBOOK, CODEBOOKS = 768, 48, 3
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": False}
COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 2048, "hidden_act": "silu"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
ROUTES = {"decoder_sparse_step": 1, "mlp_only_layers": []}


def config_json(ids: Mapping[str, int], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json as released but for its sizes; `changes` maps dotted paths to other values (None takes one out)."""
    thinker_ids = {name: ids[name] for name in ("audio_token_id", "audio_start_token_id", "audio_end_token_id")}
    control = ("codec_pad_id", "codec_bos_id", "codec_eos_token_id")
    control += ("codec_nothink_id", "codec_think_bos_id", "codec_think_eos_id")
    config: dict[str, Any] = {
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": True,
        **{name: value for name, value in ids.items() if name not in thinker_ids},
        "thinker_config": {
            **thinker_ids,
            "audio_config": {
                **{"num_mel_bins": 32, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2},
                **{"encoder_ffn_dim": 32, "downsample_hidden_size": 4, "output_dim": 32},
                **{"n_window": 50, "n_window_infer": 800},
            },
            "text_config": {
                **{"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "moe_intermediate_size": 24},
                **(HEADS | COMMON | EXPERTS | ROUTES),
            },
        },
        "talker_config": {
            **{"num_code_groups": CODEBOOKS, "accept_hidden_layer": 1, "thinker_hidden_size": 32},
            **{name: CODEBOOK + 4 + i for i, name in enumerate(control)},
            "speaker_id": {"chelsie": CODEBOOK + 20, "ethan": CODEBOOK + 21, "aiden": CODEBOOK + 22},
            "text_config": {
                **{"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": CODEBOOK + 1024},
                **{"intermediate_size": 28, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
                **(HEADS | COMMON | EXPERTS | ROUTES),
            },
            "code_predictor_config": {
                **{"hidden_size": 24, "num_hidden_layers": 1, "vocab_size": CODEBOOK, "intermediate_size": 32},
                **{"num_code_groups": CODEBOOKS, **HEADS, **COMMON},
            },
        },
        "code2wav_config": {
            **{"codebook_size": CODEBOOK, "num_quantizers": CODEBOOKS, "hidden_size": 16, "intermediate_size": 24},
            **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 6},
            **{"layer_scale_initial_scale": 0.3, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "attention_bias": False},
            **{"decoder_dim": 16, "upsample_rates": [16, 30], "upsampling_ratios": [4], "hidden_act": "silu"},
        },
    }
    for path, value in (changes or {}).items():
        *sections, last = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        if value is None:
            del section[last]
        else:
            section[last] = value
    return config


IDS = token_ids(tiny_backend(VOCAB))  # of the control tokens, as every small config needs them


@lru_cache
def _omni(changes: str, dtype: torch.dtype, seed: int) -> Omni:
    config = parse_config(config_json(IDS, json.loads(changes)))
    model = build(Omni, config, Tokenizer(tiny_backend(VOCAB), config), CPU, dtype)
    randomize(model, seed)
    return model


def omni(changes: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Omni:
    """A small model; the same arguments give the same object, so leave its weights alone."""
    return _omni(json.dumps(changes or {}, sort_keys=True), dtype, seed)


def write_checkpoint(folder: Path, model: Omni) -> Path:
    """The model on disk in the released form, tokenizer included."""
    save_checkpoint(model, folder)
    write_tokenizer(folder, vocab_size=VOCAB)
    return folder


# ------------------------------------------------------------------------------------------------- sound


def sound(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A wandering tone in noise that swells and fades; its loudest part is in the first half second."""
    t = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    tone = np.sin(2 * np.pi * (220 + 40 * seed + 90 * np.sin(2 * np.pi * 1.7 * t)) * t)
    x = (0.3 * tone + 0.05 * rng.standard_normal(len(t))) * (0.6 + 0.4 * np.cos(2 * np.pi * 3.1 * t))
    x[int(0.5 * rate) :] *= 0.4
    return np.clip(x, -0.99, 0.99).astype(np.float32)


def in_pieces(samples: np.ndarray, rate: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Pieces of 10 to 40 ms, as a microphone gives them."""
    rng, start = np.random.default_rng(seed), 0
    while start < len(samples):
        stop = start + int(rng.integers(rate // 100, rate // 25 + 1))
        yield samples[start:stop]
        start = stop


# -------------------------------------------------------------------------------------------- comparison


def assert_same(found: Any, expected: Any, dtype: torch.dtype = torch.float32) -> None:
    """Equal shapes, and values within the tolerance of `dtype` of the largest one; integers are identical."""
    a, b = torch.as_tensor(found), torch.as_tensor(expected)
    assert a.shape == b.shape
    if not b.is_floating_point():
        assert torch.equal(a, b)
    elif b.numel():
        assert b.isfinite().all()
        worst = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        assert worst <= TOLERANCE[dtype], f"differs by {worst:.1e} of the largest value"


def assert_same_reply(found: Any, expected: Any) -> None:
    """Two replies, timings left out."""
    assert found.text_ids == expected.text_ids
    assert found.text == expected.text
    assert found.finish == expected.finish
    assert found.tool_calls == expected.tool_calls
    assert found.sample_rate == expected.sample_rate
    assert_same(found.codes, expected.codes)
    assert_same(found.audio, expected.audio)


# --------------------------------------------------------------------------------------- what is answered


def script(monkeypatch: pytest.MonkeyPatch, model: Omni, *texts: str | list[int], ends: bool = True) -> None:
    """Make the Thinker say `texts`, one a turn, then end (or go on as it likes); it still reads all it says."""
    answers = [model.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    draw, told = Thought._draw, list[Thought]()

    def scripted(self: Thought) -> int:
        token = draw(self)
        if self not in told:
            told.append(self)
        ids = answers[min(told.index(self), len(answers) - 1)]
        if len(self.ids) < len(ids):
            return ids[len(self.ids)]
        return model.config.im_end_token_id if ends else token

    monkeypatch.setattr(Thought, "_draw", scripted)


def stop_speech_after(monkeypatch: pytest.MonkeyPatch, model: Omni, frames: int) -> None:
    """Make the Talker draw codec_eos after `frames` frames of every answer."""
    choose, talker = antiphon.generate.choose, model.config.talker
    assert talker is not None
    stop = talker.codec_eos_token_id

    def stopping(logits: Tensor, sampling: Any, noise: Any = None, *rest: Any) -> Tensor:
        drawn = choose(logits, sampling, noise, *rest)
        over = noise is not None and noise.codebook == 0 and noise.frame == frames
        return torch.full_like(drawn, stop) if over else drawn

    monkeypatch.setattr(antiphon.generate, "choose", stopping)


def recorded(model: Omni, **kwargs: Any) -> tuple[Session, dict[str, list[Tensor]]]:
    """A session and the record of its stages."""
    record: dict[str, list[Tensor]] = {}
    return model.session(record=record, **kwargs), record


def stage(record: dict[str, list[Tensor]], name: str) -> Tensor:
    """One stage of a record."""
    return torch.cat(record[name])
