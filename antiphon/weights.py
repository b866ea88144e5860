"""Released checkpoints in and out: sharded safetensors, one tensor per expert, read straight into place.

The only file that knows the checkpoint's prefixes. Modules carry the released names, so a checkpoint differs from the
model in two ways, both stated here as data: the prefix of each box, and experts, which are one tensor each on disk
and one stack in memory (`released_tensors`).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from antiphon.config import OmniConfig, read_config, read_json
from antiphon.errors import AntiphonError, WeightsError
from antiphon.model import Boxes
from antiphon.tokenizer import Tokenizer

PREFIXES = {  # longest module names first: a box inside another is named before it
    "aut.": "thinker.audio_tower.",
    "thinker.": "thinker.",
    "speech.talker.": "talker.",
    "speech.mtp.": "talker.code_predictor.",
    "speech.code2wav.": "code2wav.",
}
LEFT_OUT = ("thinker.visual.",)  # the vision tower: images and video are out of scope
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
SHARD_BYTES = 5_000_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}

Model = TypeVar("Model", bound=Boxes)


def released_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its name on disk, as a view into the model (works on the meta device)."""
    for name, parameter in model.named_parameters():
        box = next(p for p in PREFIXES if name.startswith(p))
        name = PREFIXES[box] + name.removeprefix(box)
        stem, _, last = name.rpartition(".")
        data = parameter.detach()
        if last == "gate_up_proj":
            half = data.shape[1] // 2
            for expert in range(data.shape[0]):
                yield f"{stem}.{expert}.gate_proj.weight", data[expert, :half]
                yield f"{stem}.{expert}.up_proj.weight", data[expert, half:]
        elif last == "down_proj":  # a stack of experts: a plain layer's name ends in .weight
            for expert in range(data.shape[0]):
                yield f"{stem}.{expert}.down_proj.weight", data[expert]
        else:
            yield name, data


def released_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of everything in `model`."""
    return {name: tuple(tensor.shape) for name, tensor in released_tensors(model)}


# ------------------------------------------------------------------------------------------ safetensors


@dataclass(frozen=True)
class Entry:
    """One tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds.

    Raises:
        WeightsError: not safetensors (a pickle, a pointer file), or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(size - 8, 100_000_000):
                raise ValueError
            table = json.loads(file.read(length))
        entries = {name: _entry(value, 8 + length) for name, value in table.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; download the checkpoint again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path} is not a safetensors file; expected the released form (no pickles)") from None
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > size:
        raise WeightsError(f"{path} is cut short: {size:,} of {end:,} bytes are there; download it again")
    return entries


def _entry(value: dict[str, Any], offset: int) -> Entry:
    start, stop = value["data_offsets"]
    return Entry(DTYPES[value["dtype"]], tuple(value["shape"]), offset + start, offset + stop)


def _read_into(file: Any, entry: Entry, target: Tensor) -> None:
    """Bytes of `entry` into `target`, without a second copy where device and type agree.

    Plain reads rather than a memory map: mapped pages count as the process's memory and would double it.
    """
    direct = target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous()
    buffer = target if direct else torch.empty(entry.shape, dtype=entry.dtype)
    if buffer.numel():
        file.seek(entry.start)
        rest = _bytes(buffer)
        while rest:  # one read gives at most 2 GiB
            rest = rest[file.readinto(rest) :]
    if not direct:
        target.copy_(buffer)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy 2 is a buffer


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor, and put it in place only when it is whole."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    names, offset = {dtype: name for name, dtype in DTYPES.items()}, 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        table[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(_bytes(tensor.detach().cpu().contiguous()))
    os.replace(part, path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU."""
    entries = read_header(path)
    tensors = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
    with path.open("rb") as file:
        for name, entry in entries.items():
            _read_into(file, entry, tensors[name])
    return tensors


def read_metadata(path: Path, key: str) -> str:
    """One entry of a safetensors file's metadata.

    Raises:
        WeightsError: not a safetensors file, or one without the entry.
    """
    read_header(path)
    with path.open("rb") as file:
        table = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    if key not in table.get("__metadata__", {}):
        raise WeightsError(f"{path} holds no {key}; it was written by something else")
    return table["__metadata__"][key]


# -------------------------------------------------------------------------------------------- checkpoint


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: as given, or downloaded from the Hub (with progress; a broken download resumes).

    Raises:
        WeightsError: neither a folder nor a Hub id that can be had.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightsError(
            f"{path} is a file; expected a checkpoint's folder or a Hub id such as Qwen/Qwen3-Omni-30B-A3B-Instruct"
        )
    parts = str(name_or_path).split("/")
    if len(parts) != 2 or not all(parts) or str(name_or_path).startswith((".", "~")):
        raise WeightsError(f"{name_or_path} does not exist; expected a checkpoint's folder or a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"])
        )
    except Exception as error:  # the hub raises its own, requests' and the operating system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{name_or_path} is no folder here and could not be downloaded: {reason}") from None


def shards(folder: Path) -> dict[Path, dict[str, Entry]]:
    """The safetensors files of a checkpoint and what each holds, the vision tower left out.

    Raises:
        WeightsError: no weights, only pickles, a shard missing or damaged, a tensor where the index does not say.
    """
    index = folder / INDEX
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict):
            raise WeightsError(f"{index} has no weight_map; download the checkpoint again")
        paths = [folder / name for name in sorted(set(table.values()))]
    elif (folder / SINGLE).exists():
        table, paths = None, [folder / SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        found = f" (found {pickles[0]}: pickles are not loaded, convert it to safetensors)" if pickles else ""
        raise WeightsError(f"{folder} has no {INDEX} and no {SINGLE}{found}")
    files = {path: read_header(path) for path in paths}
    for name, file in (table or {}).items():
        if name not in files[folder / file]:
            raise WeightsError(f"{folder / file} does not hold {name}, which {INDEX} places there")
    return {p: {n: e for n, e in held.items() if not n.startswith(LEFT_OUT)} for p, held in files.items()}


def compare(wanted: dict[str, Tensor], files: dict[Path, dict[str, Entry]]) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model.

    Raises:
        WeightsError: the first missing, surplus or misshapen tensor by name, and how many more there are.
    """
    held = {name: (path, entry) for path, entries in files.items() for name, entry in entries.items()}
    _none(
        "is missing from the checkpoint",
        {n: f"expected shape {list(t.shape)}" for n, t in wanted.items() if n not in held},
    )
    _none("is not part of this model", {n: f"found in {held[n][0].name}" for n in held if n not in wanted})
    shapes = {n: (tuple(t.shape), held[n][1].shape) for n, t in wanted.items()}
    _none("is misshapen", {n: f"expected {list(a)}, found {list(b)}" for n, (a, b) in shapes.items() if a != b})


def _none(what: str, wrong: dict[str, str]) -> None:
    if wrong:
        name, detail = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
        raise WeightsError(f"tensor {name} {what}: {detail}{more}")


def build(
    kind: type[Model], config: OmniConfig, tokenizer: Tokenizer | None, device: torch.device | str, dtype: torch.dtype
) -> Model:
    """A model with memory but no values yet: it is made on the meta device and allocated once, in its final type."""
    with torch.device("meta"):
        model = kind(config, tokenizer)
    return model.to(dtype).to_empty(device=device).requires_grad_(False).eval()


def load_checkpoint(
    kind: type[Model],
    name_or_path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A checkpoint in the released form as a `kind` of Boxes; `dtype` as on disk when None.

    `progress` is told the bytes read so far and in all.

    Raises:
        ConfigError, WeightsError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    folder = find_checkpoint(name_or_path)
    config = read_config(folder)
    files = shards(folder)
    stored = next((e.dtype for entries in files.values() for e in entries.values()), torch.float32)
    model = build(kind, config, find_tokenizer(folder, config), device, dtype or stored)
    wanted = dict(released_tensors(model))
    compare(wanted, files)
    done, total = 0, sum(e.stop - e.start for entries in files.values() for e in entries.values())
    for path, entries in files.items():
        with path.open("rb", buffering=0) as file:
            for name, entry in entries.items():
                _read_into(file, entry, wanted[name])
                done += entry.stop - entry.start
                if progress is not None:
                    progress(done, total)
    return model


def find_tokenizer(folder: Path, config: OmniConfig) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None where it has no tokenizer files."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return None
    return Tokenizer.from_folder(folder, config)


def save_checkpoint(
    model: Boxes, folder: str | Path, shard_bytes: int = SHARD_BYTES, companions: str | Path | None = None
) -> None:
    """Write `model` in the released form: config.json, shards of `shard_bytes` with an index.

    Tokenizer and preprocessor files are copied from the folder `companions`, usually the one it was loaded from.

    Raises:
        AntiphonError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AntiphonError(f"{folder} cannot be written: {error.strerror}") from None
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in released_tensors(model):
        if groups[-1] and sum(t.nbytes for t in groups[-1].values()) + tensor.nbytes > shard_bytes:
            groups.append({})
        groups[-1][name] = tensor
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, tensors in zip(names, groups, strict=True):
        write_safetensors(folder / name, tensors)
    index = {
        "metadata": {"total_size": sum(t.nbytes for g in groups for t in g.values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(dict(model.config.raw), indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS if companions is not None else ():
        if (source := Path(companions or "") / name).exists():
            shutil.copy2(source, folder / name)
