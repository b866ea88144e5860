"""safetensors files, read straight into place and written whole or not at all.

The format is a length, a JSON table of names, types, shapes and offsets, and the bytes. It is read here rather than
by its library because that maps the file into memory: the pages count as the process's, and a model would need twice
its size while it loads.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from antiphon.errors import InputError, WeightsError

Made = TypeVar("Made", bound=nn.Module)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}


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
                raise WeightsError(f"{path} is {_looks_like(head + file.read(24), length)}")
            table = json.loads(file.read(length))
        entries = {name: _entry(path, value, 8 + length) for name, value in table.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path} is not a safetensors file; expected the released form (no pickles)") from None
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > size:
        raise WeightsError(f"{path} is cut short: {size:,} of {end:,} bytes are there; download it again")
    return entries


def _looks_like(head: bytes, length: int) -> str:
    """What a file is that begins with `head` and is shorter than the header of `length` bytes it would have."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the tensors; fetch them with git lfs pull, or download the file"
    if head[8:9] == b"{" and length < 100_000_000:
        return "cut short inside its header; download it again"
    if head.startswith((b"\x80", b"PK")):  # by itself, or in a zip as torch.save writes it
        return "a pickle and not a safetensors file; pickles are not loaded, convert it to safetensors"
    return "not a safetensors file; expected the released form (no pickles)"


def check_target(path: str | Path) -> None:
    """Refuse a file that could not be written, before what is to be written has been computed.

    Raises:
        InputError: its folder does not exist or may not be written to, or it is a folder itself.
    """
    path, folder = Path(path), Path(path).absolute().parent
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it")
    if not folder.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{path} cannot be written; check the permissions of {folder}")


def _entry(path: Path, value: dict[str, Any], offset: int) -> Entry:
    (start, stop), shape = value["data_offsets"], tuple(value["shape"])
    if value["dtype"] not in DTYPES:
        raise WeightsError(f"{path} holds tensors of type {value['dtype']}; expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[value["dtype"]]
    if start < 0 or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError
    return Entry(dtype, shape, offset + start, offset + stop)


def read_into(file: RawIOBase, entry: Entry, target: Tensor) -> None:
    """Bytes of `entry` of an unbuffered file into `target`, without a second copy where device and type agree."""
    direct = target.device.type == "cpu" and target.dtype == entry.dtype and target.is_contiguous()
    buffer = target if direct else torch.empty(entry.shape, dtype=entry.dtype)
    if buffer.numel():
        file.seek(entry.start)
        rest = _bytes(buffer)
        while rest:  # one read gives at most 2 GiB
            count = file.readinto(rest)
            if not count:
                raise WeightsError(f"{getattr(file, 'name', 'the file')} ended while it was read; download it again")
            rest = rest[count:]
    if not direct:
        target.copy_(buffer)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy 2 is a buffer


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor, and put it in place only when it is whole.

    Raises:
        WeightsError: the file cannot be written.
    """
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    names, offset = {dtype: name for name, dtype in DTYPES.items()}, 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        table[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    target = path.resolve()  # a link stays and what it points to is replaced
    special = target.exists() and not target.is_file()  # a device or a pipe is written into
    part = target if special else target.with_name(target.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for tensor in tensors.values():
                if tensor.numel():
                    file.write(_bytes(tensor.detach().cpu().contiguous()))
        if not special:
            os.replace(part, target)
    except OSError as error:
        if not special:
            part.unlink(missing_ok=True)
        raise WeightsError(
            f"{path} cannot be written ({error.strerror}); check the folder and the free space"
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write one text file, put in place only when it is whole.

    Raises:
        InputError: the file cannot be written.
    """
    target = Path(path).resolve()  # a link stays and what it points to is replaced
    special = target.exists() and not target.is_file()  # a device or a pipe is written into
    part = target if special else target.with_name(target.name + ".part")
    try:
        part.write_text(text, "utf-8")
        if not special:
            os.replace(part, target)
    except OSError as error:
        if not special:
            part.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}); check the folder") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU."""
    entries = read_header(path)
    tensors = {name: torch.empty(e.shape, dtype=e.dtype) for name, e in entries.items()}
    with path.open("rb", buffering=0) as file:
        for name, entry in entries.items():
            read_into(file, entry, tensors[name])
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


def save_described(module: nn.Module, config: Any, path: Path, sizes: str) -> None:
    """Write a module as one safetensors file that says under `sizes` what it was made with, a dataclass."""
    write_safetensors(path, dict(module.state_dict()), {sizes: json.dumps(asdict(config))})


def load_described(path: Path, sizes: str, make: Callable[[dict[str, Any]], Made]) -> Made:
    """The module in a file of `save_described`, made of its sizes by `make`, for inference.

    Raises:
        WeightsError: not such a file, or a tensor that does not fit its sizes.
    """
    stated, tensors = json.loads(read_metadata(path, sizes)), read_safetensors(path)
    module = make(stated).eval()
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    if odd := sorted(set(wanted.items()) ^ {(name, tuple(t.shape)) for name, t in tensors.items()}):
        raise WeightsError(f"{path}: {odd[0][0]} does not fit the sizes that the file states; write it again")
    module.load_state_dict(tensors)
    return module
