// Text that goes on after a beginning, or whose gaps are filled.

import { by, freshSeed, prepare, setRange, tell } from "./form.js";
import { GAP, tokenizer } from "./tokens.js";
import { inSeconds } from "./units.js";

export function textView({ chain, manifest, definition }) {
  const form = by("app").querySelector("form"), { length, sampler, vocabulary } = manifest;
  const blocks = manifest.boundaries.length - 1, goesOn = manifest.task === "continuation";
  const words = tokenizer(manifest.tokenizer, definition);
  setRange("length", { min: 1, max: length, value: length });
  setRange("temperature", { min: 0, max: 2, value: sampler.temperature });
  setRange("share", { min: 0.05, max: 1, value: sampler.top_p ?? 1 });
  setRange("steps", { min: blocks, max: Math.max(goesOn ? 32 : 256, sampler.steps), value: sampler.steps });
  by("of-length").hidden = by("of-share").hidden = !goesOn;
  by("steps-is").textContent = goesOn ? "Noise levels a token" : "Steps";
  by("go").textContent = goesOn ? "Write on" : "Fill the gaps";
  by("given-is").textContent = goesOn ? "Beginning" : "Text with gaps: _ for each missing token";
  by("given").value = goesOn ? "call me " : "the ____ was ____ and the sea ";
  prepare(form);

  // Tokens of what was written, with the id `vocabulary` at the gaps.
  function tokensOf(text) {
    return text.split(GAP).filter(Boolean).flatMap((part) => (part === "_" || part === "[MASK]" ? [vocabulary] : words.encode(part)));
  }

  function problem(text, tokens) {
    const plain = goesOn ? text : text.replaceAll(new RegExp(GAP, "g"), "");
    if (plain.trim() && !words.decode(words.encode(plain)).trim()) return "The network knows none of these characters.";
    if (goesOn && tokens.length >= Number(by("length").value)) {
      return `The beginning has ${tokens.length} tokens, and the text is to have ${by("length").value}: shorten it, or ask for more.`;
    }
    if (!goesOn && tokens.length > length) return `The text has ${tokens.length} tokens, and ${length} are the most.`;
    if (!goesOn && !tokens.includes(vocabulary)) return "There is no gap: write _ for each missing token.";
    return null;
  }

  function go() {
    const given = by("given").value, tokens = goesOn ? words.encode(given) : tokensOf(given);
    const number = (id) => Number(by(id).value);
    const why = problem(given, tokens);
    tell(why ?? "Beginning ..");
    if (why) return;
    const common = { seed: number("seed"), steps: number("steps"), temperature: number("temperature") };
    const request = goesOn
      ? { ...common, prompt: tokens, length: number("length"), topP: number("share") }
      : { ...common, tokens };
    by("command").textContent = command(given, request);
    by("written").hidden = false;
    show(tokens, tokens);
    chain.run(goesOn ? "write" : "fill", request, {
      step({ done, total, state }) {
        tell(`${goesOn ? "Token" : "Step"} ${done} of ${total}`, { going: true });
        show(state, tokens);
      },
      done({ result, seconds }) {
        show(result, tokens);
        tell(`Written in ${inSeconds(seconds)}`);
      },
      failed: ({ message }) => tell(`It went wrong: ${message}`),
    });
  }

  // What was given as it is, what the network wrote in colour.
  function show(tokens, given) {
    const shown = goesOn ? tokens : tokens.slice(0, given.length), parts = [];
    for (let from = 0; from < shown.length; ) {
      const own = (i) => i < given.length && given[i] !== vocabulary, kind = own(from);
      let to = from + 1;
      while (to < shown.length && own(to) === kind) to++;
      const piece = shown.slice(from, to).map((token) => (token === vocabulary ? null : token));
      // A gap is shown as such until it is filled; letters of several bytes stay together.
      const text = piece.includes(null) ? piece.map((token) => (token === null ? "_" : words.decode([token]))).join("") : words.decode(piece);
      parts.push(kind ? text : Object.assign(document.createElement("ins"), { textContent: text }));
      from = to;
    }
    by("written").replaceChildren(...parts);
  }

  function command(given, { seed, steps, temperature, topP, length: tokens }) {
    const text = `'${given.replaceAll("'", `'\\''`)}'`;
    const parts = ["edgeblocks run network --n 1", `${goesOn ? "--prompt" : "--fill"} ${text} --seed ${seed}`];
    parts.push(`--steps ${steps} --temperature ${temperature}`);
    if (goesOn) parts.push(`--top-p ${topP} --length ${tokens}`);
    return parts.join(" ");
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go();
  });
  by("another").addEventListener("click", () => {
    by("seed").value = freshSeed();
    go();
  });
}
