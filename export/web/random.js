// The random numbers of edgeblocks: numpy's generator PCG64 at a seed that follows from a position such as
// (seed, "start", sample). With the same seed a page begins with the noise that `edgeblocks run` begins with.
//
// Sources: edgeblocks/seeds.py; numpy's SeedSequence and PCG64 (O'Neill 2014, "PCG: a family of simple fast space-efficient
// statistically good algorithms"); its normal numbers (Marsaglia and Tang 2000, "The ziggurat method").

import { sha256 } from "./sha256.js";

// A 63-bit seed for a position; see `seeds.seed_at`.
export function seedAt(...position) {
  const digest = sha256(new TextEncoder().encode(position.map(written).join("/")));
  return new DataView(digest.buffer).getBigUint64(0, true) >> 1n;
}

// Seeds may be larger than a double counts, so that a BigInt, too, is a number here.
function written(part) {
  if (typeof part !== "string") return String(part);
  if (part !== "" && !part.includes("/") && !/^(0|-?[1-9][0-9]*)$/.test(part)) return part;
  return "/" + Array.from(new TextEncoder().encode(part), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Standard normal noise of some samples, one stream a sample, Float32Array [samples, size].
export function startNoise(size, samples, seed) {
  const noise = new Float32Array(samples.length * size);
  samples.forEach((name, i) => {
    new Generator(seedAt(seed, "start", name)).normal(noise.subarray(i * size, (i + 1) * size));
  });
  return noise;
}

const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;
const WHOLE = (1n << 128n) - 1n;
const LOW = (1n << 64n) - 1n;

// numpy.random.default_rng(seed), of a seed below 2^64.
export class Generator {
  #state;
  #increment;
  #half = null; // a 64-bit number gives two of 32 bits, the lower one first

  constructor(seed) {
    const [a, b, c, d] = seedWords(BigInt(seed));
    this.#increment = (((c << 64n) | d) << 1n | 1n) & WHOLE;
    this.#state = this.#increment; // a step from 0
    this.#state = (this.#state + ((a << 64n) | b)) & WHOLE;
    this.#step();
  }

  // Uniform in [0, 1), a double.
  uniform() {
    return Number(this.#next64() >> 11n) / 2 ** 53;
  }

  // Fills a Float32Array with standard normal numbers.
  normal(numbers) {
    for (let i = 0; i < numbers.length; i++) numbers[i] = this.#normal();
    return numbers;
  }

  #step() {
    this.#state = (this.#state * MULTIPLIER + this.#increment) & WHOLE;
  }

  #next64() {
    this.#step();
    const mixed = (this.#state >> 64n) ^ (this.#state & LOW);
    const by = this.#state >> 122n;
    return ((mixed >> by) | (mixed << (64n - by))) & LOW;
  }

  #next32() {
    if (this.#half !== null) {
      const kept = this.#half;
      this.#half = null;
      return kept;
    }
    const both = this.#next64();
    this.#half = Number(both >> 32n);
    return Number(both & 0xffffffffn);
  }

  // Uniform in [0, 1), of 24 bits.
  #uniform32() {
    return (this.#next32() >>> 8) / 2 ** 24;
  }

  #normal() {
    for (;;) {
      const bits = this.#next32();
      const layer = bits & 0xff, size = bits >>> 9;
      const x = Math.fround((bits & 0x100 ? -size : size) * WIDTHS[layer]);
      if (size < INSIDE[layer]) return x;
      if (layer === 0) return this.#tail((size >> 8) & 1 ? -1 : 1);
      const height = float((HEIGHTS[layer - 1] - HEIGHTS[layer]) * this.#uniform32()) + HEIGHTS[layer];
      if (float(height) < Math.exp(-0.5 * x * x)) return x;
    }
  }

  #tail(sign) {
    for (;;) {
      const x = float(-INVERSE_R * float(Math.log1p(-this.#uniform32())));
      const y = -float(Math.log1p(-this.#uniform32()));
      if (float(y + y) > float(x * x)) return sign * float(FLOAT_R + x);
    }
  }
}

const float = Math.fround;

// The layers of the ziggurat under exp(-x^2 / 2), 256 of the same area; the widest one and the tail are number 0.
const R = 3.6541528853610088, AREA = 0.0049286732339746519;
const INVERSE_R = float(0.27366123732975828), FLOAT_R = float(R);
const INSIDE = new Uint32Array(256), WIDTHS = new Float32Array(256), HEIGHTS = new Float32Array(256);

{
  const density = (x) => Math.exp(-0.5 * x * x);
  const edges = new Float64Array(256);
  edges[255] = R;
  for (let i = 254; i > 0; i--) edges[i] = Math.sqrt(-2 * Math.log(density(edges[i + 1]) + AREA / edges[i + 1]));
  INSIDE[0] = Math.round(((R * density(R)) / AREA) * 2 ** 23);
  WIDTHS[0] = AREA / density(R) / 2 ** 23;
  HEIGHTS[0] = 1;
  for (let i = 1; i < 256; i++) {
    INSIDE[i] = Math.round((edges[i - 1] / edges[i]) * 2 ** 23);
    WIDTHS[i] = edges[i] / 2 ** 23;
    HEIGHTS[i] = density(edges[i]);
  }
}

// Four numbers of 64 bits out of a seed: numpy.random.SeedSequence(seed).generate_state(4, numpy.uint64).
function seedWords(seed) {
  let constant = 0x43b0d7e5;
  const hashed = (value) => {
    value ^= constant;
    constant = Math.imul(constant, 0x931e8875);
    value = Math.imul(value, constant);
    return value ^ (value >>> 16);
  };
  const mixed = (x, y) => {
    const value = Math.imul(x, 0xca01f9dd) - Math.imul(y, 0x4973f715);
    return value ^ (value >>> 16);
  };
  const pool = [Number(seed & 0xffffffffn), Number(seed >> 32n), 0, 0].map(hashed);
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from !== to) pool[to] = mixed(pool[to], hashed(pool[from]));
    }
  }
  constant = 0x8b51f9dd;
  const words = Array.from({ length: 8 }, (_, i) => {
    let value = pool[i % 4] ^ constant;
    constant = Math.imul(constant, 0x58f38ded);
    value = Math.imul(value, constant);
    return BigInt((value ^ (value >>> 16)) >>> 0);
  });
  return [0, 2, 4, 6].map((i) => words[i] | (words[i + 1] << 32n));
}
