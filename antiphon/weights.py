"""Released checkpoints in and out: sharded safetensors, one tensor per expert, read straight into place.

The only file that knows the checkpoint's prefixes. Modules carry the released names, so a checkpoint differs from the
model in two ways, both stated here as data: the prefix of each box, and tensors that are apart on disk and one in
memory (experts, and projections of the same input: `released_tensors`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from antiphon.codec import Codec
from antiphon.config import CodecConfig, OmniConfig
from antiphon.config_json import parse_codec_config, read_config, read_json, to_json
from antiphon.errors import AntiphonError, ConfigError, InputError, WeightsError
from antiphon.files import Entry, read_header, read_into, read_metadata, write_safetensors
from antiphon.layers import disk_tensors
from antiphon.model import Boxes
from antiphon.tokenizer import Tokenizer

PREFIXES = {  # longest module names first: a box inside another is named before it
    "aut.": "thinker.audio_tower.",
    "thinker.": "thinker.",
    "speech.talker.": "talker.",
    "speech.mtp.": "talker.code_predictor.",
    "speech.code2wav.": "code2wav.",
}
TINY = Path(__file__).parent / "tiny"  # the checkpoint that comes with the package
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
Model = TypeVar("Model", bound=Boxes)


def released_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its name on disk, as a view into the model (works on the meta device)."""
    for name, tensor in disk_tensors(model):
        box = next(p for p in PREFIXES if name.startswith(p))
        yield PREFIXES[box] + name.removeprefix(box), tensor


def prefix_of(name: str) -> str:
    """The prefix of the box that a tensor on disk belongs to."""
    return max((p for p in PREFIXES.values() if name.startswith(p)), key=len)


def released_names(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of everything in `model`."""
    return {name: tuple(tensor.shape) for name, tensor in released_tensors(model)}


# -------------------------------------------------------------------------------------------- checkpoint


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint: as given, or downloaded from the Hub (with progress; a broken download resumes).

    `tiny` is the one that comes with this package; a folder of that name is ./tiny.

    Raises:
        WeightsError: neither a folder nor a Hub id that can be had.
    """
    if str(name_or_path) == "tiny":
        if not (TINY / INDEX).exists():
            raise WeightsError("tiny does not come with this build yet; give another checkpoint with -m, or train it")
        return TINY
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
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise WeightsError(f"{index} has no weight_map of file names; download the checkpoint again")
        paths = [folder / name for name in sorted(set(table.values()))]
    elif (folder / SINGLE).exists():
        table, paths = None, [folder / SINGLE]
    else:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        found = f" (found {pickles[0]}: pickles are not loaded, convert it to safetensors)" if pickles else ""
        raise WeightsError(f"{folder} has no {INDEX} and no {SINGLE}{found}")
    if missing := [path for path in paths if not path.exists()]:
        raise WeightsError(f"{missing[0]} is missing; download the checkpoint again")
    files = {path: read_header(path) for path in paths}
    for name, file in (table or {}).items():
        if name not in files[folder / file]:
            raise WeightsError(f"{folder / file} does not hold {name}, which {INDEX} places there")
    for path, held in files.items():  # a tensor in two shards: the index says which counts
        if (name := next((n for n in held if (table or {}).get(n, path.name) != path.name), None)) is not None:
            raise WeightsError(f"{path} holds {name}, which {INDEX} places in {(table or {})[name]}")
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
    return allocate(outline(kind, config, tokenizer), device, dtype)


def outline(kind: type[Model], config: OmniConfig, tokenizer: Tokenizer | None = None) -> Model:
    """A model on the meta device: names, shapes and no memory."""
    with torch.device("meta"), _Blank():
        return kind(config, tokenizer)


class _Blank(TorchFunctionMode):
    """Leaves out initial values: the meta device holds none, and drawing them there imports torch's compiler (3 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def check_device(device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise InputError unless tensors of `dtype` can be made on `device`."""
    try:
        torch.empty(1, device=device, dtype=dtype)
    except (RuntimeError, TypeError, AssertionError) as error:  # all of them are torch's
        raise InputError(f"there is no device {device} for {dtype} here: {str(error).splitlines()[0]}") from None


def allocate(model: Model, device: torch.device | str, dtype: torch.dtype) -> Model:
    """A model made on the meta device, with memory of its own.

    Raises:
        InputError: no such device or type, or not enough memory.
    """
    try:
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        if model.config.text.tie_word_embeddings:  # to_empty gave the two a memory each
            model.thinker.lm_head.weight = model.thinker.model.embed_tokens.weight
        return model
    except (RuntimeError, TypeError, AssertionError) as error:  # all of them are torch's
        reason = str(error).splitlines()[0]
        raise InputError(f"the model cannot be made with device {device} and dtype {dtype}: {reason}") from None


def open_checkpoint(kind: type[Model], folder: Path) -> tuple[Model, dict[Path, dict[str, Entry]], torch.dtype]:
    """A checkpoint before its values are read: the model on the meta device, the tensors by file, and their type.

    Raises:
        ConfigError, WeightsError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    config = read_config(folder)
    files = shards(folder)
    model = outline(kind, config, find_tokenizer(folder, config))
    compare(dict(released_tensors(model)), files)
    return model, files, next((e.dtype for entries in files.values() for e in entries.values()), torch.float32)


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
    model, files, stored = open_checkpoint(kind, find_checkpoint(name_or_path))  # before memory is asked for
    model = allocate(model, device, dtype or stored)
    wanted = dict(released_tensors(model))
    done, total = 0, sum(e.stop - e.start for entries in files.values() for e in entries.values())
    for path, entries in files.items():
        with path.open("rb", buffering=0) as file:
            for name, entry in entries.items():
                read_into(file, entry, wanted[name])
                done += entry.stop - entry.start
                if progress is not None:
                    progress(done, total)
    return model


def load_box(box: nn.Module, name: str, name_or_path: str | Path) -> None:
    """Fill one box of another model, or a part of a box, from a checkpoint: what it was called there is `name`.

    Boxes are aut, thinker, talker, mtp and code2wav; a part is named after its box, as in code2wav.pre_transformer.

    Raises:
        ConfigError, WeightsError: no such box, or the checkpoint's tensors are not exactly those of `box`.
    """
    first, _, part = name.partition(".")
    if (prefix := next((on_disk for ours, on_disk in PREFIXES.items() if ours.endswith(f"{first}.")), None)) is None:
        boxes = ", ".join(ours.removesuffix(".").rpartition(".")[2] for ours in PREFIXES)
        raise ConfigError(f"a checkpoint has no {first}; it has {boxes}")
    within = f"{prefix}{part}." if part else prefix
    files = {
        path: {n: e for n, e in entries.items() if n.startswith(within) and prefix_of(n) == prefix}
        for path, entries in shards(find_checkpoint(name_or_path)).items()
    }
    wanted = {within + n: tensor for n, tensor in disk_tensors(box)}
    compare(wanted, files)
    for path, entries in files.items():
        with path.open("rb", buffering=0) as file:
            for n, entry in entries.items():
                read_into(file, entry, wanted[n])


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
    groups = _groups(dict(released_tensors(model)), shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, tensors in zip(names, groups, strict=True):
        write_safetensors(folder / name, tensors)
    index = {
        "metadata": {"total_size": sum(t.nbytes for g in groups for t in g.values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    _describe(model, folder, index, companions)


def save_boxes(model: Boxes, boxes: Iterable[str], folder: Path, companions: Path) -> None:
    """Write some boxes of `model`, each as a file named after it, with config.json and an index of all that are there.

    For a checkpoint that is trained box by box: what did not change is not written again.

    Raises:
        AntiphonError: the folder cannot be written.
    """
    tensors = dict(released_tensors(model))
    for ours, prefix in PREFIXES.items():
        box = ours.removesuffix(".").rpartition(".")[2]
        if box in boxes:
            held = {n: t for n, t in tensors.items() if prefix_of(n) == prefix}
            write_safetensors(folder / f"{box}.safetensors", held)
    written = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    table = {n: file for file, entries in written.items() for n in entries if n in tensors}
    size = sum(entry.stop - entry.start for entries in written.values() for n, entry in entries.items() if n in table)
    _describe(model, folder, {"metadata": {"total_size": size}, "weight_map": table}, companions)


def _describe(model: Boxes, folder: Path, index: dict[str, Any], companions: str | Path | None) -> None:
    """Write the index and config.json, and copy what else belongs to a checkpoint."""
    for name, data in ((INDEX, index), ("config.json", _typed(model.config.raw, model.dtype))):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS if companions is not None else ():
        if (source := Path(companions or "") / name).exists():
            shutil.copy2(source, folder / name)


def _groups(tensors: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """`tensors` in order, in groups of at most `most` bytes (or of one tensor)."""
    groups: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = most
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return groups


def _typed(section: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config.json that names `dtype` wherever it named a type, in either spelling."""
    name, typed = str(dtype).removeprefix("torch."), dict(section)
    for key, value in section.items():
        if isinstance(value, Mapping):
            typed[key] = _typed(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            typed[key] = name
    return typed


# ------------------------------------------------------------------------------------------------ codec

CODEC_FILE = "codec.safetensors"  # our own file, beside a checkpoint: the release has no name for the codec's encoder
# what a Mimi checkpoint holds besides: the way back to sound, and codebooks that were not asked for
_MIMI_DECODER = re.compile(r"(decoder|decoder_transformer|upsample)\.")
_CODEBOOK = re.compile(r"quantizer\.(semantic|acoustic)_residual_vector_quantizer\.layers\.\d+\.")


def mimi_tensors(codec: Codec, prefix: str = "") -> dict[str, Tensor]:
    """Views of every tensor by its name in the flat layout that kyutai/mimi has and transformers 5 still writes.

    Qwen3-TTS-Tokenizer-12Hz holds the same layout under the `prefix` "encoder.".
    """
    return {prefix + name.removeprefix("encoder."): tensor for name, tensor in disk_tensors(codec)}


def save_codec(codec: Codec, path: str | Path) -> Path:
    """Write `codec` as one safetensors file that describes itself: `path`, or codec.safetensors in that folder."""
    path = Path(path)
    path = path / CODEC_FILE if path.is_dir() else path
    write_safetensors(path, mimi_tensors(codec), {"codec_config": to_json(codec.config)})
    return path


def load_codec(path: str | Path, num_quantizers: int | None = None) -> Codec:
    """Codec in eval mode from our own file, a folder that holds one, or a folder as kyutai/mimi or Qwen3-TTS's.

    `num_quantizers` keeps the first codebooks only; by default all, or those that Qwen3-TTS declares valid.

    Raises:
        ConfigError: the configuration is missing or cannot be built.
        WeightsError: no safetensors, or a tensor missing, surplus or misshapen.
    """
    file, config, prefix = _find_codec(Path(path))
    codec = Codec(replace(config, num_quantizers=num_quantizers or config.num_quantizers)).eval()
    wanted, held = mimi_tensors(codec, prefix), read_header(file)
    spare = [n for n in held if n not in wanted and (_MIMI_DECODER.match(n) or _CODEBOOK.match(n.removeprefix(prefix)))]
    compare(wanted, {file: {name: entry for name, entry in held.items() if name not in spare}})
    with file.open("rb", buffering=0) as stream:
        for name, tensor in wanted.items():
            read_into(stream, held[name], tensor)
    return codec


def _find_codec(path: Path) -> tuple[Path, CodecConfig, str]:
    """The weights file that `path` means, its config, and the prefix of its names."""
    own, mimi = path / CODEC_FILE if path.is_dir() else path, path / SINGLE
    if own.is_file():
        return own, parse_codec_config(json.loads(read_metadata(own, "codec_config"))), ""
    if not mimi.is_file():
        raise WeightsError(
            f"{path} holds neither {CODEC_FILE} nor {SINGLE}; convert pickled weights (.bin) to safetensors"
        )
    data = read_json(path / "config.json")
    nested = data.get("encoder_config")
    if not isinstance(nested, dict):
        return mimi, parse_codec_config(data), ""
    config = parse_codec_config(nested)
    valid = data.get("encoder_valid_num_quantizers", config.num_quantizers)
    return mimi, replace(config, num_quantizers=valid), "encoder."
