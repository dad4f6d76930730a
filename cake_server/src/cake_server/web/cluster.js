// The cluster as it is now: a strip of layers, a card a node, and what has changed since the page was opened.

import { call, events } from "./api.js";
import { $, bytes, el } from "./dom.js";

const COLOURS = 8;
const RETRY = 2000;
let before = null;
let onChange = () => {};

export function setup(changed) {
  onChange = changed;
  watch();
}

async function watch() {
  for (;;) {
    try {
      const response = await call("/api/v1/cluster/events");
      for await (const { data } of events(response)) if (data) update(data);
    } catch (error) {
      onChange(null, error);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

function update(cluster) {
  draw(cluster);
  log(cluster);
  before = cluster;
  onChange(cluster, null);
}

const colour = (cluster, name) => `c${cluster.nodes.findIndex((node) => node.name === name) % COLOURS}`;

function draw(cluster) {
  const total = cluster.spans.reduce((sum, span) => sum + span.nbytes, 0) || 1;
  const pieces = cluster.spans.map((span) => {
    const piece = el("div", { className: colour(cluster, span.nodes[0]), title: `${span.layers} on ${span.nodes.join(", ")}` });
    const down = span.nodes.every((name) => cluster.nodes.find((node) => node.name === name)?.state === "down");
    if (down) piece.classList.add("down");
    piece.style.flexGrow = Math.max(span.nbytes / total, 0.02);
    piece.append(el("b", {}, span.nodes.join(", ")), el("span", {}, span.layers), el("span", {}, bytes(span.nbytes)));
    return piece;
  });
  $("strip").replaceChildren(...pieces);
  ribbon(pieces);
  $("nodes").replaceChildren(...cluster.nodes.map((node) => card(cluster, node)), ...loading(cluster));
  const entries = Object.entries(cluster.engine).concat([["requests", cluster.requests]]);
  $("engine").replaceChildren(...entries.flatMap(([name, value]) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, value)]));
}

// The strip once more, thin, under the header of every view.
function ribbon(pieces) {
  const bands = pieces.map((piece) => {
    const band = el("span", { className: piece.className, title: piece.title });
    band.style.flexGrow = piece.style.flexGrow;
    return band;
  });
  $("ribbon").replaceChildren(...bands);
}

function card(cluster, node) {
  const rows = [
    ["state", node.state],
    ["address", node.address],
    ["layers", node.layers.join(", ") || "none"],
    ["weights", bytes(node.nbytes)],
    ...node.memory.map((memory) => ["memory", describe(memory)]),
    ...traffic(node),
    ...Object.entries(node.platform).filter(([, value]) => ["string", "number"].includes(typeof value)),
    ["error", node.error],
  ].filter(([, value]) => value !== "");
  const list = el("dl", {}, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]));
  return el("article", { className: `node ${node.state}` }, el("h3", { className: colour(cluster, node.name) }, node.name), list);
}

function describe(memory) {
  const kv = memory.kv_tokens ? `, ${memory.kv_tokens - memory.kv_tokens_free} of ${memory.kv_tokens} KV tokens` : "";
  return `${memory.device} ${memory.dtype}, ${bytes(memory.weights)}${kv}`;
}

function traffic(node) {
  if (node.traffic.bytes_sent === undefined) return [];
  const old = before?.nodes.find((other) => other.name === node.name)?.traffic ?? {};
  const rate = (name) => `${bytes(node.traffic[name])} (+${bytes(Math.max(0, node.traffic[name] - (old[name] ?? 0)))})`;
  return [["sent", rate("bytes_sent")], ["received", rate("bytes_received")]];
}

function loading(cluster) {
  const parts = Object.entries(cluster.loading).map(([name, [done, total]]) => {
    const bar = el("progress", { max: total || 1, value: done });
    return el("article", { className: "node" }, el("h3", {}, name), bar, el("p", {}, `${bytes(done)} of ${bytes(total)}`));
  });
  return cluster.detail ? [el("p", { className: "error" }, cluster.detail), ...parts] : parts;
}

function log(cluster) {
  const old = new Map(before?.nodes.map((node) => [node.name, node.state]) ?? []);
  for (const node of cluster.nodes) {
    if (old.has(node.name) && old.get(node.name) !== node.state) say(`${node.name} is ${node.state}. ${node.error}`);
  }
  if (before && before.status !== cluster.status) say(`the cluster is ${cluster.status}. ${cluster.detail}`);
}

function say(text) {
  $("events").prepend(el("li", {}, el("time", {}, new Date().toLocaleTimeString()), ` ${text}`));
  while ($("events").children.length > 100) $("events").lastElementChild.remove();
}
