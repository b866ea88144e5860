"""Frames per second of Antiphon over `transformers.generate`: one stream, same checkpoint, same machine, same run.

    python -m benchmarks.vs_transformers [--frames 50] [--rounds 5] [--threads 1 2] [--shapes odd laptop release]

The two take turns on the same question, greedily, so that both say the same (which is checked); the ratio is
taken pair by pair, since single timings on a busy machine mean little. transformers runs as it comes, with the fastest
of its expert implementations, which the table names.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.audio import Samples
from antiphon.generate import AudioDelta, Done, Omni, Options, Session, load
from antiphon.sampling import GREEDY, Sampling
from tests.shapes import write_shape

# a model of a size that two cores can hold in real time: about 20 M parameters, 16 codebooks
LAPTOP: dict[str, Any] = {
    "audio": {"d_model": 192, "encoder_layers": 6, "encoder_attention_heads": 4, "encoder_ffn_dim": 768, "bins": 128},
    "conv_channels": 32,
    "thinker": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "thinker_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 384},
    "talker": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "talker_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "shared_expert": 256,
    "head_dim": 64,
    "codebooks": 16,
    "codebook_size": 256,
    "mtp_layers": 3,
    "decoder_dim": 128,
    "sliding_window": 72,
}
# the released structure, layer for layer and expert for expert, at widths that two cores can hold
RELEASE: dict[str, Any] = {
    "audio": {"d_model": 80, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 320, "bins": 128},
    "conv_channels": 8,
    "thinker": {"hidden_size": 64, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4},
    "thinker_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 32},
    "talker": {"hidden_size": 64, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 2},
    "talker_moe": {"num_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 32},
    "shared_expert": 48,
    "head_dim": 8,
    "codebooks": 16,
    "codebook_size": 128,
    "mtp_layers": 5,
    "mtp": {"num_key_value_heads": 8, "intermediate_size": 192},
    "accept": 24,
    "resize": 64,
    "code2wav": {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 192},
    "decoder_dim": 96,
    "sliding_window": 72,
}
SHAPES = {"odd": ("odd", {}), "laptop": ("base", LAPTOP), "release": ("base", RELEASE)}


EXPERTS = (
    "grouped_mm",
    "batched_mm",
    "eager",
)  # transformers' ways to run experts that need no GPU; the first by default


def question(rate: int = 16000) -> Samples:
    """Two seconds of a rising tone."""
    t = np.arange(2 * rate) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 200 * t) * t)).astype(np.float32)


def ours(model: Omni, options: Options) -> tuple[float, float, list[int], list[int]]:
    """Seconds for the whole answer, seconds to its first sound, what was read and what was said."""
    start, first = time.perf_counter(), float("nan")
    session = Session(model)
    session.append_clip(question(), 16000)
    session.append_text("What did you hear?")
    session.commit()
    prompt = list(session.ids)
    for event in session.respond(options):
        if isinstance(event, AudioDelta) and event.frame == 0:
            first = time.perf_counter() - start
        if isinstance(event, Done):
            return time.perf_counter() - start, first, prompt, event.reply.text_ids
    raise RuntimeError("no answer")


def theirs(model: Any, options: Options, ids: list[int]) -> tuple[float, list[int]]:
    """Seconds for the whole answer by transformers, whose first sound comes with its last, and what was said."""
    from transformers import WhisperFeatureExtractor

    start = time.perf_counter()
    extract: Any = WhisperFeatureExtractor(feature_size=model.config.thinker_config.audio_config.num_mel_bins)
    features = extract(question(), sampling_rate=16000, padding=True, truncation=False, return_tensors="pt")
    mel = features.input_features
    text, _ = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        input_features=mel,
        feature_attention_mask=torch.ones(1, mel.shape[2], dtype=torch.long),
        speaker=options.voice,
        thinker_max_new_tokens=options.max_text_tokens,
        thinker_do_sample=False,
        thinker_eos_token_id=model.config.im_end_token_id,
        talker_max_new_tokens=options.max_frames + 1,
        talker_do_sample=False,
    )
    return time.perf_counter() - start, text[0, len(ids) :].tolist()


def race(shape: str, frames: int, rounds: int, threads: list[int]) -> None:
    """Print the rows of one shape: both systems, with each number of threads."""
    from transformers import Qwen3OmniMoeForConditionalGeneration

    warnings.simplefilter("ignore")
    base, changes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        write_shape(base, Path(folder), **changes)
        model = load(folder)
        other: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(folder).eval()
    greedy = Sampling(0.0, repetition_penalty=1.05)
    options = Options(model.voices[0], True, 0, frames // 2, frames, GREEDY, greedy, GREEDY, verbatim=True)
    ids = [*ours(model, options)[2], *session_opening(model)]
    name = f"{shape} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M)"
    for count in threads:
        torch.set_num_threads(count)
        experts = fastest_experts(other, options, ids)
        ours(model, options)  # both are warm now
        pairs = [(ours(model, options), theirs(other, options, ids)) for _ in range(rounds)]
        assert all(a[3] == b[1][: len(a[3])] for a, b in pairs), "the two disagree: run antiphon verify"
        mine, his = statistics.median(a[0] for a, _ in pairs), statistics.median(b[0] for _, b in pairs)
        ratios = sorted(b[0] / a[0] for a, b in pairs)
        sooner = statistics.median(b[0] / a[1] for a, b in pairs)
        print(
            f"| {name} | {count} | {frames / mine:.1f} | {frames / his:.1f} ({experts}) "
            f"| **{statistics.median(ratios):.1f}** ({ratios[0]:.1f} to {ratios[-1]:.1f}) | {sooner:.0f} times |",
            flush=True,
        )


def fastest_experts(other: Any, options: Options, ids: list[int]) -> str:
    """Let transformers use the fastest of its ways to run experts, by the second of two short answers of each."""
    seconds, options = {}, replace(options, max_text_tokens=5, max_frames=10)
    for name in EXPERTS:
        other.set_experts_implementation(name)
        theirs(other, options, ids)
        seconds[name] = theirs(other, options, ids)[0]
    best = min(seconds, key=seconds.__getitem__)
    other.set_experts_implementation(best)
    return best


def session_opening(model: Omni) -> list[int]:
    """Ids that open the assistant's turn."""
    return Session(model).writer.open_reply()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}, eager float32\n")
    print("| checkpoint | threads | antiphon, frames/s | transformers, frames/s | ratio (range) | first sound sooner |")
    print("|---|---|---|---|---|---|")
    for shape in options.shapes:
        race(shape, options.frames, options.rounds, options.threads)


if __name__ == "__main__":
    main()
