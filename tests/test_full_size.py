"""The released model at its full size, on the meta device: the names and shapes on disk, and the sizes of the boxes."""

import math
import re
from itertools import product
from typing import Any

import pytest
import torch

from antiphon.config import OmniConfig
from antiphon.config_json import parse_config
from antiphon.model import Boxes
from antiphon.weights import released_names, released_tensors

META = torch.device("meta")
ROPE = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": False}
DECODER = {
    **COMMON,
    **{"head_dim": 128, "num_experts": 128, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    **{"max_position_embeddings": 65536, "rope_scaling": ROPE, "tie_word_embeddings": False},
}
RELEASED: dict[str, Any] = {  # config.json of Qwen3-Omni-30B-A3B-Instruct, as far as audio and text go
    "model_type": "qwen3_omni_moe",
    "enable_audio_output": True,
    **{"im_start_token_id": 151644, "im_end_token_id": 151645, "tts_pad_token_id": 151671, "tts_bos_token_id": 151672},
    **{"tts_eos_token_id": 151673, "system_token_id": 8948, "user_token_id": 872, "assistant_token_id": 77091},
    "thinker_config": {
        **{"audio_start_token_id": 151669, "audio_end_token_id": 151670, "audio_token_id": 151675},
        **{"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652},
        **{"vision_end_token_id": 151653, "position_id_per_seconds": 13, "seconds_per_chunk": 2},
        "audio_config": {
            **{"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20},
            **{"encoder_ffn_dim": 5120, "activation_function": "gelu", "downsample_hidden_size": 480},
            **{"output_dim": 2048, "n_window": 50, "n_window_infer": 800, "conv_chunksize": 500},
            **{"max_source_positions": 1500, "scale_embedding": False},
        },
        "text_config": {
            **{"num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "shared_expert_intermediate_size": 0},
            **{"vocab_size": 152064, **DECODER},
        },
    },
    "talker_config": {
        **{"accept_hidden_layer": 24, "num_code_groups": 16, "thinker_hidden_size": 2048},
        **{"codec_pad_id": 2148, "codec_bos_id": 2149, "codec_eos_token_id": 2150, "codec_nothink_id": 2155},
        **{"codec_think_bos_id": 2156, "codec_think_eos_id": 2157, "audio_start_token_id": 151669},
        **{"audio_end_token_id": 151670, "audio_token_id": 151675, "image_token_id": 151655, "video_token_id": 151656},
        **{"vision_start_token_id": 151652, "position_id_per_seconds": 13, "seconds_per_chunk": 2},
        "spatial_merge_size": 2,
        "speaker_id": {"chelsie": 2301, "ethan": 2302, "aiden": 2303},
        "text_config": {
            **{"num_hidden_layers": 20, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 2},
            **{"num_experts_per_tok": 6, "moe_intermediate_size": 384, "shared_expert_intermediate_size": 768},
            **{"vocab_size": 3072, **DECODER},
        },
        "code_predictor_config": {
            **{"num_hidden_layers": 5, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"head_dim": 128, "intermediate_size": 3072, "vocab_size": 2048, "num_code_groups": 16},
            **{"max_position_embeddings": 32768, **COMMON},
        },
    },
    "code2wav_config": {
        **{"codebook_size": 2048, "num_quantizers": 16, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "sliding_window": 72},
        **{"layer_scale_initial_scale": 0.01, "max_position_embeddings": 8000, "decoder_dim": 1536},
        **{"upsample_rates": [8, 5, 4, 3], "upsampling_ratios": [2, 2], "attention_dropout": 0.0},
        **COMMON,
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000},
    },
}
# The release's tensors outside thinker.visual.*, folded: {0..31} stands for a range, {k,v} for alternatives.
TENSORS = """
thinker.audio_tower.
    layers.{0..31}.self_attn.{k,v,q,out}_proj.weight 1280x1280
    layers.{0..31}.self_attn.{k,v,q,out}_proj.bias 1280
    layers.{0..31}.self_attn_layer_norm.{weight,bias} 1280
    layers.{0..31}.fc1.weight 5120x1280
    layers.{0..31}.fc1.bias 5120
    layers.{0..31}.fc2.weight 1280x5120
    layers.{0..31}.{fc2,final_layer_norm}.bias 1280
    layers.{0..31}.final_layer_norm.weight 1280
    ln_post.{weight,bias} 1280
    conv2d1.weight 480x1x3x3
    conv2d{1,2,3}.bias 480
    conv2d{2,3}.weight 480x480x3x3
    conv_out.weight 1280x7680
    proj1.weight 1280x1280
    proj1.bias 1280
    proj2.weight 2048x1280
    proj2.bias 2048
thinker.
    model.embed_tokens.weight 152064x2048
    model.layers.{0..47}.self_attn.q_proj.weight 4096x2048
    model.layers.{0..47}.self_attn.{k,v}_proj.weight 512x2048
    model.layers.{0..47}.self_attn.o_proj.weight 2048x4096
    model.layers.{0..47}.self_attn.{q,k}_norm.weight 128
    model.layers.{0..47}.mlp.gate.weight 128x2048
    model.layers.{0..47}.mlp.experts.{0..127}.{gate,up}_proj.weight 768x2048
    model.layers.{0..47}.mlp.experts.{0..127}.down_proj.weight 2048x768
    model.layers.{0..47}.{input,post_attention}_layernorm.weight 2048
    model.norm.weight 2048
    lm_head.weight 152064x2048
talker.
    model.layers.{0..19}.self_attn.q_proj.weight 2048x1024
    model.layers.{0..19}.self_attn.{k,v}_proj.weight 256x1024
    model.layers.{0..19}.self_attn.o_proj.weight 1024x2048
    model.layers.{0..19}.self_attn.{q,k}_norm.weight 128
    model.layers.{0..19}.mlp.gate.weight 128x1024
    model.layers.{0..19}.mlp.experts.{0..127}.{gate,up}_proj.weight 384x1024
    model.layers.{0..19}.mlp.experts.{0..127}.down_proj.weight 1024x384
    model.layers.{0..19}.mlp.shared_expert.{gate,up}_proj.weight 768x1024
    model.layers.{0..19}.mlp.shared_expert.down_proj.weight 1024x768
    model.layers.{0..19}.mlp.shared_expert_gate.weight 1x1024
    model.layers.{0..19}.{input,post_attention}_layernorm.weight 1024
    model.norm.weight 1024
    model.codec_embedding.weight 3072x1024
    {text,hidden}_projection.linear_fc1.weight 2048x2048
    {text,hidden}_projection.linear_fc1.bias 2048
    {text,hidden}_projection.linear_fc2.weight 1024x2048
    {text,hidden}_projection.linear_fc2.bias 1024
    codec_head.weight 3072x1024
talker.code_predictor.
    model.layers.{0..4}.self_attn.q_proj.weight 2048x1024
    model.layers.{0..4}.self_attn.{k,v}_proj.weight 1024x1024
    model.layers.{0..4}.self_attn.o_proj.weight 1024x2048
    model.layers.{0..4}.self_attn.{q,k}_norm.weight 128
    model.layers.{0..4}.mlp.{gate,up}_proj.weight 3072x1024
    model.layers.{0..4}.mlp.down_proj.weight 1024x3072
    model.layers.{0..4}.{input,post_attention}_layernorm.weight 1024
    model.norm.weight 1024
    model.codec_embedding.{0..14}.weight 2048x1024
    lm_head.{0..14}.weight 2048x1024
code2wav.
    pre_transformer.layers.{0..7}.self_attn.{q,k,v,o}_proj.weight 1024x1024
    pre_transformer.layers.{0..7}.mlp.{gate,up}_proj.weight 3072x1024
    pre_transformer.layers.{0..7}.mlp.down_proj.weight 1024x3072
    pre_transformer.layers.{0..7}.{input,post_attention}_layernorm.weight 1024
    pre_transformer.layers.{0..7}.{self_attn,mlp}_layer_scale.scale 1024
    pre_transformer.norm.weight 1024
    code_embedding.weight 32768x1024
    upsample.{0..1}.0.conv.weight 1024x1024x2
    upsample.{0..1}.0.conv.bias 1024
    upsample.{0..1}.1.gamma 1024
    upsample.{0..1}.1.dwconv.conv.weight 1024x1x7
    upsample.{0..1}.1.dwconv.conv.bias 1024
    upsample.{0..1}.1.norm.{weight,bias} 1024
    upsample.{0..1}.1.pwconv1.weight 4096x1024
    upsample.{0..1}.1.pwconv1.bias 4096
    upsample.{0..1}.1.pwconv2.weight 1024x4096
    upsample.{0..1}.1.pwconv2.bias 1024
    decoder.0.conv.weight 1536x1024x7
    decoder.0.conv.bias 1536
    decoder.1.block.0.{alpha,beta} 1536
    decoder.1.block.1.conv.weight 1536x768x16
    decoder.1.block.1.conv.bias 768
    decoder.1.block.{2..4}.act{1,2}.{alpha,beta} 768
    decoder.1.block.{2..4}.conv1.conv.weight 768x768x7
    decoder.1.block.{2..4}.conv{1,2}.conv.bias 768
    decoder.1.block.{2..4}.conv2.conv.weight 768x768x1
    decoder.2.block.0.{alpha,beta} 768
    decoder.2.block.1.conv.weight 768x384x10
    decoder.2.block.1.conv.bias 384
    decoder.2.block.{2..4}.act{1,2}.{alpha,beta} 384
    decoder.2.block.{2..4}.conv1.conv.weight 384x384x7
    decoder.2.block.{2..4}.conv{1,2}.conv.bias 384
    decoder.2.block.{2..4}.conv2.conv.weight 384x384x1
    decoder.3.block.0.{alpha,beta} 384
    decoder.3.block.1.conv.weight 384x192x8
    decoder.3.block.1.conv.bias 192
    decoder.3.block.{2..4}.act{1,2}.{alpha,beta} 192
    decoder.3.block.{2..4}.conv1.conv.weight 192x192x7
    decoder.3.block.{2..4}.conv{1,2}.conv.bias 192
    decoder.3.block.{2..4}.conv2.conv.weight 192x192x1
    decoder.4.block.0.{alpha,beta} 192
    decoder.4.block.1.conv.weight 192x96x6
    decoder.4.block.1.conv.bias 96
    decoder.4.block.{2..4}.act{1,2}.{alpha,beta} 96
    decoder.4.block.{2..4}.conv1.conv.weight 96x96x7
    decoder.4.block.{2..4}.conv{1,2}.conv.bias 96
    decoder.4.block.{2..4}.conv2.conv.weight 96x96x1
    decoder.5.{alpha,beta} 96
    decoder.6.conv.weight 1x96x7
    decoder.6.conv.bias 1
"""
PARAMETERS = 34_721_187_137


def unfolded(name: str) -> list[str]:
    """Names that a folded one stands for."""
    parts = re.split(r"\{([^}]*)\}", name)  # plain, choice, plain, choice, … plain
    choices = [[part] if i % 2 == 0 else _alternatives(part) for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _alternatives(choice: str) -> list[str]:
    first, dots, last = choice.partition("..")
    return [str(i) for i in range(int(first), int(last) + 1)] if dots else choice.split(",")


def release() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the release."""
    tensors, prefix = dict[str, tuple[int, ...]](), ""
    for line in TENSORS.strip().splitlines():
        if not line.startswith(" "):
            prefix = line
            continue
        name, shape = line.split()
        for rest in unfolded(name):
            assert prefix + rest not in tensors
            tensors[prefix + rest] = tuple(map(int, shape.split("x")))
    return tensors


@pytest.fixture(scope="module")
def config() -> OmniConfig:
    return parse_config(RELEASED)


@pytest.fixture(scope="module")
def model(config: OmniConfig) -> Boxes:
    with META:
        return Boxes(config)


def test_the_table_is_the_release() -> None:
    table = release()
    assert len(table) == 27_659
    assert sum(map(math.prod, table.values())) == PARAMETERS
    assert table["thinker.model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert table["talker.code_predictor.lm_head.14.weight"] == (2048, 1024)


def test_names_and_shapes_on_disk(model: Boxes) -> None:
    ours, table = released_names(model), release()
    wrong = [f"- {name} {shape}" for name, shape in sorted(table.items() - ours.items())]
    wrong += [f"+ {name} {shape}" for name, shape in sorted(ours.items() - table.items())]
    assert not wrong, f"{len(wrong)} differ (- release, + ours):\n" + "\n".join(wrong[:40])
    assert ours == table


def test_every_tensor_is_a_view_into_the_model(model: Boxes) -> None:
    """Loading writes through these, so together they must be all of the model and nothing beside it."""
    views = sum(tensor.numel() for _, tensor in released_tensors(model))
    assert views == sum(p.numel() for p in model.parameters()) == PARAMETERS
    storages = {p.untyped_storage()._cdata for p in model.parameters()}
    assert {tensor.untyped_storage()._cdata for _, tensor in released_tensors(model)} == storages


@pytest.mark.parametrize(
    ("box", "parameters"),
    [
        ("aut", 647_927_168),
        ("thinker.model", 30_221_219_840),
        ("thinker.lm_head", 311_427_072),
        ("speech.talker.model", 3_167_291_392),
        ("speech.talker.text_projection", 6_294_528),
        ("speech.talker.hidden_projection", 6_294_528),
        ("speech.talker.codec_head", 3_145_728),
        ("speech.mtp", 141_570_304),
        ("speech.mtp.model.layers", 78_654_720),
        ("speech.code2wav", 216_016_577),
        ("speech.code2wav.code_embedding", 33_554_432),
        ("speech.code2wav.pre_transformer", 109_085_696),
        ("speech.code2wav.upsample", 21_006_336),
        ("speech.code2wav.decoder", 52_370_113),
    ],
)
def test_parameters_of_a_box(model: Boxes, box: str, parameters: int) -> None:
    assert sum(p.numel() for p in model.get_submodule(box).parameters()) == parameters


def test_parameters_of_the_talker_and_its_mtp(model: Boxes) -> None:
    speech = model.speaking()
    talker = sum(p.numel() for box in (speech.talker, speech.mtp) for p in box.parameters())
    assert talker == 3_324_596_480


@pytest.mark.parametrize(("box", "size"), [("thinker", 98_304), ("speech.talker", 20_480)])
def test_cache_bytes_of_a_position(model: Boxes, box: str, size: int) -> None:
    state: Any = model.get_submodule(box)
    cache = state.init_state(1, 65536, META, torch.bfloat16)
    before = cache.nbytes
    cache.reserve(1024)
    assert cache.nbytes - before == 1024 * size
