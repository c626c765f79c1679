// Pictures as a network sees them, and as a screen shows them. Pixels are bytes [height, width, channels].

const float = Math.fround;

// float32 [channels, height, width] with zero mean; see `ImageInfo.to_model`.
export function toModel(pixels, { image, mean, scale }) {
  const area = image.height * image.width, values = new Float32Array(pixels.length);
  const factor = float(scale / 255), shift = float(mean * scale);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < image.channels; c++) values[c * area + i] = float(pixels[i * image.channels + c] * factor) - shift;
  }
  return values;
}

// The inverse; see `pictures.to_uint8`.
export function toPixels(values, { image, mean, scale }) {
  const area = image.height * image.width, pixels = new Uint8Array(values.length);
  const divisor = float(scale), shift = float(mean);
  for (let c = 0; c < image.channels; c++) {
    for (let i = 0; i < area; i++) {
      const share = float(float(values[c * area + i] / divisor) + shift);
      pixels[i * image.channels + c] = toEven(float(255 * Math.min(Math.max(share, 0), 1)));
    }
  }
  return pixels;
}

function toEven(value) {
  const low = Math.floor(value), rest = value - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 === 1) ? low + 1 : low;
}

// The first sample's pixels on a canvas of the same size; with two channels or more than four the first is shown as grey.
export function paint(canvas, pixels, { width, height, channels }) {
  canvas.width = width;
  canvas.height = height;
  const shown = new ImageData(width, height), coloured = channels >= 3;
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) shown.data[4 * i + c] = pixels[i * channels + (coloured ? c : 0)];
    shown.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(shown, 0, 0);
}

// The central square of a picture (all of it where the network's images are not square), as a network takes it: laid on
// white, of its size, in grey or in colour. `rgba` is an ImageData.
export function fitted(rgba, { width, height, channels }) {
  const square = width === height, same = rgba.width === width && rgba.height === height;
  if (!square && !same) {
    throw new Error(`this picture has ${rgba.width} x ${rgba.height} pixels; the network takes ${width} x ${height}`);
  }
  if (channels !== 1 && channels !== 3) throw new Error(`the network takes pictures with ${channels} channels`);
  const pixels = new Uint8Array(rgba.width * rgba.height * channels);
  for (let i = 0; i < rgba.width * rgba.height; i++) {
    const alpha = rgba.data[4 * i + 3] / 255;
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(255 + (rgba.data[4 * i + c] - 255) * alpha));
    if (channels === 1) pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // Pillow's grey
    else pixels.set([r, g, b], 3 * i);
  }
  if (same) return pixels;
  const side = Math.min(rgba.width, rgba.height), before = (length) => (length - side) >> 1;
  const narrow = resizedRows(pixels, rgba, side, before(rgba.width), width, channels);
  const lying = { width: rgba.height, height: width };
  const low = resizedRows(turned(narrow, lying, channels), lying, side, before(rgba.height), width, channels);
  return turned(low, { width, height: width }, channels);
}

// Of each row the part [from, from + side) as `wanted` pixels, by Lanczos' filter in the whole numbers that Pillow counts
// in; the filter sees what lies beside the part, too.
function resizedRows(pixels, { width, height }, side, from, wanted, channels) {
  const bits = 22, scale = side / wanted, stretch = Math.max(scale, 1), support = 3 * stretch;
  const resized = new Uint8Array(height * wanted * channels);
  for (let x = 0; x < wanted; x++) {
    const centre = from + (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(width, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: end - first }, (_, i) => lanczos((i + first - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((weight) => {
      const share = (weight / sum) * 2 ** bits;
      return Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    });
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let total = 2 ** (bits - 1);
        for (let i = 0; i < whole.length; i++) total += pixels[(y * width + first + i) * channels + c] * whole[i];
        resized[(y * wanted + x) * channels + c] = Math.min(Math.max(Math.floor(total / 2 ** bits), 0), 255);
      }
    }
  }
  return resized;
}

function lanczos(x) {
  if (x < -3 || x >= 3) return 0;
  const sinc = (t) => (t === 0 ? 1 : Math.sin(t * Math.PI) / (t * Math.PI));
  return sinc(x) * sinc(x / 3);
}

// Columns become rows, of which the result has `height`.
function turned(pixels, { width, height }, channels) {
  const found = new Uint8Array(pixels.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < channels; c++) found[(y * width + x) * channels + c] = pixels[(x * height + y) * channels + c];
    }
  }
  return found;
}
