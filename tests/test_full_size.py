"""The released model at its full size, on the meta device: the names and shapes on disk, and the sizes of the boxes."""

import math
import re
from itertools import product
from typing import Any

import pytest
import torch

from antiphon.config import OmniConfig
from antiphon.config_json import parse_config, read_json
from antiphon.model import Boxes
from antiphon.random_model import RELEASE
from antiphon.weights import released_names, released_tensors

META = torch.device("meta")
RELEASED = read_json(RELEASE / "config.json")
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
