"""README and docs as a reader would try them: Python blocks and `antiphon` lines run, on a small random checkpoint."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

import antiphon
from antiphon import cli
from antiphon.audio import Samples, write_audio
from antiphon.generate import Omni, load
from tests.models import script, sound, stop_speech_after
from tests.test_full_size import RELEASED

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = {"info", "talk", "transcribe", "ask", "speak", "trace", "verify"}  # what needs data or days is only parsed
NEEDS_THE_MODEL_ITSELF = {"verify"}  # it is led along what transformers says, so nobody may put words in its mouth
Checkpoints = Callable[[str], Path]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of `page` in `language`; "" for blocks without one."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """`antiphon` lines in shell blocks; a part in brackets gives one line without it and one with it."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"^\.venv/bin/", "", line)
            if words.startswith("antiphon "):
                yield from map(split, dict.fromkeys([re.sub(r" *\[.*?\]", "", words), re.sub(r"[][]", "", words)]))


def split(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]
SHELL = [(page, words) for page in PAGES for words in commands(page)]


@pytest.fixture
def model(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Omni:
    """A model that says two words and speaks for 1.6 s."""
    model = load(checkpoint("base"))
    script(monkeypatch, model, "Good morning.")
    stop_speech_after(monkeypatch, model, 20)
    return model


@pytest.fixture(autouse=True)
def in_a_folder_with_sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    for name, seconds in {"question.wav": 0.6, "clip.wav": 0.6, "reference.wav": 3.0}.items():
        write_audio(name, sound(seconds, 24000), 24000)


def test_the_pages_have_something_to_run() -> None:
    assert {page.name for page, _ in PYTHON} >= {"README.md"}
    assert {words[0] for _, words in SHELL} >= RUN


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[page.name for page, _ in PYTHON])
def test_python_runs(page: Path, block: str, model: Omni, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(antiphon, "load", lambda name, device="cpu", dtype=None: model)
    heard: list[Samples] = []
    stage: dict[str, Any] = {"play": heard.append, "microphone": lambda: np.split(sound(1.2, 48000), 60)}
    exec(compile(block, page.name, "exec"), stage)
    if "play(" in block:
        assert [len(samples) for samples in heard] == [1920] * 20
    if "print(" in block:
        assert "Good morning." in capsys.readouterr().out


@pytest.mark.parametrize(("page", "words"), SHELL, ids=[" ".join(words) for _, words in SHELL])
def test_commands_run(
    page: Path, words: list[str], request: pytest.FixtureRequest, checkpoint: Checkpoints, monkeypatch: Any
) -> None:
    if words[0] not in RUN:
        command = typer.main.get_command(cli.app).commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])
        return
    if words[0] not in NEEDS_THE_MODEL_ITSELF and "-m" in words:  # without it, tiny speaks for itself
        request.getfixturevalue("model")
    before = set(Path.cwd().iterdir())
    if "--clone" in words and "-m" in words:  # the checkpoint of the tests has no speaker encoder
        monkeypatch.setattr(Omni, "clone", lambda self, samples, rate: torch.ones(32))
    monkeypatch.setattr(sys, "argv", ["antiphon", *filled(words, checkpoint("base"))])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    made = {path.name for path in set(Path.cwd().iterdir()) - before}
    assert made == {word for flag, word in pairwise(words) if flag in ("-o", "--out", "--report")}


def filled(words: list[str], checkpoint: Path) -> Iterator[str]:
    """As the shell would give them, with a checkpoint for MODEL and for the folders that examples name."""
    for word in words:
        if word == "MODEL" or word.startswith("/tmp/shapes/"):
            yield str(checkpoint)
        elif "*" in word:
            yield from map(str, sorted(Path.cwd().glob(word)))
        else:
            yield word


def test_the_readme_shows_what_info_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("release").mkdir()
    Path("release/config.json").write_text(json.dumps(RELEASED))
    monkeypatch.setattr(sys, "argv", ["antiphon", "info", "release"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main()
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert printed in "\n".join(line.rstrip() for line in PAGES[0].read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names_of_tests_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", text):
        assert f"def {name}(" in tests, f"{page.name} names {name}, which is no test"
    for path in re.findall(r"`((?:antiphon|tests|benchmarks|recipes|docs)/[\w/.]+\.(?:py|md|yaml))`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which is no file"
