// Markdown to DOM nodes. What a model writes is hostile until shown otherwise: text only ever becomes text nodes, links
// keep http, https and mailto, and images become links, because fetching one would tell a stranger that it was seen.

import { el } from "./dom.js";

const SAFE_LINK = /^(https?:|mailto:)/i;
const INLINE = new RegExp(
  [
    "(`+)([\\s\\S]*?[^`])\\1(?!`)", // 1, 2: code
    "\\*\\*([^*\\n][\\s\\S]*?)\\*\\*", // 3: bold
    "\\*([^*\\s][^*\\n]*?)\\*", // 4: italic
    "~~([^~\\n]+)~~", // 5: struck
    "!?\\[([^\\]\\n]*)\\]\\(([^()\\s]+)(?:\\s+\"[^\"]*\")?\\)", // 6, 7: link or image
    "(https?://[^\\s<>()]+[^\\s<>().,;:!?])", // 8: bare link
  ].join("|"),
  "g",
);

export function inline(text, depth = 0) {
  const nodes = [];
  let last = 0;
  if (depth > 8) return [document.createTextNode(text)];
  for (const match of text.matchAll(INLINE)) {
    nodes.push(document.createTextNode(text.slice(last, match.index)), span(match, depth));
    last = match.index + match[0].length;
  }
  nodes.push(document.createTextNode(text.slice(last)));
  return nodes;
}

function span(match, depth) {
  if (match[2] !== undefined) return el("code", {}, match[2].trim());
  if (match[3] !== undefined) return el("strong", {}, ...inline(match[3], depth + 1));
  if (match[4] !== undefined) return el("em", {}, ...inline(match[4], depth + 1));
  if (match[5] !== undefined) return el("del", {}, ...inline(match[5], depth + 1));
  const target = match[7] ?? match[8];
  if (!SAFE_LINK.test(target)) return document.createTextNode(match[0]);
  return el("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, match[6] || target);
}

export function render(text) {
  const fragment = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  let at = 0;
  while (at < lines.length) {
    const block = BLOCKS.find(([test]) => test(lines, at));
    const [node, next] = block[1](lines, at);
    if (node) fragment.append(node);
    at = next;
  }
  return fragment;
}

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const LIST = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*$/;
const ROW = /^\s*\|(.+)\|\s*$/;
const ROW_RULE = /^\s*\|?[\s:|-]*-[\s:|-]*\|?\s*$/;

const isTable = (lines, at) => ROW.test(lines[at]) && ROW_RULE.test(lines[at + 1] ?? "");

// [does a block of this kind start here, its node and the line after it]; the last one takes anything.
const BLOCKS = [
  [(lines, at) => !lines[at].trim(), (_lines, at) => [null, at + 1]],
  [(lines, at) => FENCE.test(lines[at]), fence],
  [(lines, at) => HEADING.test(lines[at]), heading],
  [(lines, at) => RULE.test(lines[at]), (_lines, at) => [el("hr"), at + 1]],
  [(lines, at) => /^\s{0,3}>/.test(lines[at]), quote],
  [(lines, at) => LIST.test(lines[at]), list],
  [isTable, table],
  [() => true, paragraph],
];

const startsBlock = (lines, at) => BLOCKS.slice(0, -1).some(([test]) => test(lines, at));

function fence(lines, at) {
  const [, mark, language] = FENCE.exec(lines[at]);
  const body = [];
  let next = at + 1;
  while (next < lines.length && !lines[next].trim().startsWith(mark)) body.push(lines[next++]);
  const copy = el("button", { className: "copy quiet", type: "button", textContent: "Copy" });
  copy.addEventListener("click", () => navigator.clipboard?.writeText(body.join("\n")));
  const label = el("span", { className: "language" }, language);
  return [el("div", { className: "code" }, label, copy, el("pre", {}, el("code", {}, body.join("\n")))), next + 1];
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]);
  return [el(`h${Math.min(marks.length + 2, 6)}`, {}, ...inline(text)), at + 1];
}

function quote(lines, at) {
  const body = [];
  let next = at;
  while (next < lines.length && /^\s{0,3}>/.test(lines[next])) body.push(lines[next++].replace(/^\s{0,3}> ?/, ""));
  const deep = body.filter((line) => /^(\s{0,3}>){6}/.test(line)).length;
  return [el("blockquote", {}, deep ? body.join("\n") : render(body.join("\n"))), next];
}

function list(lines, at) {
  const [, indent, marker] = LIST.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const node = el(ordered ? "ol" : "ul", ordered ? { start: parseInt(marker, 10) } : {});
  let next = at;
  while (next < lines.length) {
    const match = LIST.exec(lines[next]);
    if (!match || match[1].length < indent.length || /\d/.test(match[2]) !== ordered) break;
    if (match[1].length > indent.length + 1 && node.lastChild) {
      const [inner, after] = list(lines, next);
      node.lastChild.append(inner);
      next = after;
    } else {
      node.append(el("li", {}, ...inline(match[3])));
      next += 1;
    }
  }
  return [node, next];
}

function table(lines, at) {
  const cells = (line) => ROW.exec(line)[1].split("|").map((cell) => cell.trim());
  const head = el("tr", {}, ...cells(lines[at]).map((cell) => el("th", {}, ...inline(cell))));
  const body = el("tbody");
  let next = at + 2;
  while (next < lines.length && ROW.test(lines[next])) {
    body.append(el("tr", {}, ...cells(lines[next++]).map((cell) => el("td", {}, ...inline(cell)))));
  }
  return [el("table", {}, el("thead", {}, head), body), next];
}

function paragraph(lines, at) {
  const body = [lines[at]];
  let next = at + 1;
  while (next < lines.length && !startsBlock(lines, next)) body.push(lines[next++]);
  const nodes = body.flatMap((line, index) => [...(index ? [el("br")] : []), ...inline(line)]);
  return [el("p", {}, ...nodes), next];
}
