// Pictures that move: what is heard and said, how long a turn took, and when each packet came.

const LOWEST = 60, HIGHEST = 8000; // Hz that a spectrogram shows, by mel
const QUIET = -95, LOUD = -25; // dB

const mel = (hz) => 2595 * Math.log10(1 + hz / 700);
const hertz = (m) => 700 * (10 ** (m / 2595) - 1);

/** A canvas as large as it looks, on any screen. */
function fit(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * scale));
  const height = Math.max(1, Math.round(canvas.clientHeight * scale));
  const changed = canvas.width !== width || canvas.height !== height;
  if (changed) Object.assign(canvas, { width, height });
  return { width, height, scale, changed, ink: canvas.getContext("2d") };
}

/** A colour of the style sheet, as it is in the light or dark of now. */
function colour(name) {
  const probe = document.documentElement.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

/** Spectrogram above waveform, running from right to left while there is sound. */
export class Scope {
  constructor(canvas, tint) {
    this.canvas = canvas;
    this.tint = tint; // name of a colour of the style sheet
    this.silent = 0;
  }

  /** One step: what `analyser` has now. */
  step(analyser) {
    const { width, height, ink, scale, changed } = fit(this.canvas);
    if (changed || !this.rgb) this.rgb = rgbOf(colour(this.tint), ink);
    if (!analyser) return this.rest(ink, width, height);
    const wave = (this.wave ??= new Float32Array(analyser.fftSize));
    analyser.getFloatTimeDomainData(wave);
    const peak = wave.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    this.silent = peak < 1e-4 ? this.silent + 1 : 0;
    if (this.silent > 40) return; // the picture stands while nothing is to be seen
    const bins = (this.bins ??= new Float32Array(analyser.frequencyBinCount));
    analyser.getFloatFrequencyData(bins);
    const shift = Math.max(1, Math.round(2 * scale));
    const split = Math.round(0.68 * height);
    ink.globalCompositeOperation = "copy";
    ink.drawImage(this.canvas, -shift, 0);
    ink.globalCompositeOperation = "source-over";
    this.column(ink, bins, analyser.context.sampleRate / 2, width - shift, shift, split);
    this.line(ink, peak, width - shift, shift, split, height);
  }

  column(ink, bins, top, left, width, height) {
    const picture = ink.createImageData(width, height);
    const [r, g, b] = this.rgb;
    const low = mel(LOWEST), high = mel(HIGHEST);
    for (let y = 0; y < height; y++) {
      const bin = (hertz(high - ((high - low) * y) / height) / top) * bins.length;
      const loud = Math.max(0, Math.min(1, (bins[Math.round(bin)] - QUIET) / (LOUD - QUIET)));
      for (let x = 0; x < width; x++) picture.data.set([r, g, b, 255 * loud ** 1.6], 4 * (y * width + x));
    }
    ink.putImageData(picture, left, 0);
  }

  line(ink, peak, left, width, top, bottom) {
    const middle = (top + bottom) / 2;
    const half = Math.max(0.5, Math.min(1, Math.sqrt(peak)) * (bottom - top) * 0.46);
    ink.fillStyle = `rgb(${this.rgb.join(",")})`;
    ink.fillRect(left, middle - half, width, 2 * half);
  }

  rest(ink, width, height) {
    ink.clearRect(0, 0, width, height);
    ink.fillStyle = `rgba(${this.rgb.join(",")},0.35)`;
    ink.fillRect(0, Math.round(0.84 * height), width, 1);
  }
}

function rgbOf(text, ink) {
  ink.save();
  ink.globalCompositeOperation = "copy";
  ink.fillStyle = text;
  ink.fillRect(0, 0, 1, 1);
  const [r, g, b] = ink.getImageData(0, 0, 1, 1).data;
  ink.clearRect(0, 0, 1, 1);
  ink.restore();
  return [r, g, b];
}

/** When each packet of an answer came, above (early) or below (late) the moment at which it had to be played. */
export class Strip {
  constructor(canvas) {
    this.canvas = canvas;
    this.begin();
  }

  begin() {
    this.packets = []; // {slack: ms}
    this.first = null;
    this.sent = 0; // ms of sound
  }

  /** A packet of `ms` of sound came at `now` ms; what it was early by is returned. */
  add(now, ms) {
    this.first ??= now;
    const slack = this.first + this.sent - now;
    this.sent += ms;
    this.packets.push({ slack });
    return slack;
  }

  get late() {
    return this.packets.filter(({ slack }) => slack < 0).length;
  }

  draw() {
    const { width, height, ink, scale } = fit(this.canvas);
    ink.clearRect(0, 0, width, height);
    const most = Math.max(400, ...this.packets.map(({ slack }) => Math.abs(slack)));
    const zero = height * 0.72;
    const above = zero - 6 * scale, below = height - zero - 4 * scale;
    ink.fillStyle = colour("--line");
    ink.fillRect(0, zero, width, scale);
    const step = Math.min(8 * scale, width / Math.max(1, this.packets.length));
    const [late, early] = [colour("--late"), colour("--them")];
    this.packets.forEach(({ slack }, i) => {
      ink.fillStyle = slack < 0 ? late : early;
      const size = slack < 0 ? (-slack / most) * below : (slack / most) * above;
      ink.fillRect(i * step, slack < 0 ? zero : zero - size, Math.max(1, step - scale), Math.max(2 * scale, size));
    });
  }
}
