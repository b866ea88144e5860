// What the browser hears and plays: microphone, speaker, files, and sound as the wire carries it (16-bit PCM in base64).

import { Resampler } from "./resample.js";

export const RATE = 24000; // of the wire, both ways

/** Float32Array -> base64 of little-endian 16-bit samples. */
export function encode(samples) {
  const bytes = new Uint8Array(2 * samples.length);
  const view = new DataView(bytes.buffer);
  samples.forEach((x, i) => view.setInt16(2 * i, Math.round(32767 * Math.max(-1, Math.min(1, x))), true));
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

/** base64 of little-endian 16-bit samples -> Float32Array. */
export function decode(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length >> 1 }, (_, i) => view.getInt16(2 * i, true) / 32768);
}

/** A wav file (Blob) of samples at `RATE`. */
export function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((x, i) => view.setInt16(44 + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, x))), true));
  return new Blob([view], { type: "audio/wav" });
}

/** Microphone and speaker over one AudioContext; `onpiece` and `onplay` are set by the page. */
export class Sound {
  constructor() {
    this.onpiece = () => {}; // ({samples, level}) of the microphone, every 40 ms
    this.onplay = () => {}; // what player-worklet.js reports
    this.stopping = []; // who waits to know how much had been played
    this.context = null;
    this.microphone = null; // MediaStream while it is open
  }

  /** Browsers make sound only after somebody has touched the page: call this then. */
  async open() {
    if (this.context) return this.context.resume();
    if (!window.AudioContext || !window.AudioWorkletNode)
      throw new Error("This browser has no AudioWorklet; open the page over https or on localhost in a current browser.");
    this.context = new AudioContext({ latencyHint: "interactive" });
    const place = (name) => new URL(name, import.meta.url);
    await Promise.all(["capture-worklet.js", "player-worklet.js"].map((n) => this.context.audioWorklet.addModule(place(n))));
    const about = { processorOptions: { rate: RATE } };
    this.player = new AudioWorkletNode(this.context, "player", { ...about, numberOfInputs: 0, outputChannelCount: [1] });
    this.player.port.onmessage = ({ data }) => ("stopped" in data ? this.stopping.shift()?.(data.playedMs) : this.onplay(data));
    this.heard = this.analyser();
    this.said = this.analyser();
    this.player.connect(this.said).connect(this.context.destination);
    return this.context.resume();
  }

  analyser() {
    const node = new AnalyserNode(this.context, { fftSize: 2048, smoothingTimeConstant: 0 });
    return node;
  }

  async openMicrophone() {
    await this.open();
    if (this.microphone) return;
    if (!navigator.mediaDevices)
      throw new Error("The microphone needs https or localhost; open the page in one of these ways.");
    const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
    this.microphone = await navigator.mediaDevices.getUserMedia({ audio });
    this.input = this.context.createMediaStreamSource(this.microphone);
    this.capture = new AudioWorkletNode(this.context, "capture", { processorOptions: { rate: RATE } });
    this.capture.port.onmessage = ({ data }) => this.onpiece(data);
    this.input.connect(this.heard);
    this.input.connect(this.capture);
  }

  closeMicrophone() {
    if (!this.microphone) return;
    this.microphone.getTracks().forEach((track) => track.stop());
    this.input.disconnect();
    this.capture.disconnect();
    this.microphone = null;
  }

  play(samples, item) {
    this.player?.port.postMessage({ samples, item }, [samples.buffer]);
  }

  /** Silence at once; how many ms of the answer had been played by then. */
  stop() {
    if (!this.player) return Promise.resolve(0);
    this.player.port.postMessage({ clear: true });
    return new Promise((resolve) => this.stopping.push(resolve));
  }

  /** A sound file -> mono samples at `RATE`. */
  async read(file) {
    await this.open();
    let buffer;
    try {
      buffer = await this.context.decodeAudioData(await file.arrayBuffer());
    } catch {
      throw new Error(`${file.name || "This file"} holds no sound that the browser can read; try wav, mp3, ogg or flac.`);
    }
    const mono = new Float32Array(buffer.length);
    for (let c = 0; c < buffer.numberOfChannels; c++)
      buffer.getChannelData(c).forEach((x, i) => (mono[i] += x / buffer.numberOfChannels));
    const resampler = new Resampler(buffer.sampleRate, RATE);
    const rest = resampler.step === 1 ? 0 : resampler.reach + 1;
    return resampler.push(Float32Array.from({ length: mono.length + rest }, (_, i) => mono[i] ?? 0));
  }

  /** The sound of a file, into the picture of what is heard. */
  show(samples) {
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.heard);
    source.start();
  }
}
