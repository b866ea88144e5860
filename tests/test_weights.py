"""Checkpoints in and out: the released form, read into place, and a plain sentence for everything that is wrong."""

import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from antiphon.cli import describe
from antiphon.config_json import read_config
from antiphon.errors import AntiphonError, ConfigError, InputError, WeightsError
from antiphon.evaluate.parity import verify
from antiphon.evaluate.reference import load_reference
from antiphon.files import read_metadata, read_safetensors, write_safetensors
from antiphon.generate import Omni, load
from antiphon.weights import INDEX, SINGLE, _groups, load_box, released_names, released_tensors, save_checkpoint
from tests.shapes import SHAPES, write_shape

Checkpoints = Callable[[str], Path]
ROOT = Path(__file__).parent.parent
VISION = "thinker.visual."
EXPERT = "thinker.model.layers.1.mlp.experts.3.up_proj.weight"
QUESTION = [{"role": "user", "content": "What time is it?"}]


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of one's own: four shards and an index, as transformers writes them."""
    return shutil.copytree(checkpoint("base"), tmp_path / "base")


def on_disk(folder: Path, vision: bool = False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: t for file in files for name, t in safetensors.torch.load_file(file).items()}
    return {name: t for name, t in tensors.items() if vision or not name.startswith(VISION)}


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shard_of(folder: Path, name: str) -> Path:
    return folder / read_index(folder)["weight_map"][name]


def edit_shard(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def say(model: Omni, **options: Any) -> tuple[list[int], list[list[int]]]:
    reply = model.generate(QUESTION, **({"max_text_tokens": 5, "max_frames": 4} | options))
    return reply.text_ids, reply.codes.tolist()


# ------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("shape", SHAPES)
def test_out_as_it_came_in(shape: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, target = checkpoint(shape), tmp_path / "deep" / "inside"
    model = load(source)
    save_checkpoint(model, target, shard_bytes=600_000, companions=source)
    assert_same_tensors(on_disk(target), on_disk(source))
    assert_same_tensors(on_disk(target), {name: t.clone() for name, t in released_tensors(model)})

    theirs, ours = read_index(source), read_index(target)
    assert ours["weight_map"].keys() == {name for name in theirs["weight_map"] if not name.startswith(VISION)}
    assert ours["metadata"]["total_size"] == sum(t.nbytes for t in on_disk(source).values())
    form = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
    assert all(form.fullmatch(name) for name in set(theirs["weight_map"].values()) | set(ours["weight_map"].values()))
    shards = sorted(set(ours["weight_map"].values()))
    assert sorted(p.name for p in target.glob("model*")) == [*shards, INDEX]
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert len(shards) > 1
    assert all(sum(t.nbytes for t in read_safetensors(target / s).values()) <= 600_000 for s in shards)

    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    again = load(target)
    assert again.config == model.config
    assert say(again) == say(model)
    assert not list(tmp_path.rglob("*.part"))


def test_transformers_reads_what_we_wrote(checkpoint: Checkpoints, tmp_path: Path) -> None:
    save_checkpoint(load(checkpoint("odd")), tmp_path / "saved", shard_bytes=300_000, companions=checkpoint("odd"))
    rows, _, _ = verify(tmp_path / "saved")
    assert all(row.agrees for row in rows)
    before, after = (load_reference(f, torch.float32).state_dict() for f in (checkpoint("odd"), tmp_path / "saved"))
    assert before.keys() - after.keys() == {name for name in before if ".visual." in name and name not in after}
    assert_same_tensors(*({n: t for n, t in s.items() if ".visual." not in n} for s in (before, after)))


@pytest.mark.parametrize("shard_bytes", [1, 100_000, 10**12])
def test_shards_of_any_size(shard_bytes: int, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = load(checkpoint("mixed"))
    save_checkpoint(model, tmp_path, shard_bytes)
    count = {1: len(released_names(model)), 10**12: 1}.get(shard_bytes)
    assert count is None or len(list(tmp_path.glob("*.safetensors"))) == count
    assert_same_tensors(on_disk(tmp_path), on_disk(checkpoint("mixed")))
    assert_same_tensors(dict(released_tensors(load(tmp_path))), on_disk(checkpoint("mixed")))


def test_a_single_file(checkpoint: Checkpoints, tmp_path: Path) -> None:
    write_shape("mixed", tmp_path, shard="1GB")
    assert sorted(p.name for p in tmp_path.glob("model*")) == [SINGLE]
    assert_same_tensors(dict(released_tensors(load(tmp_path))), on_disk(checkpoint("mixed")))


@pytest.mark.parametrize("form", ["json", "bpe"])
def test_the_tokenizer_goes_along(form: str, tmp_path: Path) -> None:
    source = write_shape("mixed", tmp_path / "source", form=form)
    model = load(source)
    save_checkpoint(model, tmp_path / "with", companions=source)
    save_checkpoint(model, tmp_path / "without")
    assert load(tmp_path / "with").tokenizer.encode("Hello there") == model.tokenizer.encode("Hello there")
    bare = load(tmp_path / "without")
    with pytest.raises(InputError, match=r"no tokenizer; put tokenizer\.json"):
        say(bare)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_type_at_load(dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    model, stored = load(checkpoint("mixed"), dtype=dtype), on_disk(checkpoint("mixed"))
    assert model.dtype == dtype
    assert_same_tensors(dict(released_tensors(model)), {name: t.to(dtype) for name, t in stored.items()})


def test_bfloat16_in_and_out(checkpoint: Checkpoints, tmp_path: Path) -> None:
    save_checkpoint(load(checkpoint("base"), dtype=torch.bfloat16), tmp_path / "a", 300_000, checkpoint("base"))
    model = load(tmp_path / "a")
    assert model.dtype == torch.bfloat16
    assert {t.dtype for t in on_disk(tmp_path / "a").values()} == {torch.bfloat16}
    save_checkpoint(model, tmp_path / "b", 300_000)
    assert_same_tensors(on_disk(tmp_path / "a"), on_disk(tmp_path / "b"))
    assert_same_tensors(on_disk(tmp_path / "a"), {n: t.bfloat16() for n, t in on_disk(checkpoint("base")).items()})
    wide = load(tmp_path / "a", dtype=torch.float32)
    assert_same_tensors(dict(released_tensors(wide)), {n: t.float() for n, t in on_disk(tmp_path / "a").items()})
    theirs, ours = (load_reference(f, torch.bfloat16).state_dict() for f in (checkpoint("base"), tmp_path / "a"))
    assert_same_tensors(*({n: t for n, t in s.items() if ".visual." not in n} for s in (theirs, ours)))


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_the_config_names_the_type_that_was_written(spelling: str, folder: Path, tmp_path: Path) -> None:
    def respell(config: dict[str, Any]) -> None:
        config[spelling] = config.pop("dtype")
        config["thinker_config"]["text_config"][spelling] = "float32"
        config["code2wav_config"]["dtype"] = None  # as transformers leaves it in most sections
        config["talker_config"].pop("dtype", None)

    edit_json(folder / "config.json", respell)
    save_checkpoint(load(folder, dtype=torch.bfloat16), tmp_path / "b", companions=folder)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "b"))
    assert before[spelling] == "float32"
    assert after[spelling] == after["thinker_config"]["text_config"][spelling] == "bfloat16"
    after[spelling] = after["thinker_config"]["text_config"][spelling] = "float32"
    assert after == before  # and nothing else is another
    assert load_reference(tmp_path / "b", "auto").dtype == torch.bfloat16  # type: ignore[arg-type]


def test_shards_are_filled_in_one_pass() -> None:
    """The time to write 27,659 tensors grows with their number and not with its square."""
    looks = [0]

    class Counted:
        nbytes = property(lambda self: looks.__setitem__(0, looks[0] + 1) or 10)

    tensors: Any = {str(i): Counted() for i in range(1000)}
    groups = _groups(tensors, 95)
    assert [len(group) for group in groups] == [9] * 111 + [1]
    assert {name for group in groups for name in group} == set(tensors)
    assert looks[0] <= 3 * len(tensors)


def test_a_folder_that_cannot_be_written(checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = load(checkpoint("mixed"))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "full" / "model-00001-of-00001.safetensors").mkdir(parents=True)
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "full"):
        with pytest.raises(AntiphonError, match=re.escape(str(target)) + ".* cannot be written"):
            save_checkpoint(model, target)
    assert not list(tmp_path.rglob("*.part"))


def release_spelling(config: dict[str, Any]) -> None:
    """The same numbers as the release spells them, without what only transformers 5 writes."""
    sections = [config["thinker_config"]["text_config"], config["code2wav_config"]]
    sections += [config["talker_config"][name] for name in ("text_config", "code_predictor_config")]
    for section in sections:
        rope = section.pop("rope_parameters")
        section["rope_theta"] = rope.pop("rope_theta")
        section["rope_scaling"] = rope
        if "num_local_experts" in section:
            section["num_experts"] = section.pop("num_local_experts")
        for name in ("model_type", "architectures", "id2label", "label2id", "layer_types", "return_dict"):
            section.pop(name, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_spellings_of_the_config(shape: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    source = checkpoint(shape)
    folder = shutil.copytree(source, tmp_path / "release")
    edit_json(folder / "config.json", release_spelling)
    written, spelled = (json.loads((f / "config.json").read_text()) for f in (source, folder))
    assert "rope_parameters" in json.dumps(written)
    assert "rope_parameters" not in json.dumps({k: v for k, v in spelled.items() if k != "thinker_config"})
    assert "num_local_experts" not in json.dumps(spelled)
    assert read_config(folder) == read_config(source)
    assert say(load(folder)) == say(load(source))


def test_the_vision_tower_is_left_out_by_name(folder: Path) -> None:
    assert any(name.startswith(VISION) for name in on_disk(folder, vision=True))
    with_vision = load(folder)
    for path in folder.glob("*.safetensors"):
        edit_shard(path, lambda held: [held.pop(name) for name in [*held] if name.startswith(VISION)])
    edit_json(folder / INDEX, lambda index: [index["weight_map"].pop(n) for n in [*index["weight_map"]] if VISION in n])
    assert_same_tensors(dict(released_tensors(load(folder))), dict(released_tensors(with_vision)))


def test_tied_embeddings_are_on_disk_once(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("mixed"), tmp_path / "tied")
    edit_json(folder / "config.json", lambda c: c["thinker_config"].update(tie_word_embeddings=True))
    head = "thinker.lm_head.weight"
    edit_shard(shard_of(folder, head), lambda held: held.pop(head))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(head))
    model = load(folder)
    assert torch.equal(model.thinker.lm_head.weight, model.thinker.model.embed_tokens.weight)
    rows, _, _ = verify(folder)
    assert all(row.agrees for row in rows)
    save_checkpoint(model, tmp_path / "again")
    assert_same_tensors(on_disk(tmp_path / "again"), on_disk(folder))
    with torch.no_grad():
        model.thinker.model.embed_tokens.weight[3] = 7
    assert bool((model.thinker.lm_head.weight[3] == 7).all())  # one tensor, not a copy


def test_a_model_is_outlined_without_torchs_compiler(checkpoint: Checkpoints) -> None:
    """Which takes seconds to import, at every start of the command line."""
    code = "import sys; from antiphon.cli import describe, read_config; "
    code += "print(describe(read_config(sys.argv[1]))['tensors'], 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, checkpoint("base")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(on_disk(checkpoint("base")))), "False"]


def test_a_shared_expert_of_width_zero_is_none(checkpoint: Checkpoints) -> None:
    """On disk it has tensors without elements, and a gate that weighs nothing; in the sound it has no part."""
    held = on_disk(checkpoint("routed"))
    name = "talker.model.layers.0.mlp.shared_expert"
    assert held[f"{name}.up_proj.weight"].shape[0] == held[f"{name}.down_proj.weight"].shape[1] == 0
    assert held[f"{name}_gate.weight"].numel() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it initialises such a tensor
        model = load(checkpoint("routed"))
        assert describe(model.config)["tensors"] == len(held)
    said = say(model)
    for path, tensor in released_tensors(model):
        if path.endswith("shared_expert_gate.weight"):
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    assert say(model) == said


def test_progress_counts_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    size = sum(t.nbytes for t in on_disk(folder).values())
    assert seen[-1] == (size, size)
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(on_disk(folder))


# -------------------------------------------------------------------------------------- without a Talker


def drop_speech(folder: Path, form: str) -> None:
    """What the Thinking and Captioner releases are: no Talker, no Code2Wav."""

    def change(config: dict[str, Any]) -> None:
        config["enable_audio_output"] = False
        for name in ("talker_config", "code2wav_config"):
            if form == "absent":
                del config[name]
            elif form == "null":
                config[name] = None

    edit_json(folder / "config.json", change)
    for path in folder.glob("*.safetensors"):
        edit_shard(path, lambda held: [held.pop(name) for name in [*held] if not name.startswith("thinker.")])
    edit_json(
        folder / INDEX,
        lambda index: index.update(
            weight_map={n: f for n, f in index["weight_map"].items() if n.startswith("thinker.")}
        ),
    )


@pytest.mark.parametrize("form", ["absent", "null", "kept"])
def test_a_model_without_talker(form: str, folder: Path, checkpoint: Checkpoints, tmp_path: Path) -> None:
    drop_speech(folder, form)
    model, whole = load(folder), load(checkpoint("base"))
    assert model.speech is None
    assert model.voices == []
    reply = model.generate(QUESTION, audio=False, max_text_tokens=5)
    assert reply.text_ids == whole.generate(QUESTION, audio=False, max_text_tokens=5).text_ids
    assert (len(reply.audio), reply.codes.numel()) == (0, 0)
    with pytest.raises(InputError, match="no Talker and cannot speak; ask for text only"):
        model.generate(QUESTION)
    with pytest.raises(InputError, match="no Talker and cannot speak"):
        model.generate(QUESTION, voice="ethan")
    with pytest.raises(InputError, match="no Talker and cannot speak"):
        list(model.speak("Hello."))
    save_checkpoint(model, tmp_path / "again", companions=folder)
    assert_same_tensors(on_disk(tmp_path / "again"), on_disk(folder))
    assert load(tmp_path / "again").speech is None


def test_verify_without_talker(folder: Path) -> None:
    drop_speech(folder, "absent")
    rows, ours, _ = verify(folder)
    assert all(row.agrees for row in rows)
    stages = ["mel", "audio_features", "prompt_ids", "thinker_hidden", "thinker_logits"]
    stages += ["thinker_experts", "text_ids"]
    assert [row.stage for row in rows] == stages == list(ours)


def test_a_talker_that_the_config_denies_is_surplus(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(enable_audio_output=False))
    with pytest.raises(WeightsError, match=r"tensor (talker|code2wav)\.\S+ is not part of this model: found in model-"):
        load(folder)


def test_a_talker_that_the_config_promises_is_missed(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    drop_speech(folder, "kept")
    (folder / "config.json").write_text(config)
    with pytest.raises(
        WeightsError, match=r"tensor talker\.\S+ is missing from the checkpoint: .*and \d+ more like it"
    ):
        load(folder)


# ------------------------------------------------------------------------------------ what can be wrong


def refusal(folder: Path, kind: type[AntiphonError] = WeightsError) -> str:
    """The one sentence with which a checkpoint is refused, before any of it was read."""
    read: list[int] = []
    with pytest.raises(kind) as caught:
        load(folder, progress=lambda done, total: read.append(done))
    text = str(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 400
    assert not read
    assert caught.value.__cause__ is None
    return text


def test_missing_tensor(folder: Path) -> None:
    edit_shard(shard_of(folder, EXPERT), lambda held: held.pop(EXPERT))
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(EXPERT))
    assert refusal(folder) == f"tensor {EXPERT} is missing from the checkpoint: expected shape [24, 40]"


def test_missing_tensors_are_counted(folder: Path) -> None:
    names = [EXPERT, EXPERT.replace("up", "down"), EXPERT.replace("up", "gate")]
    for name in names:
        edit_shard(shard_of(folder, name), lambda held, name=name: held.pop(name))
        edit_json(folder / INDEX, lambda index, name=name: index["weight_map"].pop(name))
    text = refusal(folder)
    assert any(name in text for name in names)
    assert text.endswith("and 2 more like it")


def test_the_index_names_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    edit_shard(shard, lambda held: held.pop(EXPERT))
    assert refusal(folder) == f"{shard} does not hold {EXPERT}, which {INDEX} places there"


def test_the_index_places_a_tensor_in_another_shard(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    other = next(p for p in sorted(folder.glob("*.safetensors")) if p != shard)
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({EXPERT: other.name}))
    text = refusal(folder)
    assert EXPERT in text
    assert other.name in text


@pytest.mark.parametrize("which", [0, -1])
def test_a_tensor_in_two_shards(which: int, folder: Path) -> None:
    """Left over from another download, say: which of the two would be loaded must not be a matter of order."""
    shard = shard_of(folder, EXPERT)
    other = [p for p in sorted(folder.glob("*.safetensors")) if p != shard][which]
    edit_shard(other, lambda held: held.update({EXPERT: torch.zeros(24, 40)}))
    text = refusal(folder)
    assert EXPERT in text
    assert other.name in text


def test_surplus_tensor(folder: Path) -> None:
    shard, name = shard_of(folder, EXPERT), EXPERT.replace(".3.", ".4.")
    edit_shard(shard, lambda held: held.update({name: torch.zeros(24, 40)}))
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: shard.name}))
    assert refusal(folder) == f"tensor {name} is not part of this model: found in {shard.name}"


def test_surplus_tensor_that_the_index_does_not_name(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    edit_shard(shard, lambda held: held.update(unknown=torch.zeros(1)))
    text = refusal(folder)
    assert "unknown" in text
    assert shard.name in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (EXPERT, [24, 40]),
        ("thinker.model.layers.0.self_attn.q_proj.weight", [64, 40]),
        ("code2wav.decoder.6.conv.weight", [1, 3, 7]),
        ("talker.code_predictor.lm_head.1.weight", [64, 32]),
    ],
)
def test_misshapen_tensor(name: str, expected: list[int], folder: Path) -> None:
    edit_shard(shard_of(folder, name), lambda held: held.update({name: held[name].mT.contiguous()}))
    found = [*expected[:-2], expected[-1], expected[-2]]
    assert refusal(folder) == f"tensor {name} is misshapen: expected {expected}, found {found}"


def test_missing_shard(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    shard.unlink()
    assert refusal(folder) == f"{shard} is missing; download the checkpoint again"


@pytest.mark.parametrize("keep", [0.5, 0.999, -1])
def test_truncated_file(keep: float, folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    whole = shard.read_bytes()
    size = len(whole) - 1 if keep == -1 else int(keep * len(whole))
    shard.write_bytes(whole[:size])
    assert refusal(folder) == f"{shard} is cut short: {size:,} of {len(whole):,} bytes are there; download it again"


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 500])
def test_file_cut_inside_its_header(size: int, folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    shard.write_bytes(shard.read_bytes()[:size])
    said = "cut short inside its header; download it again" if size > 8 else "not a safetensors file; expected"
    assert refusal(folder).startswith(f"{shard} is {said}")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(struct.pack("<Q", 0x280) + b'{"weight": ')
    with pytest.raises(WeightsError, match="cut short inside its header"):
        read_safetensors(path)


def header(table: Any) -> bytes:
    data = json.dumps(table).encode()
    return struct.pack("<Q", len(data)) + data


def pickled() -> bytes:
    return pickle.dumps({"weight": np.ones((30, 30))})


def saved_by_torch() -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.ones(30, 30)}, file)
    return file.getvalue()


GARBAGE: dict[str, Callable[[], bytes]] = {
    "noise": lambda: np.random.default_rng(0).bytes(5000),
    "zeros": lambda: bytes(5000),
    "text": lambda: b"<!DOCTYPE html><html><body>404: no such file</body></html>" * 9,
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c\nsize 4999999488\n",
    "pickle": pickled,
    "saved by torch": saved_by_torch,
    "list": lambda: header(["a", "list"]) + bytes(100),
    "no object": lambda: header({"a": 5}) + bytes(100),
    "no offsets": lambda: header({"a": {"dtype": "F32", "shape": [5]}}) + bytes(100),
    "strange type": lambda: header({"a": {"dtype": "F99", "shape": [5], "data_offsets": [0, 20]}}) + bytes(100),
    "more shape than bytes": lambda: header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 20]}}) + bytes(20),
    "less shape than bytes": lambda: header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 20]}}) + bytes(20),
    "before the start": lambda: header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [-20, 0]}}) + bytes(100),
    "backwards": lambda: header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [40, 20]}}) + bytes(100),
    "words as numbers": lambda: header({"a": {"dtype": "F32", "shape": ["5"], "data_offsets": [0, 20]}}) + bytes(100),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_file_that_is_no_safetensors(kind: str, folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    shard.write_bytes(GARBAGE[kind]())
    text = refusal(folder)
    said = {
        "strange type": "holds tensors of type F99; expected one of F64, F32",
        "pointer": "is a Git LFS pointer and not the tensors; fetch them with git lfs pull",
        "pickle": "is a pickle and not a safetensors file; pickles are not loaded, convert it",
        "saved by torch": "is a pickle and not a safetensors file",
    }
    assert text.startswith(f"{shard} {said.get(kind, 'is not a safetensors file; expected')}")


def test_a_directory_where_a_file_should_be(folder: Path) -> None:
    shard = shard_of(folder, EXPERT)
    shard.unlink()
    shard.mkdir()
    assert str(shard) in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "last.ckpt"])
def test_only_pickles(name: str, folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / name).write_bytes(pickled())
    text = refusal(folder)
    assert f"found {name}: pickles are not loaded, convert it to safetensors" in text


def test_no_weights_at_all(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert refusal(folder) == f"{folder} has no {INDEX} and no {SINGLE}"


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    text = refusal(folder, ConfigError)
    assert str(folder / "config.json") in text
    assert "does not exist" in text


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["b"]}}', "\udc80"],
)
def test_a_damaged_index(index: str, folder: Path) -> None:
    (folder / INDEX).write_bytes(index.encode(errors="surrogateescape"))
    assert str(folder / INDEX) in refusal(folder, AntiphonError)


def test_an_empty_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    text = refusal(folder)
    assert "is missing from the checkpoint" in text


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.zeros(1)})
    text = refusal(path)
    assert text.startswith(f"{path} is a file; expected a checkpoint's folder or a Hub id such as Qwen/")


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./owner/name", "nowhere", "a/b/c", "~/no such folder", "a//b", ""]
)
def test_a_path_that_does_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(AntiphonError) as caught:
        load(name)
    assert str(caught.value) == (
        f"{name} does not exist; expected a checkpoint's folder or a Hub id (owner/name)"
        if name
        else "config.json does not exist; expected a folder with a Qwen3-Omni config.json"
    )


def test_an_unknown_hub_id_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(WeightsError) as caught:
        load("nobody/has-this-model")
    text = str(caught.value)
    assert text.startswith("nobody/has-this-model is no folder here and could not be downloaded: ")
    assert "\n" not in text


def test_from_the_hub(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(checkpoint("mixed"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same_tensors(dict(released_tensors(load("Qwen/Some-Omni"))), on_disk(checkpoint("mixed")))
    ((name, patterns),) = asked
    assert name == "Qwen/Some-Omni"
    assert "*.safetensors" in patterns
    assert not any(path.match(pattern) for pattern in patterns for path in (Path("a.bin"), Path("a.pt"), Path("a.py")))


@pytest.mark.parametrize(
    "error", [OSError("disk full\nand more"), ValueError(""), ConnectionError("no network"), KeyError("x")]
)
def test_a_download_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError, match=r"^Qwen/Some-Omni is no folder here and could not be downloaded: .+$"):
        load("Qwen/Some-Omni")


# ----------------------------------------------------------------------------------- safetensors themselves


TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "scalar": torch.tensor(3.5),
    "nothing": torch.zeros(0, 5),
    "half": torch.linspace(-2, 2, 7).half(),
    "brain": torch.linspace(-2, 2, 7).bfloat16(),
    "double": torch.linspace(-2, 2, 7, dtype=torch.float64),
    "eighth": torch.linspace(-2, 2, 7).to(torch.float8_e4m3fn),
    "ids": torch.tensor([-(2**40), 2**40]),
    "bytes": torch.arange(250, 256, dtype=torch.uint8),
    "signed": torch.tensor([-7, 7], dtype=torch.int8),
    "имя": torch.ones(2),
}


def test_the_library_reads_ours_and_we_read_the_librarys(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", TENSORS, {"note": "hello"})
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs", {"note": "hello"})
    loaded = safetensors.torch.load_file(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")
    for tensors in (*loaded, read_safetensors(tmp_path / "ours")):
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype
            assert tensors[name].shape == tensor.shape
            assert torch.equal(tensors[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert read_metadata(tmp_path / "ours", "note") == read_metadata(tmp_path / "theirs", "note") == "hello"
    with pytest.raises(WeightsError, match="ours holds no other"):
        read_metadata(tmp_path / "ours", "other")


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    write_safetensors(tmp_path / "f", {"rows": whole[1:3], "columns": whole[:, ::2], "turned": whole.T})
    read = read_safetensors(tmp_path / "f")
    assert torch.equal(read["rows"], whole[1:3])
    assert torch.equal(read["columns"], whole[:, ::2])
    assert torch.equal(read["turned"], whole.T)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    class Lost(Exception):
        pass

    def lost() -> Tensor:
        raise Lost

    path, bad = tmp_path / "f", SimpleNamespace(nbytes=4, dtype=torch.float32, shape=(1,), detach=lost, numel=lambda: 1)
    write_safetensors(path, {"a": torch.ones(3)})
    with pytest.raises(Lost):
        write_safetensors(path, {"a": torch.zeros(3), "b": bad})  # type: ignore[dict-item]
    assert torch.equal(read_safetensors(path)["a"], torch.ones(3))


# ----------------------------------------------------------------------------------------------- memory


WIDE = {"hidden_size": 1024, "num_hidden_layers": 2, "moe_intermediate_size": 1024}
MEASURE = """
import re, sys
from pathlib import Path
import torch
import antiphon
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
antiphon.load(sys.argv[1])  # a small one, so that all imports are done
before = kilobytes("VmHWM")
model = antiphon.load(sys.argv[2])
peak = kilobytes("VmHWM")
size = sum(p.nbytes for p in model.parameters())
print(before * 1024, peak * 1024, size, model.dtype, float(model.thinker.lm_head.weight[-1, -1]))
"""


def write_wide(source: Path, folder: Path, megabytes: int) -> int:
    """A large checkpoint, half experts and half embeddings; its two shards are holes but for the last value.

    Returns its size in bytes.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*"))

    def widen(config: dict[str, Any]) -> None:
        thinker, talker = config["thinker_config"], config["talker_config"]
        thinker["text_config"].update(**WIDE, num_experts=megabytes // 25, vocab_size=120 * megabytes)
        thinker["audio_config"]["output_dim"] = talker["thinker_hidden_size"] = 1024

    edit_json(folder / "config.json", widen)
    with torch.device("meta"):
        sizes = {name: shape for name, shape in released_names(Omni(read_config(folder))).items() if math.prod(shape)}
    names = sorted(sizes, key=lambda name: name == "thinker.lm_head.weight")  # the last value is its
    weight_map: dict[str, str] = {}
    for number, held in enumerate((names[::2], names[1::2]), 1):
        file, stop = f"model-0000{number}-of-00002.safetensors", 0
        table: dict[str, Any] = {}
        for name in held:
            start, stop = stop, stop + 2 * math.prod(sizes[name])
            table[name] = {"dtype": "BF16", "shape": sizes[name], "data_offsets": [start, stop]}
            weight_map[name] = file
        with (folder / file).open("wb") as f:
            f.write(header(table))
            f.seek(stop - 2, os.SEEK_CUR)
            f.write(torch.ones(1).bfloat16().view(torch.uint8).numpy().tobytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return sum(2 * math.prod(shape) for shape in sizes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.long
def test_peak_memory_of_loading(checkpoint: Checkpoints, tmp_path: Path) -> None:
    size = write_wide(checkpoint("base"), tmp_path / "wide", megabytes=2000)
    assert 0.95 < size / 2e9 < 1.1
    try:
        command = [sys.executable, "-c", MEASURE, str(checkpoint("base")), str(tmp_path / "wide")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(tmp_path / "wide")
    assert done.returncode == 0, done.stderr
    before, peak, loaded, dtype, last = done.stdout.split()
    assert int(loaded) == size
    assert dtype == "torch.bfloat16"
    assert float(last) == 1
    above = int(peak) - int(before)
    # not less either: what is mapped and not read yet would count later
    assert 0.95 * size < above < 1.15 * size, f"{above / size:.3f} of its size"


# ------------------------------------------------------------------------------------- boxes one by one


@pytest.mark.parametrize("name", ["aut", "thinker", "talker", "mtp", "code2wav", "code2wav.pre_transformer"])
def test_a_box_is_filled_from_a_checkpoint(checkpoint: Checkpoints, name: str) -> None:
    model = load(checkpoint("base"))
    part = model.get_submodule(name if name.startswith(("aut", "thinker")) else f"speech.{name}")
    wanted = {n: t.clone() for n, t in part.state_dict().items()}
    with torch.no_grad():
        for p in part.parameters():
            p.zero_()
    load_box(part, name, checkpoint("base"))
    assert_same_tensors(dict(part.state_dict()), wanted)
    assert any(bool(t.any()) for t in wanted.values())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ear", ConfigError, r"^a checkpoint has no ear; it has aut, thinker, talker, mtp, code2wav$"),
        ("mtp", WeightsError, r"^tensor talker.code_predictor.\S+ is m"),
        ("aut.layers", WeightsError, r"^tensor thinker.audio_tower.layers.conv2d1.weight is missing from the"),
    ],
)
def test_a_box_that_a_checkpoint_does_not_hold(checkpoint: Checkpoints, name: str, error: type, message: str) -> None:
    model = load(checkpoint("base"))
    box = load(checkpoint("odd")).speaking().mtp if name == "mtp" else model.aut
    with pytest.raises(error, match=message):
        load_box(box, name, checkpoint("base"))
