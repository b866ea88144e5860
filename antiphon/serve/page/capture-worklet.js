// Microphone -> 24 kHz, in pieces of 40 ms.
//
//   to the page:   {samples: Float32Array, level: number}   a piece and its root mean square

import { Resampler } from "./resample.js";

const PIECE = 0.04; // seconds

class Capture extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.rate = options.processorOptions.rate;
    this.resampler = new Resampler(sampleRate, this.rate);
    this.held = [];
    this.count = 0;
  }

  process(inputs) {
    const channels = inputs[0];
    if (!channels.length) return true;
    const mono = channels[0].slice();
    for (let c = 1; c < channels.length; c++) for (let i = 0; i < mono.length; i++) mono[i] += channels[c][i];
    if (channels.length > 1) for (let i = 0; i < mono.length; i++) mono[i] /= channels.length;
    const samples = this.resampler.push(mono);
    this.held.push(samples);
    this.count += samples.length;
    if (this.count >= PIECE * this.rate) this.give();
    return true;
  }

  give() {
    const samples = new Float32Array(this.count);
    let place = 0;
    for (const part of this.held) {
      samples.set(part, place);
      place += part.length;
    }
    this.held = [];
    this.count = 0;
    let energy = 0;
    for (const x of samples) energy += x * x;
    this.port.postMessage({ samples, level: Math.sqrt(energy / samples.length) }, [samples.buffer]);
  }
}

registerProcessor("capture", Capture);
