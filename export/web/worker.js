// Loads the network and runs its chains beside the page, which stays awake meanwhile.

import * as chains from "./chains.js";
import { Network } from "./network.js";

class Stopped extends Error {}

let network;
let current = 0; // the number of the request that is wanted; one that is not stops

onmessage = async ({ data: { number, chain, request } }) => {
  current = number;
  const tell = (kind, what = {}) => postMessage({ kind, number, ...what });
  try {
    if (!network) {
      network = await Network.load((bytes, total) => tell("loading", { bytes, total }));
      return tell("ready", { manifest: network.manifest, bytes: network.bytes, definition: network.definition });
    }
    if (!chain) return; // a request to stop
    const began = performance.now();
    const result = await chains[chain](network, request, async (done, total, state) => {
      tell("step", { done, total, state: typeof state === "function" ? state() : state });
      await new Promise((go) => setTimeout(go)); // other messages have their turn
      if (number !== current) throw new Stopped();
    });
    tell("done", { result, seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    if (!(error instanceof Stopped)) tell("failed", { message: error.message ?? String(error) });
  }
};
