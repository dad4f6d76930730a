// What an empty conversation shows: that it is private, and something to begin with.

import { el } from "./dom.js";

const IDEAS = ["Why is the sky blue?", "Write a haiku about cake.", "Explain what a neural network is to a child."];

export function welcome(name, ask) {
  const ideas = IDEAS.map((text) => {
    const button = el("button", { type: "button", className: "idea", textContent: text });
    button.addEventListener("click", () => ask(text));
    return button;
  });
  return el(
    "div",
    { className: "welcome" },
    el("h1", {}, name ? `Ask ${name} anything` : "Ask anything"),
    el("p", { className: "muted" }, "What you write stays in this browser and on your machines."),
    el("div", { className: "ideas" }, ...ideas),
  );
}
