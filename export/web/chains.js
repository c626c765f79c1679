// The chains that edgeblocks runs, over the same graphs: images from noise, classes of an image, text.
//
// Each is given a network (network.js), a request, and a function that hears of each step; that one is awaited, so that a
// page can paint, and it may throw to end the chain. The arithmetic is that of edgeblocks/diffusion, rounded to float32
// where numpy rounds.

import { blockOf, samplerLevels, unmaskingSteps } from "./levels.js";
import { toModel, toPixels } from "./pixels.js";
import { Generator, seedAt, startNoise } from "./random.js";
import { hex, sha256 } from "./sha256.js";

const float = Math.fround;
const TOGETHER = 16; // samples that go through a graph at a time
const PROMPT_SEGMENT = 64;

// dz/dsigma = (z - D(z, sigma)) / sigma from the first level down to 0; z is changed.
// Source: Karras et al. 2022, arXiv 2206.00364, algorithm 1.
async function integrate(denoise, z, levels, { heun, onLevel }) {
  for (let j = 0; j < z.length; j++) z[j] *= float(levels[0]);
  for (const [i, sigma] of levels.entries()) {
    const next = levels[i + 1] ?? 0, here = float(sigma), way = float(next - sigma);
    const denoised = await denoise(z, sigma);
    const slope = z.map((x, j) => float(x - denoised[j]) / here);
    const start = z.slice();
    for (let j = 0; j < z.length; j++) z[j] = float(slope[j] * way) + start[j];
    if (heun && next > 0) {
      const again = await denoise(z, next), there = float(next), half = float((next - sigma) / 2);
      for (let j = 0; j < z.length; j++) {
        const mean = float(float(float(z[j] - again[j]) / there) + slope[j]);
        z[j] = float(mean * half) + start[j];
      }
    }
    await onLevel?.(i + 1, next, z);
  }
  return z;
}

// Pictures, the pixels of each. `label` null: the classes take turns.
// onLevel hears how many levels are done, and what the samples look like so far.
export async function images(network, { n, seed, steps, heun, guidance, label }, onLevel) {
  const { manifest } = network, { image, num_classes: classes, sigma_data: spread } = manifest;
  const size = image.channels * image.height * image.width;
  const levels = samplerLevels(manifest.boundaries, steps);
  const labels = classes ? Array.from({ length: n }, (_, i) => BigInt(label ?? i % classes)) : null;
  const nothing = labels?.map(() => BigInt(classes));

  async function denoised(z, sigma, of) {
    const block = blockOf(manifest.boundaries, sigma), found = new Float32Array(z.length);
    for (let start = 0; start < n; start += TOGETHER) {
      const end = Math.min(start + TOGETHER, n), count = end - start;
      const feed = {
        z: network.floats(z.slice(start * size, end * size), [count, image.channels, image.height, image.width]),
        sigma: network.floats(new Float32Array(count).fill(sigma), [count]),
      };
      if (of) feed.labels = network.wholes(of.slice(start, end), [count]);
      found.set((await network.run(block, feed)).denoised, start * size);
    }
    return found;
  }

  // Without classes D_null, with them D_null + guidance (D_class - D_null). Source: arXiv 2207.12598.
  async function denoise(z, sigma) {
    const found = await denoised(z, sigma, labels);
    if (!labels || guidance === 1) return found;
    const plain = await denoised(z, sigma, nothing), by = float(guidance);
    return found.map((x, j) => plain[j] + float(float(x - plain[j]) * by));
  }

  const samples = Array.from({ length: n }, (_, i) => i);
  const shown = (z, sigma) => {
    // At its spread in the data, so that noise, too, is in the range of pixels.
    const shrink = spread / Math.hypot(spread, sigma);
    return samples.map((i) => toPixels(z.subarray(i * size, (i + 1) * size).map((x) => x * shrink), manifest));
  };
  const z = await integrate(denoise, startNoise(size, samples, seed), levels, {
    heun,
    onLevel: (done, sigma, state) => onLevel(done, levels.length, manifest.decoding ? null : () => shown(state, sigma)),
  });
  if (z.some(Number.isNaN)) throw new Error("the network gave values that are no numbers: it is damaged");
  return manifest.decoding ? decoded(network, z, size, n) : shown(z, 0);
}

// Pictures of latents, one after the other.
async function decoded(network, z, size, n) {
  const { manifest } = network, { image, decoding, scale, mean } = manifest, pictures = [];
  for (let i = 0; i < n; i++) {
    const latents = z.slice(i * size, (i + 1) * size).map((x) => float(float(x / float(scale)) + float(mean)));
    const feed = { latents: network.floats(latents, [1, image.channels, image.height, image.width]) };
    const [values] = Object.values(await network.run(decoding.graph.block, feed));
    pictures.push(toPixels(values, { image: decoding.picture, mean: 0, scale: 1 }));
  }
  return pictures;
}

// The probabilities of a picture's classes: the mean over several chains of noised labels and all their levels.
export async function classes(network, { pixels, seed, steps, noises }, onLevel) {
  const { manifest } = network, { image, num_classes: count } = manifest;
  const levels = samplerLevels(manifest.boundaries, steps), name = hex(sha256(pixels));
  const noise = new Float32Array(noises * count);
  for (let chain = 0; chain < noises; chain++) {
    noise.set(startNoise(count, [name], seedAt(seed, "chain", chain)), chain * count);
  }
  const one = toModel(pixels, manifest), seen = new Float32Array(noises * one.length);
  for (let chain = 0; chain < noises; chain++) seen.set(one, chain * one.length);
  const images = network.floats(seen, [noises, image.channels, image.height, image.width]);
  const total = new Float32Array(count);

  async function denoise(z, sigma) {
    const feed = {
      z: network.floats(z, [noises, count]),
      sigma: network.floats(new Float32Array(noises).fill(sigma), [noises]),
      images,
    };
    const { denoised } = await network.run(blockOf(manifest.boundaries, sigma), feed);
    denoised.forEach((share, j) => { total[j % count] += share; });
    return denoised;
  }

  await integrate(denoise, noise, levels, { heun: false, onLevel: (done) => onLevel(done, levels.length) });
  return total.map((sum) => sum / float(noises * levels.length));
}

// Tokens with every gap (the id `vocabulary`) filled. Source: arXiv 2406.07524 (MDLM), section 3.2.3.
export async function fill(network, { tokens, seed, steps, temperature }, onStep) {
  const { manifest } = network, { length, vocabulary } = manifest;
  const text = Array.from({ length }, (_, i) => tokens[i] ?? vocabulary);
  const intervals = unmaskingSteps(manifest.boundaries, steps), stream = new Generator(seedAt(seed, "unmask", 0));
  for (const [number, [from, to]] of intervals.entries()) {
    const share = number < intervals.length - 1 ? (from - to) / from : 1, middle = (from + to) / 2;
    const picks = Array.from({ length }, () => stream.uniform()), draws = Array.from({ length }, () => stream.uniform());
    const chosen = text.flatMap((token, i) => (token === vocabulary && picks[i] < share ? [i] : []));
    if (chosen.length) {
      const feed = {
        z: network.wholes(text.map(BigInt), [1, length]),
        t: network.floats(new Float32Array([middle]), [1]),
      };
      const [logits] = Object.values(await network.run(blockOf(manifest.boundaries, middle), feed));
      for (const i of chosen) {
        text[i] = drawn(logits.subarray(i * vocabulary, (i + 1) * vocabulary), temperature, draws[i]);
      }
    }
    await onStep(number + 1, intervals.length, text);
  }
  return text;
}

// A token by one uniform number: where the sum of the weights so far exceeds that share of the whole sum.
function drawn(logits, temperature, uniform) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return logits.indexOf(largest);
  let sum = 0;
  const sums = Array.from(logits, (logit) => (sum += Math.exp((logit - largest) / temperature)));
  const found = sums.findIndex((so_far) => so_far > uniform * sum);
  return found < 0 ? logits.length - 1 : found;
}

// A text that goes on after a prompt, token by token: the chain is one graph, with keys and values that go from one run to
// the next. onToken hears the tokens so far.
export async function write(network, { prompt, length, seed, steps, temperature, topP }, onToken) {
  const { manifest } = network, { caches, code_width: width, vocabulary } = manifest;
  const levels = samplerLevels(manifest.boundaries, steps);
  const blocks = levels.map((sigma) => blockOf(manifest.boundaries, sigma));
  const perStep = caches.per === "step", sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const numCaches = perStep ? sum(blocks.map((block) => caches.num_caches[block])) : sum(caches.num_caches);
  const stream = new Generator(seedAt(seed, "continue", 0));
  const noise = stream.normal(new Float32Array(length * width));
  const uniform = Float64Array.from({ length }, () => stream.uniform());
  // At each position the token before it; at the first one the id `vocabulary`.
  const inputs = [vocabulary, ...prompt];
  let past = network.floats(new Float32Array(0), [numCaches, 1, caches.heads, 0, caches.head_width]);

  async function run(start, stop, ofLevels, draw, heat, share) {
    const feed = {
      tokens: network.wholes(inputs.slice(start, stop).map(BigInt), [1, stop - start]),
      noise: network.floats(noise.slice(start * width, stop * width), [1, stop - start, width]),
      past,
      levels: network.doubles(ofLevels, [ofLevels.length]),
      uniform: network.doubles([draw], [1]),
      temperature: network.doubles([heat], []),
      top_p: network.doubles([share], []),
    };
    const found = await network.runChain(feed);
    past = found.present;
    return Number(found.token.data[0]);
  }

  // Of a chain whose keys and values are those of noised codes the position before is run again with each token.
  const again = perStep ? 1 : 0, known = prompt.length - again;
  const fillLevels = perStep ? levels : levels.filter((_, i) => blocks.indexOf(blocks[i]) === i);
  for (let start = 0; start < known; start += PROMPT_SEGMENT) {
    const stop = Math.min(start + PROMPT_SEGMENT, known) + again;
    await run(start, stop, fillLevels, 0, 1, 1);
  }
  const tokens = [...prompt];
  for (let position = prompt.length; position < length; position++) {
    const start = Math.max(0, position - again);
    const token = await run(start, position + 1, levels, uniform[position], temperature, topP);
    inputs.push(token);
    tokens.push(token);
    await onToken(tokens.length - prompt.length, length - prompt.length, tokens);
  }
  return tokens;
}
