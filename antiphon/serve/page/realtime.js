// A conversation over the Realtime protocol: the socket, and who said what. No picture, no sound: those are the page's.
//
//   socket ──server event──> Conversation ──"change", "sound", "interrupted", "timing" …──> page
//   page   ──say, append, commit, voice …──> client event ──> socket

import { encode } from "./sound.js";

const RESUME_FOR = 60000; // ms that the server keeps a lost conversation

export class Conversation extends EventTarget {
  constructor() {
    super();
    this.forget();
  }

  forget() {
    this.items = new Map(); // id -> {role, text, state}, in order
    this.session = null;
    this.response = null; // id of the answer that is being given
    this.speaking = null; // id of the item that is being said
    this.wanted = {}; // of the session, as the page has it
  }

  get isOpen() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  /** Connect and wait until there is a session, the lost one if it still waits. `key`: where the server asks for one. */
  async open(key) {
    const url = new URL("v1/realtime", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const resuming = this.token && Date.now() - this.lost < RESUME_FOR;
    if (resuming) {
      url.searchParams.set("session_id", this.session.id);
      url.searchParams.set("resume_token", this.token);
    }
    const protocols = ["realtime", ...(key ? [`openai-insecure-api-key.${key}`] : [])];
    const socket = (this.socket = new WebSocket(url, protocols));
    const opened = new Promise((resolve, reject) => {
      socket.onopen = () => resuming && resolve(); // who comes back is not greeted again
      socket.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        this.take(event);
        if (event.type === "session.created") resolve();
        if (event.type === "error" && !this.session) reject(new Error(event.error.message));
      };
      socket.onclose = ({ code, reason }) => {
        reject(new Error(reason || (key ? "The server did not let this page in." : "There is no connection.")));
        this.lost = Date.now();
        this.emit("closed", { code, reason });
      };
    });
    try {
      await opened;
    } catch (error) {
      this.token = null; // the lost session is gone: begin anew
      if (resuming) return this.open(key);
      throw error;
    }
    this.update({});
  }

  close() {
    this.token = null;
    this.socket?.close(1000);
  }

  emit(type, detail) {
    this.dispatchEvent(Object.assign(new Event(type), { detail }));
  }

  send(event) {
    if (!this.isOpen) return;
    this.socket.send(JSON.stringify(event));
    this.emit("event", { sent: true, event });
  }

  // ------------------------------------------------------------------------------------------------ what the page asks

  /** Change the session: {voice, instructions, vad: a type of turn detection or null}; what is not named stays. */
  update(changes) {
    Object.assign(this.wanted, changes);
    const { voice, instructions, vad } = this.wanted;
    const turn_detection = vad ? { type: vad, create_response: true, interrupt_response: true } : null;
    this.send({
      type: "session.update",
      session: {
        type: "realtime",
        output_modalities: ["audio"],
        ...(instructions === undefined ? {} : { instructions }),
        audio: {
          input: { turn_detection, transcription: { model: this.session?.model } },
          ...(voice ? { output: { voice } } : {}),
        },
      },
    });
  }

  append(samples) {
    this.send({ type: "input_audio_buffer.append", audio: encode(samples) });
  }

  clear() {
    this.send({ type: "input_audio_buffer.clear" });
  }

  /** What was appended is a turn; answer it. */
  commit() {
    this.send({ type: "input_audio_buffer.commit" });
    this.respond();
  }

  say(text) {
    const item = { type: "message", role: "user", content: [{ type: "input_text", text }] };
    this.send({ type: "conversation.item.create", item });
    this.respond();
  }

  respond() {
    this.emit("timing", { phase: "asked" });
    this.send({ type: "response.create" });
  }

  cancel() {
    this.send({ type: "response.cancel" });
  }

  /** Take in no more of the item that is being said; what it is, if there is one. */
  cut() {
    const item = this.items.get(this.speaking);
    this.speaking = null;
    if (item) {
      item.state = "cut";
      this.emit("change", item);
    }
    return item;
  }

  /** `ms` of the sound of an item were heard. */
  truncate(item, ms) {
    this.send({
      type: "conversation.item.truncate",
      item_id: item.id,
      content_index: 0,
      audio_end_ms: Math.floor(Math.min(ms, item.ms)),
    });
  }

  // ------------------------------------------------------------------------------------------------ what the server says

  take(event) {
    this.emit("event", { sent: false, event });
    this[event.type]?.(event);
  }

  item(id, role) {
    if (!this.items.has(id)) {
      this.items.set(id, { id, role, text: "", state: "forming", ms: 0 });
      this.emit("change", this.items.get(id));
    }
    return this.items.get(id);
  }

  grow(id, role, text, state) {
    const item = this.item(id, role);
    if (item.state === "cut") return; // what is still on its way was not heard
    item.state = state;
    item.text = state === "forming" ? item.text + text : text;
    this.emit("change", item);
  }

  "session.created"({ session }) {
    this.session = session;
    this.token = session.antiphon?.resume_token ?? null;
    this.emit("session", session);
  }

  "session.updated"({ session }) {
    this.session = { ...this.session, ...session };
    this.emit("session", session);
  }

  "error"({ error }) {
    this.emit("problem", error.message);
  }

  "conversation.item.added"({ item }) {
    if (item.type === "function_call" || item.role === "system") return;
    const text = (item.content ?? []).map((part) => part.text ?? part.transcript ?? "").join("");
    const kept = this.item(item.id, item.role ?? "tool");
    if (text && !kept.text) this.grow(item.id, kept.role, text, "done");
  }

  "conversation.item.deleted"({ item_id }) {
    this.items.delete(item_id);
    this.emit("gone", item_id);
  }

  "input_audio_buffer.speech_started"() {
    this.emit("interrupted");
    this.emit("timing", { phase: "started" });
  }

  "input_audio_buffer.speech_stopped"() {
    this.emit("timing", { phase: "stopped" });
  }

  "input_audio_buffer.committed"({ item_id }) {
    this.item(item_id, "user");
    this.emit("timing", { phase: "committed" });
  }

  "conversation.item.input_audio_transcription.delta"({ item_id, delta }) {
    this.grow(item_id, "user", delta, "forming");
  }

  "conversation.item.input_audio_transcription.completed"({ item_id, transcript }) {
    this.grow(item_id, "user", transcript, "done");
  }

  "conversation.item.input_audio_transcription.failed"({ item_id, error }) {
    this.grow(item_id, "user", `(not understood: ${error.message})`, "done");
  }

  "response.created"({ response }) {
    this.response = response.id;
    this.emit("timing", { phase: "created" });
  }

  "response.output_item.added"({ item }) {
    if (item.type === "function_call") this.grow(item.id, "tool", `${item.name}(`, "forming");
  }

  "response.function_call_arguments.delta"({ item_id, delta }) {
    this.grow(item_id, "tool", delta, "forming");
  }

  "response.function_call_arguments.done"({ item_id, arguments: given }) {
    const name = this.items.get(item_id)?.text.split("(")[0] ?? "";
    this.grow(item_id, "tool", `${name}(${given})`, "done");
  }

  "response.output_audio_transcript.delta"({ item_id, delta }) {
    this.emit("timing", { phase: "text" });
    this.grow(item_id, "assistant", delta, "forming");
  }

  "response.output_text.delta"(event) {
    this["response.output_audio_transcript.delta"](event);
  }

  "response.output_audio.delta"({ item_id, delta }) {
    const item = this.item(item_id, "assistant");
    if (item.state === "cut") return;
    this.speaking = item_id;
    this.emit("sound", { item, delta });
  }

  "response.done"({ response }) {
    this.response = null;
    for (const { id } of response.output ?? []) {
      const item = this.items.get(id);
      if (!item) continue;
      if (item.state === "forming") item.state = response.status === "cancelled" ? "cut" : "done";
      this.emit("change", item);
    }
    if (response.status === "failed") this.emit("problem", response.status_details?.error?.message ?? "The answer failed.");
    this.emit("finished", response);
  }
}
