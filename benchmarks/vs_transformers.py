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
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.bench.against import fastest_experts, readable, theirs
from antiphon.evaluate.reference import load_reference
from antiphon.evaluate.stages import Case, spelled
from antiphon.generate import load
from tests.shapes import write_shape

RATE = 16000  # Hz, of the question
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


def case(voice: str, frames: int) -> Case:
    """Two seconds of a rising tone and a written question, to be answered in so many frames."""
    t = np.arange(2 * RATE) / RATE
    tone = (0.3 * np.sin(2 * np.pi * (200 + 200 * t) * t)).astype(np.float32)
    return Case([[(tone, RATE), "What did you hear?"]], None, voice, frames // 2, frames)


def race(shape: str, frames: int, rounds: int, threads: list[int]) -> None:
    """Print the rows of one shape: both systems, with each number of threads."""
    warnings.simplefilter("ignore")
    base, changes = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        write_shape(base, Path(folder), **changes)
        model = load(folder)
        other = load_reference(Path(folder), model.dtype)
    asked = case(model.voices[0], frames)
    ids = spelled(asked, model.config, model.tokenizer)
    name = f"{shape} ({sum(p.numel() for p in model.parameters()) / 1e6:.1f} M)"
    for count in threads:
        torch.set_num_threads(count)
        experts = fastest_experts(other, asked, ids)
        readable(model, asked)  # both are warm now
        pairs = [(readable(model, asked), theirs(other, asked, ids)) for _ in range(rounds)]
        assert all(a.ids == b.ids[: len(a.ids)] for a, b in pairs), "the two disagree: run antiphon verify"
        mine, his = statistics.median(a.seconds for a, _ in pairs), statistics.median(b.seconds for _, b in pairs)
        ratios = sorted(b.seconds / a.seconds for a, b in pairs)
        sooner = statistics.median(b.seconds / a.first for a, b in pairs)
        print(
            f"| {name} | {count} | {frames / mine:.1f} | {frames / his:.1f} ({experts}) "
            f"| **{statistics.median(ratios):.1f}** ({ratios[0]:.1f} to {ratios[-1]:.1f}) | {sooner:.0f} times |",
            flush=True,
        )


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
