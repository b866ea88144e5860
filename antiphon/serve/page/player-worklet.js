// Packets of an answer -> the speaker, one after another; silent at once when it is told to stop.
//
//   from the page: {samples: Float32Array, item: string}   a packet at 24 kHz, and the answer it belongs to
//                  {clear: true}                           throw away what has not been played
//   to the page:   {item, playedMs, queuedMs, underruns}   about every 50 ms while something is played, and when it ends
//                  {started: item}                         the first sample of an answer has left
//                  {stopped: item, playedMs}               it was cut off after so much

import { Resampler } from "./resample.js";

const FADE = 0.005; // seconds, when an answer is cut off: a step would click
const NEWS = 0.05; // seconds between reports

class Player extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.source = options.processorOptions.rate;
    this.queue = [];
    this.forget();
    this.port.onmessage = ({ data }) => (data.clear ? this.stop() : this.take(data));
  }

  forget() {
    this.item = null;
    this.resampler = new Resampler(this.source, sampleRate);
    this.place = 0; // in the first packet of the queue
    this.played = 0; // samples of this answer
    this.underruns = 0;
    this.starving = false;
    this.sinceNews = 0;
    this.last = 0; // sample that was given last
    this.fading = 0;
  }

  take({ samples, item }) {
    if (item !== this.item) {
      this.queue = [];
      this.forget();
      this.item = item;
    }
    const ready = this.resampler.push(samples);
    if (ready.length) this.queue.push(ready);
  }

  stop() {
    this.queue = [];
    this.fading = Math.round(FADE * sampleRate);
    this.port.postMessage({ stopped: this.item, playedMs: (1000 * this.played) / sampleRate });
    this.item = null;
  }

  process(_, outputs) {
    const out = outputs[0][0];
    let i = 0;
    while (i < out.length && this.queue.length) {
      if (!this.played) this.port.postMessage({ started: this.item });
      const head = this.queue[0];
      const count = Math.min(out.length - i, head.length - this.place);
      out.set(head.subarray(this.place, this.place + count), i);
      i += count;
      this.place += count;
      this.played += count;
      this.starving = false;
      if (this.place === head.length) {
        this.queue.shift();
        this.place = 0;
      }
    }
    if (i) this.last = out[i - 1];
    for (; i < out.length && this.fading > 0; i++) out[i] = this.last *= 1 - 1 / this.fading--;
    if (this.item && this.played && !this.queue.length && !this.starving) {
      this.starving = true; // the page knows whether the answer had come to its end
      this.underruns++;
      this.report();
    }
    this.sinceNews += out.length;
    if (this.queue.length && this.sinceNews >= NEWS * sampleRate) this.report();
    for (let c = 1; c < outputs[0].length; c++) outputs[0][c].set(out);
    return true;
  }

  report() {
    this.sinceNews = 0;
    const queued = this.queue.reduce((sum, part) => sum + part.length, -this.place);
    const ms = (samples) => (1000 * Math.max(0, samples)) / sampleRate;
    this.port.postMessage({
      item: this.item,
      playedMs: ms(this.played),
      queuedMs: ms(queued),
      underruns: this.underruns,
      starving: this.starving,
    });
  }
}

registerProcessor("player", Player);
