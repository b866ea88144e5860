"""The codec's encoder and quantizer: equal to Mimi, equal in pieces, trainable, and loaded without surprises."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MimiConfig, MimiModel

from antiphon.codec import Codec, SplitQuantizer
from antiphon.config import CodecConfig
from antiphon.config_json import parse_codec_config
from antiphon.errors import CapacityError, ConfigError, InputError, WeightsError
from antiphon.weights import CODEC_FILE, load_codec, mimi_tensors, save_codec

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "upsample_groups": 32,
    "num_filters": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "codebook_size": 64,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 5,
}
CASES: dict[str, dict[str, Any]] = {
    "window shorter than the sequence, grouped heads": {
        "upsampling_ratios": [5, 4, 3, 2],
        "sliding_window": 5,
        "num_key_value_heads": 2,
    },
    "released ratios, deeper residual stacks, no projections": {
        "upsampling_ratios": [8, 6, 5, 4],
        "num_residual_layers": 3,
        "dilation_growth_rate": 3,
        "compress": 1,
        "head_dim": 16,
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
        "num_semantic_quantizers": 2,
    },
    "other kernels, stride 4 to the frame": {
        "upsampling_ratios": [3, 2],
        "sampling_rate": 2400,
        "frame_rate": 100,
        "kernel_size": 5,
        "last_kernel_size": 5,
        "residual_kernel_size": 5,
        "sliding_window": 20,
        "norm_eps": 1e-3,
    },
}


def spread(split: Any, latents: Tensor) -> None:
    """Random codebooks, Mimi's or ours, where the latents [R, T, W] are and then around what is left of them."""
    for rvq in (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer):
        x = latents.transpose(1, 2)
        x = (x if rvq.input_proj is None else rvq.input_proj(x)).transpose(1, 2).flatten(0, 1)
        for layer in rvq.layers:
            book = layer.codebook
            book.cluster_usage.copy_(0.5 + 2 * torch.rand(book.cluster_usage.shape))
            vectors = x.mean(0) + x.std(0) * torch.randn(book.embed_sum.shape).to(x.dtype)
            book.cluster_usage[:16] = 1e-7  # below the floor, as dead codes are
            book.embed_sum.copy_(vectors * book.cluster_usage.clamp(min=1e-5)[:, None])
            x = x - vectors[torch.cdist(x, vectors).argmin(-1)]


def mimi(seed: int = 0, **fields: Any) -> MimiModel:
    """A small Mimi in which no part is trivially zero or one."""
    torch.manual_seed(seed)
    model = MimiModel(MimiConfig(**(SMALL | fields))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layer_scale" in name or "layernorm" in name:
                p.copy_(0.5 + 0.5 * torch.rand(p.shape))
        spread(model.quantizer, reference_latents(model, wave(2, 10 * model.config.frame_size)))
    return model


def reference_latents(model: Any, x: Tensor) -> Tensor:
    return model.encoder(x[:, None]).latents.transpose(1, 2)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.split(",")[0].replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MimiModel, Codec]:
    """A Mimi of transformers, and ours loaded from what it wrote."""
    model = mimi(**CASES[request.param])
    folder = tmp_path_factory.mktemp("mimi")
    model.save_pretrained(folder)
    return model, load_codec(folder)


def small_config(**fields: Any) -> CodecConfig:
    shape: dict[str, Any] = {"upsampling_ratios": [3, 2], "sampling_rate": 300, "sliding_window": 4}
    return parse_codec_config(MimiConfig(**(SMALL | shape | fields)).to_dict())


def small_codec(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> Codec:
    """A codec of 12 samples a frame whose transformer matters and whose codes differ."""
    torch.manual_seed(seed)
    codec = Codec(small_config(**({"layer_scale_initial_scale": 0.7} | fields))).to(dtype).eval()
    with torch.no_grad():
        spread(codec.quantizer, codec.encoder(wave(2, 40 * codec.config.frame_samples, seed=9, dtype=dtype)))
    return codec


def wave(rows: int, samples: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    assert ours.shape == expected.shape
    if expected.numel():
        assert float((ours - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ----------------------------------------------------------------------------------------------- parity


def lengths(config: CodecConfig) -> list[int]:
    frame = config.frame_samples
    return [
        1,
        frame - 1,
        frame,
        frame + 1,
        3 * frame,
        5 * frame + frame // 2 + 1,
        math.ceil(3.2 * config.sampling_rate),
    ]


@torch.no_grad()
def test_equals_mimi_at_any_length(pair: tuple[MimiModel, Codec]):
    model, codec = pair
    theirs: Any = model
    for samples in lengths(codec.config):
        x = wave(2, samples)
        expected = reference_latents(model, x)
        assert_close(codec.encoder(x), expected, 1e-5)
        assert expected.shape[1] == math.ceil(samples / codec.config.frame_samples)
        codes = theirs.encode(x[:, None]).audio_codes.transpose(1, 2)
        assert torch.equal(codec.encode(x), codes)
        assert torch.equal(codec.encode(x, num_quantizers=3), codes[..., :3])
        summed = theirs.quantizer.decode(codes.transpose(1, 2)).transpose(1, 2)
        assert_close(codec.quantizer.decode(codes), summed, 1e-5)
        if samples > 3 * codec.config.sampling_rate:  # the comparison means something
            assert all(len(book.unique()) > 8 for book in codes.flatten(0, 1).unbind(-1))


def test_released_size():
    with torch.device("meta"):
        codec = Codec(parse_codec_config(MimiConfig().to_dict()))
    assert (codec.config.frame_samples, codec.config.frame_rate) == (1920, 12.5)
    assert sum(p.numel() for p in codec.parameters()) == 39_391_520
    assert sum(b.numel() for name, b in codec.named_buffers() if name.endswith("embed_sum")) == 32 * 2048 * 256


# -------------------------------------------------------------------------------------------------- law


def in_pieces(codec: Codec, x: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Latents and codes of x cut at `cuts`, the last piece final."""
    encoder_state, state = (codec.init_state(len(x), 0, CPU, x.dtype) for _ in range(2))
    bounds = [0, *sorted(cuts), x.shape[1]]
    latents, codes = [], []
    for start, stop in pairwise(bounds):
        piece, final = x[:, start:stop], stop == x.shape[1]
        latents.append(codec.encoder(piece, encoder_state, final))
        codes.append(codec(piece, state, final))
    return torch.cat(latents, 1), torch.cat(codes, 1)


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 130), data=st.data())
@torch.no_grad()
def test_pieces_equal_the_whole(samples: int, data: st.DataObject):
    cuts = data.draw(st.lists(st.integers(1, max(samples - 1, 1)), max_size=12, unique=True))
    cuts = [cut for cut in cuts if cut < samples]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        codec, x = small_codec(dtype=dtype), wave(2, samples, dtype=dtype)
        latents, codes = in_pieces(codec, x, cuts)
        assert_close(latents, codec.encoder(x), tolerance)
        assert torch.equal(codes, codec.encode(x))


@pytest.mark.parametrize("fields", [{}, {"frame_rate": 50}, {"upsampling_ratios": [2, 2, 2], "num_residual_layers": 2}])
@torch.no_grad()
def test_pieces_of_one_sample(fields: dict[str, Any]):
    codec, x = small_codec(**fields), wave(2, 77, dtype=torch.float64)
    latents, codes = in_pieces(codec, x, list(range(1, 77)))
    assert_close(latents, codec.encoder(x), 1e-12)
    assert torch.equal(codes, codec.encode(x))


@torch.no_grad()
def test_frames_come_at_once_and_never_change():
    codec, x = small_codec(), wave(1, 61, dtype=torch.float64)
    frame = codec.config.frame_samples
    state = codec.init_state(1, 0, CPU, x.dtype)
    counts = [codec.encoder(x[:, i : i + 1], state).shape[1] for i in range(61)]
    assert counts == [int((i + 1) % frame == 0) for i in range(61)]
    for samples in range(frame, 61, frame):
        assert_close(codec.encoder(x)[:, : samples // frame], codec.encoder(x[:, :samples]), 1e-12)


@torch.no_grad()
def test_silence_and_nothing():
    codec = small_codec()
    assert codec.encode(torch.zeros(2, 0, dtype=torch.float64)).shape == (2, 0, 5)
    state = codec.init_state(2, 0, CPU, torch.float64)
    whole = wave(2, 24, dtype=torch.float64)
    assert codec(whole, state).shape == (2, 2, 5)
    assert codec(whole[:, :0], state, final=True).shape == (2, 0, 5)  # nothing was waiting


@torch.no_grad()
def test_rows_are_independent():
    codec, x = small_codec(), wave(3, 100, dtype=torch.float64)
    latents, codes = in_pieces(codec, x, [5, 17, 18, 60])
    for row in range(3):
        assert_close(latents[row : row + 1], codec.encoder(x[row : row + 1]), 1e-12)
        assert torch.equal(codes[row : row + 1], codec.encode(x[row : row + 1]))


@torch.no_grad()
def test_a_row_starts_while_another_goes_on():
    codec, x = small_codec(), wave(2, 96, dtype=torch.float64)
    state = codec.init_state(2, 0, CPU, x.dtype)
    codec.encoder(x[:, :48], state)
    state.reset([1])
    assert float(state.length[0]) > float(state.length[1]) == 0
    y = codec.encoder(x[:, 48:], state)  # in step, since both wait for a whole frame
    assert_close(y[:1], codec.encoder(x[:1])[:, 4:], 1e-12)
    assert_close(y[1:], codec.encoder(x[1:, 48:]), 1e-12)


@torch.no_grad()
def test_rows_out_of_step():
    codec, x = small_codec(), wave(2, 40, dtype=torch.float64)
    state = codec.init_state(2, 0, CPU, x.dtype)
    codec(x[:1, :5], state.view(0, 1))
    with pytest.raises(CapacityError, match=r"one state\.view at a time"):
        codec(x, state)
    codes = [codec(x[:1, 5:], state.view(0, 1), final=True), codec(x[1:], state.view(1, 2), final=True)]
    assert torch.equal(torch.cat(codes), codec.encode(x))


@torch.no_grad()
def test_reset_forgets_and_copies_part_ways(tmp_path: Path):
    codec, x = small_codec(), wave(2, 90, dtype=torch.float64)
    state = codec.init_state(2, 0, CPU, x.dtype)
    codec.encoder(torch.full_like(x, torch.nan)[:, :31], state)
    state.reset()
    codec.encoder(x[:, :31], state)
    fork, size = state.copy(), state.nbytes
    save_file(state.tensors(), tmp_path / "state.safetensors")
    codec.encoder(-x, fork, True)
    rest = codec.encoder(x[:, 31:], state, True)
    assert_close(rest, codec.encoder(x)[:, 2:], 1e-12)
    assert state.nbytes == size
    resumed = codec.init_state(2, 0, CPU, x.dtype)
    resumed.load(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(codec.encoder(x[:, 31:], resumed, True), rest)


# -------------------------------------------------------------------------------------------- quantizer


@torch.no_grad()
def test_codes_do_not_depend_on_the_batch():
    quantizer = small_codec(codebook_dim=32, vector_quantization_hidden_dimension=32).quantizer
    for buffer in quantizer.buffers():
        if len(buffer) == 64:
            buffer[32:] = buffer[:32]  # every code twice: ties in any order of rounding
    x = wave(1, 90 * 32, dtype=torch.float64).view(1, 90, 32)
    codes = quantizer.encode(x)
    assert int(codes.max()) < 32
    for rows in (1, 7, 26):
        assert torch.equal(torch.cat([quantizer.encode(part) for part in x.split(rows, 1)], 1), codes)


def test_number_of_codebooks():
    codec = small_codec(num_semantic_quantizers=2)
    assert codec.encode(wave(1, 24, dtype=torch.float64), num_quantizers=2).shape == (1, 2, 2)
    for count in (1, 6):
        with pytest.raises(InputError, match=f"{count} codebooks were asked for; this codec has 2 to 5"):
            codec.encode(wave(1, 24, dtype=torch.float64), num_quantizers=count)
        with pytest.raises(InputError, match="this codec has 2 to 5"):
            codec.quantizer.decode(torch.zeros(1, 2, count, dtype=torch.long))


def mixture(steps: int, seed: int = 0) -> Tensor:
    """Batches [steps, 8, 40, 32] from a mixture of 200 Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(200, 32, generator=generator)
    chosen = torch.randint(200, (steps, 8, 40), generator=generator)
    return centres[chosen] + 0.3 * torch.randn(steps, 8, 40, 32, generator=generator)


@torch.no_grad()
def trained(steps: int, num_quantizers: int | None = None, **fields: Any) -> SplitQuantizer:
    """A quantizer after `steps` batches of the mixture."""
    torch.manual_seed(0)
    quantizer, generator = SplitQuantizer(small_config(**fields)), torch.Generator().manual_seed(0)
    for batch in mixture(steps):
        quantizer(batch, generator, num_quantizers)
    return quantizer


WIDE = {"codebook_dim": 32, "vector_quantization_hidden_dimension": 32}  # no projections: the data is what is coded


@torch.no_grad()
def test_codebooks_learn_the_data():
    first, last = trained(1, **WIDE).eval(), trained(300, **WIDE).eval()
    unseen = torch.cat(list(mixture(310)[300:]))
    result = last(unseen)
    assert float(result.usage.min()) > 0.8
    assert bool((result.commit_loss < 0.7 * first(unseen).commit_loss).all())
    acoustic = result.commit_loss[1:].tolist()
    assert acoustic == sorted(acoustic, reverse=True)  # each codebook leaves less over


def test_training_is_reproducible():
    one, two = trained(5), trained(5)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_codebooks_start_from_data_one_a_batch():
    for batches in (1, 2, 4):
        quantizer = trained(batches, **WIDE)
        started = [bool(b) for name, b in quantizer.named_buffers() if name.endswith("initialized")]
        assert started == [True, *(i < batches for i in range(4))]
    first = trained(1, **WIDE).semantic_residual_vector_quantizer
    usage = first.get_buffer("layers.0.codebook.cluster_usage")
    vectors = first.get_buffer("layers.0.codebook.embed_sum") / usage[:, None]
    distance = torch.cdist(vectors, mixture(1)[0].flatten(0, 1)).min(1).values
    assert float(distance.max()) < 3  # each where a vector of the batch was; other clusters are 24 away


@torch.no_grad()
def test_a_fresh_quantizer_adds_nothing():
    quantizer = SplitQuantizer(small_config()).eval()
    assert not quantizer.decode(quantizer.encode(mixture(1)[0])).any()


def test_dead_codes_revive():
    quantizer = trained(5, **WIDE)
    book = quantizer.semantic_residual_vector_quantizer
    book.get_buffer("layers.0.codebook.embed_sum")[16:] = 1e3
    book.get_buffer("layers.0.codebook.cluster_usage")[16:] = 1e-3
    used, generator = [], torch.Generator().manual_seed(0)
    for batch in mixture(20, seed=3):
        used.append(float(quantizer(batch, generator).usage[0]))
    assert used[0] <= 0.25
    assert used[-1] > 0.8


@torch.no_grad()
def test_eval_changes_nothing():
    quantizer = trained(3)
    quantizer.eval()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    x = mixture(1, seed=5)[0]
    result = quantizer(x, torch.Generator())
    assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert torch.equal(result.codes, quantizer.encode(x))
    assert_close(result.latents, quantizer.decode(result.codes), 1e-5)
    assert_close(result.semantic, quantizer.semantic_residual_vector_quantizer.decode(result.codes[..., :1]), 1e-5)


def test_training_needs_a_generator():
    with pytest.raises(InputError, match=r"pass a torch\.Generator"):
        SplitQuantizer(small_config())(mixture(1)[0])


def test_dropped_codebooks_do_not_learn():
    full = trained(4)
    dropped = trained(4, num_quantizers=3)
    acoustic = "acoustic_residual_vector_quantizer.layers.{}.codebook.initialized"
    assert [float(full.get_buffer(acoustic.format(i))) for i in range(4)] == [1, 1, 1, 1]
    assert [float(dropped.get_buffer(acoustic.format(i))) for i in range(4)] == [1, 1, 0, 0]
    result = dropped(mixture(1)[0], torch.Generator(), 3)
    assert result.codes.shape == (8, 40, 3)
    assert result.commit_loss.shape == result.usage.shape == (3,)
    assert dropped(mixture(1)[0], torch.Generator(), 1).codes.shape == (8, 40, 1)


def test_gradient_passes_straight_through():
    codec = small_codec(dtype=torch.float32, **WIDE).train()
    latents = codec.encoder(wave(2, 120))
    latents.retain_grad()
    result = codec.quantizer(latents, torch.Generator().manual_seed(0))
    pull = torch.randn(result.latents.shape, generator=torch.Generator().manual_seed(0))
    (result.latents * pull).sum().backward(retain_graph=True)
    assert latents.grad is not None
    assert_close(latents.grad, 2 * pull, 1e-6)  # once through each of the two quantizers
    gradients = [p.grad for p in codec.encoder.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.abs().sum() > 0) for g in gradients if g is not None) == len(gradients)
    codec.zero_grad()
    result.commit_loss.mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in codec.encoder.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Mimi as transformers writes it."""
    mimi(upsampling_ratios=[3, 2], sampling_rate=300).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) drop tensors of the folder's checkpoint, by name with / for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("/", "."), None)
        if tensor is not None:
            tensors[name.replace("/", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_names_on_disk(folder: Path):
    present = set(load_file(folder / "model.safetensors"))
    names = set(mimi_tensors(load_codec(folder)))
    assert {n for n in present if not n.startswith(("decoder", "upsample"))} == names
    assert {
        "encoder.layers.0.conv.weight",
        "downsample.conv.weight",
        "encoder_transformer.layers.1.mlp.fc1.weight",
    } < names


def test_first_codebooks_only(folder: Path):
    whole, part, x = load_codec(folder), load_codec(folder, num_quantizers=3), wave(1, 50)
    assert part.config.num_quantizers == 3
    assert torch.equal(part.encode(x), whole.encode(x)[..., :3])
    assert not part.training
    with pytest.raises(WeightsError, match=r"acoustic.*layers\.4\.codebook\.\w+ is missing"):
        load_codec(folder, num_quantizers=6)


def test_qwen3_tts_layout(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    other = tmp_path_factory.mktemp("tts")
    tensors = {
        f"encoder.{n}": t for n, t in load_file(folder / "model.safetensors").items() if n[:3] not in ("dec", "ups")
    }
    save_file(tensors | {"decoder.pre_conv.conv.weight": torch.zeros(1)}, other / "model.safetensors")
    nested = {"encoder_config": json.loads((folder / "config.json").read_text()), "encoder_valid_num_quantizers": 4}
    (other / "config.json").write_text(json.dumps(nested | {"model_type": "qwen3_tts_tokenizer_12hz"}))
    x = wave(1, 50)
    assert torch.equal(load_codec(other).encode(x), load_codec(folder).encode(x)[..., :4])
    assert set(mimi_tensors(load_codec(other, 5), "encoder.")) < set(tensors) | {""}


def test_our_own_file(tmp_path: Path):
    codec, x = small_codec(dtype=torch.float32), wave(1, 50)
    assert save_codec(codec, tmp_path) == tmp_path / CODEC_FILE
    for path in (tmp_path, tmp_path / CODEC_FILE):
        again = load_codec(path)
        assert again.config == codec.config
        assert torch.equal(again.encode(x), codec.encode(x))
    assert torch.equal(load_codec(tmp_path, num_quantizers=2).encode(x), codec.encode(x)[..., :2])


def test_wrong_tensors(folder: Path):
    name = "encoder/layers/0/conv/bias"
    rewrite(folder, **{name: torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"encoder\.layers\.0\.conv\.bias is misshapen: expected \[4\], found \[3\]"):
        load_codec(folder)
    rewrite(folder, **{name: None})
    with pytest.raises(WeightsError, match=r"encoder\.layers\.0\.conv\.bias is missing"):
        load_codec(folder)
    rewrite(folder, **{name: torch.zeros(4), "encoder/layers/99/conv/bias": torch.zeros(4)})
    with pytest.raises(WeightsError, match=r"encoder\.layers\.99\.conv\.bias is not part of this model"):
        load_codec(folder)


def test_wrong_files(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is cut short"):
        load_codec(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="convert pickled weights"):
        load_codec(folder)
    with pytest.raises(WeightsError, match=r"is cut short|is not a safetensors file"):
        load_codec(folder / "pytorch_model.bin")
    save_file({"x": torch.zeros(1)}, weights)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_codec(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("audio_channels", 2, "codec.audio_channels is 2; expected mono, 1"),
        ("codebook_dim", 16, "codec.codebook_dim is 16; expected vector_quantization_hidden_dimension, 8"),
        ("use_causal_conv", False, "codec.use_causal_conv is False"),
        ("num_filters", None, "codec.num_filters is missing"),
        ("head_dim", 7, "codec.head_dim is 7"),
    ],
)
def test_impossible_configs(folder: Path, field: str, value: object, said: str):
    data = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said):
        load_codec(folder)
