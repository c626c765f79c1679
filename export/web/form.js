// What the views share of their forms.

export const by = (id) => document.getElementById(id);

// What goes on, below the result. Readers of the screen hear what came of it, and not each step.
export function tell(text, { going = false } = {}) {
  by("status").setAttribute("aria-busy", going);
  by("status").textContent = text;
}

export const freshSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;

// Sliders show their values; the settings are unfolded where there is room for them.
export function prepare(form) {
  for (const output of form.querySelectorAll("output")) {
    const input = by(output.htmlFor.value);
    const show = () => { output.value = input.value; };
    input.addEventListener("input", show);
    show();
  }
  form.querySelector(".more").open = matchMedia("(min-width: 820px)").matches;
}

export function setRange(id, { min, max, value }) {
  Object.assign(by(id), { min, max });
  by(id).value = value; // last, as it is held between the others
}
