"""How the package is built: imports go one way, the public names are frozen, and no module keeps what it streams."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import antiphon
from antiphon.generate import collect
from tests.models import CODEBOOK, CODEBOOKS, CPU, omni, sound

ROOT = Path(antiphon.__file__).parent
# Reading order, from the bottom up; a module imports only from the lines above its own,
# so neither does evaluate import the engine nor the engine evaluate. `name/` is a whole folder.
ORDER: list[set[str]] = [
    {"errors"},
    {"config", "files", "binding", "memory"},
    {"config_json", "streaming", "sampling", "metrics"},
    {"tokenizer", "caches", "convolutions"},
    {"kernels/"},
    {"chat"},
    {"audio", "layers", "spoken", "guide"},
    {"messages", "aut", "thinker", "talker", "mtp", "code2wav", "codec", "speaker", "turn"},
    {"model"},
    {"weights"},
    {"conversation"},
    {"generate"},
    {"__init__"},
    {"transcripts", "terminal", "report", "random_model"},
    {"error_rates", "engine/"},
    {"train/"},
    {"evaluate/"},
    {"bench/", "serve/"},
    {"scale/"},
    {"cli", "__main__"},
]
APART = {("train/", "engine/")}  # training measures what it trained, and never depends on how it is served
HOMES = {
    **{"transformers": ("evaluate/", "scale/"), "scipy": ("train/",), "torchaudio": (), "librosa": ("evaluate/",)},
    **{"pandas": (), "ray": ("scale/",), "pyarrow": ("scale/", "evaluate/")},
}
LATE = {"transformers", "librosa", "onnxruntime", "speechmos", "ray", "pyarrow"}  # only inside functions
ON_RAY = "serving.py"  # all of it runs on Ray, and it is imported by who serves there
WITH_TRANSFORMERS = {"reference.py", "teachers.py", "downloaded.py"}  # parity; a teacher; judges that are downloaded
FILES = sorted(ROOT.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(path: Path) -> str:
    """The name in ORDER of a file of the package."""
    inside = path.relative_to(ROOT)
    return inside.stem if len(inside.parts) == 1 else f"{inside.parts[0]}/"


def level(name: str) -> int:
    return next(i for i, names in enumerate(ORDER) if name in names)


def imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names of the modules that are imported anywhere below `node`, and where."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from ((alias.name, part.lineno) for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, "imports are absolute"
            yield part.module or "", part.lineno
            yield from ((f"{part.module}.{alias.name}", part.lineno) for alias in part.names)


def own(name: str) -> str | None:
    """The name in ORDER of an imported module of this package; None for other modules and for names in a module."""
    parts = name.split(".")
    if parts[0] != "antiphon":
        return None
    if len(parts) == 1:
        return "__init__"
    if (ROOT / f"{parts[1]}.py").exists():
        return parts[1]
    return f"{parts[1]}/" if (ROOT / parts[1]).is_dir() else None


# --------------------------------------------------------------------------------------------------- imports


def test_every_file_has_its_place_in_the_order():
    assert len(FILES) > 15
    names = [name for names in ORDER for name in names]
    assert len(names) == len(set(names))
    assert {place(path) for path in FILES} <= set(names), "say in ORDER where the new module belongs"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = place(path)
    for name, line in imports(tree(path)):
        there = own(name)
        if there is None or there == here:
            continue
        if there == "__init__" and name != "antiphon":
            continue
        assert level(there) < level(here), f"{path.name}:{line} imports {name}, which does not stand below it"
        assert (here, there) not in APART, f"{path.name}:{line} imports {name}"


def test_the_order_is_the_one_of_the_design():
    for lower, upper in (
        ("config", "layers"),
        ("config", "config_json"),
        ("errors", "config"),
        ("layers", "talker"),
        ("streaming", "caches"),
        ("caches", "layers"),
        ("aut", "model"),
        ("code2wav", "model"),
        ("model", "weights"),
        ("weights", "conversation"),
        ("conversation", "generate"),
        ("generate", "engine/"),
        ("engine/", "serve/"),
        ("generate", "evaluate/"),
        ("evaluate/", "cli"),
    ):
        assert level(lower) < level(upper)


def test_heavy_packages_are_imported_where_they_are_needed_and_nowhere_else():
    """transformers is the oracle of `antiphon verify`, may be a teacher of `antiphon label`, and brings judges."""
    found = set()
    for path in FILES:
        module = tree(path)
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
        inside = {line for function in functions for _, line in imports(function)}
        for name, line in imports(module):
            package = name.split(".")[0]
            if package in HOMES:
                found.add(package)
                assert place(path) in HOMES[package], f"{path.name}:{line} imports {name}"
            if package == "transformers":
                assert path.name in WITH_TRANSFORMERS, f"{path.name}:{line} imports {name}"
            if package in LATE and path.name != ON_RAY:
                assert line in inside, f"{path.name}:{line} imports {package} for everyone who imports it"
    assert "transformers" in found


def test_importing_antiphon_imports_neither_the_oracle_nor_the_tests_tools():
    loaded = loaded_by("antiphon")
    assert "torch" in loaded
    assert loaded.isdisjoint({*HOMES, "soxr", "pytest", "hypothesis", "fastapi", "uvicorn", "ray", "datasets"})


def test_importing_the_judges_imports_no_judge():
    loaded = loaded_by("antiphon.evaluate.tags")
    assert "antiphon" in loaded
    assert loaded.isdisjoint({"librosa", "numba", "sklearn", "onnxruntime", "speechmos", "resemblyzer", "pesq"})


def loaded_by(module: str) -> set[str]:
    """The packages that importing a module imports."""
    code = f"import {module}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


# ------------------------------------------------------------------------------------------------ public names


def test_the_public_names_are_frozen():
    assert antiphon.__all__ == [
        "AntiphonError",
        "AudioDelta",
        "AudioError",
        "CapacityError",
        "ConfigError",
        "Done",
        "Event",
        "InputError",
        "Omni",
        "Options",
        "Reply",
        "Sampling",
        "Session",
        "TextDelta",
        "WeightsError",
        "load",
    ]
    assert all(hasattr(antiphon, name) for name in antiphon.__all__)


def test_every_public_name_says_what_it_is():
    for name in antiphon.__all__:
        if name != "Event":  # a union of three
            assert getattr(antiphon, name).__doc__, f"{name} has no docstring"


# ----------------------------------------------------------------------------------------- no state of one's own

GLOBAL_RANDOMNESS = {
    *("torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.cuda.manual_seed", "torch.random.manual_seed"),
    *("torch.rand", "torch.randn", "torch.randint", "torch.multinomial", "torch.bernoulli", "torch.normal"),
    *("torch.rand_like", "torch.randn_like", "torch.randperm", "np.random.seed", "np.random.rand", "np.random.randn"),
    "numpy.random.seed",
}


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_no_global_random_generator_is_touched():
    """Noise is a pure function of (seed, turn, frame, codebook); a draw with a generator of its own is allowed.

    Training draws from torch's, since fresh weights and dropout do, and seeds it anew at every step.
    """
    for path in FILES:
        assert not any(name == "random" for name, _ in imports(tree(path))), f"{path.name} imports random"
        if place(path) == "train/":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and dotted(node.func) in GLOBAL_RANDOMNESS:
                assert any(k.arg == "generator" for k in node.keywords), (
                    f"{path.name}:{node.lineno} {dotted(node.func)}"
                )


def snapshot(module: torch.nn.Module) -> dict[str, Any]:
    """Everything that a module and those in it hold: which objects, and for tensors their values too."""
    held: dict[str, Any] = {}
    for where, part in module.named_modules():
        for name, value in vars(part).items():
            held[f"{where}.{name}"] = dict(value) if isinstance(value, dict) else value
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            held[f"{where}.{name} values"] = tensor.clone()
    return held


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys(), f"new attributes: {after.keys() ^ before.keys()}"
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and name.endswith(" values"):
            assert torch.equal(value, after[name]), name
        elif isinstance(value, dict):
            assert value.keys() == after[name].keys(), name
            assert all(value[key] is after[name][key] for key in value), name
        else:
            assert value is after[name], f"{name} was {value!r} and is {after[name]!r}"


def streamed(name: str) -> None:
    """One streaming call of the box `name`."""
    model = omni()
    speech, c = model.speaking(), model.config
    thinker, talker = c.text.hidden_size, speech.talker.config.text.hidden_size
    if name == "log_mel":
        model.log_mel(torch.randn(1, 900), model.log_mel.init_state(1, CPU, torch.float32))
    elif name == "aut":
        state = model.aut.init_state(1, CPU, torch.float32, window=1)
        model.aut(torch.randn(1, 130, c.audio.num_mel_bins), state)
    elif name == "thinker":
        model.thinker(torch.randn(1, 3, thinker), model.thinker.init_state(1, 9, CPU, torch.float32))
    elif name == "talker":
        speech.talker(torch.randn(1, 3, talker), speech.talker.init_state(1, 9, CPU, torch.float32))
    elif name == "mtp":
        state = speech.mtp.init_state(1, CPU, torch.float32)
        speech.mtp.predict(torch.randn(1, talker), torch.randn(1, talker), lambda x, _: x.argmax(-1), state)
    elif name == "code2wav":
        codes = torch.randint(0, CODEBOOK, (1, 2, CODEBOOKS))
        speech.code2wav(codes, speech.code2wav.init_state(1, CPU, torch.float32))
    else:
        session = model.session(window=1)
        session.append_audio(sound(1.2))
        collect(session.respond(max_text_tokens=4, max_frames=3))


@pytest.mark.parametrize("name", ["log_mel", "aut", "thinker", "talker", "mtp", "code2wav", "session"])
def test_no_box_keeps_stream_state_in_its_attributes(name):
    model = omni()
    _ = model.log_mel  # has no weights and is made at first use
    before = snapshot(model)
    with torch.inference_mode():
        streamed(name)
    assert_unchanged(before, snapshot(model))


def test_the_check_for_kept_state_sees_it():
    module = torch.nn.Linear(2, 2)
    for keep in (
        lambda: setattr(module, "last", 1),
        lambda: module.register_buffer("tail", torch.zeros(1)),
        lambda: module.weight.data.add_(1),
    ):
        before = snapshot(module)
        keep()
        with pytest.raises(AssertionError):
            assert_unchanged(before, snapshot(module))
