// @openai/agents' realtime session over WebSocket: node agents.mjs URL QUESTION.pcm ...
// Speaks each question, hands free: the second into the answer to the first, and the last one has to call the tool.
// Prints what it was sent, as JSON.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const { RealtimeAgent, RealtimeSession, tool } = createRequire(process.env.CLIENTS)("@openai/agents/realtime");
const { z } = createRequire(process.env.CLIENTS)("zod");

const [url, ...questions] = process.argv.slice(2);
const asked = [];
const setTimer = tool({
  name: "set_timer",
  description: "Set a timer.",
  parameters: z.object({ minutes: z.number().int() }),
  execute: async ({ minutes }) => {
    asked.push(minutes);
    choose("none");
    return "done";
  },
});
const agent = new RealtimeAgent({ name: "antiphon", instructions: "", tools: [setTimer] });
const session = new RealtimeSession(agent, {
  transport: "websocket",
  model: "tiny",
  tracingDisabled: true,
  config: {
    toolChoice: "none",
    audio: { input: { turnDetection: { type: "server_vad" }, transcription: { model: "tiny" } } },
  },
});
const choose = (choice) =>
  session.transport.sendEvent({ type: "session.update", session: { type: "realtime", tool_choice: choice } });

const events = [];
let waiting = () => {};
session.transport.on("*", (event) => {
  events.push(event);
  waiting();
});
const sounds = new Map(); // by answer
let interruptions = 0;
session.on("audio", ({ responseId, data }) => sounds.set(responseId, [...(sounds.get(responseId) ?? []), Buffer.from(data)]));
session.on("audio_interrupted", () => (interruptions += 1));
session.on("error", (error) => {
  console.error(error);
  process.exit(1);
});

let from = 0;
async function until(...kinds) {
  const missing = () => kinds.some((kind) => !events.slice(from).some((event) => event.type === kind));
  while (missing()) await new Promise((resolve) => (waiting = resolve));
  const seen = events.slice(from);
  from = events.length;
  return seen;
}

const turn = (seen) => ({
  heard: seen.find((e) => e.type === HEARD)?.transcript,
  item: seen.find((e) => e.type === HEARD)?.item_id,
  deltas: seen.filter((e) => e.type === "response.output_audio_transcript.delta").map((e) => e.delta).join(""),
  ...answer(seen.find((e) => e.type === "response.output_audio_transcript.done")),
});
const answer = (done) => ({
  said: done?.transcript,
  answer: done?.item_id,
  sound: Buffer.concat(sounds.get(done?.response_id) ?? []).toString("base64"),
});
const HEARD = "conversation.item.input_audio_transcription.completed";

await session.connect({ apiKey: "none", url });
const PAUSE = Buffer.alloc(48000);
function say(...sounds) {
  const sound = Buffer.concat(sounds);
  for (let start = 0; start < sound.length; start += 1920) {
    const piece = sound.subarray(start, start + 1920);
    session.sendAudio(piece.buffer.slice(piece.byteOffset, piece.byteOffset + piece.length));
  }
}
async function kept(id) {
  session.transport.sendEvent({ type: "conversation.item.retrieve", item_id: id });
  const isIt = (e) => e.type === "conversation.item.retrieved" && e.item.id === id;
  let found; // the client itself asks for what was cut
  while (!(found = (await until("conversation.item.retrieved")).find(isIt)));
  return found.item;
}
const spoken = questions.map((path) => readFileSync(path));
const turns = [];
say(spoken[0], PAUSE);
const first = await until("response.output_audio.delta", HEARD);
say(PAUSE.subarray(0, 12000), spoken[1]); // while it speaks
const cut = (await until("conversation.item.truncated")).find((e) => e.type === "conversation.item.truncated");
turns.push(turn(first));
say(PAUSE);
const second = turn(await until("response.output_audio_transcript.done", "response.done", HEARD));
turns.push({ ...second, kept: await kept(second.answer) });
choose("required");
say(spoken[2], PAUSE);
turns.push(turn(await until("response.done", HEARD)));
await until("response.done"); // what it says of the tool's result
const last = answer(events.filter((e) => e.type === "response.output_audio_transcript.done").at(-1));
const items = [];
for (const { item } of events.filter((e) => e.type === "conversation.item.added")) items.push(await kept(item.id));
writeFileSync(1, JSON.stringify({ turns, last, items, asked, cut: cut.item_id, interruptions })); // all of it, before the process ends
session.close();
process.exit(0);
