"""One spoken answer as one page of HTML that shows what every box did, and when.

The page is `report.html` with the answer's data in it as JSON: sound, log-mel, tokens, codes and times. It loads
nothing from elsewhere and draws itself.

Shapes: N samples, T mel frames, F mel bins, M frames of 80 ms, Q codebooks.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antiphon.audio import (
    DYNAMIC_RANGE,
    QUIETEST,
    LogMel,
    Resampler,
    Samples,
    check_samples,
    mel_filters,
    write_audio,
)
from antiphon.config import AudioConfig, Code2WavConfig, DecoderConfig, MelConfig, OmniConfig, TalkerConfig
from antiphon.conversation import WINDOWS
from antiphon.errors import InputError
from antiphon.files import write_text
from antiphon.generate import Reply, Session
from antiphon.metrics import Span
from antiphon.tokenizer import Tokenizer

SPEECH_SECTIONS = re.compile(r"<!-- speech -->.*?<!-- end -->\n?", re.DOTALL)
SPECTROGRAM_BINS = 96
SPECTROGRAM_RATE = 100  # frames per second


def write_report(
    path: str | Path, session: Session, question: Samples, rate: int, reply: Reply, title: str = ""
) -> None:
    """Write the page that shows how `reply` came to be, whole or not at all.

    Args:
        path: the HTML file.
        session: the conversation right after the answer.
        question: samples [N] of the clip that was answered.
        rate: their rate in Hz.
        reply: what `session.respond` ended with.
        title: what the page names the answer by.

    Raises:
        AudioError: a question that is no sound.
        InputError: the session has not answered yet, or the file cannot be written.
    """
    data = report_data(session, question, rate, reply) | {"title": title}
    page = files("antiphon").joinpath("report.html").read_text("utf-8")
    if "speech" not in data:
        page = SPEECH_SECTIONS.sub("", page)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # inside a script element only "<" can end it, and in JSON it stands in strings alone
    write_text(path, page.replace("{{data}}", text.replace("<", "\\u003c")))


@torch.inference_mode()
def report_data(session: Session, question: Samples, rate: int, reply: Reply) -> dict[str, Any]:
    """What the page draws, ready for JSON; without the key "speech" where nothing was said aloud."""
    if session.answer is None:
        raise InputError("there is no answer to show; a report follows respond")
    model, config, front = session.model, session.model.config, session.model.config.audio.mel
    wave = Resampler(rate, front.sample_rate)(torch.from_numpy(check_samples(question, rate))[None])
    log_mel = model.log_mel(wave.to(model.device))[0].cpu()
    spans = {name: _seconds(runs) for name, runs in _by_name(reply.spans).items()}
    data = {
        "about": sentences(config, session.window, speaks=len(reply.codes) > 0),
        "text": reply.text,
        "finish": reply.finish,
        "question": _sound(wave[0].numpy(), front.sample_rate),
        "mel": _mel(log_mel, config.audio, session.window),
        "prompt": list(_prompt(session.ids[: session.answer.start], model.tokenizer)),
        "answer": list(_answer(reply, model.tokenizer, len(spans.get("thinker", [])))),
        "spans": spans,
        "times": {name: reply.timings[name] for name in ("first_text", "total") if name in reply.timings},
    }
    if config.code2wav is not None and len(reply.codes):
        data["speech"] = _speech(reply, config.code2wav, model.tokenizer, spans["code2wav"])
    return data


# ------------------------------------------------------------------------------------------------ sound


def _sound(samples: Samples, rate: int) -> dict[str, Any]:
    """A sound [N] as a WAV file, and its spectrogram on a mel scale up to half its rate."""
    wav = io.BytesIO()
    write_audio(wav, samples, rate)
    hop = rate // SPECTROGRAM_RATE
    front = MelConfig(SPECTROGRAM_BINS, rate, n_fft=5 * hop // 2, hop=hop)  # AuT's proportions: no sound is too short
    log_mel = LogMel(front)(torch.from_numpy(samples)[None].float())[0]
    return {"rate": rate, "seconds": len(samples) / rate, "wav": _base64(wav.getvalue())} | _levels(log_mel, front)


def _mel(log_mel: Tensor, config: AudioConfig, window: int) -> dict[str, Any]:
    """Raw log-mel [T, F] as AuT hears it, and how AuT divides it."""
    return _levels(log_mel, config.mel) | {
        "chunk_frames": config.chunk_frames,
        "chunk_tokens": config.chunk_tokens,
        "token_frames": 2**config.conv_layers,
        "tokens": config.tokens(len(log_mel)),
        "windows": WINDOWS,
        "window": window,
    }


def _levels(log_mel: Tensor, front: MelConfig) -> dict[str, Any]:
    """Raw log-mel [T, F] in bytes, frame by frame: 255 is its loudest value, 0 is 80 dB below or less."""
    peak = log_mel.max().clamp(min=math.log10(QUIETEST) + DYNAMIC_RANGE)  # silence is dark
    above = (log_mel - peak + DYNAMIC_RANGE).clamp(min=0) / DYNAMIC_RANGE
    return {
        "frames": len(log_mel),
        "frame_rate": front.frame_rate,
        "decibels": 10 * DYNAMIC_RANGE,
        "hertz": _centres(front).round().astype(int).tolist(),
        "levels": _base64((255 * above).round().byte().numpy().tobytes()),
    }


def _centres(front: MelConfig) -> NDArray[np.float64]:
    """Frequencies [F] in Hz that the mel bins are centred on; 0 for one too narrow to hear anything."""
    weights = mel_filters(front)
    hertz = np.linspace(0, front.sample_rate / 2, weights.shape[1])
    return weights @ hertz / np.maximum(weights.sum(1), np.finfo(float).tiny)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# ----------------------------------------------------------------------------------------------- tokens


def _prompt(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The prompt's tokens in order; a run of audio placeholders is one entry."""
    for is_audio, run in groupby(ids, lambda token: token == tokenizer.config.audio_token_id):
        run = list(run)
        if is_audio:
            yield {"kind": "audio", "count": len(run)}
        else:
            yield from (_token(token, "text", tokenizer) for token in run)


def _answer(reply: Reply, tokenizer: Tokenizer, drawn: int) -> Iterator[dict[str, Any]]:
    """The answer's tokens: "said" as they are, "changed" where marks were taken out, "kept" from the Talker.

    Of `drawn` tokens the reply lacks the last if it closed the turn.
    """
    matcher = SequenceMatcher(None, reply.text_ids, reply.spoken_ids, autojunk=False)
    kinds = {"equal": "said", "replace": "changed", "delete": "kept"}
    for what, start, stop, _, _ in matcher.get_opcodes():
        yield from (_token(token, kinds[what], tokenizer) for token in reply.text_ids[start:stop])
    if drawn > len(reply.text_ids):
        yield _token(tokenizer.config.im_end_token_id, "kept", tokenizer)


def _token(token: int, kind: str, tokenizer: Tokenizer) -> dict[str, Any]:
    piece = tokenizer.piece(token)
    if not piece:  # a control token, or an id that no text has
        return {"id": token, "kind": kind, "text": tokenizer.backend.id_to_token(token) or "", "control": True}
    return {"id": token, "kind": kind, "text": _spelled(piece)}


def _spelled(piece: bytes) -> str:
    """The text of a token; a token that is part of a character is spelled in bytes."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return f"‹{piece.hex('-').upper()}›"


# ----------------------------------------------------------------------------------------- speech and time


def _speech(reply: Reply, config: Code2WavConfig, tokenizer: Tokenizer, decoded: list[list[float]]) -> dict[str, Any]:
    """What was said aloud, frame by frame; a packet is on time if it is there when those before it have been heard."""
    first, length = reply.timings["first_audio"], config.frame_samples / config.sample_rate
    ready = [stop for _, stop in decoded]
    return _sound(reply.audio, reply.sample_rate) | {
        "codes": reply.codes.tolist(),
        "codebook_size": config.codebook_size,
        "frame_seconds": length,
        "words": [_token(token, "said", tokenizer)["text"] for token in reply.spoken_ids],
        "first_audio": first,
        "ready": ready,
        "on_time": sum(at <= first + frame * length for frame, at in enumerate(ready)),
        "rtf": reply.timings["total"] / (len(ready) * length),
    }


def _by_name(spans: Sequence[Span]) -> dict[str, list[Span]]:
    return {name: [span for span in spans if span.name == name] for name in dict.fromkeys(span.name for span in spans)}


def _seconds(spans: Sequence[Span]) -> list[list[float]]:
    """Begin and end of each span, to 10 µs."""
    return [[round(span.start, 5), round(span.stop, 5)] for span in spans]


# ---------------------------------------------------------------------------------------- what the boxes are


def sentences(config: OmniConfig, window: int, speaks: bool = True) -> dict[str, str]:
    """One sentence about each box, with the sizes of this model; those of speech only where it `speaks`."""
    audio = config.audio
    said = {
        "aut": f"AuT, the audio encoder, hears {audio.num_mel_bins} mel bins {audio.mel.frame_rate} times a second: "
        f"{audio.conv_layers} convolutions make {audio.chunk_tokens} tokens of each chunk of "
        f"{audio.chunk_frames / audio.mel.frame_rate:g} s, and {_layers(audio.encoder_layers, audio.d_model)} let the "
        f"tokens of one window of {window} s attend to each other and to nothing else.",
        "thinker": f"The Thinker, the language model ({_decoder(config.text)}), reads audio and text tokens alike "
        "and writes the answer, one token at a time.",
    }
    if speaks and config.talker is not None and config.code2wav is not None:
        said |= _speech_sentences(config.talker, config.code2wav)
    return said


def _speech_sentences(talker: TalkerConfig, wave: Code2WavConfig) -> dict[str, str]:
    size, rest = wave.codebook_size, wave.num_quantizers - 1
    kbits = wave.num_quantizers * math.log2(size) * wave.frame_rate / 1000
    return {
        "talker": f"The Talker ({_decoder(talker.text)}) speaks: every {wave.frame_ms:g} ms it takes in one of the "
        f"Thinker's tokens and chooses the frame's first code, one of {size:,}.",
        "mtp": f"MTP ({_layers(talker.mtp.num_hidden_layers, talker.mtp.hidden_size)}) adds the frame's other {rest} "
        f"code{'s' * (rest > 1)}, one after another, each refining the sound.",
        "codec": f"Together they are the language of a neural codec: {wave.num_quantizers} codebooks of {size:,} "
        f"codes, {wave.frame_rate:g} frames a second, {kbits:.2g} kbit/s.",
        "code2wav": f"Code2Wav, the codec's decoder ({_layers(wave.num_hidden_layers, wave.hidden_size)}, looking back "
        f"{wave.sliding_window} frames and never ahead), turns each frame into {wave.frame_samples:,} samples, "
        f"{wave.frame_ms:g} ms at {wave.sample_rate:,} Hz.",
    }


def _decoder(c: DecoderConfig) -> str:
    layers = _layers(c.num_hidden_layers, c.hidden_size)
    return layers + (f", {c.num_experts_per_tok} of {c.num_experts} experts for each token" if c.num_experts else "")


def _layers(count: int, width: int) -> str:
    return f"{count} layer{'s' * (count > 1)} of width {width:,}"
