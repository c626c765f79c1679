// The files of the page: fetched with their progress, compared with their checksums, and run by onnxruntime.

import * as ort from "./runtime/ort.wasm.bundle.min.mjs";
import { sha256OfFile } from "./sha256.js";
import { inMegabytes } from "./units.js";

// WebAssembly ends at 4 GB, and a graph takes some three times its file while it is loaded. Where all are more than this,
// one of them is loaded at a time.
const MOST_LOADED_BYTES = 2 ** 30;

export class Network {
  #graphs; // by their numbers: what the manifest says of them
  #files = new Map(); // names and bytes, until they are loaded
  #sessions = new Map();
  #keepsAll;

  // onProgress hears the bytes so far, and how many there will be.
  static async load(onProgress) {
    const network = new Network();
    const site = JSON.parse(await text("site.json"));
    network.manifest = JSON.parse(await text("network/manifest.json"));
    const { manifest } = network, { chain, files, decoding } = manifest;
    network.#graphs = chain ? [chain] : [...files, ...(decoding ? [decoding.graph] : [])];
    network.bytes = network.#graphs.reduce((sum, { bytes }) => sum + bytes, 0);
    network.#keepsAll = network.bytes <= MOST_LOADED_BYTES;
    const { wasm } = site.runtime;
    const total = wasm.bytes + network.bytes;
    let before = 0;
    const fetched = async ({ file, bytes, sha256 }) => {
      const found = await checked(file, sha256, bytes, (so_far) => onProgress(before + so_far, total));
      before += bytes;
      return found;
    };
    // One thread: several need headers that few servers send.
    Object.assign(ort.env.wasm, { numThreads: 1, proxy: false });
    ort.env.logLevel = "error";
    ort.env.wasm.wasmBinary = await fetched(wasm);
    for (const graph of network.#graphs) {
      network.#files.set(graph.file, await fetched({ ...graph, file: `network/${graph.file}` }));
    }
    if (manifest.tokenizer_sha256) {
      const found = await checked("network/tokenizer.json", manifest.tokenizer_sha256);
      network.definition = JSON.parse(new TextDecoder().decode(found));
    }
    // What cannot be is told now, and the first result does not wait for it.
    for (const graph of network.#keepsAll ? network.#graphs : network.#graphs.slice(0, 1)) await network.#session(graph);
    return network;
  }

  floats = (values, shape) => new ort.Tensor("float32", values, shape);
  wholes = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values), shape);
  doubles = (values, shape) => new ort.Tensor("float64", Float64Array.from(values), shape);

  // A block's outputs, each as the array of its values.
  async run(block, feed) {
    const found = await (await this.#session(this.#graphs[block])).run(feed);
    return Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
  }

  // The outputs of the whole chain's graph, as they are.
  async runChain(feed) {
    return (await this.#session(this.#graphs[0])).run(feed);
  }

  async #session({ file }) {
    if (this.#sessions.has(file)) return this.#sessions.get(file);
    if (!this.#keepsAll) {
      for (const other of this.#sessions.values()) await other.release();
      this.#sessions.clear();
    }
    try {
      const session = await ort.InferenceSession.create(this.#files.get(file), { executionProviders: ["wasm"] });
      this.#sessions.set(file, session);
      if (this.#keepsAll) this.#files.delete(file);
      return session;
    } catch (error) {
      if (!/memory|alloc|abort/i.test(String(error))) throw error;
      throw new Error(`this browser has too little memory for the network (${inMegabytes(this.bytes)}): ${error.message}`);
    }
  }
}

async function text(file) {
  return new TextDecoder().decode(await fetchedBytes(file));
}

async function checked(file, sha256, bytes, onBytes) {
  const found = await fetchedBytes(file, bytes, onBytes);
  if ((bytes !== undefined && found.length !== bytes) || (await sha256OfFile(found)) !== sha256) {
    throw new Error(`${file} is damaged (${found.length} bytes): copy the folder to the server again`);
  }
  return found;
}

async function fetchedBytes(file, size = 0, onBytes = () => {}) {
  let answer;
  try {
    answer = await fetch(new URL(file, import.meta.url));
  } catch (error) {
    throw new Error(`cannot fetch ${file}: ${error.message}; is the server still running?`);
  }
  if (!answer.ok) throw new Error(`cannot fetch ${file}: the server answers ${answer.status}; is all of the folder there?`);
  const parts = [];
  let length = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    onBytes(Math.min(length, size));
  }
  const whole = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
