// The conversation: send, stream, stop, edit, regenerate.

import { ApiError, events, post } from "./api.js";
import { $, el, number } from "./dom.js";
import { render } from "./markdown.js";
import * as store from "./store.js";
import { welcome } from "./welcome.js";

let conversation = fresh();
let abort = null;
let model = { name: "", context: 0 };

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", changed: Date.now(), messages: [] };
}

export function start(name, context) {
  const known = model.name === name;
  model = { name, context };
  if (!known && !conversation.messages.length) draw();
}

export async function setup() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("input").value);
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send($("input").value);
    }
  });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => show(fresh()));
  $("export").addEventListener("click", exportAll);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  draw();
  await list();
}

const stop = () => abort?.abort();

async function list() {
  const entries = (await store.all()).map((item) => {
    const open = el("button", { className: "quiet", textContent: item.title || "…", title: item.title });
    open.addEventListener("click", () => show(item));
    const forget = el("button", { className: "quiet", textContent: "×", "aria-label": `Delete ${item.title}` });
    forget.addEventListener("click", async () => {
      await store.remove(item.id);
      if (item.id === conversation.id) show(fresh());
      await list();
    });
    return el("li", { className: item.id === conversation.id ? "current" : "" }, open, forget);
  });
  $("conversations").replaceChildren(...entries);
}

function show(chosen) {
  stop();
  conversation = chosen;
  draw();
  list();
  $("input").focus();
}

async function send(text) {
  if (!text.trim() || abort) return;
  $("input").value = "";
  conversation.title ||= text.trim().slice(0, 60);
  conversation.messages.push({ role: "user", content: text });
  await answer();
}

async function answer() {
  const message = { role: "assistant", content: "", reasoning: "" };
  conversation.messages.push(message);
  const controller = (abort = new AbortController());
  busy(true);
  draw();
  const view = $("messages").lastElementChild;
  const began = performance.now();
  try {
    await read(await post("/v1/chat/completions", body(message), controller.signal), message, view, began);
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else if (error instanceof ApiError) message.error = error.message;
    else throw error;
  } finally {
    abort = null;
    busy(false);
    conversation.changed = Date.now();
    draw();
    await store.save(conversation);
    await list();
  }
}

function body(message) {
  const system = $("system-prompt").value.trim();
  const said = conversation.messages
    .filter((item) => item !== message && (item.content || item.role === "user"))
    .map(({ role, content }) => ({ role, content }));
  return {
    model: model.name || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function read(response, message, view, began) {
  let due = false;
  const redraw = () => {
    due = false;
    fill(view, message, true);
  };
  for await (const { comment, data } of events(response)) {
    if (comment?.startsWith("prefill_progress ")) {
      const { done, total } = JSON.parse(comment.slice(17));
      message.progress = `reading the prompt, ${done} of ${total} tokens`;
    }
    if (data) take(data, message, began);
    if (!due) {
      due = true;
      requestAnimationFrame(redraw);
    }
  }
}

function take(chunk, message, began) {
  for (const { delta } of chunk.choices) {
    const thought = delta.reasoning_content ?? "";
    if (!delta.content && !thought) continue;
    const now = performance.now() - began;
    message.first ??= now;
    message.pieces = (message.pieces ?? 0) + 1;
    message.rate = (1000 * (message.pieces - 1)) / (now - message.first);
    message.content += delta.content ?? "";
    message.reasoning += thought;
  }
  if (chunk.timings) message.timings = chunk.timings;
}

// What is on the page

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("messages").setAttribute("aria-busy", String(is));
}

function draw() {
  if (!conversation.messages.length) {
    $("messages").replaceChildren(welcome(model.name, send));
    $("context").hidden = true;
    return;
  }
  $("messages").replaceChildren(...conversation.messages.map((message, index) => view(message, index)));
  $("messages").scrollTop = $("messages").scrollHeight;
  context();
}

function view(message, index) {
  const node = el("article", { className: `message ${message.role}` });
  fill(node, message, Boolean(abort) && index === conversation.messages.length - 1);
  if (!abort) node.append(actions(message, index));
  return node;
}

function fill(node, message, streaming) {
  const log = $("messages");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const content = el("div", { className: "content" });
  content.append(message.role === "user" ? message.content : render(message.content));
  const empty = !streaming && message.role === "assistant" && !message.content && !message.reasoning && !message.error;
  const waiting = streaming && !message.content && !message.reasoning;
  node.replaceChildren(
    ...[
      message.reasoning ? thoughts(message, streaming) : null,
      waiting ? el("p", { className: "muted waiting" }, message.progress ?? "…") : content,
      message.error ? el("p", { className: "error", role: "alert" }, message.error) : null,
      empty && !message.stopped ? el("p", { className: "muted" }, "(an empty answer)") : null,
      message.stopped ? el("p", { className: "muted" }, "stopped") : null,
      message.timings || message.first ? el("p", { className: "stats muted" }, stats(message)) : null,
    ].filter(Boolean),
  );
  if (follows) log.scrollTop = log.scrollHeight;
}

function thoughts(message, streaming) {
  const details = el("details", { className: "reasoning", open: streaming && !message.content });
  details.append(el("summary", {}, "Reasoning"), render(message.reasoning));
  return details;
}

function stats({ first, timings, rate }) {
  const parts = [];
  if (first) parts.push(`first token ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  if (timings) {
    parts.push(`${timings.predicted_n} tokens`, `${timings.predicted_per_second.toFixed(1)} tokens/s`);
    if (timings.cache_n) parts.push(`${timings.cache_n} from the cache`);
  } else if (Number.isFinite(rate)) {
    parts.push(`about ${rate.toFixed(1)} tokens a second`);
  }
  return parts.join(" · ");
}

function context() {
  const timings = conversation.messages.findLast?.((message) => message.timings)?.timings;
  $("context").hidden = !(timings && model.context);
  if ($("context").hidden) return;
  const used = timings.prompt_n + timings.predicted_n;
  $("context").firstElementChild.style.width = `${Math.min(100, (100 * used) / model.context)}%`;
  $("context").lastElementChild.textContent = `${used} of ${model.context} tokens`;
}

function actions(message, index) {
  const bar = el("div", { className: "actions" });
  const add = (label, action) => {
    const button = el("button", { className: "quiet", type: "button", textContent: label });
    button.addEventListener("click", action);
    bar.append(button);
  };
  if (message.role === "user") add("Edit", () => edit(message, index));
  else add(message.error ? "Retry" : "Regenerate", () => rewind(index));
  add("Copy", () => navigator.clipboard?.writeText(message.content));
  return bar;
}

function rewind(index) {
  conversation.messages.length = index;
  answer();
}

function edit(message, index) {
  const area = el("textarea", { value: message.content, rows: 3, "aria-label": "Edit message" });
  const save = el("button", { type: "button", textContent: "Send" });
  const cancel = el("button", { type: "button", className: "quiet", textContent: "Cancel" });
  save.addEventListener("click", () => {
    conversation.messages.length = index;
    send(area.value);
  });
  cancel.addEventListener("click", draw);
  $("messages").children[index].replaceChildren(area, save, cancel);
  area.focus();
}

async function exportAll() {
  const text = JSON.stringify(await store.all(), null, 2);
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: "cake.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}
