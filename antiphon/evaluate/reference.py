"""The same stages from the installed transformers, the oracle of `antiphon verify`.

Only this file imports transformers, inside its functions: it is a development dependency and not part of the product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from antiphon.audio import Resampler, Samples
from antiphon.errors import InputError
from antiphon.evaluate.stages import Case, finished
from antiphon.files import read_header


def reference_stages(model: Any, case: Case, prompt_ids: Tensor) -> dict[str, Tensor]:
    """All that is compared, from a `load_reference`, which reads `prompt_ids`; `model` is left as it was."""
    tower, prompt_ids = model.thinker.model.audio_tower, prompt_ids.to(model.device)
    window = tower.n_window_infer if case.window is None else case.window * 2 * tower.n_window
    with _quiet(), torch.no_grad(), patch.object(tower, "n_window_infer", window), _Watch(model) as watch:
        clips = [part for turn in case.turns for part in turn if not isinstance(part, str)]
        inputs, stages = _features(model, clips)
        answer = _generate(model, case, prompt_ids, inputs, stages)
        thinker = answer["thinker"]
        layer = model.config.talker_config.accept_hidden_layer if model.has_talker else 0
        stages["prompt_ids"] = prompt_ids
        stages["thinker_hidden"] = thinker.hidden_states[0][layer][0]
        stages["thinker_logits"] = torch.cat(thinker.logits)
        stages["text_ids"] = thinker.sequences[0, len(prompt_ids) :]
        stages |= watch.experts()
        if "talker" in answer:
            stages |= _spoken(model, answer["inputs"][0], answer["talker"])
        if "codes" in stages:
            stages["mtp_logits"] = torch.cat(watch.residual).unflatten(0, (len(stages["codes"]), -1))
            # its Talker takes one step more than there are frames
            steps = len(stages["talker_inputs"]) + min(len(stages["codes"]), case.max_frames - 1)
            stages["talker_experts"] = stages["talker_experts"][:, :steps]
        return finished(stages)


def _spoken(model: Any, inputs: Tensor, talker: Any) -> dict[str, Tensor]:
    """Stages of what the Talker said; none where that was nothing."""
    codes = [hidden[-1][0] for hidden in talker.hidden_states if hidden[-1] is not None]
    if not codes:
        return {}
    return {
        "talker_inputs": inputs,
        "talker_logits": torch.cat(talker.logits)[: len(codes)],
        "codes": torch.stack(codes),
        "waveform": causal_waveform(model, torch.stack(codes).T[None])[0],
    }


class _Watch:
    """Keeps which experts are chosen and what MTP's heads score while it is open."""

    def __init__(self, model: Any) -> None:
        self.routes: dict[str, list[list[Tensor]]] = {}  # per stage and layer
        self.residual: list[Tensor] = []
        self.hooks: list[Any] = []
        boxes = {"thinker_experts": model.thinker.model} | (
            {"talker_experts": model.talker} if model.has_talker else {}
        )
        for stage, box in boxes.items():
            routers = [m for m in box.modules() if type(m).__name__.endswith("TopKRouter")]
            self.routes[stage] = [[] for _ in routers]
            for router, chosen in zip(routers, self.routes[stage], strict=True):
                self.hooks.append(router.register_forward_hook(partial(self._route, chosen)))
        for head in model.talker.code_predictor.lm_head if model.has_talker else ():
            self.hooks.append(head.register_forward_hook(self._score))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def experts(self) -> dict[str, Tensor]:
        """Chosen in every box that ran [K, positions, k]."""
        return {
            stage: torch.stack([torch.cat(chosen) for chosen in layers])
            for stage, layers in self.routes.items()
            if any(layers)
        }

    @staticmethod
    def _route(chosen: list[Tensor], module: Any, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(out[2])

    def _score(self, module: Any, args: Any, out: Tensor) -> None:
        self.residual.append(out[:, -1])


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
    if not any(name.startswith("thinker.visual.") for name in names):  # as Antiphon writes them: make a stub
        thinker: Any = config.thinker_config
        vision = thinker.vision_config
        vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
        vision.deepstack_visual_indexes, vision.num_position_embeddings, vision.patch_size = [0], 16, 4
        vision.out_hidden_size = thinker.text_config.hidden_size
    model: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype, experts_implementation="eager"
    )
    return model.to(device).eval()  # its device_map would need one more package


def _features(model: Any, clips: Sequence[tuple[Samples, int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Generation inputs for the clips and the stages mel and audio_features, every clip on its own."""
    if not clips:
        return {}, {}
    mels = [_mel(model, *clip) for clip in clips]
    tower = model.thinker.model.audio_tower
    lengths = [torch.tensor([mel.shape[1]], device=model.device) for mel in mels]
    encoded = [tower(m.to(model.device), feature_lens=n) for m, n in zip(mels, lengths, strict=True)]
    features = torch.cat([out.last_hidden_state for out in encoded])
    longest = max(mel.shape[1] for mel in mels)
    padded = torch.stack([torch.nn.functional.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
    mask = torch.stack([(torch.arange(longest) < mel.shape[1]).long() for mel in mels])
    inputs = {"input_features": padded.to(model.device), "feature_attention_mask": mask.to(model.device)}
    return inputs, {"mel": torch.cat(mels, 1), "audio_features": features}


def _mel(model: Any, samples: Samples, source_rate: int) -> Tensor:
    """Normalised log-mel [F, frames] of a clip by transformers' front end."""
    from transformers import WhisperFeatureExtractor

    extract: Any = WhisperFeatureExtractor(feature_size=model.config.thinker_config.audio_config.num_mel_bins)
    rate = extract.sampling_rate
    wave = Resampler(source_rate, rate)(torch.from_numpy(samples)[None])[0].numpy()
    mel = extract(wave, sampling_rate=rate, padding=True, truncation=False, return_tensors="pt").input_features[0]
    return mel[:, : len(wave) // rate * 100 + len(wave) % rate // extract.hop_length]


def reference_answer(model: Any, case: Case, prompt_ids: Tensor) -> list[int]:
    """Text ids of transformers' answer to one clip and a text, as its `generate` comes: sound and all, to the end."""
    (clip,) = [part for part in case.turns[0] if not isinstance(part, str)]
    ids, mel = prompt_ids[None].to(model.device), _mel(model, *clip)[None].to(model.device)
    with _quiet(), torch.no_grad():
        text, _ = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=mel,
            feature_attention_mask=torch.ones(1, mel.shape[2], dtype=torch.long, device=model.device),
            **_limits(model, case),
        )
    return text[0, len(prompt_ids) :].tolist()


def _limits(model: Any, case: Case) -> dict[str, Any]:
    """How transformers' `generate` is to answer a case."""
    return {
        "speaker": case.voice,
        "thinker_max_new_tokens": case.max_text_tokens,
        "thinker_do_sample": False,
        "thinker_eos_token_id": model.config.im_end_token_id,
        "talker_do_sample": False,
        "talker_max_new_tokens": case.max_frames + 1,
        "talker_repetition_penalty": case.repetition_penalty,
    }


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
    model: Any, case: Case, ids: Tensor, inputs: dict[str, Tensor], stages: dict[str, Tensor]
) -> dict[str, Any]:
    """What the Thinker gives, the Talker's inputs and what the Talker gives, caught from transformers' generate()."""
    caught: dict[str, Any] = {}

    def text(*args: Any, **kwargs: Any) -> Any:
        caught["thinker"] = type(model.thinker).generate(model.thinker, *args, **kwargs)
        if caught["thinker"].sequences.shape[1] < len(ids) + 2:  # no word to say, on which it fails
            raise _Enough
        return caught["thinker"]

    def codes(*args: Any, **kwargs: Any) -> Any:
        caught["inputs"] = kwargs["inputs_embeds"]
        caught["talker"] = type(model.talker).generate(model.talker, *args, **kwargs)
        raise _Enough

    def features(*args: Any, **kwargs: Any) -> Any:  # one call for all clips would pad them to the longest
        return SimpleNamespace(last_hidden_state=stages["audio_features"], pooler_output=stages["audio_features"])

    everything = {"output_hidden_states": True, "return_dict_in_generate": True}
    common = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), **inputs}
    limits = {**_limits(model, case), "thinker_output_logits": True, "talker_output_logits": True}
    with patch.object(model.thinker.model, "get_audio_features", features), suppress(_Enough):
        if case.voice is None:
            thinker = {n.removeprefix("thinker_"): v for n, v in limits.items() if n.startswith("thinker_")}
            return {"thinker": model.thinker.generate(**common, **thinker, **everything)}
        with patch.object(model.thinker, "generate", text), patch.object(model.talker, "generate", codes):
            model.generate(**common, **limits)
    return caught


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
