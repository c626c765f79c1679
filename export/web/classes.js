// A picture that is drawn, chosen, dropped or pasted, and its likeliest classes.

import { by, prepare, setRange, tell } from "./form.js";
import { fitted, paint } from "./pixels.js";
import { inSeconds } from "./units.js";

const MOST_SHOWN = 5;
const MOST_SIDE = 4096;

export function classesView({ chain, manifest }) {
  const form = by("app").querySelector("form"), blocks = manifest.boundaries.length - 1, { image } = manifest;
  setRange("steps", { min: blocks, max: Math.max(32, blocks), value: manifest.sampler.steps });
  setRange("noises", { min: 1, max: Math.max(32, manifest.sampler.noises), value: manifest.sampler.noises });
  prepare(form);
  let pixels = null;

  function classify() {
    if (!pixels) return;
    paint(by("seen"), pixels, image);
    by("seen").classList.toggle("small", Math.min(image.width, image.height) < 128);
    const number = (id) => Number(by(id).value);
    const request = { pixels, seed: number("seed"), steps: number("steps"), noises: number("noises") };
    chain.run("classes", request, {
      step: ({ done, total }) => tell(`Noise level ${done} of ${total}`, { going: true }),
      done({ result, seconds }) {
        show(Array.from(result));
        tell(`${by("bars").querySelector("span").textContent}, in ${inSeconds(seconds)}`);
      },
      failed: ({ message }) => tell(`It went wrong: ${message}`),
    });
  }

  function show(probabilities) {
    const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
    by("bars").replaceChildren(...order.slice(0, MOST_SHOWN).map((i) => {
      const item = document.createElement("li");
      const [name, share, bar] = ["span", "b", "i"].map((kind) => document.createElement(kind));
      name.textContent = manifest.class_names[i];
      share.textContent = `${(100 * probabilities[i]).toFixed(1)} %`;
      bar.style.width = `${100 * probabilities[i]}%`;
      item.append(name, share, bar);
      return item;
    }));
  }

  function take(rgba) {
    try {
      pixels = fitted(rgba, image);
      classify();
    } catch (error) {
      tell(error.message);
    }
  }

  async function open(file) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    } catch {
      tell(`${file.name || "This"} is no picture that this browser can read.`);
      return;
    }
    // A canvas of any size is not to be had; what is larger is made smaller first.
    const shrink = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
    const paper = new OffscreenCanvas(width, height).getContext("2d");
    paper.drawImage(bitmap, 0, 0, width, height);
    bitmap.close();
    take(paper.getImageData(0, 0, width, height));
  }

  // Light ink on a dark ground, or the other way round, as most of the training's pictures are.
  const pad = by("pad"), ink = pad.getContext("2d", { willReadFrequently: true }), dark = manifest.mean < 0.5;
  let last = null;

  function clear() {
    ink.fillStyle = dark ? "black" : "white";
    ink.fillRect(0, 0, pad.width, pad.height);
  }

  function draw(event) {
    const box = pad.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * (pad.width / box.width), (event.clientY - box.top) * (pad.height / box.height)];
    Object.assign(ink, { strokeStyle: dark ? "white" : "black", lineWidth: pad.width / 9, lineCap: "round", lineJoin: "round" });
    ink.beginPath();
    ink.moveTo(...(last ?? [x, y]));
    ink.lineTo(x, y);
    ink.stroke();
    last = [x, y];
  }

  pad.addEventListener("pointerdown", (event) => {
    pad.setPointerCapture(event.pointerId);
    last = null;
    draw(event);
  });
  pad.addEventListener("pointermove", (event) => {
    if (event.buttons) draw(event);
  });
  pad.addEventListener("pointerup", () => take(ink.getImageData(0, 0, pad.width, pad.height)));
  by("clear").addEventListener("click", clear);
  by("file").addEventListener("change", () => by("file").files[0] && open(by("file").files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files[0]) open(event.clipboardData.files[0]);
  });
  form.addEventListener("change", (event) => event.target.id !== "file" && classify());
  form.addEventListener("submit", (event) => event.preventDefault());
  clear();
}
