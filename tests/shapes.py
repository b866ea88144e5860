"""Random checkpoints in the released form, made with transformers: six shapes that the proofs run on.

    python -m tests.shapes FOLDER        writes all six

Weights have a standard deviation of 1/sqrt(fan-in), somewhat more where it decides how much the sound and earlier words
count, and the last convolution is scaled so that sound has an rms of 0.2: a comparison over all-zero or saturating
weights would prove nothing.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.tiny_tokenizer import SPECIAL, TAGS, write_tokenizer

VOCAB = 768

# thinker, talker, mtp and code2wav sizes that differ from BASE
BASE: dict[str, Any] = {
    "audio": {"d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 80, "bins": 128},
    "conv_channels": 8,
    "thinker": {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "thinker_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "head_dim": 16,
    "talker": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "talker_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "shared_expert": 24,
    "norm_topk": True,
    "codebooks": 4,
    "codebook_size": 64,
    "mtp_layers": 2,
    "accept": 2,
    "resize": 36,
    "decoder_dim": 48,
    "upsample_rates": [8, 5, 4, 3],
    "upsampling_ratios": [2, 2],
    "sliding_window": 8,
    "window": 800,
}
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    # widths that are no power of two, as many codebooks as the release, the accept layer in the middle
    "odd": {
        "audio": {"d_model": 42, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 50, "bins": 128},
        "conv_channels": 5,
        "thinker": {"hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3},
        "head_dim": 10,
        "talker": {"hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1},
        "codebooks": 16,
        "accept": 2,
        "resize": 44,
        "decoder_dim": 80,
    },
    # one expert is a dense model; two codebooks; post-norm accept layer
    "dense": {
        "thinker_moe": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 60},
        "talker_moe": {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 40},
        "codebooks": 2,
        "accept": 3,
    },
    # no shared expert, unnormalised routing, the embeddings as accept layer, other rates
    "routed": {
        "thinker_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
        "talker_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
        "shared_expert": 0,
        "norm_topk": False,
        "accept": 0,
        "codebooks": 8,
        "upsample_rates": [6, 5, 4],
        "upsampling_ratios": [2, 2, 2],
        "sliding_window": 3,
    },
    # dense layers between routed ones, 2-second windows, fewer mel bins, a single upsampling stage
    "mixed": {
        "audio": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "bins": 80},
        "thinker_dense": {"mlp_only_layers": [1], "intermediate_size": 56},
        "window": 200,
        "codebooks": 5,
        "upsample_rates": [4, 3],
        "upsampling_ratios": [4],
        "decoder_dim": 24,
        "accept": 1,
    },
    # deep and narrow, 1-second windows, plain multi-head attention
    "deep": {
        "audio": {"d_model": 24, "encoder_layers": 5, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "bins": 64},
        "thinker": {"hidden_size": 24, "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 2},
        "talker": {"hidden_size": 20, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2},
        "mtp_layers": 4,
        "head_dim": 8,
        "window": 100,
        "accept": 5,
        "codebooks": 6,
        "upsample_rates": [2, 3, 5, 2],
        "upsampling_ratios": [2, 2],
    },
}


def config_dict(shape: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Arguments of Qwen3OmniMoeConfig for a shape."""
    s = {**BASE, **shape}
    audio, width = dict(s["audio"]), s["thinker"]["hidden_size"]
    rope = {
        "rope_theta": 1e6,
        "rope_type": "default",
        "mrope_section": _sections(s["head_dim"]),
        "mrope_interleaved": True,
    }
    text_ids = {k: v for k, v in ids.items() if k.startswith(("im_", "tts_", "user", "assistant", "system"))}
    audio_ids = {k: v for k, v in ids.items() if k.startswith("audio")}
    first = VOCAB - len(SPECIAL) - len(TAGS)  # ids that no text has, else transformers takes words for images
    vision = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    vision_ids = {f"{name}_token_id": first + SPECIAL.index(f"<|{token}|>") for name, token in vision.items()}
    size = s["codebook_size"]
    control = ("codec_pad_id", "codec_bos_id", "codec_eos_token_id")
    control += ("codec_nothink_id", "codec_think_bos_id", "codec_think_eos_id")
    common = {"head_dim": s["head_dim"], "rope_parameters": rope, "norm_topk_prob": s["norm_topk"]}
    heads = s["talker"]["num_attention_heads"]
    return {
        **text_ids,
        "thinker_config": {
            **audio_ids,
            **vision_ids,
            "audio_config": {
                **{k: v for k, v in audio.items() if k != "bins"},
                "num_mel_bins": audio["bins"],
                "downsample_hidden_size": s["conv_channels"],
                "output_dim": width,
                "n_window": 50,
                "n_window_infer": s["window"],
            },
            "vision_config": {
                **{"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width},
                **{"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4},
            },
            "text_config": {
                **s["thinker"],
                **s["thinker_moe"],
                **common,
                **s.get("thinker_dense", {}),
                "vocab_size": VOCAB,
            },
        },
        "talker_config": {
            **audio_ids,
            **{name: size + 4 + i for i, name in enumerate(control)},
            "spatial_merge_size": 2,
            "accept_hidden_layer": s["accept"],
            "num_code_groups": s["codebooks"],
            "thinker_hidden_size": width,
            **vision_ids,
            "speaker_id": {"chelsie": size + 20, "ethan": size + 21, "aiden": size + 22},
            "text_config": {
                **s["talker"],
                **s["talker_moe"],
                **common,
                "shared_expert_intermediate_size": s["shared_expert"],
                "intermediate_size": s["resize"],
                "vocab_size": size + 1024,
            },
            "code_predictor_config": {
                **s["talker"],
                "num_hidden_layers": s["mtp_layers"],
                "head_dim": s["head_dim"],
                "intermediate_size": 48,
                "vocab_size": size,
                "num_code_groups": s["codebooks"],
                **s.get("mtp", {}),
            },
        },
        "code2wav_config": {
            "codebook_size": size,
            "num_quantizers": s["codebooks"],
            "hidden_size": heads * 8,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "sliding_window": s["sliding_window"],
            "decoder_dim": s["decoder_dim"],
            "upsample_rates": s["upsample_rates"],
            "upsampling_ratios": s["upsampling_ratios"],
            **s.get("code2wav", {}),
        },
    }


def _sections(head_dim: int) -> list[int]:
    third = head_dim // 2 // 3
    return [head_dim // 2 - 2 * third, third, third]


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Weights of std 1/sqrt(fan-in), norms and scales around their neutral values, nothing left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "visual" in name:
            continue
        if name.endswith("_layer_scale.scale") or name.endswith(".gamma"):
            p.copy_(0.3 + 0.1 * noise)
        elif ("norm" in name and name.endswith("weight")) or name.endswith(".beta"):
            p.copy_(
                (1.5 if "q_norm" in name or "k_norm" in name else 1) + 0.1 * noise
            )  # so that single positions count
        elif p.ndim == 1:
            p.copy_(0.1 * noise)
        elif "embed" in name:
            p.copy_(0.4 * noise)  # so that what was said before counts, and not the last token alone
        else:
            fan_in = p.shape[-1] if p.ndim == 3 and "experts" in name else p.numel() // max(len(p), 1)
            # three times as large in AuT's convolutions, so that it hears the sound and not only its positions
            p.copy_(noise * max(fan_in, 1) ** -0.5 * (3 if "conv2d" in name else 1))
    if not model.has_talker:
        return
    decoder = model.code2wav
    c = decoder.config
    codes = torch.randint(0, c.codebook_size, (1, c.num_quantizers, 24), generator=generator)
    last, clamp = decoder.decoder[-1].conv, torch.Tensor.clamp
    try:  # the rms before the clamp
        torch.Tensor.clamp = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]
        for _ in range(2):
            wave = decoder(codes)
            last.bias -= wave.mean()
            scale = 0.2 / (wave - wave.mean()).square().mean().sqrt()
            last.weight *= scale
            last.bias *= scale
    finally:
        torch.Tensor.clamp = clamp  # type: ignore[method-assign]


def write_shape(
    name: str, folder: Path, seed: int = 0, form: str = "json", shard: str = "600KB", **changes: Any
) -> Path:
    """Write the random checkpoint `name` to `folder`, tokenizer included."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, form, VOCAB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Qwen3OmniMoeConfig(**config_dict({**SHAPES[name], **changes}, ids))
        torch.manual_seed(seed)
        model = Qwen3OmniMoeForConditionalGeneration(config).eval()
        randomize(model, seed)
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def main() -> None:
    """Write all shapes below the folder that is given."""
    root = Path(sys.argv[1])
    for name in SHAPES:
        folder = write_shape(name, root / name)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(
            f"{name:8} {size / 1e6:6.2f} MB  {json.loads((folder / 'config.json').read_text())['model_type']}  {folder}"
        )


if __name__ == "__main__":
    main()
