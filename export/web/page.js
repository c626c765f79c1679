// The page: it starts the worker, shows how loading goes, and gives the view of what the network makes the word.

import { classesView } from "./classes.js";
import { by } from "./form.js";
import { imagesView } from "./images.js";
import { inMegabytes } from "./units.js";
import { textView } from "./text.js";

const VIEWS = { images: imagesView, classes: classesView, text: textView, continuation: textView };
const TITLES = {
  images: "Pictures out of noise",
  classes: "What is in this picture?",
  text: "Fill in the gaps",
  continuation: "How it goes on",
};
const MAKES = {
  images: "makes pictures",
  classes: "tells the classes of pictures",
  text: "fills gaps in text",
  continuation: "writes on, token by token",
};

function refuse(why) {
  by("refusal").textContent = why;
  by("refusal").hidden = false;
  by("loading").hidden = true;
}

// The chain runs in a worker. It begins as a blob, for one that begins so is held to this page's policy, and can make no
// request to anywhere else either.
class Chain {
  #number = 0;
  #listeners;

  constructor(onLoading, onReady) {
    const script = `import ${JSON.stringify(new URL("./worker.js", import.meta.url).href)};`;
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    this.worker = new Worker(address, { type: "module" });
    this.worker.onerror = (event) => {
      event.preventDefault();
      refuse(`The page's scripts could not be loaded (${event.message ?? "no reason was given"}). Is all of the folder on the server?`);
    };
    this.worker.onmessage = ({ data }) => {
      if (data.kind === "loading") onLoading(data);
      else if (data.kind === "ready") onReady(data);
      else if (!this.#listeners) refuse(data.message);
      else if (data.number === this.#number) this.#listeners[data.kind]?.(data);
    };
    this.worker.postMessage({ number: 0 });
  }

  // Runs a chain of chains.js; one that was running ends. Listeners: step, done, failed.
  run(chain, request, listeners) {
    this.#number += 1;
    this.#listeners = listeners;
    this.worker.postMessage({ number: this.#number, chain, request });
  }
}

function start() {
  const chain = new Chain(
    ({ bytes, total }) => {
      by("bytes").value = bytes / total;
      by("loaded").textContent =
        bytes < total ? `Loading: ${inMegabytes(bytes)} of ${inMegabytes(total)}` : "Starting the network ..";
    },
    ({ manifest, bytes, definition }) => {
      const { task, family } = manifest, blocks = manifest.boundaries.length - 1;
      document.title = by("title").textContent = TITLES[task];
      by("about").textContent =
        `The network (${family}, ${blocks} ${blocks === 1 ? "block" : "blocks"}, ${inMegabytes(bytes)}) ${MAKES[task]} on ` +
        "your machine, in this page. Nothing that you do here is sent anywhere.";
      by("app").append(by(task === "continuation" ? "text" : task).content.cloneNode(true));
      by("loading").hidden = true;
      by("app").hidden = false;
      VIEWS[task]({ chain, manifest, definition });
    },
  );
}

if (!window.refused) start();
