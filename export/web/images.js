// Pictures that are made of noise before the eye, and the way there again.

import { by, freshSeed, prepare, setRange, tell } from "./form.js";
import { paint } from "./pixels.js";
import { inSeconds } from "./units.js";

export function imagesView({ chain, manifest }) {
  const form = by("app").querySelector("form"), blocks = manifest.boundaries.length - 1;
  const picture = manifest.decoding?.picture ?? manifest.image, names = manifest.class_names;
  setRange("steps", { min: blocks, max: Math.max(64, blocks), value: manifest.sampler.steps });
  setRange("n", { min: 1, max: 64, value: names.length ? Math.min(names.length, 16) : 9 });
  by("solver").value = manifest.sampler.solver;
  by("of-classes").hidden = !names.length;
  names.forEach((name, i) => by("label").append(new Option(name, i)));
  prepare(form);
  let frames = []; // of each level, the pixels of each picture

  function make() {
    const wanted = request();
    frames = [];
    layOut(wanted);
    by("path").hidden = true;
    by("save").disabled = true;
    by("command").textContent = command(wanted);
    tell("Making noise ..");
    chain.run("images", wanted, {
      step({ done, total, state }) {
        tell(done < total ? `Noise level ${done} of ${total}` : "Decoding ..", { going: true });
        by("tiles").style.setProperty("--done", done / total);
        if (state) show(frames.push(state) - 1);
      },
      done({ result, seconds }) {
        frames.push(result);
        show(frames.length - 1);
        by("tiles").removeAttribute("aria-busy");
        tell(`${result.length} ${result.length === 1 ? "picture" : "pictures"} in ${inSeconds(seconds)}`);
        by("save").disabled = false;
        by("path").hidden = frames.length < 2;
        setRange("frame", { min: 0, max: frames.length - 1, value: frames.length - 1 });
      },
      failed({ message }) {
        by("tiles").removeAttribute("aria-busy");
        tell(`It went wrong: ${message}`);
      },
    });
  }

  function request() {
    const number = (id) => Number(by(id).value);
    return {
      n: number("n"),
      seed: number("seed"),
      steps: number("steps"),
      heun: by("solver").value === "heun",
      guidance: names.length ? number("guidance") : 1,
      label: names.length && by("label").value !== "" ? number("label") : null,
    };
  }

  function layOut({ n, label }) {
    const tiles = by("tiles");
    tiles.setAttribute("aria-busy", "true");
    tiles.style.setProperty("--done", 0);
    tiles.dataset.many = n > 16 ? "many" : n > 4 ? "some" : "few";
    tiles.replaceChildren(...Array.from({ length: n }, (_, i) => {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas");
      const name = names.length ? names[label ?? i % names.length] : "";
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", name ? `Picture ${i + 1}, class ${name}` : `Picture ${i + 1}`);
      canvas.classList.toggle("small", Math.min(picture.width, picture.height) < 128);
      figure.append(canvas);
      if (name) figure.append(Object.assign(document.createElement("figcaption"), { textContent: name }));
      return figure;
    }));
    for (const canvas of tiles.querySelectorAll("canvas")) Object.assign(canvas, { width: picture.width, height: picture.height });
  }

  function show(frame) {
    by("tiles").querySelectorAll("canvas").forEach((canvas, i) => paint(canvas, frames[frame][i], picture));
  }

  // The grid as `edgeblocks run` writes it: enlarged, with lines between.
  function save() {
    const canvases = [...by("tiles").querySelectorAll("canvas")], columns = Math.ceil(Math.sqrt(canvases.length));
    const factor = Math.max(1, Math.ceil(48 / Math.min(picture.width, picture.height)));
    const [wide, high] = [picture.width * factor, picture.height * factor], line = 2;
    const grid = document.createElement("canvas"), paper = grid.getContext("2d");
    grid.width = columns * (wide + line) + line;
    grid.height = Math.ceil(canvases.length / columns) * (high + line) + line;
    paper.fillStyle = "rgb(224 224 224)";
    paper.fillRect(0, 0, grid.width, grid.height);
    paper.imageSmoothingEnabled = false;
    canvases.forEach((canvas, i) => {
      paper.drawImage(canvas, line + (i % columns) * (wide + line), line + Math.floor(i / columns) * (high + line), wide, high);
    });
    grid.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "pictures.png" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    });
  }

  function command({ n, seed, steps, heun, guidance, label }) {
    const parts = ["edgeblocks run network -o grid.png", `--n ${n} --seed ${seed} --steps ${steps}`];
    if (!heun) parts.push("--solver euler");
    if (names.length) parts.push(`--guidance ${guidance}`);
    if (label !== null) parts.push(`--class ${label}`);
    return parts.join(" ");
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    make();
  });
  by("another").addEventListener("click", () => {
    by("seed").value = freshSeed();
    make();
  });
  by("frame").addEventListener("input", () => show(Number(by("frame").value)));
  by("save").addEventListener("click", save);
  make();
}
