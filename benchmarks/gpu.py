"""Whether the engine says on a device what the readable loop says, and what bfloat16 changes.

    python -m benchmarks.gpu [--model tiny] [--device cuda] [--frames 40] [--together 1 4 16 32] [--out codes.json]

In float32 every answer of the engine, alone and with others, is held to the readable loop: ids, codes, and samples
within 1e-5 of the largest. In bfloat16 sums of another order round differently, so what is said is the share of frames
before the first that differs, and of all codes, that an answer has in a batch of each size as it has alone. Every line
is printed, and the file written, as soon as it is known.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antiphon.engine import Engine
from antiphon.generate import Omni, Reply, collect, load
from antiphon.sampling import GREEDY

QUESTIONS = ("What can you hear?", "Tell me about the sea.", "Count to ten, please.", "Why is the sky blue?")


def asked(number: int, frames: int) -> tuple[str, dict[str, Any]]:
    """A question and how it is answered: some greedily, most as the release draws."""
    ways: dict[str, Any] = {"speech": GREEDY, "residual": GREEDY} if number % 4 == 3 else {}
    how = {"seed": number, "max_frames": frames, "max_text_tokens": frames, "verbatim": True, **ways}
    return QUESTIONS[number % len(QUESTIONS)], how


def alone(model: Omni, number: int, frames: int) -> Reply:
    """The answer of the readable loop."""
    session, (question, how) = model.session(), asked(number, frames)
    session.append_text(question)
    return collect(session.respond(**how))


def together(engine: Engine, count: int, frames: int) -> list[Reply]:
    """The answers of the engine to so many at once, which has lanes in threads."""
    calls, answers = [engine.open() for _ in range(count)], []
    for number, call in enumerate(calls):
        question, how = asked(number, frames)
        call.append_text(question)
        answers.append(call.respond(**how))
    replies = [events.reply() for events in answers]
    for call in calls:
        call.close()
    return replies


def differences(one: Reply, other: Reply) -> list[str]:
    """What is not the same in two answers."""
    found = [] if one.text_ids == other.text_ids else ["text"]
    if not torch.equal(one.codes, other.codes):
        return [*found, "codes"]
    largest = max(1e-9, float(np.abs(one.audio).max(initial=0)))
    worst = float(np.abs(one.audio - other.audio).max(initial=0)) / largest
    return found if worst <= 1e-5 else [*found, f"samples by {worst:.1e}"]


def shares(one: Reply, other: Reply) -> tuple[float, float]:
    """Of the frames of two answers, those before the first that differs; of the codes, those that are the same."""
    count = max(len(one.codes), len(other.codes), 1)
    both = min(len(one.codes), len(other.codes))
    same = one.codes[:both] == other.codes[:both]
    first = int(same.all(1).int().cumprod(0).sum())
    return first / count, float(same.sum()) / (count * one.codes.shape[1])


class Findings:
    """Lines that are printed and written at once, so that none is lost if the next step fails."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.lines, self.start = out, list[dict[str, Any]](), time.perf_counter()

    def add(self, **facts: Any) -> None:
        """One more."""
        self.lines.append(facts)
        print(
            f"{time.perf_counter() - self.start:6.1f} s  " + "  ".join(f"{k} {v}" for k, v in facts.items()), flush=True
        )
        if self.out is not None:
            self.out.write_text(json.dumps(self.lines, indent=1))


def exact(model: Omni, together_: list[int], frames: int, found: Findings) -> bool:
    """Hold the engine to the readable loop; whether it says the same."""
    expected, good = [alone(model, number, frames) for number in range(max(together_))], True
    found.add(check="readable loop", answers=len(expected), frames=sum(len(reply.codes) for reply in expected))
    with Engine(model) as engine:
        for count in together_:
            replies = together(engine, count, frames)
            wrong = [w for one, other in zip(expected, replies, strict=False) if (w := differences(one, other))]
            found.add(check="float32 engine over readable loop", together=count, differ=len(wrong), how=wrong[:3])
            good = good and not wrong
    return good


def rounded(model: Omni, together_: list[int], frames: int, found: Findings) -> None:
    """What bfloat16 makes of the same answers in batches of other sizes."""
    with Engine(model) as engine:
        expected = [together(engine, 1, frames)[0]]
        for count in together_:
            replies = together(engine, count, frames)
            first, every = shares(expected[0], replies[0])
            found.add(check="bfloat16 over alone", together=count, frames_before=f"{first:.3f}", codes=f"{every:.3f}")


def main() -> None:
    """Print what was found; exit 1 if float32 differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--together", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = Findings(given.out)
    model = load(given.model, given.device, torch.float32)
    good = exact(model, given.together, given.frames, found)
    rounded(load(given.model, given.device, torch.bfloat16), given.together, given.frames, found)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
