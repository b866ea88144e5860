// @openai/agents' realtime session over WebSocket: node agents.mjs URL QUESTION.pcm ...
// Speaks each question, hands free; the last one has to call the tool. Prints what it was sent, as JSON.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";

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
let samples = 0;
session.on("audio", (event) => (samples += event.data.byteLength / 2));
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
  heard: seen.find((e) => e.type === "conversation.item.input_audio_transcription.completed")?.transcript,
  item: seen.find((e) => e.type === "conversation.item.input_audio_transcription.completed")?.item_id,
  deltas: seen.filter((e) => e.type === "response.output_audio_transcript.delta").map((e) => e.delta).join(""),
  said: seen.find((e) => e.type === "response.output_audio_transcript.done")?.transcript,
});
const HEARD = "conversation.item.input_audio_transcription.completed";

await session.connect({ apiKey: "none", url });
const turns = [];
for (const [i, path] of questions.entries()) {
  if (i === questions.length - 1) choose("required");
  const sound = Buffer.concat([readFileSync(path), Buffer.alloc(48000)]);
  for (let start = 0; start < sound.length; start += 1920) {
    const piece = sound.subarray(start, start + 1920);
    session.sendAudio(piece.buffer.slice(piece.byteOffset, piece.byteOffset + piece.length));
    await sleep(40); // as a microphone gives it: what the user hears is told by the clock
  }
  const told = turn(await until("response.done", HEARD));
  session.transport.sendEvent({ type: "conversation.item.retrieve", item_id: told.item });
  const retrieved = (await until("conversation.item.retrieved")).find((e) => e.type === "conversation.item.retrieved");
  turns.push({ ...told, sound: retrieved.item.content[0].audio });
}
await until("response.done"); // what it says of the tool's result
const last = events.filter((e) => e.type === "response.output_audio_transcript.done").at(-1)?.transcript;
writeFileSync(1, JSON.stringify({ turns, asked, samples, last })); // all of it, before the process ends
session.close();
process.exit(0);
