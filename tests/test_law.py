"""The law of streaming.py for the boxes with weights: a sequence in pieces gives what it gives at once.

`box(x) == cat(box(piece, state) …, last piece final)` over random cuts, float64 within 1e-12 and float32 within 1e-5
of the largest value; greedy ids are identical, an output given never changes, rows do not see each other, and a state
can be forgotten, forked, saved and cut back. The resampler's, the log-mel's and the codec's law is in their own files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from antiphon import convolutions
from antiphon.aut import LOG_FLOOR, AuT, TextDecoder, TextDecoderConfig
from antiphon.caches import CACHE_BLOCK, KVCache
from antiphon.code2wav import Code2Wav
from antiphon.config import AudioConfig, Code2WavConfig, OmniConfig, TalkerConfig
from antiphon.errors import CapacityError, WeightsError
from antiphon.mtp import MTP
from antiphon.streaming import State
from antiphon.talker import Talker
from antiphon.thinker import Thinker
from tests.models import CPU, assert_same, omni, randomize

CAPACITY = 600
DECODER = TextDecoderConfig(vocab_size=40, layers=2, heads=2, ffn_dim=32)
law = settings(max_examples=15, deadline=None)
dtypes = st.sampled_from([torch.float64, torch.float32])


# ------------------------------------------------------------------------------------------------- boxes


@lru_cache
def config() -> OmniConfig:
    """Sizes that the sessions' small models leave out: several layers, a dense layer between routed ones, MTP of 6."""
    c = omni().config
    assert c.talker is not None
    assert c.code2wav is not None
    text = replace(c.text, num_hidden_layers=3, mlp_only_layers=(1,), intermediate_size=40)
    talker = replace(
        c.talker, text=replace(c.talker.text, num_hidden_layers=2), mtp=replace(c.talker.mtp, num_hidden_layers=2)
    )
    wave = replace(
        c.code2wav, num_hidden_layers=2, num_quantizers=6, upsample_rates=(8, 5, 4, 3), upsampling_ratios=(2, 2)
    )
    return replace(c, text=text, talker=replace(talker, num_code_groups=6), code2wav=wave)


@lru_cache
def part(name: str, dtype: torch.dtype) -> Any:
    """The box `name` in `dtype`, with the same weights in both types."""
    c = config()
    assert isinstance(c.talker, TalkerConfig)
    assert isinstance(c.code2wav, Code2WavConfig)
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "aut": lambda: AuT(c.audio),
        "text decoder": lambda: TextDecoder(DECODER, c.audio.d_model),
        "thinker": lambda: Thinker(c.text, accept_layer=2),
        "talker": lambda: Talker(c.talker),  # type: ignore[arg-type]
        "mtp": lambda: MTP(c.talker.mtp, c.talker.num_code_groups),  # type: ignore[union-attr]
        "code2wav": lambda: Code2Wav(c.code2wav),  # type: ignore[arg-type]
    }
    box = make[name]()
    randomize(box, seed=1)
    return box.to(dtype).requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def _as_served() -> Iterator[None]:
    """Without gradients, as in generation; some boxes compute otherwise then (`test_..._with_gradients`)."""
    with torch.no_grad():
        yield


def noise(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def mel(seed: int, frames: int, dtype: torch.dtype) -> Tensor:
    """Raw log-mel [T, F] that gets louder and quieter from second to second, with silences far below the floor."""
    level = noise((frames // 100 + 1, 1), seed + 500, dtype).repeat_interleave(100, 0)[:frames]
    x = noise((frames, config().audio.num_mel_bins), seed, dtype) + 2 * level - 3
    x[noise((frames,), seed + 900, torch.float64) > 1.2] = LOG_FLOOR
    return x.clamp(min=LOG_FLOOR)


@dataclass(frozen=True)
class Box:
    """How a test drives one box; a row's content is named by a seed."""

    name: str
    longest: int  # units that a test gives it
    content: Callable[[int, int, torch.dtype], Tensor]  # seed, length, dtype -> one row of input
    floats: Callable[[Any], list[Tensor]] = lambda y: [y]  # what the box gives, as tensors [B, T, …]
    ids: Callable[[Any, Any], Tensor] | None = None  # greedy choice from (box, outputs)

    def of(self, dtype: torch.dtype) -> Any:
        return part(self.name, dtype)

    def init(self, rows: int, dtype: torch.dtype) -> Any:
        bounded = self.name in ("thinker", "talker", "text decoder")
        size = (CAPACITY,) if bounded else ()
        window = {"window": 1} if self.name == "aut" else {}
        return self.of(dtype).init_state(rows, *size, device=CPU, dtype=dtype, **window)

    def rows(self, seeds: list[int], length: int, dtype: torch.dtype) -> Tensor:
        return torch.stack([self.content(seed, length, dtype) for seed in seeds])

    def run(self, x: Tensor, seeds: list[int], dtype: torch.dtype, state: Any = None, final: bool = False) -> Any:
        """One call; `seeds` name the rows, for the text decoder hears other audio in each."""
        box = self.of(dtype)
        if self.name == "text decoder":
            audio = torch.stack([noise((9, box.width), seed + 70, dtype) for seed in seeds])
            return self.floats(box(x, box.memory(audio), state, final))
        window = {"window": 1} if self.name == "aut" and state is None else {}
        return self.floats(box(x, state, final, **window))


def _rows_of(width: Callable[[OmniConfig], int]) -> Callable[[int, int, torch.dtype], Tensor]:
    return lambda seed, length, dtype: noise((300, width(config())), seed, dtype)[:length]


def _talker(c: OmniConfig) -> TalkerConfig:
    assert c.talker is not None
    return c.talker


BOXES = {
    box.name: box
    for box in (
        Box("aut", 330, lambda seed, length, dtype: mel(seed, 900, dtype)[:length]),
        Box(
            "text decoder",
            20,
            lambda seed, length, dtype: numbers(DECODER.vocab_size, (300,), seed)[:length],
            ids=lambda box, y: y[0].argmax(-1),
        ),
        Box(
            "thinker",
            20,
            _rows_of(lambda c: c.text.hidden_size),
            floats=list,
            ids=lambda box, y: box.logits(y[0]).argmax(-1),
        ),
        Box(
            "talker",
            20,
            _rows_of(lambda c: _talker(c).text.hidden_size),
            ids=lambda box, y: box.codec_head(y[0]).argmax(-1),
        ),
        Box(
            "mtp",
            6,
            _rows_of(lambda c: _talker(c).mtp.hidden_size),
            ids=lambda box, y: torch.stack([head(y[0]).argmax(-1) for head in box.lm_head]),
        ),
        Box("code2wav", 12, lambda seed, length, dtype: numbers(48, (20, 6), seed)[:length]),
    )
}
every_box = pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
# MTP remembers nothing between frames, and inside one its rows are at the same step: nobody is reset or saved there
STREAMS = [box for name, box in BOXES.items() if name != "mtp"]
every_stream = pytest.mark.parametrize("box", STREAMS, ids=[box.name for box in STREAMS])


def in_pieces(
    box: Box, x: Tensor, sizes: list[int], seeds: list[int], dtype: torch.dtype, state: Any = None
) -> list[Tensor]:
    """Outputs for x [B, T, …] in pieces of `sizes`, the rest last; checks that nothing given changes later."""
    state = box.init(len(x), dtype) if state is None else state
    *pieces, last = x.split([*sizes, x.shape[1] - sum(sizes)], dim=1)
    given: list[list[Tensor]] = []
    kept: list[list[Tensor]] = []
    for piece in [*pieces, last]:
        given.append(box.run(piece, seeds, dtype, state, final=piece is last))
        kept.append([y.clone() for y in given[-1]])
    for early, copies in zip(given, kept, strict=True):
        for y, clone in zip(early, copies, strict=True):
            assert torch.equal(y, clone), "an output that was given has changed"
    return [torch.cat(parts, 1) for parts in zip(*given, strict=True)]


def assert_law(box: Box, length: int, sizes: list[int], dtype: torch.dtype, seed: int) -> None:
    seeds = [seed, seed + 1]
    x = box.rows(seeds, length, dtype)
    whole = box.run(x, seeds, dtype)
    pieces = in_pieces(box, x, sizes, seeds, dtype)
    for found, expected in zip(pieces, whole, strict=True):
        assert_same(found, expected, dtype)
    if box.ids is not None:
        assert torch.equal(box.ids(box.of(dtype), pieces), box.ids(box.of(dtype), whole))


@st.composite
def cuts(draw: st.DrawFn, longest: int) -> tuple[int, list[int]]:
    """A length and the sizes of its pieces but the last, many of them one."""
    length = draw(st.integers(1, longest))
    places = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6))
    start = draw(st.integers(0, length - 1))
    places |= set(range(start, min(start + 3, length)))  # neighbours: pieces of one
    ends = sorted(p for p in places if 0 < p < length)
    return length, [b - a for a, b in zip([0, *ends], ends, strict=False)]


# --------------------------------------------------------------------------------------------------- the law


@every_box
@law
@given(data=st.data(), dtype=dtypes, seed=st.integers(0, 99))
def test_pieces_give_what_the_whole_gives(box, data, dtype, seed):
    length, sizes = data.draw(cuts(box.longest))
    assert_law(box, length, sizes, dtype, seed)


@every_box
def test_pieces_give_what_the_whole_gives_with_gradients(box):
    length = 230 if box.name == "aut" else box.longest
    with torch.enable_grad():
        assert_law(box, length, [length // 3, 1], torch.float64, 7)
        trained = box.run(box.rows([7, 8], length, torch.float64), [7, 8], torch.float64)
    served = box.run(box.rows([7, 8], length, torch.float64), [7, 8], torch.float64)
    assert_equal(trained, served)


@pytest.mark.parametrize("most", [0, 3000, 30_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_both_ways_to_convolve_are_one_law(monkeypatch, most, dtype):
    """Short pieces are convolved as matrix products and long ones are not: a stream and its whole may mix."""
    monkeypatch.setattr(convolutions, "WINDOWED_AT_MOST", most)
    assert_law(BOXES["code2wav"], 12, [1, 1, 4], dtype, 9)


@every_box
def test_pieces_of_one(box):
    length = 101 if box.name == "aut" else box.longest
    assert_law(box, length, [1] * (length - 1), torch.float64, 3)
    assert_law(box, 1, [], torch.float64, 3)


@pytest.mark.parametrize("name", ["thinker", "talker", "text decoder"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_pieces_around_the_end_of_a_cache_block(name, dtype):
    assert_law(BOXES[name], 270, [CACHE_BLOCK - 2, 1, 1, 1, 1, 7], dtype, 5)
    assert_law(BOXES[name], 270, [CACHE_BLOCK], dtype, 6)


@settings(max_examples=30, deadline=None)
@given(
    window=st.sampled_from([1, 2, 4, 8]),
    length=st.one_of(st.integers(1, 99), st.sampled_from([100, 200, 400, 800]), st.integers(101, 890)),
    places=st.sets(st.integers(1, 890), max_size=8),
    step=st.booleans(),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
@example(window=8, length=890, places={1, 2, 799, 800, 801}, step=False, dtype=torch.float64, seed=0)
@example(window=1, length=100, places={99}, step=False, dtype=torch.float64, seed=1)
@example(window=2, length=99, places=set(), step=True, dtype=torch.float32, seed=2)
def test_aut_law_in_every_window(window, length, places, step, dtype, seed):
    box = part("aut", dtype)
    x = torch.stack([mel(seed, 900, dtype)[:length], mel(seed + 1, 900, dtype)[:length]])
    ends = set(range(10, length, 10)) if step else {p for p in places if p < length}  # 100 ms, or anywhere
    state, given, done = box.init_state(2, CPU, dtype, window=window), [], 0
    for end in [*sorted(ends), length]:
        given.append(box(x[:, done:end], state, final=end == length))
        done = end
        closed = length if end == length else end // (100 * window) * 100 * window
        assert sum(y.shape[1] for y in given) == box.config.tokens(closed), "a window is given when it closes"
    assert_same(torch.cat(given, 1), box(x, window=window), dtype)


def test_aut_windows_do_not_see_each_other():
    box, x = part("aut", torch.float64), mel(0, 900, torch.float64)[None, :500]
    peak = x.amax((1, 2))
    whole = box(x, window=2, peak=peak)
    assert whole.shape[1] == 65
    for first in range(0, 500, 200):
        alone = box(x[:, first : first + 200], window=2, peak=peak)
        assert_same(alone, whole[:, first // 100 * 13 :][:, : alone.shape[1]], torch.float64)
    louder = x.clone()
    louder[:, 250] = 5.0  # above everything, in the second window
    changed = box(louder, window=2) - box(x, window=2)
    assert not changed[:, :26].any()
    assert changed[:, 26:].abs().amax(-1).gt(0).all()


def test_aut_refers_its_floor_to_the_peak_so_far():
    box = part("aut", torch.float64)
    quiet = mel(0, 900, torch.float64)[None, :300].clamp(max=-6)
    loud = quiet.clone()
    loud[:, 150] = 3.0  # in the second window: 80 dB below it is above much of the rest
    peak, so_far = box(loud, window=1, peak=loud.amax((1, 2))), box(loud, window=1)
    assert_same(so_far[:, :13], box(quiet, window=1)[:, :13], torch.float64)  # not known yet
    assert_same(so_far[:, 13:], peak[:, 13:], torch.float64)
    assert (so_far[:, :13] - peak[:, :13]).abs().max() > 0.01


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(
        st.one_of(st.sampled_from([1, 7, 99, 100, 101, 400]), st.integers(1, 500)), min_size=2, max_size=4
    ),
    window=st.sampled_from([1, 2, 4, 8]),
    padding=st.sampled_from([LOG_FLOOR, 0.0, 3.0]),
    whole_peak=st.booleans(),
)
def test_aut_in_a_padded_batch_hears_each_clip_as_alone(lengths, window, padding, whole_peak):
    box, dtype = part("aut", torch.float64), torch.float64
    clips = [mel(seed, 900, dtype)[:length] for seed, length in enumerate(lengths)]
    batch = torch.full((len(clips), max(lengths), clips[0].shape[1]), padding, dtype=dtype)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    peaks = torch.stack([clip.amax() for clip in clips]) if whole_peak else None
    together = box.encode(batch, window=window, frames=torch.tensor(lengths), peak=peaks)
    for i, clip in enumerate(clips):
        alone = box.encode(clip[None], window=window, peak=None if peaks is None else peaks[i : i + 1])
        assert_same(together[i : i + 1, : alone.shape[1]], alone, dtype)


@every_box
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_do_not_see_each_other(box, dtype):
    seeds, length = [11, 12, 13], min(box.longest, 230)
    sizes = [length // 3, 1]
    together = in_pieces(box, box.rows(seeds, length, dtype), sizes, seeds, dtype)
    for i, seed in enumerate(seeds):
        alone = in_pieces(box, box.rows([seed], length, dtype), sizes, [seed], dtype)
        for all_rows, row in zip(together, alone, strict=True):
            assert_same(all_rows[i : i + 1], row, dtype)


@every_box
def test_a_whole_batch_is_its_rows(box):
    seeds, length = [21, 22], min(box.longest, 150)
    together = box.run(box.rows(seeds, length, torch.float64), seeds, torch.float64)
    for i, seed in enumerate(seeds):
        alone = box.run(box.rows([seed], length, torch.float64), [seed], torch.float64)
        for all_rows, row in zip(together, alone, strict=True):
            assert_same(all_rows[i : i + 1], row, torch.float64)


@pytest.mark.parametrize("name", ["thinker", "talker"])
def test_explicit_positions_turn_the_keys(name):
    box = part(name, torch.float64)
    x = BOXES[name].rows([1], 12, torch.float64)
    plain = BOXES[name].floats(box(x))[0]
    places = torch.arange(12)[None]
    assert_same(BOXES[name].floats(box(x, positions=places))[0], plain, torch.float64)
    moved = BOXES[name].floats(box(x, positions=places + 7))[0]
    assert_same(moved, plain, torch.float32)  # rotary positions are relative; angles are float32
    assert (BOXES[name].floats(box(x, positions=places * 3))[0] - plain).abs().max() > 0.01


# ----------------------------------------------------------------------------------------------- MTP's own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mtp_step_by_step_equals_at_once(dtype):
    box, rows = part("mtp", dtype), 3
    hidden, first = (noise((rows, box.config.hidden_size), seed, dtype) for seed in (1, 2))
    state, seen = box.init_state(rows, CPU, dtype), []

    def greedy(logits: Tensor, codebook: int) -> Tensor:
        assert codebook == len(seen) + 1
        seen.append(logits)
        return logits.argmax(-1)

    codes, total = box.predict(hidden, first, greedy, state)
    at_once = box.logits(hidden, first, codes)
    assert_same(torch.stack(seen, 1), at_once, dtype)
    assert torch.equal(at_once.argmax(-1), codes)
    assert codes.unique().numel() > 3
    assert_same(total, box.embed(codes).sum(1), dtype)

    seen.clear()
    box.predict(first, hidden, greedy, state)  # another frame
    seen.clear()
    spoil(state, 1)
    again, _ = box.predict(hidden, first, greedy, state)  # positions restart: the frame before leaves nothing
    assert torch.equal(again, codes)

    state.restart()
    box(hidden[:, None], state)  # the beginning of a frame, left there
    seen.clear()
    saved, new = {name: t.clone() for name, t in state.tensors().items()}, box.init_state(rows, CPU, dtype)
    new.load(saved)
    assert torch.equal(box.predict(hidden, first, greedy, new)[0], codes)


@pytest.mark.parametrize("steps", [(6, 1), (5, 2), (7,)], ids=str)
def test_mtp_refuses_more_steps_than_a_frame_has(steps):
    box = part("mtp", torch.float64)
    state = box.init_state(1, CPU, torch.float64)
    x = noise((1, 7, box.config.hidden_size), 1, torch.float64)
    *within, over = steps
    for count in within:
        box(x[:, :count], state)
    with pytest.raises(CapacityError, match="a frame has 6 steps"):
        box(x[:, :over], state)


# ------------------------------------------------------------------------------------------------- states


def begun(box: Box, dtype: torch.dtype = torch.float64, seeds: tuple[int, ...] = (31, 32)) -> tuple[Any, int]:
    """A state that has heard the first part of its rows, and how much that was."""
    state, length = box.init(len(seeds), dtype), box.longest // 2
    box.run(box.rows([*seeds], length, dtype), [*seeds], dtype, state)
    return state, length


def go_on(
    box: Box, state: Any, start: int, seeds: tuple[int, ...] = (31, 32), dtype: torch.dtype = torch.float64
) -> Any:
    """What the rows' second part gives."""
    x = box.rows([*seeds], box.longest, dtype)[:, start:]
    return box.run(x, [*seeds], dtype, state, final=True)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, torch.float64)


def spoil(state: State, row: int) -> None:
    """NaN wherever `row` has a number."""
    for f in fields(state):
        value = getattr(state, f.name)
        for tensor in [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []:
            if tensor.is_floating_point():
                tensor.select(f.metadata["row"], row).fill_(float("nan"))


@every_box
def test_reset_forgets(box):
    state, start = begun(box)
    spoil(state, 0)
    spoil(state, 1)
    state.reset()
    assert all(not t.any() for t in state.tensors().values())
    new = box.init(2, torch.float64)
    x = box.rows([31, 32], start, torch.float64)
    assert_equal(
        box.run(x, [31, 32], torch.float64, state, final=True), box.run(x, [31, 32], torch.float64, new, final=True)
    )


@every_stream
def test_reset_of_one_row_leaves_the_other(box):
    state, start = begun(box)
    spoil(state, 1)
    state.reset([1])
    untouched, _ = begun(box)
    assert_equal(
        box.run(
            box.rows([31], box.longest, torch.float64)[:, start:], [31], torch.float64, state.view(0, 1), final=True
        ),
        go_on(box, untouched.view(0, 1), start, (31,)),
    )
    x = box.rows([33], box.longest, torch.float64)  # another conversation takes the row
    assert_equal(
        box.run(x, [33], torch.float64, state.view(1, 2), final=True), box.run(x, [33], torch.float64, None, final=True)
    )


@every_box
def test_copy_forks(box):
    state, start = begun(box)
    fork = state.copy()
    other = box.rows([41, 42], box.longest, torch.float64)[:, start:]
    elsewhere = box.run(other, [31, 32], torch.float64, fork, final=True)
    expected = go_on(box, begun(box)[0], start)
    assert_equal(go_on(box, state, start), expected)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(elsewhere, expected, strict=True) if a.shape == b.shape)


@every_stream
def test_saved_tensors_go_on_identically(box):
    state, start = begun(box)
    saved = {name: t.clone() for name, t in state.tensors().items()}
    expected = go_on(box, state, start)
    new = box.init(2, torch.float64)
    new.load(saved)
    for found, wanted in zip(go_on(box, new, start), expected, strict=True):
        assert torch.equal(found, wanted)


@every_box
def test_a_saved_state_of_another_form_is_refused(box):
    state, _ = begun(box)
    saved = {name: t.clone() for name, t in state.tensors().items()}
    for name in saved:
        with pytest.raises(WeightsError, match=name):
            box.init(2, torch.float64).load({k: t for k, t in saved.items() if k != name})
    with pytest.raises(WeightsError, match="should have shape"):
        box.init(1, torch.float64).load(saved)


@every_box
def test_nbytes_and_rows_tell_what_is_held(box):
    state, _ = begun(box)
    assert state.rows == 2
    assert state.nbytes == sum(t.numel() * t.element_size() for t in state.tensors().values())
    assert state.view(0, 1).rows == 1


# ------------------------------------------------------------------------------------------------ KVCache


DECODERS = [BOXES[name] for name in ("thinker", "talker", "text decoder")]
every_decoder = pytest.mark.parametrize("box", DECODERS, ids=[box.name for box in DECODERS])


def heard(box: Box, seed: int, length: int, after: int = 0) -> list[Tensor]:
    """What steps `after` to `length` of a row give in one whole call."""
    ys = box.run(box.rows([seed], length, torch.float64), [seed], torch.float64)
    return [y[:, after:] for y in ys]


def steps(box: Box, state: KVCache, seeds: list[int], starts: list[int], count: int) -> list[Tensor]:
    """The next `count` steps of rows that stand at `starts`."""
    rows = [box.content(seed, start + count, torch.float64)[start:] for seed, start in zip(seeds, starts, strict=True)]
    return box.run(torch.stack(rows), seeds, torch.float64, state)


@every_decoder
def test_rows_of_different_lengths_share_a_cache(box):
    state = box.init(2, torch.float64)
    steps(box, state, [51, 52], [0, 0], 5)
    spoil(state, 1)
    state.reset([1])
    together = steps(box, state, [51, 53], [5, 0], 4)
    assert state.length.tolist() == [9, 4]
    for y, first, second in zip(together, heard(box, 51, 9, 5), heard(box, 53, 4), strict=True):
        assert_same(y[:1], first, torch.float64)
        assert_same(y[1:], second, torch.float64)


@every_decoder
def test_rows_step_alone_through_views_and_then_together(box):
    state = box.init(2, torch.float64)
    state.reserve(CACHE_BLOCK + 20)
    first = steps(box, state.view(0, 1), [61], [0], CACHE_BLOCK - 2)
    assert_equal(first, heard(box, 61, CACHE_BLOCK - 2))
    second = steps(box, state.view(1, 2), [62], [0], 3)
    assert_equal(second, heard(box, 62, 3))
    together = steps(box, state, [61, 62], [CACHE_BLOCK - 2, 3], 4)  # row 0 goes on into the second block
    assert state.length.tolist() == [CACHE_BLOCK + 2, 7]
    expected = zip(together, heard(box, 61, CACHE_BLOCK + 2, CACHE_BLOCK - 2), heard(box, 62, 7, 3), strict=True)
    for y, long, short in expected:
        assert_same(y[:1], long, torch.float64)
        assert_same(y[1:], short, torch.float64)


@every_decoder
def test_a_view_cannot_grow_the_cache(box):
    state = box.init(2, torch.float64)
    state.reserve(1)
    with pytest.raises(CapacityError, match="257 positions and its cache holds 256"):
        steps(box, state.view(0, 1), [1], [0], CACHE_BLOCK + 1)


def test_a_cache_grows_by_whole_blocks_up_to_its_capacity():
    cache = KVCache.empty(2, 1, 1, 2, 600, CPU, torch.float32)
    block, sizes = 2 * 2 * CACHE_BLOCK * 2 * 4, [cache.nbytes]
    for slots, expected in ((1, 256), (256, 256), (257, 512), (512, 512), (513, 600), (600, 600)):
        cache.reserve(slots)
        assert cache.k.shape[3] == cache.v.shape[3] == expected
        sizes.append(cache.nbytes)
    assert sizes[1] - sizes[0] == block
    assert sizes[3] - sizes[2] == block
    with pytest.raises(CapacityError, match="601 positions and its cache holds 600"):
        cache.reserve(601)
    assert cache.k.shape[3] == 600


@every_decoder
def test_a_step_beyond_the_capacity_is_refused_and_changes_nothing(box):
    state = box.init(1, torch.float64)
    state.capacity = 10
    steps(box, state, [71], [0], 8)
    before = {name: t.clone() for name, t in state.tensors().items()}
    with pytest.raises(CapacityError):
        steps(box, state, [71], [8], 3)
    assert all(torch.equal(t, before[name]) for name, t in state.tensors().items())
    assert_equal(steps(box, state, [71], [8], 2), heard(box, 71, 10, 8))
    assert state.k.shape[3] == 10


@every_decoder
@pytest.mark.parametrize(("said", "cut"), [(10, 6), (10, 0), (9, 9), (CACHE_BLOCK + 30, 17)])
def test_truncate_takes_back_what_was_said(box, said, cut):
    state = box.init(1, torch.float64)
    steps(box, state, [81], [0], said)
    state.truncate(cut)
    assert state.length.tolist() == [cut]
    clean = box.init(1, torch.float64)
    if cut:
        steps(box, clean, [81], [0], cut)
    later = box.rows([82], 7, torch.float64)
    found, expected = (box.run(later, [81], torch.float64, cache) for cache in (state, clean))
    assert_equal(found, expected)


@every_decoder
def test_truncate_of_one_row_leaves_the_other(box):
    state = box.init(2, torch.float64)
    steps(box, state, [91, 92], [0, 0], 8)
    state.truncate(3, row=1)
    state.truncate(20, row=0)  # longer than it is: nothing to cut
    assert state.length.tolist() == [8, 3]
    together = steps(box, state, [91, 92], [8, 3], 2)
    for y, first, second in zip(together, heard(box, 91, 10, 8), heard(box, 92, 5, 3), strict=True):
        assert_same(y[:1], first, torch.float64)
        assert_same(y[1:], second, torch.float64)


def test_rows_out_of_step_are_refused_where_they_cannot_share_a_call():
    box = BOXES["aut"]
    state, _ = begun(box)
    state.reset([1])
    with pytest.raises(CapacityError, match=r"one state\.view at a time"):
        box.run(box.rows([1, 2], 5, torch.float64), [1, 2], torch.float64, state)


# ------------------------------------------------------------------------------------- the training half of AuT


def test_text_decoder_ignores_audio_that_is_padding():
    box, dtype = part("text decoder", torch.float64), torch.float64
    ids, audio = numbers(DECODER.vocab_size, (2, 6), 1), noise((2, 9, box.width), 2, dtype)
    there = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    padded = audio.masked_fill(~there[..., None], 50.0)
    found = box(ids, box.memory(padded), heard=there)
    assert_same(found[:1], box(ids[:1], box.memory(audio[:1])), dtype)
    assert_same(found[1:], box(ids[1:], box.memory(audio[1:, :5])), dtype)
    assert (found - box(ids, box.memory(padded))).abs().max() > 0.01


def test_aut_ratios_4_8_and_16_follow_the_config():
    for layers, tokens in ((2, 25), (3, 13), (4, 7)):
        c: AudioConfig = replace(config().audio, conv_layers=layers)
        box = AuT(c)
        randomize(box)
        box.double().requires_grad_(False)
        assert c.chunk_tokens == tokens
        x, state = mel(0, 900, torch.float64)[None, :230], box.init_state(1, CPU, torch.float64, window=1)
        given = [box(piece, state, final=last) for piece, last in ((x[:, :101], False), (x[:, 101:], True))]
        assert_same(torch.cat(given, 1), box(x, window=1), torch.float64)
        assert sum(y.shape[1] for y in given) == c.tokens(230)
