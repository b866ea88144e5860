// A streaming resampler: windowed-sinc interpolation between any two rates. Pieces of any length give what the whole gives.

const ZEROS = 16; // zero crossings of the sinc on either side, at the lower of the two rates

export class Resampler {
  constructor(source, target) {
    this.step = source / target; // input samples an output sample moves on
    this.cutoff = Math.min(1, target / source) * 0.95; // of the input's half rate
    this.reach = Math.ceil(ZEROS / this.cutoff); // input samples that an output sample looks at, on either side
    this.kept = new Float32Array(this.reach); // the last samples, and as many zeros before the first
    this.at = this.reach; // place of the next output sample in `kept` and what follows it
  }

  /** Samples (Float32Array) at the source's rate -> those at the target's rate that are certain by now. */
  push(samples) {
    if (this.step === 1) return samples;
    const x = new Float32Array(this.kept.length + samples.length);
    x.set(this.kept);
    x.set(samples, this.kept.length);
    const count = Math.max(0, Math.floor((x.length - this.reach - 1 - this.at) / this.step) + 1);
    const out = new Float32Array(count);
    for (let i = 0; i < count; i++) out[i] = this.interpolate(x, this.at + i * this.step);
    const next = this.at + count * this.step;
    const first = Math.max(0, Math.floor(next) - this.reach);
    this.kept = x.slice(first);
    this.at = next - first;
    return out;
  }

  interpolate(x, at) {
    const first = Math.floor(at) - this.reach + 1;
    let sum = 0;
    for (let k = Math.max(0, first); k < first + 2 * this.reach && k < x.length; k++) {
      const t = k - at;
      const phase = Math.PI * t * this.cutoff;
      const sinc = Math.abs(phase) < 1e-9 ? 1 : Math.sin(phase) / phase;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * t) / (this.reach + 1)); // Hann
      sum += x[k] * sinc * window * this.cutoff;
    }
    return sum;
  }
}
