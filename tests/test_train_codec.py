"""Training the codec and Code2Wav: losses with gradients everywhere, codes on time, resumed bit for bit."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from torch import nn

from antiphon.audio import write_audio
from antiphon.aut import AuT, TextDecoder, TextDecoderConfig
from antiphon.code2wav import Code2Wav
from antiphon.config import AudioConfig
from antiphon.convolutions import tails_of
from antiphon.errors import ConfigError
from antiphon.files import read_safetensors, write_safetensors
from antiphon.train.adversary import Adversary, feature_loss, fooling_loss, judging_loss
from antiphon.train.listener import Listener, at_frames, token_times
from antiphon.train.loop import BEST, STATE, Stage, train
from antiphon.train.losses import SpectralDistance, Spectrum
from antiphon.train.recipe import Recipe, read_fields
from antiphon.train.stages.codec import (
    CODEC_SIZES,
    Code2WavStage,
    CodecStage,
    SpectrumHead,
    code2wav_config,
    crop,
    embed_codebooks,
)
from antiphon.train.stages.common import Setting
from tests.models import CODEBOOK, CODEBOOKS, CPU, config_json, randomize
from tests.tiny_tokenizer import write_tokenizer

RATE, FRAME = 24000, 1920
CODEC = {
    **{"sampling_rate": RATE, "audio_channels": 1, "hidden_size": 16, "num_filters": 4, "num_residual_layers": 1},
    **{"dilation_growth_rate": 2, "compress": 2, "upsampling_ratios": [8, 10, 12], "latent_stride": 2},
    **{"kernel_size": 7, "last_kernel_size": 3, "residual_kernel_size": 3, "num_hidden_layers": 1},
    **{"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "norm_eps": 1e-5},
    **{"rope_theta": 1e4, "sliding_window": 8, "layer_scale_initial_scale": 0.1, "num_quantizers": CODEBOOKS},
    **{"num_semantic_quantizers": 1, "codebook_size": CODEBOOK, "codebook_dim": 6},
    "vector_quantization_hidden_dimension": 6,
}
TEXT_DECODER = {"layers": 1, "heads": 2, "ffn_dim": 32}


def voice(seconds: float, seed: int) -> np.ndarray:
    """Harmonics that come and go, as vowels do."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    pitch = rng.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 3) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    tone = sum(np.sin(k * phase) / k ** rng.uniform(0.5, 1.5) for k in range(1, 12))
    loud = np.sin(2 * np.pi * rng.uniform(1.5, 4) * t + seed).clip(0)
    return (0.08 * tone * loud).astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cuts, and the runs that a codec is trained after: a tokenizer with its configs, and an untaught AuT."""
    folder = tmp_path_factory.mktemp("codec")
    cuts = []
    for i in range(10):
        samples, name = voice(1.3 - 0.1 * i, i), f"clip{i}"
        write_audio(folder / f"{name}.wav", samples, RATE)
        source = AudioSource("file", [0], f"{name}.wav")
        duration = len(samples) / RATE
        said = SupervisionSegment(name, name, 0, duration, text="What time is it", language="en")
        recording = Recording(name, [source], RATE, len(samples), duration)
        cuts.append(MonoCut(name, 0, duration, 0, supervisions=[said], recording=recording))
    CutSet.from_cuts(cuts[:8]).to_file(folder / "train.jsonl.gz")
    CutSet.from_cuts(cuts[8:]).to_file(folder / "test.jsonl.gz")
    tokenizer, aut = folder / "runs" / "tokenizer", folder / "runs" / "aut"
    tokenizer.mkdir(parents=True)
    aut.mkdir()
    config = config_json(write_tokenizer(tokenizer, vocab_size=768))
    (tokenizer / "config.json").write_text(json.dumps(config))
    (tokenizer / CODEC_SIZES).write_text(json.dumps(CODEC))
    audio = setting(folder, "codec").config.audio
    decoder = TextDecoder(TextDecoderConfig(vocab_size=768, **TEXT_DECODER), audio.d_model)
    boxes = nn.ModuleDict({"aut": AuT(audio), "decoder": decoder})
    randomize(boxes)
    write_safetensors(aut / BEST, boxes.state_dict())
    return folder


def setting(place: Path, stage: str, **changes: Any) -> Setting:
    """A small recipe in `place`; `changes` are keys of the recipe, those of tables merged into them."""
    recipe: dict[str, Any] = {
        "name": stage,
        "stage": stage,
        "optimization": {
            **{"steps": 12, "lr": 2e-3, "warmup": 3, "dtype": "float32", "betas": [0.8, 0.99], "log_every": 1},
            **{"validate_every": 12, "sample_every": 100, "save_every": 3},
        },
        "data": {
            **{"mix": [{"cuts": "train.jsonl.gz"}], "validation": [{"cuts": "test.jsonl.gz"}]},
            **{"batch_seconds": 1.92},
        },
        "options": {"frames": 6, "spectra": [256, 1024]},
    }
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return Setting(read_fields(Recipe, recipe, "recipe"), place, place / "runs", CPU)


def run(place: Setting, folder: Path) -> Stage:
    """The stage, trained in `folder`."""
    stage = (CodecStage if place.recipe.stage == "codec" else Code2WavStage)(place)
    train(stage, place.recipe, folder, quiet=True)
    return stage


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The run of a codec whose adversary joins half way."""
    folder = place / "runs" / "codec"
    judging = {"start": 0.5, "periods": [2], "sizes": [256], "width": 2, "frames": 4}
    options = {"frames": 6, "spectra": [256, 1024], "judging": judging, "decoder": TEXT_DECODER}
    run(setting(place, "codec", options=options, init={"aut": "aut", "decoder": "aut"}), folder)
    return folder


# ------------------------------------------------------------------------------------------------ losses


def test_equal_sounds_have_no_distance_and_others_have():
    distance = SpectralDistance(RATE, (256, 512, 1024, 2048))
    x, y = torch.from_numpy(np.stack([voice(0.5, 1), voice(0.5, 2)])).split(1)
    same, other = distance(x, x), distance(x, y)
    assert [float(d) for d in (same.mel, same.stft, same.convergence)] == [0, 0, 0]
    assert min(float(d) for d in (other.mel, other.stft, other.convergence)) > 0.2
    louder = distance(x, 2 * x)
    assert float(louder.convergence) == pytest.approx(0.5, abs=0.01)
    assert float(louder.mel) < np.log(2)


@pytest.mark.parametrize("level", [1e-4, 1e-6, 1e-8])
def test_silence_has_a_way_out(level):
    """What is next to nothing is told to be louder, as strongly however quiet it is; a clamp would say nothing."""
    distance = SpectralDistance(RATE, (256, 1024))
    wanted = torch.from_numpy(voice(0.3, 3))[None]
    made = (level / 0.08 * wanted).requires_grad_()
    for part, least in (("mel", 0.1), ("stft", 0.1), ("convergence", 1e-4)):
        (slope,) = torch.autograd.grad(getattr(distance(made, wanted), part), made, retain_graph=True)
        assert slope.norm().item() > least, part
        assert (slope * made).sum().item() < 0, part


def test_wanted_silence_is_finite():
    distance = SpectralDistance(RATE, (256, 1024))
    made = torch.from_numpy(voice(0.3, 3))[None].requires_grad_()
    d = distance(made, torch.zeros_like(made))
    (d.mel + d.stft + d.convergence).backward()
    assert made.grad is not None
    assert bool(made.grad.isfinite().all())
    assert 1 < d.mel.item() < 20


def test_the_adversary_learns_to_tell_and_the_decoder_to_match():
    torch.manual_seed(0)
    adversary = Adversary((2, 3), (256,), 2)
    real, made = torch.from_numpy(voice(0.2, 1))[None], 0.05 * torch.randn(1, RATE // 5)
    optimizer = torch.optim.AdamW(adversary.parameters(), lr=2e-2)
    losses = []
    for _ in range(40):
        loss = judging_loss(adversary(real), adversary(made))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        assert float(feature_loss(adversary(real), adversary(real))) == 0
        assert float(feature_loss(adversary(real), adversary(made))) > 0.3
        assert float(fooling_loss(adversary(real))) < float(fooling_loss(adversary(made)))


# ----------------------------------------------------------------------------------------------- alignment


def test_tokens_are_mapped_to_frames_by_time():
    audio = AudioConfig(128, 24, 2, 2, 32, 4, 32, 50, 800)
    times = token_times(28, audio)  # two seconds and two tokens
    assert times[:3].tolist() == pytest.approx([0, 0.08, 0.16])
    assert times[12:15].tolist() == pytest.approx([0.96, 1.0, 1.08])
    assert times[26].item() == pytest.approx(2)
    # a state that says its own time must, in every frame, say the middle of the frame
    spoken = at_frames(times[None, :, None], times, 12.5, 26)[0, :, 0]
    assert spoken.tolist() == pytest.approx([0.04 + 0.08 * n for n in range(26)], abs=1e-5)
    late = at_frames(times[None, :, None], times, 12.5, 30)[0, -1, 0]
    assert late.item() == pytest.approx(2.08)  # beyond the last token there is only that one


@pytest.mark.parametrize("token", [0, 4, 12, 13, 20])
def test_a_click_is_heard_by_the_token_of_its_time(token):
    """Through the real resampler, log-mel and convolutions of AuT, without the layers that mix all moments."""
    aut = AuT(AudioConfig(128, 24, 1, 2, 32, 4, 32, 50, 800))
    randomize(aut)
    aut.layers = nn.ModuleList()
    wave = torch.zeros(2, 2 * RATE)
    wave[:, 36000:36400] = 0.5 * torch.randn(400, generator=torch.Generator().manual_seed(0))  # and so is the floor
    middle = round(token_times(26, aut.config)[token].item() * RATE)
    wave[1, max(0, middle - 20) : middle + 20] = 0.02
    states = Listener(aut, RATE).states(wave)
    assert states.shape == (2, 26, 24)
    assert (states[1] - states[0]).norm(dim=-1).argmax().item() == token


# --------------------------------------------------------------------------------------------------- data


def test_crops_begin_before_their_clip_and_end_after_it():
    clip = np.arange(1, 101, dtype=np.float32)
    assert crop(clip, 16, 0.0).tolist() == [0, 0, *range(1, 15)]
    assert crop(clip, 16, 0.999).tolist() == [*range(87, 101), 0, 0]
    short = crop(clip[:5], 16, 0.5)
    assert sorted(short.tolist())[-5:] == [1, 2, 3, 4, 5]
    assert len(short) == 16


def test_a_batch_is_a_function_of_its_step(place):
    one, other = CodecStage(setting(place, "codec")), CodecStage(setting(place, "codec"))
    batches = [one.batch(step) for step in range(3)]
    assert batches[0].shape == (4, 6 * FRAME)
    assert torch.equal(other.batch(2), batches[2])
    assert not torch.equal(batches[1], batches[2])
    assert not torch.equal(batches[1][0], batches[1][1])


# ------------------------------------------------------------------------------------------------- stages


def test_codes_are_off_at_first_and_then_on(place):
    stage = CodecStage(setting(place, "codec", options={"frames": 6, "spectra": [256], "quantize": 0.5}))
    books = [b for n, b in stage.modules.named_buffers() if n.endswith("initialized")]
    before = stage.loss("codec", stage.batch(0), 5)
    assert not any(bool(b) for b in books)
    assert "commit" not in before.figures
    after = [stage.loss("codec", stage.batch(s), s) for s in range(6, 6 + CODEBOOKS)][-1]
    assert all(bool(b) for b in books)
    assert float(after.figures["commit"]) > 0


@pytest.mark.parametrize("kind", ["codec", pytest.param("code2wav", marks=pytest.mark.long)])
def test_thirty_steps_bring_the_distance_down(place, trained, tmp_path, kind):
    init = {"codec": "codec"} if kind == "code2wav" else {}
    run(setting(place, kind, optimization={"steps": 30, "lr": 4e-3, "warmup": 2}, init=init), tmp_path)
    lines = [f for f in figures(tmp_path) if "mel" in f]
    total = [f["mel"] + f["stft"] + f["convergence"] for f in lines]
    assert np.mean(total[-5:]) < 0.8 * np.mean(total[:3])


@pytest.mark.parametrize("kind", ["codec", pytest.param("code2wav", marks=pytest.mark.long)])
def test_killed_and_continued_is_as_never_killed(place, trained, tmp_path, monkeypatch, kind):
    """Codebooks, the adversary, AdamW's memory and the averages included."""
    judging = {"start": 0.5, "periods": [2], "sizes": [256], "width": 2, "frames": 4}
    plan = {"average": 0.9}
    here = setting(
        place,
        kind,
        optimization=plan,
        options={"frames": 6, "spectra": [256], "judging": judging},
        init={"codec": "codec"} if kind == "code2wav" else {},
    )
    run(here, tmp_path / "whole")

    def killed(player: str, batch: torch.Tensor, step: int, last: int) -> Any:
        if step == last:
            raise KeyboardInterrupt
        return whole(player, batch, step)

    for last in (4, 10):  # before the adversary joins, and after
        stage = (CodecStage if kind == "codec" else Code2WavStage)(here)
        whole = stage.loss
        monkeypatch.setattr(stage, "loss", partial(killed, last=last))
        with pytest.raises(KeyboardInterrupt):
            train(stage, here.recipe, tmp_path / "killed", quiet=True)
    run(here, tmp_path / "killed")
    one, other = (read_safetensors(tmp_path / name / STATE) for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert {n for n, t in one.items() if not torch.equal(t, other[n])} == set()
    assert any("embed_sum" in n for n in one)
    assert any(n.startswith("adamw.adversary") for n in one)
    assert any(n.startswith("average.") for n in one)


def test_the_adversary_joins_in_time_and_aut_stays_in_its_own_run(trained):
    lines = [f for f in figures(trained) if "mel" in f]
    assert ["judging" in f for f in lines] == [False] * 6 + [True] * 6
    assert all("semantic" in f for f in lines)
    judged = [f for f in figures(trained)[-1] if f.startswith("val/")]
    assert {"val/mel", "val/used", "val/used.0", "val/error.wanted", "val/error.made"} <= set(judged)
    assert judged[0] == "val/mel"  # what decides which weights are the best
    names = {n.split(".")[0] for n in read_safetensors(trained / BEST)}
    assert names == {"codec", "code2wav", "head", "outline", "semantic", "adversary"}


def test_in_a_share_of_the_steps_only_the_first_codebooks_are_heard(place):
    """Then the sound is made of them alone, most often of one, and the others have no part in the loss."""
    options = {"frames": 6, "spectra": [256], "quantize": 0.0, "few": 0.5}
    stage = CodecStage(setting(place, "codec", options=options))
    heard = [stage.heard_codebooks(torch.Generator().manual_seed(i)) for i in range(400)]
    few = [count for count in heard if count is not None]
    assert 0.4 < len(few) / len(heard) < 0.6
    assert set(few) == set(range(1, CODEBOOKS))
    assert few.count(1) > max(few.count(count) for count in range(2, CODEBOOKS))
    assert stage.heard_codebooks(torch.Generator().manual_seed(0)) == heard[0]
    stage.heard_codebooks = lambda generator: 1
    stage.loss("codec", stage.batch(0), 0).total.backward()
    quantizer = stage.codec.quantizer
    heard = quantizer.semantic_residual_vector_quantizer.output_proj
    silent = quantizer.acoustic_residual_vector_quantizer.output_proj
    assert heard is not None
    assert silent is not None
    assert heard.weight.grad is not None
    assert heard.weight.grad.any()
    assert silent.weight.grad is None


def test_aut_teaches_the_first_codebook_alone(place):
    stage = CodecStage(setting(place, "codec", init={"aut": "aut"}))
    wave = stage.batch(0)
    for step in range(4, 8):
        stage.loss("codec", wave, step)
    made = stage.make(wave, 8)
    made.figures["semantic"].backward()
    quantizer = stage.codec.quantizer
    taught = quantizer.semantic_residual_vector_quantizer.input_proj
    other = quantizer.acoustic_residual_vector_quantizer.input_proj
    assert taught is not None
    assert other is not None
    assert taught.weight.grad is not None
    assert float(taught.weight.grad.norm()) > 0
    assert other.weight.grad is None
    assert stage.listener is not None
    assert all(p.grad is None for p in stage.listener.aut.parameters())


def test_what_is_trained_is_what_speaks(place, trained, tmp_path):
    """A fresh Code2Wav with the weights of the run says what the stage heard, whole and frame by frame."""
    here = setting(place, "code2wav", init={"codec": "codec"})
    stage = run(here, tmp_path)
    assert isinstance(stage, Code2WavStage)
    wave = torch.from_numpy(voice(1.0, 20))[None]
    box = Code2Wav(code2wav_config(here)).eval()
    tensors = read_safetensors(tmp_path / BEST)
    box.load_state_dict({n[9:]: t for n, t in tensors.items() if n.startswith("code2wav.")})
    with torch.inference_mode():
        codes = stage.encode(wave)
        assert len(codes.unique()) > 2
        made = box(codes)
        assert torch.equal(made, stage.decode(codes))
        state = box.init_state(1, CPU, torch.float32)
        pieces = [box(codes[:, n : n + 1], state) for n in range(codes.shape[1])]
    assert float(made.std()) > 1e-3
    assert float((torch.cat(pieces, 1) - made).abs().max()) < 1e-5 * float(made.abs().max())
    start = read_safetensors(trained / BEST)
    assert all(torch.equal(tensors[n], t) for n, t in start.items() if n.startswith("codec."))


def test_training_begins_where_the_sound_is(place):
    """Convolutions of the encoder give mean 0 and deviation 1; the head and the outline say the mean spectrum."""
    stage = CodecStage(setting(place, "codec"))
    wave = stage.batch(0)
    with torch.no_grad():
        x = stage.codec.encoder.encoder(wave[:, None], tails_of(None))
        torch.testing.assert_close(x.mean((0, 2)), torch.zeros(CODEC["hidden_size"]), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.std((0, 2)), torch.ones(CODEC["hidden_size"]), atol=1e-3, rtol=0)
        silence = torch.zeros(1, 6, CODEC["hidden_size"])
        said, wanted = stage.outline.map(silence)[0, 0], stage.outline.wanted(wave).mean((0, 1))
        torch.testing.assert_close(said, wanted)
        stage.head.out.weight.zero_()
        made = stage.head(torch.zeros(4, 24, CODEC["hidden_size"]))
    spectrum = Spectrum(RATE, 1024)
    mean = [spectrum(w).clamp(min=1e-5).log().mean().item() for w in (wave, made)]
    assert mean[1] == pytest.approx(mean[0], abs=1)


def test_code2wav_begins_as_the_quantizer_ends(place, trained):
    stage = Code2WavStage(setting(place, "code2wav", init={"codec": "codec"}))
    codes = torch.randint(CODEBOOK, (2, 5, CODEBOOKS))
    embed_codebooks(stage.code2wav, stage.codec)
    offsets = torch.arange(CODEBOOKS) * CODEBOOK
    with torch.no_grad():
        embedded, wanted = stage.code2wav.code_embedding(codes + offsets).mean(2), stage.codec.quantizer.decode(codes)
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(embedded, wanted)


@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_head_teaches_code2wav(place, trained, tmp_path, frozen):
    """What it says is the codec's own sound of the same codes, also where what it reads goes on; both come nearer."""
    parts = ("code2wav.pre_transformer", "code2wav.upsample")
    init = dict.fromkeys(("codec", "head", *parts), "codec")
    steps = {"steps": 40, "validate_every": 40, "lr": 5e-3}
    here = setting(
        place, "code2wav", init=init, freeze=[*(parts if frozen else ()), "code2wav.code_embedding"], optimization=steps
    )
    stage, codec = (
        Code2WavStage(here),
        CodecStage(setting(place, "codec", init=dict.fromkeys(("codec", *parts, "head"), "codec"))),
    )
    codec.modules.eval()
    wave = stage.batch(0)
    before = {n: t.clone() for n, t in stage.modules.state_dict().items()}
    first = stage.make(wave, 0)
    with torch.no_grad():
        wanted = codec.decode(codec.encode(wave))
    off = (first.wave.detach() - wanted).norm() / wanted.norm()
    assert float(first.figures["taught"]) == pytest.approx(float(off.detach()), rel=1e-3)
    train(stage, here.recipe, tmp_path, quiet=True)
    last = stage.make(wave, 0)
    assert float(last.figures["taught"]) == pytest.approx(float((last.wave - wanted).norm() / wanted.norm()), rel=1e-3)
    assert float(last.figures["taught"]) < 0.95 * float(off)
    moved = {n for n, t in stage.modules.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all(n.startswith("code2wav.decoder." if frozen else "code2wav.") for n in moved)
    assert frozen or any(n.startswith("code2wav.upsample.") for n in moved)


def test_the_head_hears_nothing_ahead(place):
    torch.manual_seed(0)
    config = code2wav_config(setting(place, "codec"))
    head, x = SpectrumHead(config), torch.randn(1, 12, config.hidden_size)
    step = FRAME // config.upsampling_ratios[0]
    with torch.no_grad():
        whole, other = head(x), head(torch.cat([x[:, :7], torch.randn(1, 5, config.hidden_size)], 1))
    assert whole.shape == (1, 12 * step)
    assert torch.equal(whole[:, : 7 * step], other[:, : 7 * step])
    assert not torch.allclose(whole[:, 7 * step : 7 * step + 100], other[:, 7 * step : 7 * step + 100])


def test_sound_and_pictures(place, trained, tmp_path):
    from torch.utils.tensorboard.writer import SummaryWriter

    stage = CodecStage(setting(place, "codec", init={"codec": "codec"}))
    with SummaryWriter(str(tmp_path / "board")) as board, torch.inference_mode():
        stage.sample(tmp_path, board)
    assert {p.name for p in tmp_path.iterdir()} >= {"0.png", "0-made.wav", "0-wanted.wav", "1.png"}


# ------------------------------------------------------------------------------------------------- errors


def test_sizes_that_do_not_go_together_are_named(place, tmp_path):
    runs = tmp_path / "runs" / "tokenizer"
    shutil.copytree(place / "runs" / "tokenizer", runs)
    (runs / CODEC_SIZES).write_text(json.dumps({**CODEC, "codebook_size": 32}))
    with pytest.raises(ConfigError, match="codebook_size is 32, but code2wav_config has 48"):
        CodecStage(setting(tmp_path, "codec"))


def test_code2wav_needs_a_codec(place):
    with pytest.raises(ConfigError, match="init names no codec"):
        Code2WavStage(setting(place, "code2wav"))
