"""The page: what it names is there, it is served, and its resampler gives in pieces what it gives at once."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from starlette.testclient import TestClient

from antiphon.serve.app import PAGE, create_app
from antiphon.serve.settings import Settings

SCRIPTS = sorted(PAGE.glob("*.js"))
RESAMPLED = """
import { Resampler } from "%s/resample.js";
const [source, target] = %s;
const wave = Float32Array.from({ length: source }, (_, i) => Math.sin((2 * Math.PI * 440 * i) / source));
const whole = new Resampler(source, target).push(wave);
const inPieces = new Resampler(source, target);
const parts = [];
for (let i = 0, n = 1; i < wave.length; i += n, n = 1 + ((7 * n) %% 997))
  parts.push(...inPieces.push(wave.slice(i, i + n)));
let apart = 0, off = 0;
for (let i = 0; i < whole.length; i++) apart = Math.max(apart, Math.abs(whole[i] - parts[i]));
for (let i = 100; i < whole.length; i++)
  off = Math.max(off, Math.abs(whole[i] - Math.sin((2 * Math.PI * 440 * i) / target)));
console.log(JSON.stringify({ counts: [whole.length, parts.length], apart, off }));
"""


class Page(HTMLParser):
    """What the page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.labelled = set[str | None](), set[str | None]()
        self.files, self.controls = list[str](), list[dict[str, str]]()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        about = dict(attrs)
        self.ids.add(about.get("id"))
        self.files += [about[name] for name in ("src", "href") if name in about and not about[name].startswith("#")]
        if tag == "label":
            self.labelled.add(about.get("for"))
        if tag in ("select", "textarea") or (tag == "input" and about.get("type") != "checkbox"):
            self.controls.append(about)


def page() -> Page:
    parsed = Page()
    parsed.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    return parsed


def test_what_the_page_names_is_there():
    found = page()
    for name in found.files:
        assert (PAGE / name).is_file(), name
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= found.ids, script.name
        for name in re.findall(r'from "\./([^"]+)"', text) + re.findall(r'"([\w-]+\.js)"', text):
            assert (PAGE / name).is_file(), f"{script.name} imports {name}"
        assert not re.search(r"https?://(?!www\.w3\.org)", text), f"{script.name} asks somebody else"


def test_every_control_says_what_it_is_for():
    """Named by a label around it or for it, or by aria-label: somebody may only hear the page."""
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    around = set(re.findall(r'<label>[^<]*<input id="([\w-]+)"', text))
    for control in page().controls:
        assert "aria-label" in control or control.get("id") in page().labelled | around, control


def test_the_server_gives_the_page_away(tmp_path):
    client = TestClient(create_app(Settings(), lambda: pytest.fail("nothing is needed for the page")))
    for name, kind in (("", "text/html"), ("app.js", "javascript"), ("style.css", "text/css"), ("icon.svg", "svg")):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200, name
        assert kind in answer.headers["content-type"]
    assert client.get("/../pyproject.toml").status_code == 404


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here to run the page's scripts")
@pytest.mark.parametrize("rates", [(48000, 24000), (44100, 24000), (24000, 48000), (24000, 24000)])
def test_the_resampler_of_the_page(rates, tmp_path):
    script = tmp_path / "try.mjs"
    shutil.copy(PAGE / "resample.js", tmp_path / "resample.mjs")
    script.write_text((RESAMPLED % (".", json.dumps(rates))).replace("resample.js", "resample.mjs"))
    said = subprocess.run(["node", script], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stderr
    made = json.loads(said.stdout)
    assert made["counts"][0] == made["counts"][1]
    assert made["apart"] < 1e-5
    assert made["off"] < 2e-3
    assert abs(made["counts"][0] - rates[1]) < 60
