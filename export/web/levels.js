// Noise levels and the blocks that own them, as edgeblocks/diffusion/noise.py makes them.

// The block that owns a noise level: block b owns [boundaries[b + 1], boundaries[b]).
export function blockOf(boundaries, sigma) {
  return boundaries.slice(1, -1).filter((boundary) => sigma < boundary).length;
}

// Levels of a sampler, descending: those of EDM, evenly spaced in sigma^(1/rho), but that none lies on a boundary and that
// every block has at least one. Source: Karras et al. 2022, arXiv 2206.00364, equation 5.
export function samplerLevels(boundaries, steps, rho = 7) {
  const highest = boundaries[0], lowest = boundaries.at(-1), blocks = boundaries.length - 1;
  const top = highest ** (1 / rho), bottom = lowest ** (1 / rho);
  const levels = Array.from({ length: steps }, (_, i) => {
    if (i === 0) return highest;
    if (i === steps - 1) return lowest;
    return Math.min(Math.max((top + (i / (steps - 1)) * (bottom - top)) ** rho, lowest), highest);
  });
  const byBlock = Array.from({ length: blocks }, (_, b) => levels.filter((level) => blockOf(boundaries, level) === b));
  const counts = byBlock.map((own) => own.length);
  const respaced = new Set();
  byBlock.forEach((own, b) => {
    if (own.some((level) => boundaries.slice(1, -1).some((boundary) => close(level, boundary)))) respaced.add(b);
  });
  while (counts.includes(0)) {
    const taker = counts.indexOf(0), giver = counts.indexOf(Math.max(...counts));
    counts[taker] += 1;
    counts[giver] -= 1;
    respaced.add(taker).add(giver);
  }
  for (const block of respaced) byBlock[block] = levelsInside(boundaries, block, counts[block], rho);
  return byBlock.flat();
}

// Intervals [from, to] of time in which text is unmasked; none crosses a boundary.
export function unmaskingSteps(boundaries, steps) {
  const blocks = boundaries.length - 1, intervals = [];
  for (let block = 0; block < blocks; block++) {
    const high = boundaries[block], low = boundaries[block + 1];
    const count = Math.floor(steps / blocks) + (block < steps % blocks ? 1 : 0);
    const ends = Array.from({ length: count + 1 }, (_, i) => (i === count ? low : high + (i / count) * (low - high)));
    for (let i = 0; i < count; i++) intervals.push([ends[i], ends[i + 1]]);
  }
  return intervals;
}

function close(a, b) {
  return Math.abs(a - b) <= 1e-5 * Math.max(Math.abs(a), Math.abs(b));
}

function levelsInside(boundaries, block, count, rho) {
  const high = boundaries[block] ** (1 / rho), low = boundaries[block + 1] ** (1 / rho);
  const first = block === 0, last = block === boundaries.length - 2;
  const parts = count - 1 + (first ? 0 : 0.5) + (last ? 0 : 0.5);
  const gap = parts ? (high - low) / parts : 0;
  const start = first ? high : high - gap / 2;
  const levels = Array.from({ length: count }, (_, i) => (start - i * gap) ** rho);
  if (first) levels[0] = boundaries[0];
  else if (last) levels[levels.length - 1] = boundaries.at(-1);
  return levels;
}
