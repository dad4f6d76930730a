// Views, settings, and the state of the server in the corner.

import { getKey, setKey } from "./api.js";
import * as chat from "./chat.js";
import * as cluster from "./cluster.js";
import { $ } from "./dom.js";
import * as image from "./image.js";

const KEPT = ["system-prompt", "temperature", "top-p", "max-tokens", "seed"];
const VIEWS = ["chat", "image", "cluster"];
let chosen = location.hash.slice(1);

function open(view) {
  for (const name of VIEWS) {
    $(`view-${name}`).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
  }
}

function choose(view) {
  chosen = view;
  history.replaceState(null, "", `#${view}`);
  open(view);
}

// The model decides which of the two makers is there; the first thing it is known, its own view opens.
function changed(state, error) {
  const badge = $("health");
  badge.textContent = error ? "offline" : state.status;
  badge.title = error ? error.message : state.detail;
  badge.className = `badge ${badge.textContent}`;
  if (error?.status === 401) {
    badge.textContent = "key needed";
    $("settings").hidden = false;
  }
  if (!state) return;
  const image_model = state.model_type === "image";
  $("model").textContent = state.model ? `${state.model} · ${state.nodes.length} node${state.nodes.length === 1 ? "" : "s"}` : "";
  $("tab-chat").hidden = image_model;
  $("tab-image").hidden = state.model_type !== "image";
  chat.start(state.model, state.context_length);
  image.start(state.model);
  if (!state.model_type) return open("cluster");
  const home = image_model ? "image" : "chat";
  open(VIEWS.includes(chosen) && !$(`tab-${chosen}`).hidden ? chosen : home);
}

function settings() {
  $("settings-button").addEventListener("click", () => {
    $("settings").hidden = !$("settings").hidden;
    $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
  });
  $("api-key").value = getKey();
  $("api-key").addEventListener("change", () => setKey($("api-key").value));
  for (const id of KEPT) {
    $(id).value = localStorage.getItem(`cake-${id}`) ?? "";
    $(id).addEventListener("change", () => localStorage.setItem(`cake-${id}`, $(id).value));
  }
}

function tabs() {
  const buttons = VIEWS.map((name) => $(`tab-${name}`));
  for (const button of buttons) {
    button.addEventListener("click", () => choose(button.dataset.view));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const shown = buttons.filter((other) => !other.hidden);
      shown[(shown.indexOf(button) + step + shown.length) % shown.length].focus();
    });
  }
  $("ribbon").addEventListener("click", () => choose("cluster"));
}

settings();
tabs();
open("chat");
chat.setup();
image.setup();
cluster.setup(changed);
