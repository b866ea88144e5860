"""The page in a real browser: it hears a question, answers, is interrupted, answers again, and what is played is kept.

Chromium's microphone plays a file; what reaches the loudspeaker is recorded inside the page. `make browser` runs this;
with PICTURES=docs/pictures it also leaves the pictures of the documentation.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antiphon.audio import Resampler, Samples, from_pcm16, write_audio
from antiphon.engine import Engine
from antiphon.serve.settings import Settings
from antiphon.transcripts import transcribe
from tests.realtime_line import at_24k, quiet
from tests.serving import Served, make_talkative, serving, tiny

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]
QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
RATE, PACKET, SLACK = 24000, 1920, 240
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000  # ms
RECORDER = """
const RECORDER = `registerProcessor("recorder", class extends AudioWorkletProcessor {
  process([input]) { if (input[0]) this.port.postMessage(input[0].slice()); return true; }
});`;
window.recorded = { rate: 0, pieces: [] };
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (to, ...rest) {
  if (to instanceof AudioDestinationNode && !this.context.recorder) {
    const { context } = this;
    context.recorder = true;
    recorded.rate = context.sampleRate;
    context.audioWorklet.addModule(URL.createObjectURL(new Blob([RECORDER], { type: "text/javascript" }))).then(() => {
      const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
      node.port.onmessage = ({ data }) => recorded.pieces.push(data);
      connect.call(this, node);
    });
  }
  return connect.call(this, to, ...rest);
};
"""
RECORDED = """() => {
  const all = Float32Array.from(recorded.pieces.flatMap((piece) => [...piece]));
  const bytes = new Uint8Array(all.buffer);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return [recorded.rate, btoa(text)];
}"""


class Wire:
    """What went over the page's WebSocket."""

    def __init__(self, page: Any) -> None:
        self.got: list[dict[str, Any]] = []
        self.sent: list[dict[str, Any]] = []
        page.on("websocket", self._listen)

    def _listen(self, socket: Any) -> None:
        socket.on("framereceived", lambda text: self.got.append(json.loads(text)))
        socket.on("framesent", lambda text: self.sent.append(json.loads(text)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in [*self.got, *self.sent] if event["type"] == kind]

    def sound(self, item: str) -> Samples:
        """What the server sent of an item."""
        deltas = [event["delta"] for event in self.of("response.output_audio.delta") if event["item_id"] == item]
        return from_pcm16(b"".join(map(base64.b64decode, deltas)))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(make=warm) as served:
        yield served


def warm() -> Engine:
    """An engine whose first answer does not have to wait, as `antiphon serve` has it."""
    engine = Engine(tiny(), 2)
    engine.warm(2)
    return engine.start()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page, with sound as its microphone."""
    with playwright.sync_playwright() as started:
        opened = []

        def open(server: Served, heard: Samples, viewport: dict[str, int], scheme: str = "light") -> Any:
            file = tmp_path / "microphone.wav"
            write_audio(file, heard, RATE)
            flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
            flags += [f"--use-file-for-fake-audio-capture={file}%noloop", "--no-sandbox", "--disable-gpu"]
            chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
            opened.append(chromium)
            context = chromium.new_context(
                viewport=viewport, color_scheme=scheme, device_scale_factor=2 if viewport is PHONE else 1
            )
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.add_init_script(RECORDER)
            page.problems = problems = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda line: line.type == "error" and problems.append(line.text))
            page.wire = Wire(page)
            page.goto(server.url)
            return page

        yield open
        for one in opened:
            one.close()


def picture(page: Any, name: str) -> None:
    """Keep what the page looks like, where that is asked for."""
    if folder := os.environ.get("PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def until(page: Any, true: Callable[[], Any]) -> Any:
    """Let the page go on until something is true."""
    for _ in range(PATIENCE // 50):
        if found := true():
            return found
        page.wait_for_timeout(50)
    raise AssertionError("waited in vain")


def played(page: Any) -> Samples:
    """What came out of the loudspeaker, at RATE."""
    rate, data = page.evaluate(RECORDED)
    wave = torch.from_numpy(np.frombuffer(base64.b64decode(data), "<f4").copy())
    return Resampler(rate, RATE)(wave[None], final=True)[0].numpy()


def alike(whole: Samples, part: Samples) -> Samples:
    """How like a part is what begins at each place of `whole`: 1 is the same."""
    size = 1 << (len(whole) + len(part)).bit_length()
    cross = np.fft.irfft(np.fft.rfft(whole, size) * np.fft.rfft(part, size).conj(), size)[: len(whole)]
    energy = np.convolve(whole**2, np.ones(len(part)), "full")[len(part) - 1 :][: len(whole)]
    return (cross / (np.sqrt(np.maximum(energy, 1e-9)) * np.linalg.norm(part))).astype(np.float32)


def like(one: str, other: str) -> float:
    """How like two texts are: 1 is the same."""
    return SequenceMatcher(None, one, other).ratio()


def first_loud(x: Samples) -> int:
    """Where silence ends."""
    return int((np.abs(x) > 0.003).argmax())


def found_in(whole: Samples, part: Samples, start: int = 0) -> tuple[int, int, Samples]:
    """Where in `whole` a part begins that is the next sound after `start`, where it ends, and it as it is there.

    A late packet leaves a gap, which is left out of it.

    One that is no louder than a whisper, or is not whole, is taken to be there; a gap may go through one.
    """
    likeness, there = list[float](), list[Samples]()
    begin = place = start + first_loud(whole[start:]) - first_loud(part)
    for packet in np.split(part, range(PACKET, len(part), PACKET)):
        if np.abs(packet).max() > 0.01 and len(packet) == PACKET:
            near = alike(whole[max(0, place - SLACK) : place + PACKET + SLACK], packet)[: 2 * SLACK]
            if near.max() > 0.8:
                place += int(near.argmax()) - min(SLACK, place)
                likeness.append(float(near.max()))
            else:
                later = alike(whole[place : place + 3 * RATE], packet)
                place += int(later.argmax())
                likeness.append(float(later.max()))
        there.append(whole[place : place + len(packet)])
        place += len(packet)
    assert np.mean(likeness) > 0.97, f"what was sent is not what was played: {np.round(likeness, 2)}"
    return begin, place, np.concatenate(there)


def test_a_spoken_question_is_answered_interrupted_and_answered_again(server, browser, monkeypatch):
    end_answers, question = make_talkative(monkeypatch), at_24k(QUESTION)
    page = browser(server, np.concatenate([quiet(1.5), question, quiet(5), question, quiet(90)]), DESKTOP)
    wire = page.wire
    page.get_by_role("button", name="Talk", exact=True).click()
    (truncated,) = until(page, lambda: wire.of("conversation.item.truncate"))
    end_answers()

    def answers() -> list[dict[str, Any]]:
        """Those that were heard."""
        return [event["response"] for event in wire.of("response.done") if event["response"]["output"]]

    until(page, lambda: answers() and answers()[-1]["status"] == "completed")
    playwright.expect(page.get_by_role("button", name="Interrupt")).to_be_disabled()  # all has been heard
    (first,) = [answer for answer in answers() if answer["output"][0]["id"] == truncated["item_id"]]
    second = answers()[-1]
    assert (first["status"], first["status_details"]["reason"]) == ("cancelled", "turn_detected")
    cut = page.locator(f"#said [data-id={truncated['item_id']}]")
    playwright.expect(cut).to_have_attribute("data-state", "cut")
    turns = wire.of("input_audio_buffer.committed")
    written = "conversation.item.input_audio_transcription.completed"
    until(page, lambda: len(wire.of(written)) == len(turns))
    users = page.locator("#said .user").all_inner_texts()
    assert len(users) == len(turns) >= 2  # a pause in the question may end a turn
    assert all(text.strip("…") for text in users)
    for phase in ("first text", "first packet", "first sound played"):
        shown = page.locator("#phases div", has_text=phase).locator("dd")
        playwright.expect(shown).to_contain_text(re.compile(r"^\d+ ms$"))
    packets = len(wire.sound(second["output"][0]["id"])) // PACKET
    playwright.expect(page.locator("#late")).to_contain_text(re.compile(rf"^{packets}, none late|of {packets} late"))
    sound, last = played(page), wire.sound(second["output"][0]["id"])
    heard = wire.sound(first["output"][0]["id"])[: 24 * truncated["audio_end_ms"]]
    _, stopped, _ = found_in(sound, heard)
    begun, _, again = found_in(sound, last, stopped + RATE // 20)
    assert begun - stopped > RATE, "the answer went on after it was interrupted"
    said = second["output"][0]["content"][0]["transcript"]
    read, *others = (transcribe(tiny(), part, RATE).text for part in (again, last, heard))
    assert read
    assert like(read, others[0]) > like(read, others[1]), "what is played is not what was sent, to who listens to it"
    print(f"said {said!r}, read back as {read!r}, and as {others[0]!r} before it was played")
    print(f"interrupted after {truncated['audio_end_ms']} ms")
    assert page.problems == []
    picture(page, "page")


def test_by_keyboard_on_a_phone_in_the_dark(server, browser):
    page = browser(server, quiet(1), PHONE, "dark")
    page.get_by_role("textbox", name="Write to Antiphon").focus()
    page.keyboard.type("What is three plus four?")
    page.keyboard.press("Enter")
    until(page, lambda: page.wire.of("response.done"))
    answer = page.wire.of("response.done")[0]["response"]["output"][0]["content"][0]["transcript"]
    playwright.expect(page.get_by_role("log")).to_contain_text(f"Antiphon: {answer}")  # once, when it is whole
    playwright.expect(page.get_by_role("button", name="Interrupt")).to_be_disabled()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "the page is wider than the phone"
    picture(page, "page-phone")
    page.get_by_role("button", name="Switch between light and dark").press("Enter")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button')].filter(b => !b.textContent.trim() && !b.ariaLabel).map(b => b.id)"
    )
    assert unnamed == []
    assert page.problems == []


def answered(page: Any, times: int) -> dict[str, Any]:
    """The last of so many answers."""
    until(page, lambda: len(page.wire.of("response.done")) == times)
    answer = page.wire.of("response.done")[-1]["response"]
    assert answer["status"] == "completed"
    return answer


def written(page: Any, times: int) -> str:
    """What the page shows that the user has said, the last of so many turns."""
    done = "conversation.item.input_audio_transcription.completed"
    until(page, lambda: len(page.wire.of(done)) == times)
    heard = page.wire.of(done)[-1]
    playwright.expect(page.locator(f"#said [data-id={heard['item_id']}]")).to_contain_text(heard["transcript"])
    return heard["transcript"]


DROP = """(data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "dropped.wav", { type: "audio/wav" }));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true }));
}"""


def test_files_are_chosen_or_dropped_and_the_log_tells_what_went_over_the_wire(server, browser):
    page = browser(server, quiet(1), DESKTOP)
    page.locator("#file").set_input_files(QUESTION)
    first = answered(page, 1)
    heard = written(page, 1)
    page.evaluate(DROP, base64.b64encode(QUESTION.read_bytes()).decode())
    answered(page, 2)
    assert written(page, 2) == heard != ""
    assert not page.wire.of("input_audio_buffer.speech_started"), "a file is one turn"
    page.get_by_text("Events", exact=False).first.click()
    log = page.get_by_role("list", name="Events of the protocol")
    playwright.expect(log).to_contain_text("→ input_audio_buffer.commit")
    playwright.expect(log).not_to_contain_text("response.output_audio.delta")
    line = log.get_by_role("listitem").filter(has_text="← response.done").first
    line.get_by_text("← response.done").click()
    playwright.expect(line).to_contain_text(first["id"])
    assert page.problems == []


def test_who_pushes_to_talk_is_heard_from_key_down_to_key_up(server, browser):
    page = browser(server, np.concatenate([at_24k(QUESTION), quiet(60)]), DESKTOP)
    page.get_by_label("Push to talk").press("Space")
    playwright.expect(page.get_by_label("Push to talk")).to_be_checked()
    page.keyboard.down("Space")
    page.wait_for_timeout(1000 * len(at_24k(QUESTION)) / RATE + 500)
    page.keyboard.up("Space")
    answered(page, 1)
    assert written(page, 1)
    assert len(page.wire.of("input_audio_buffer.commit")) == len(page.wire.of("input_audio_buffer.committed")) == 1
    assert not page.wire.of("input_audio_buffer.speech_started")
    assert page.problems == []


def test_a_voice_is_cloned_from_a_file_and_from_a_recording(browser):
    reference = QUESTION.with_name("reference.wav")
    with serving(Settings(keys=("secret",)), warm) as server:
        page = browser(server, np.concatenate([at_24k(reference), quiet(60)]), PHONE)
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Connect").click()
        for name in ("anna", "bert"):
            page.get_by_role("button", name="Clone…").click()
            page.get_by_label("Name").fill(name)
            if name == "anna":
                page.get_by_label("Recording of the voice").set_input_files(reference)
            else:
                page.get_by_role("button", name="Record", exact=True).click()
                playwright.expect(page.locator("#clone-state")).to_contain_text("4.")
                page.get_by_role("button", name="Stop").click()
            page.get_by_role("button", name="Clone", exact=True).click()
            playwright.expect(page.get_by_label("Voice", exact=True)).to_have_value(name)
        page.get_by_role("textbox", name="Write to Antiphon").fill("What is three plus four?")
        page.keyboard.press("Enter")
        answered(page, 1)
        assert page.wire.of("session.updated")[-1]["session"]["audio"]["output"]["voice"] == "bert"
        assert [line for line in page.problems if "401" not in line] == []
