// The page: what is pressed becomes words of the conversation, what the conversation says becomes pictures and sound.

import { Scope, Strip } from "./draw.js";
import { Conversation } from "./realtime.js";
import { RATE, Sound, decode, wav } from "./sound.js";

const $ = (id) => document.getElementById(id);
const sound = new Sound();
const talk = new Conversation();
const scopes = { heard: new Scope($("heard"), "--you"), spoken: new Scope($("spoken"), "--them") };
const strip = new Strip($("packets"));
const KEPT_EVENTS = 400;
const KEPT_LINES = 20; // for a screen reader
const GRACE = 3000; // ms after the microphone opened in which echo cancellation settles, and nothing is interrupted by it
const FILE_PIECE = RATE; // samples of a file that are sent at once
const AUDIBLE = 0.01;
const SHORTEST_VOICE = 3; // seconds

let openedAt = 0; // the microphone, on performance.now's clock
let playing = silent(); // what is heard now, how much of it, and whether it waits for more
let spoken = 0; // when the last piece with something in it was sent

// ----------------------------------------------------------------------------------------------------- connection

/** A conversation that is open, after asking for a key where the server wants one. */
async function connected() {
  if (talk.isOpen) return;
  state("connecting…", "closed");
  try {
    await talk.open(sessionStorage.getItem("key"));
  } catch (error) {
    if ((await fetch("v1/models", { headers: authorized() })).status !== 401) throw error;
    await askForKey();
    return connected();
  }
}

function authorized() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function askForKey() {
  return new Promise((resolve) => {
    $("asking").addEventListener("close", () => {
      sessionStorage.setItem("key", $("key").value);
      resolve();
    }, { once: true });
    $("asking").showModal();
  });
}

/** Run what somebody asked for; what goes wrong is told in a sentence. */
async function attempt(what) {
  $("problem").hidden = true;
  try {
    await what();
  } catch (error) {
    problem(error.name === "NotAllowedError" ? "The microphone is not allowed; allow it for this page in the browser." : error.message);
  }
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

function state(text, name) {
  $("state").textContent = text;
  $("state").dataset.state = name;
}

talk.addEventListener("session", ({ detail }) => {
  $("model").textContent = detail.model ?? "";
  state("connected", "open");
});
talk.addEventListener("closed", ({ detail }) => {
  state("not connected", "closed");
  sound.stop();
  closeMicrophone();
  if (detail.code !== 1000) problem(`The connection ended${detail.reason ? `: ${detail.reason}` : ""}. Press Talk to go on where it was.`);
});
talk.addEventListener("problem", ({ detail }) => problem(detail));

// ----------------------------------------------------------------------------------------------------- talking

async function openMicrophone() {
  await connected();
  await sound.openMicrophone();
  openedAt = performance.now();
  $("talk").setAttribute("aria-pressed", "true");
  $("talk-label").textContent = $("push").checked ? "Release to send" : "Listening";
  state("listening", "listening");
}

function closeMicrophone() {
  sound.closeMicrophone();
  $("talk").setAttribute("aria-pressed", "false");
  $("talk-label").textContent = $("push").checked ? "Hold to talk" : "Talk";
  if (talk.isOpen) state("connected", "open");
}

sound.onpiece = ({ samples, level }) => {
  $("talk").style.setProperty("--level", Math.min(0.3, level).toFixed(3));
  if (level > AUDIBLE) spoken = performance.now();
  talk.append(samples);
};

function press() {
  attempt(async () => {
    await interrupt();
    await openMicrophone();
  });
}

function release() {
  if (!sound.microphone) return;
  closeMicrophone();
  if (performance.now() - openedAt < 200) return talk.clear();
  timing("stopped");
  talk.commit();
}

/** Stop the answer, here at once and there with what was heard of it. */
async function interrupt() {
  if (!playing.item && !talk.response) return;
  if (talk.response) talk.cancel();
  await cutShort();
}

async function cutShort() {
  const item = talk.cut();
  fallSilent();
  const ms = await sound.stop();
  if (item) talk.truncate(item, ms);
}

talk.addEventListener("interrupted", () => { // the server has cancelled the answer itself
  if (talk.speaking && performance.now() - openedAt >= GRACE) cutShort();
});

$("talk").addEventListener("click", () => {
  if ($("push").checked) return;
  if (sound.microphone) closeMicrophone();
  else attempt(openMicrophone);
});
$("talk").addEventListener("pointerdown", (event) => {
  if (!$("push").checked) return;
  event.currentTarget.setPointerCapture(event.pointerId);
  press();
});
for (const end of ["pointerup", "pointercancel"]) $("talk").addEventListener(end, () => $("push").checked && release());
$("push").addEventListener("change", () => {
  closeMicrophone();
  if ($("push").checked) $("talk").focus(); // where the space bar talks: here it would undo the choice
  talk.update({ vad: detection() });
});
$("ends").addEventListener("change", () => talk.update({ vad: detection() }));
$("stop").addEventListener("click", interrupt);

/** How the server tells that a turn has ended; not at all where a key says so. */
function detection() {
  return $("push").checked ? null : $("ends").value;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) interrupt();
  const free = !event.target.closest("input, textarea, select, dialog, summary, button:not(#talk)");
  if (event.code === "Space" && $("push").checked && free) {
    event.preventDefault();
    if (!event.repeat && !sound.microphone) press();
  }
});
document.addEventListener("keyup", (event) => {
  if (event.code === "Space" && $("push").checked) release();
});

$("write").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  $("text").value = "";
  attempt(async () => {
    await sound.open();
    await connected();
    await interrupt();
    talk.say(text);
  });
});

for (const question of ["What is two plus three?", "Which month comes after May?", "What is “cat” in French?"]) {
  const button = Object.assign(document.createElement("button"), { textContent: question, className: "example" });
  button.addEventListener("click", () => {
    $("text").value = question;
    $("write").requestSubmit();
  });
  $("examples").append(button);
}

// ----------------------------------------------------------------------------------------------------- files

function sendFile(file) {
  return attempt(async () => {
    const samples = await sound.read(file);
    await connected();
    await interrupt();
    talk.update({ vad: null }); // a file is one turn, whatever pauses are in it
    sound.show(samples);
    for (let start = 0; start < samples.length; start += FILE_PIECE) talk.append(samples.subarray(start, start + FILE_PIECE));
    timing("stopped");
    talk.commit();
    talk.update({ vad: detection() });
  });
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) sendFile(target.files[0]);
  target.value = "";
});
let over = 0;
addEventListener("dragenter", (event) => event.dataTransfer.types.includes("Files") && ++over && $("drop").classList.add("over"));
addEventListener("dragleave", () => (over = Math.max(0, over - 1)) || $("drop").classList.remove("over"));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  $("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) sendFile(event.dataTransfer.files[0]);
});

// ----------------------------------------------------------------------------------------------------- answers

talk.addEventListener("sound", ({ detail: { item, delta } }) => {
  const samples = decode(delta);
  const ms = (1000 * samples.length) / RATE;
  if (!item.ms) strip.begin();
  item.ms += ms;
  strip.add(performance.now(), ms);
  strip.draw();
  $("late").textContent = strip.late ? `${strip.late} of ${strip.packets.length} late` : `${strip.packets.length}, none late`;
  timing("sound");
  sound.play(samples, item.id);
  $("stop").disabled = false;
});

sound.onplay = (news) => {
  if (news.started) {
    timing("heard");
    state("speaking", "speaking");
    playing = { item: news.started, ms: 0, waits: false };
    return;
  }
  if (news.item !== playing.item) return;
  Object.assign(playing, { ms: news.playedMs, waits: news.starving });
  endOfSound();
};

function silent() {
  return { item: null, ms: 0, waits: true };
}

/** All of an answer has been heard when the player waits and nothing more will come. */
function endOfSound() {
  if (!playing.waits || talk.response) return;
  talk.speaking = null;
  fallSilent();
}

function fallSilent() {
  playing = silent();
  $("stop").disabled = true;
  state(sound.microphone ? "listening" : "connected", sound.microphone ? "listening" : "open");
}
talk.addEventListener("finished", endOfSound);

talk.addEventListener("change", ({ detail: item }) => {
  $("empty").hidden = true;
  let line = $("said").querySelector(`[data-id="${CSS.escape(item.id)}"]`);
  if (!line) {
    line = document.createElement("li");
    line.dataset.id = item.id;
    line.append(document.createElement("span"));
    $("said").append(line);
  }
  line.className = item.role;
  line.dataset.state = item.state;
  line.firstChild.textContent = item.text || (item.role === "user" ? "…" : "");
  line.scrollIntoView({ block: "nearest" });
  if (item.state !== "forming" && item.text) announce(item);
});

const SPEAKERS = { user: "You", assistant: "Antiphon", tool: "Function" };

/** Tell a screen reader what was said, once it is whole. */
function announce(item) {
  if (item.announced === item.text) return;
  item.announced = item.text;
  const cut = item.state === "cut" ? ", interrupted" : "";
  $("aloud").append(Object.assign(document.createElement("p"), { textContent: `${SPEAKERS[item.role]}${cut}: ${item.text}` }));
  while ($("aloud").children.length > KEPT_LINES) $("aloud").firstChild.remove();
}
talk.addEventListener("gone", ({ detail: id }) => $("said").querySelector(`[data-id="${CSS.escape(id)}"]`)?.remove());

// ----------------------------------------------------------------------------------------------------- how long it took

const PHASES = [ // from the end of what was said
  ["text", "first text"],
  ["sound", "first packet"],
  ["heard", "first sound played"],
];
let turn = {};

function timing(phase) {
  const now = performance.now();
  if (phase === "stopped" || phase === "asked") {
    if (phase === "asked" && turn.stopped && now - turn.stopped < 1000 && !turn.text) return;
    const silent = phase === "stopped" && sound.microphone && spoken && now - spoken < 3000;
    turn = { stopped: silent ? spoken : now }; // somebody who listens waits from the last sound, not from the decision
    return showTurn();
  }
  turn[phase] ??= now;
  showTurn();
}

function showTurn() {
  const rows = PHASES.map(([name, label]) => [label, turn[name] && turn.stopped ? turn[name] - turn.stopped : null]);
  const most = Math.max(300, ...rows.map(([, ms]) => ms ?? 0));
  $("phases").replaceChildren(
    ...rows.map(([label, ms]) => {
      const row = document.createElement("div");
      row.style.setProperty("--share", ms === null ? 0 : ms / most);
      row.append(Object.assign(document.createElement("dt"), { textContent: label }));
      row.append(Object.assign(document.createElement("dd"), { textContent: ms === null ? "–" : `${Math.round(ms)} ms` }));
      return row;
    }),
  );
}

talk.addEventListener("timing", ({ detail: { phase } }) => ["stopped", "asked", "text"].includes(phase) && timing(phase));

// ----------------------------------------------------------------------------------------------------- voices

async function listVoices(chosen) {
  const answer = await fetch("v1/audio/voices", { headers: authorized() });
  if (answer.status === 401) {
    await askForKey();
    return listVoices(chosen);
  }
  const { data } = await answer.json();
  const wanted = chosen ?? $("voice").value;
  $("voice").replaceChildren(...data.map(({ id, name, type }) => new Option(type ? `${name} (cloned)` : name, type ? name : id)));
  if ([...$("voice").options].some(({ value }) => value === wanted)) $("voice").value = wanted;
}

$("voice").addEventListener("change", () => talk.update({ voice: $("voice").value }));
$("instructions").addEventListener("change", () => talk.update({ instructions: $("instructions").value }));

let reference = null; // File or Blob of the voice to be cloned
let recording = null; // pieces, while it is recorded

function refer(blob, text) {
  reference = blob;
  $("clone-state").textContent = text;
  $("clone-done").disabled = !blob;
}

async function record() {
  if (recording) return endRecording();
  const before = sound.onpiece;
  closeMicrophone();
  await sound.openMicrophone();
  recording = { pieces: [], before };
  sound.onpiece = ({ samples }) => {
    recording.pieces.push(samples);
    const seconds = recording.pieces.reduce((sum, part) => sum + part.length, 0) / RATE;
    $("clone-state").textContent = `${seconds.toFixed(1)} s recorded${seconds < SHORTEST_VOICE ? `; at least ${SHORTEST_VOICE} are needed` : ""}.`;
    if (seconds > 29) endRecording();
  };
  $("clone-record").textContent = "Stop";
  $("clone-record").setAttribute("aria-pressed", "true");
}

function endRecording() {
  if (!recording) return;
  const { pieces, before } = recording;
  recording = null;
  sound.onpiece = before;
  closeMicrophone();
  $("clone-record").textContent = "Record";
  $("clone-record").setAttribute("aria-pressed", "false");
  const samples = new Float32Array(pieces.reduce((sum, part) => sum + part.length, 0));
  pieces.reduce((place, part) => (samples.set(part, place), place + part.length), 0);
  const enough = samples.length >= SHORTEST_VOICE * RATE;
  refer(enough ? wav(samples) : null, enough ? `${(samples.length / RATE).toFixed(1)} s recorded.` : "That was too short; record at least 3 seconds.");
}

$("clone").addEventListener("click", () => $("cloning").showModal());
$("clone-record").addEventListener("click", () => attempt(record));
$("clone-file").addEventListener("change", ({ target }) => refer(target.files[0] ?? null, target.files[0]?.name ?? "Nothing chosen."));
$("cloning").addEventListener("close", () => {
  endRecording();
  if ($("cloning").returnValue !== "default" || !reference) return;
  attempt(async () => {
    const form = new FormData();
    const name = $("clone-name").value.trim();
    form.set("name", name);
    form.set("audio_sample", reference, reference.name ?? "voice.wav");
    const answer = await fetch("v1/audio/voices", { method: "POST", body: form, headers: authorized() });
    const made = await answer.json();
    if (!answer.ok) throw new Error(made.error.message);
    await listVoices(made.name);
    talk.update({ voice: made.name });
    refer(null, "Nothing recorded yet.");
  });
});

// ----------------------------------------------------------------------------------------------------- events, looks

let counted = 0;
talk.addEventListener("event", ({ detail: { sent, event } }) => {
  $("count").textContent = ++counted;
  if (!$("noisy").checked && (event.type === "input_audio_buffer.append" || event.type === "response.output_audio.delta")) return;
  const line = document.createElement("li");
  line.className = sent ? "sent" : "got";
  const whole = document.createElement("details");
  whole.append(Object.assign(document.createElement("summary"), { textContent: `${sent ? "→" : "←"} ${event.type}` }));
  const shorter = (key, value) => (typeof value === "string" && value.length > 200 ? `${value.slice(0, 60)}… (${value.length})` : value);
  whole.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(event, shorter, 1) }));
  line.append(whole);
  const list = $("events");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
  list.append(line);
  while (list.children.length > KEPT_EVENTS) list.firstChild.remove();
  if (atEnd) list.scrollTop = list.scrollHeight;
});
$("forget").addEventListener("click", () => $("events").replaceChildren());

function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
  repaint();
}

function repaint() {
  for (const scope of Object.values(scopes)) scope.rgb = null;
  strip.draw();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
$("theme").addEventListener("click", () => theme(isDark() ? "light" : "dark"));
prefersDark.addEventListener("change", repaint);
if (localStorage.getItem("theme")) theme(localStorage.getItem("theme"));
else repaint();

function frame() {
  scopes.heard.step(sound.heard);
  scopes.spoken.step(sound.said);
  requestAnimationFrame(frame);
}

talk.wanted = { vad: detection() };
showTurn();
frame();
attempt(listVoices);
