// SHA-256 of bytes, as hexadecimal digits or as 32 bytes. Seeds need it at once, and crypto.subtle answers later, and not
// at all where a page comes over plain http from another machine.
// Source: FIPS 180-4, section 6.2.

const K = new Uint32Array(64);
const START = new Uint32Array(8);

// The first 32 bits of the fractional parts of the roots of the first primes.
for (let number = 2, found = 0; found < 64; number++) {
  let prime = true;
  for (let d = 2; d * d <= number; d++) if (number % d === 0) prime = false;
  if (!prime) continue;
  if (found < 8) START[found] = (Math.sqrt(number) % 1) * 2 ** 32;
  K[found++] = (Math.cbrt(number) % 1) * 2 ** 32;
}

export function sha256(bytes) {
  const end = bytes.length >> 6 << 6;
  const state = START.slice();
  const w = new Uint32Array(64);
  let view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0; at < end; at += 64) compress(state, w, view, at);

  const rest = bytes.length - end;
  const tail = new Uint8Array(rest < 56 ? 64 : 128);
  tail.set(bytes.subarray(end));
  tail[rest] = 0x80;
  view = new DataView(tail.buffer);
  view.setBigUint64(tail.length - 8, BigInt(bytes.length) * 8n);
  for (let at = 0; at < tail.length; at += 64) compress(state, w, view, at);

  const digest = new DataView(new ArrayBuffer(32));
  state.forEach((word, i) => digest.setUint32(4 * i, word));
  return new Uint8Array(digest.buffer);
}

export function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Of a large file: by the browser where it offers to, which is ten times as fast.
export async function sha256OfFile(bytes) {
  if (!globalThis.crypto?.subtle) return hex(sha256(bytes));
  return hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
}

function compress(state, w, view, at) {
  for (let i = 0; i < 16; i++) w[i] = view.getUint32(at + 4 * i);
  for (let i = 16; i < 64; i++) {
    const s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ (w[i - 15] >>> 3);
    const s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ (w[i - 2] >>> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let i = 0; i < 64; i++) {
    const s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
    const s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    [h, g, f, e, d, c, b, a] = [g, f, e, (d + t1) | 0, c, b, a, (t1 + t2) | 0];
  }
  [a, b, c, d, e, f, g, h].forEach((word, i) => { state[i] += word; });
}

const rotated = (word, by) => (word >>> by) | (word << (32 - by));
