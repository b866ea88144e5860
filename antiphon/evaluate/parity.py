"""Every stage of one greedy answer, by Antiphon and by the installed transformers, and the differences between them.

Stages (all float32 or int64; T prompt positions, n text tokens, M frames, Q codebooks):

    mel             [F, frames]  normalised log-mel of the clip(s), side by side
    audio_features  [tokens, U]  AuT's output
    prompt_ids      [T]          the Thinker's prompt
    thinker_hidden  [T, U]       the accept layer's states over the prompt
    thinker_logits  [n, V]       raw scores of each generated token
    text_ids        [n]          generated tokens, the closing one included
    talker_inputs   [P, W]       the Talker's prefill
    talker_logits   [M, C]       raw scores of codebook 0, before suppression and penalty
    codes           [M, Q]
    waveform        [M * 1920]   the oracle is Code2Wav with its transposed convolutions cropped on the right only
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from antiphon.audio import Resampler, Samples, normalize
from antiphon.config import MelConfig
from antiphon.errors import InputError, WeightsError
from antiphon.files import read_header, read_safetensors, write_safetensors
from antiphon.generate import Omni, Options, Session, collect, load
from antiphon.sampling import GREEDY, Sampling
from antiphon.tokenizer import byte_tokenizer

STAGES = (
    "mel",
    "audio_features",
    "prompt_ids",
    "thinker_hidden",
    "thinker_logits",
    "text_ids",
    "talker_inputs",
    "talker_logits",
    "codes",
    "waveform",
)
# largest difference over largest value; ids and codes must be identical in every type
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Case:
    """What is said to the model and how it answers, greedily.

    A turn is a list of parts, text or (samples, rate); user and assistant take turns, the user first and last, and
    assistant turns are one text.
    """

    turns: Sequence[Sequence[str | tuple[Samples, int]]]
    system: str | None = None
    voice: str | None = None
    max_text_tokens: int = 12
    max_frames: int = 12
    repetition_penalty: float = 1.05
    window: int | None = None

    @property
    def options(self) -> Options:
        """Greedy options; every token is spoken, as in the release."""
        speech = Sampling(0.0, repetition_penalty=self.repetition_penalty)
        return Options(
            voice=self.voice,
            max_text_tokens=self.max_text_tokens,
            max_frames=self.max_frames,
            text=GREEDY,
            speech=speech,
            residual=GREEDY,
            verbatim=True,
        )


def default_case() -> Case:
    """A clip of 3.3 s (rising tone over noise, a pause in it) and a question."""
    rate = MelConfig.sample_rate
    t = np.arange(int(3.3 * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    sound = 0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t) + 0.02 * noise
    sound[int(1.5 * rate) : int(2.0 * rate)] *= 0.01
    return Case([[(sound.astype(np.float32), rate), "What did you hear?"]])


# ------------------------------------------------------------------------------------------------- ours


def trace(model: Omni, case: Case) -> dict[str, Tensor]:
    """All stages as Antiphon computes them."""
    record: dict[str, list[Tensor]] = {}
    session = Session(model, case.system, window=case.window, record=record)
    for i, parts in enumerate(case.turns):
        if i % 2:
            session.append_message({"role": "assistant", "content": parts[0]})
            continue
        for part in parts:
            session.append_text(part) if isinstance(part, str) else session.append_clip(*part)
        session.commit()
    options = case.options if model.speech is not None else replace(case.options, audio=False)
    collect(session.respond(options))
    stages = {name: torch.cat(parts) for name, parts in record.items() if name != "mel"}
    if "mel" in record:
        mels = [normalize(mel, mel.amax()).T for mel in record["mel"]]
        stages["mel"] = torch.cat(mels, 1)
    return _finished(stages)


def _finished(stages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stages in order and in plain types; the Talker's input is one of them only where it said something."""
    silent = () if "codes" in stages else ("talker_inputs",)
    return {name: _plain(stages[name]) for name in STAGES if name in stages and name not in silent}


def _plain(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x.long()).contiguous()


# ----------------------------------------------------------------------------------------- transformers


def reference_stages(model: Any, case: Case, prompt_ids: Tensor, speaks: bool) -> dict[str, Tensor]:
    """The same stages from a `load_reference`, which reads `prompt_ids`; `model` is left as it was.

    `speaks` False keeps the Talker out of it: transformers fails on an answer without a word.
    """
    tower, prompt_ids = model.thinker.model.audio_tower, prompt_ids.to(model.device)
    window = tower.n_window_infer if case.window is None else case.window * 2 * tower.n_window
    with _quiet(), torch.no_grad(), patch.object(tower, "n_window_infer", window):
        clips = [part for turn in case.turns for part in turn if not isinstance(part, str)]
        inputs, stages = _features(model, clips)
        thinker, talker_inputs, talker = _generate(model, case, prompt_ids, inputs, stages, speaks)
        layer = model.config.talker_config.accept_hidden_layer if model.has_talker else 0
        stages["prompt_ids"] = prompt_ids
        stages["thinker_hidden"] = thinker.hidden_states[0][layer][0]
        stages["thinker_logits"] = torch.cat(thinker.logits)
        stages["text_ids"] = thinker.sequences[0, len(prompt_ids) :]
        frames = talker.hidden_states if speaks else []
        codes = [hidden[-1][0] for hidden in frames if hidden[-1] is not None]
        if codes:
            stages["talker_inputs"] = talker_inputs[0]
            stages["talker_logits"] = torch.cat(talker.logits)[: len(codes)]
            stages["codes"] = torch.stack(codes)
            stages["waveform"] = causal_waveform(model, stages["codes"].T[None])[0]
        return _finished(stages)


def load_reference(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The checkpoint in the installed transformers' class.

    Raises:
        InputError: transformers is not installed.
    """
    with _quiet():
        return _transformers_model(folder, dtype, device)


def _transformers_model(folder: Path, dtype: torch.dtype, device: str) -> Any:
    try:
        from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration
    except ImportError:
        raise InputError("comparing needs transformers; install it with: pip install 'antiphon[verify]'") from None
    config = Qwen3OmniMoeConfig.from_pretrained(folder)
    names = {name for path in folder.glob("*.safetensors") for name in read_header(path)}
    if not any(
        name.startswith("thinker.visual.") for name in names
    ):  # a checkpoint without a vision tower: make a stub
        thinker: Any = config.thinker_config
        vision = thinker.vision_config
        vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
        vision.deepstack_visual_indexes, vision.num_position_embeddings, vision.patch_size = [0], 16, 4
        vision.out_hidden_size = thinker.text_config.hidden_size
    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        experts_implementation="eager",
        device_map=device if device != "cpu" else None,
    )
    return model.eval()


def _features(model: Any, clips: Sequence[tuple[Samples, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Generation inputs for the clips and the stages mel and audio_features, every clip on its own."""
    if not clips:
        return {}, {}
    from transformers import WhisperFeatureExtractor

    extract: Any = WhisperFeatureExtractor(feature_size=model.config.thinker_config.audio_config.num_mel_bins)
    rate = extract.sampling_rate
    mels = []
    for samples, source_rate in clips:
        wave = Resampler(source_rate, rate)(torch.from_numpy(samples)[None])[0].numpy()
        mel = extract(wave, sampling_rate=rate, padding=True, truncation=False, return_tensors="pt").input_features[0]
        mels.append(mel[:, : len(wave) // rate * 100 + len(wave) % rate // extract.hop_length])
    tower = model.thinker.model.audio_tower
    lengths = [torch.tensor([mel.shape[1]], device=model.device) for mel in mels]
    encoded = [tower(m.to(model.device), feature_lens=n) for m, n in zip(mels, lengths, strict=True)]
    features = torch.cat([out.last_hidden_state for out in encoded])
    longest = max(mel.shape[1] for mel in mels)
    padded = torch.stack([torch.nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
    mask = torch.stack([(torch.arange(longest) < mel.shape[1]).long() for mel in mels])
    inputs = {"input_features": padded.to(model.device), "feature_attention_mask": mask.to(model.device)}
    return inputs, {"mel": torch.cat(mels, 1), "audio_features": features}


def reference_prompt(folder: Path, config: Any, case: Case) -> Tensor:
    """The prompt as transformers' tokenizer reads it from one ChatML string, placeholders written out."""
    from transformers import AutoTokenizer
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

    with _quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    spell, thinker = tokenizer.convert_ids_to_tokens, config.thinker_config
    start, end = spell(config.im_start_token_id), spell(config.im_end_token_id)
    before, pad = spell(thinker.audio_start_token_id), spell(thinker.audio_token_id)
    text = "" if case.system is None else f"{start}system\n{case.system}{end}\n"
    for i, parts in enumerate(case.turns):
        text += start + ("assistant\n" if i % 2 else "user\n")
        for part in parts:
            if isinstance(part, str):
                text += part
            else:
                frames = round(len(part[0]) * 16000 / part[1]) // 160
                count = int(_get_feat_extract_output_lengths(torch.tensor(frames)))
                text += before + pad * count + "<|audio_end|>"
        text += f"{end}\n"
    ids = tokenizer(f"{text}{start}assistant\n", add_special_tokens=False).input_ids
    return torch.tensor(ids)


class _Enough(Exception):
    """Ends transformers' generate() after the Talker: what follows is the decoder that is not the oracle."""


def _generate(
    model: Any, case: Case, ids: Tensor, inputs: dict[str, Tensor], stages: dict[str, Tensor], speaks: bool
) -> tuple[Any, Any, Any]:
    """What the Thinker gives, the Talker's input and what the Talker gives, caught from transformers' generate()."""
    caught: dict[str, Any] = {}

    def text(*args: Any, **kwargs: Any) -> Any:
        caught["thinker"] = type(model.thinker).generate(model.thinker, *args, **kwargs)
        return caught["thinker"]

    def codes(*args: Any, **kwargs: Any) -> Any:
        caught["inputs"] = kwargs["inputs_embeds"]
        caught["talker"] = type(model.talker).generate(model.talker, *args, **kwargs)
        raise _Enough

    def features(*args: Any, **kwargs: Any) -> Any:  # one call for all clips would pad them to the longest
        return SimpleNamespace(last_hidden_state=stages["audio_features"], pooler_output=stages["audio_features"])

    everything = {"output_hidden_states": True, "return_dict_in_generate": True}
    common = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), **inputs}
    thinker = {"max_new_tokens": case.max_text_tokens, "do_sample": False, "output_logits": True}
    thinker["eos_token_id"] = model.config.im_end_token_id
    with patch.object(model.thinker.model, "get_audio_features", features), suppress(_Enough):
        if not speaks:
            return model.thinker.generate(**common, **thinker, **everything), None, None
        with patch.object(model.thinker, "generate", text), patch.object(model.talker, "generate", codes):
            model.generate(
                **common,
                **{f"thinker_{name}": value for name, value in thinker.items()},
                speaker=case.voice,
                talker_do_sample=False,
                talker_max_new_tokens=case.max_frames + 1,
                talker_repetition_penalty=case.repetition_penalty,
                talker_output_logits=True,
            )
    return caught["thinker"], caught["inputs"], caught["talker"]


def causal_waveform(model: Any, codes: Tensor) -> Tensor:
    """transformers' Code2Wav [B, N] of codes [B, Q, T] as the exact oracle: its transposed convolutions keep their
    left edge."""
    with ExitStack() as stack, torch.no_grad():
        for module in model.code2wav.modules():
            if hasattr(module, "left_pad"):
                stack.enter_context(patch.object(module, "left_pad", 0))
        return model.code2wav(codes)[:, 0]


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


# ------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Difference:
    """How far one stage is from the reference."""

    stage: str
    shape: tuple[int, ...]
    difference: float  # largest, over the reference's largest value; for ids the share that differs
    tolerance: float
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether it is within tolerance."""
        return self.difference <= self.tolerance and not self.note


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> list[Difference]:
    """Stage by stage; a stage that one side lacks, or of another shape, disagrees."""
    rows = []
    for stage in STAGES:
        if stage not in ours and stage not in theirs:
            continue
        a, b = ours.get(stage), theirs.get(stage)
        if a is None or b is None:
            missing = "antiphon" if a is None else "the reference"
            rows.append(Difference(stage, (), float("inf"), 0.0, f"missing in {missing}"))
        elif a.shape != b.shape:
            rows.append(Difference(stage, tuple(a.shape), float("inf"), 0.0, f"reference has {list(b.shape)}"))
        else:
            rows.append(_difference(stage, a, b, dtype))
    return rows


def _difference(stage: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> Difference:
    if not a.is_floating_point():
        share = float((a != b).double().mean()) if a.numel() else 0.0
        return Difference(stage, tuple(a.shape), share, 0.0)
    # the front end is computed in float32 whatever the weights are
    tolerance = TOLERANCES[torch.float32 if stage == "mel" else dtype]
    largest = float(b.abs().max()) if b.numel() else 0.0
    gap = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return Difference(stage, tuple(a.shape), gap / largest if largest else gap, tolerance)


def verify(
    folder: Path,
    case: Case | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    golden: Path | None = None,
    write_golden: Path | None = None,
) -> tuple[list[Difference], dict[str, Tensor], torch.dtype]:
    """Compare a checkpoint with transformers, or with the `golden` file that an earlier comparison wrote.

    One model is in memory at a time, so that 70 GB fit where they fit once.

    Raises:
        AntiphonError: the checkpoint or the golden file cannot be used, or transformers is missing.
    """
    model = load(folder, device, dtype)
    stand_in = ensure_tokenizer(model)
    case, dtype = case or default_case(), model.dtype
    case = replace(case, voice=case.voice or next(iter(model.voices), None))
    ours, voice, im_end = trace(model, case), case.voice, model.config.im_end_token_id
    del model
    gc.collect()
    if golden is not None:
        theirs = read_safetensors(golden)
        if not set(theirs) <= set(STAGES):
            raise WeightsError(f"{golden} is not a golden file; write one with --write-golden")
    else:
        said = int((ours["text_ids"] != im_end).sum())
        spoken = said if ours["text_ids"][-1] == im_end else said - 1
        speaks = voice is not None and spoken > 0
        other = load_reference(folder, dtype, device)
        theirs = reference_stages(other, case, ours["prompt_ids"], speaks)
        if not stand_in:
            theirs["prompt_ids"] = reference_prompt(folder, other.config, case)
    if write_golden is not None:
        write_safetensors(write_golden, theirs)
    return compare(ours, theirs, dtype), ours, dtype


def ensure_tokenizer(model: Omni) -> bool:
    """Let bytes stand in for tokens where a checkpoint has no tokenizer; whether they do."""
    try:
        model.tokenizer  # noqa: B018
    except InputError:
        model.tokenizer = byte_tokenizer(model.config)
        return True
    return False
