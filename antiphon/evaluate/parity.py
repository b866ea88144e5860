"""Antiphon against the installed transformers, stage by stage: `antiphon verify`.

transformers answers first, or a golden file holds what it answered elsewhere. Antiphon is then led along that answer:
it is fed the same ids, codes and experts, and where it would have chosen another, the scores of the two candidates are
compared. In float32 every choice is the same; in bfloat16 two right implementations differ wherever two candidates
score alike within rounding. So a comparison says the same in every type, with that type's tolerance.
"""

from __future__ import annotations

import gc
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antiphon.errors import InputError, WeightsError
from antiphon.evaluate.reference import load_reference, reference_prompt, reference_stages
from antiphon.evaluate.stages import COMPARED, Case, Choices, Follower, default_case, ensure_tokenizer, spelled, trace
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.generate import Omni, load
from antiphon.weights import check_device, open_checkpoint, released_names

LEAD = 4  # times a stage's tolerance, which is of its mean: two scores, and the worst of hundreds of choices
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Difference:
    """How far one stage is from the reference."""

    stage: str
    shape: tuple[int, ...]
    difference: float  # `typical`, which must be within tolerance; of choices the largest lead over the reference's
    tolerance: float
    largest: float = 0.0  # difference of a single value, over the largest value: shown, for it is mostly rounding
    note: str = ""  # why nothing could be compared
    parted: int = 0  # choices that are not the reference's, and of how many
    choices: int = 0

    @property
    def agrees(self) -> bool:
        """Whether it is within tolerance."""
        return self.difference <= self.tolerance and not self.note


def compare(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, choices: Mapping[str, Choices] | None = None
) -> list[Difference]:
    """Stage by stage; a stage that one side lacks, or of another shape, disagrees.

    `choices` are those of the Follower that led `ours`; ids that were chosen freely must be the same.
    """
    rows = []
    for stage in COMPARED:
        a, b = ours.get(stage), theirs.get(stage)
        if a is None and b is None:
            continue
        if a is None or b is None:
            missing = "antiphon" if a is None else "the reference"
            rows.append(Difference(stage, (), float("inf"), 0.0, note=f"missing in {missing}"))
        elif a.shape != b.shape:
            rows.append(Difference(stage, tuple(a.shape), float("inf"), 0.0, note=f"reference has {list(b.shape)}"))
        else:
            rows.append(_difference(stage, a, b, dtype, (choices or {}).get(stage)))
    return rows


def _difference(stage: str, a: Tensor, b: Tensor, dtype: torch.dtype, choices: Choices | None) -> Difference:
    shape = tuple(a.shape)
    if choices is not None:
        tolerance = LEAD * TOLERANCES[dtype]
        return Difference(stage, shape, choices.gap, tolerance, parted=choices.parted, choices=choices.made)
    if not a.is_floating_point():
        return Difference(stage, shape, float((a != b).double().mean()) if a.numel() else 0.0, 0.0)
    if stage == "mel":  # the front end is computed in float32 whatever the weights are
        dtype = torch.float32
    a, b = a.double(), b.double()
    return Difference(stage, shape, typical(a, b), TOLERANCES[dtype], largest(a, b))


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference of a from b, over the largest value of b."""
    if not a.numel():
        return 0.0
    gap, scale = float((a - b).abs().max()), float(b.abs().max())
    return gap / scale if scale else gap


def typical(a: Tensor, b: Tensor) -> float:
    """Root mean square, over the positions of b [.., D] or over all of b [N], of how far a is off each in its own size.

    A position with huge values, as language models have at their first token, does not hide the others.
    """
    if not a.numel():
        return 0.0
    gap, scale = (a - b).norm(dim=-1), b.norm(dim=-1)
    return float(torch.where(scale > 0, gap / scale, gap).square().mean().sqrt())


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

    Returns:
        A row per stage, our stages, and the type that sets the tolerance: the coarser of weights' and golden file's.

    Raises:
        AntiphonError: the checkpoint, the case or the golden file cannot be used, or transformers is missing.
    """
    bare, _, stored = open_checkpoint(Omni, folder)  # what is wrong shows before a model is loaded
    stand_in, dtype = ensure_tokenizer(bare), dtype or stored
    case = case or default_case()
    case = replace(case, voice=case.voice or next(iter(bare.voices), None))
    check_device(device, dtype)
    if case.voice is not None:
        bare.speaker(case.voice)
    prompt, facts = spelled(case, bare.config, bare.tokenizer), _facts(case, bare)
    if golden is not None:
        theirs, coarser = _read_golden(golden, facts)
    else:
        theirs, coarser = _reference(folder, case, prompt, stand_in, dtype, device), dtype
    if write_golden is not None:
        write_safetensors(write_golden, theirs, {"case": json.dumps(facts), "dtype": str(coarser)})
    model = load(folder, device, dtype)
    model.tokenizer = bare.tokenizer
    follower = Follower(theirs, bare.config.talker and bare.config.talker.codec_eos_token_id)
    ours = trace(model, case, follower)
    dtype = max(dtype, coarser, key=TOLERANCES.__getitem__)
    return compare(ours, theirs, dtype, follower.choices), ours, dtype


def _reference(
    folder: Path, case: Case, prompt: Tensor, stand_in: bool, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """What transformers answers; it is out of memory again afterwards."""
    model = load_reference(folder, dtype, device)
    prompt = prompt if stand_in else reference_prompt(folder, model.config, case)
    stages = reference_stages(model, case, prompt)
    del model
    gc.collect()
    return stages


def _facts(case: Case, model: Omni) -> dict[str, Any]:
    """What a golden file was made of: the sizes of the checkpoint, the input and the limits."""
    turns = [
        [
            part if isinstance(part, str) else f"{len(part[0])} samples, crc {zlib.crc32(part[0].tobytes())}"
            for part in t
        ]
        for t in case.turns
    ]
    sizes = zlib.crc32(repr(sorted(released_names(model).items())).encode())
    return {"sizes": sizes} | {**vars(case), "turns": turns}


def _read_golden(path: Path, facts: dict[str, Any]) -> tuple[dict[str, Tensor], torch.dtype]:
    if not path.is_file():
        raise InputError(f"{path} is no file; write a golden file with --write-golden")
    theirs = read_safetensors(path)
    if not set(theirs) <= set(COMPARED):
        raise WeightsError(f"{path} is not a golden file; write one with --write-golden")
    written = json.loads(read_metadata(path, "case"))
    for name, value in facts.items():
        if written.get(name) != value:
            found = (
                f"{written.get(name)!r}, and now it is {value!r}" if name != "sizes" else "those of another checkpoint"
            )
            raise InputError(f"{path} was written with other {name}: {found}; ask for the same or write it anew")
    dtypes = {str(dtype): dtype for dtype in TOLERANCES}
    return theirs, dtypes[read_metadata(path, "dtype")]
