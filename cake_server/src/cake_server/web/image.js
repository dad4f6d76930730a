// Images: paint, watch the steps and previews, keep the seed, start from an image.

import { ApiError, call, events, post } from "./api.js";
import { $, el, number } from "./dom.js";

let abort = null;
let model = "";

export function start(name) {
  model = name;
}

export function setup() {
  $("painter").addEventListener("submit", (event) => {
    event.preventDefault();
    paint();
  });
  $("image-stop").addEventListener("click", () => abort?.abort());
  const drop = $("painter");
  drop.addEventListener("dragover", (event) => event.preventDefault());
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) $("image-file").files = event.dataTransfer.files;
    begun();
  });
  $("image-file").addEventListener("change", begun);
  begun();
}

// How far from an image is only a question where there is one.
function begun() {
  $("strength-label").hidden = !$("image-file").files.length;
}

function fields() {
  return {
    model: model || undefined,
    prompt: $("image-prompt").value,
    negative_prompt: $("negative-prompt").value || undefined,
    size: $("image-size").value || undefined,
    steps: number("image-steps"),
    guidance_scale: number("image-guidance"),
    seed: number("image-seed"),
    n: number("image-count"),
    stream: true,
    partial_images: 3,
    progress: true,
  };
}

function request(signal) {
  const file = $("image-file").files[0];
  if (!file) return post("/v1/images/generations", fields(), signal);
  const form = new FormData();
  const given = { ...fields(), strength: number("image-strength") };
  for (const [name, value] of Object.entries(given)) if (value !== undefined) form.append(name, value);
  form.append("image", file);
  return call("/v1/images/edits", { method: "POST", body: form, signal });
}

async function paint() {
  if (abort) return;
  abort = new AbortController();
  busy(true);
  status("waiting");
  const pictures = new Map();
  try {
    for await (const { data } of events(await request(abort.signal))) if (data) take(data, pictures);
    status("");
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ApiError)) throw error;
    status(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
    for (const card of pictures.values()) if (!card.done) card.node.remove();
  } finally {
    abort = null;
    busy(false);
  }
}

function take(data, pictures) {
  if (data.type === "image.progress") {
    $("image-progress").value = data.step / data.steps;
    status(`image ${data.image + 1}, step ${data.step} of ${data.steps}, ${(data.eta_ms / 1000).toFixed(1)} s to go`);
  } else if (data.b64_json) {
    const card = pictures.get(data.image) ?? newCard(data.image, pictures);
    card.image.src = `data:image/${data.output_format};base64,${data.b64_json}`;
    if (data.type.endsWith(".completed")) finish(card, data);
  }
}

function newCard(index, pictures) {
  const image = el("img", { alt: $("image-prompt").value, className: "partial" });
  const card = { image, node: el("figure", {}, image), done: false };
  pictures.set(index, card);
  $("gallery").prepend(card.node);
  return card;
}

function finish(card, data) {
  card.done = true;
  card.image.classList.remove("partial");
  const again = el("button", { type: "button", className: "quiet", textContent: `Seed ${data.seed}`, title: "Use this seed" });
  again.addEventListener("click", () => ($("image-seed").value = data.seed));
  const file = el("a", { href: card.image.src, download: `cake-${data.seed}.${data.output_format}` }, "Save");
  card.node.append(el("figcaption", {}, again, file, el("span", { className: "muted" }, data.size)));
}

function busy(is) {
  $("paint").disabled = is;
  $("image-stop").hidden = !is;
  $("image-progress").hidden = !is;
  $("image-progress").value = 0;
}

function status(text, failed = false) {
  $("image-status").textContent = text;
  $("image-status").className = failed ? "error" : "muted";
}
