// Calls to the server. Every request carries the API key, if there is one; every failure is an ApiError with a message
// that can be shown.

export class ApiError extends Error {
  constructor(message, code, status) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

let key = sessionStorage.getItem("cake-key") || "";

export function setKey(value) {
  key = value.trim();
  sessionStorage.setItem("cake-key", key);
}

export const getKey = () => key;

const headers = (more) => (key ? { ...more, authorization: `Bearer ${key}` } : more);

export async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?", "unreachable", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error || {};
  return new ApiError(error.message || `HTTP ${response.status}`, error.code, response.status);
}

export const get = async (path) => (await call(path)).json();

export const post = (path, body, signal) =>
  call(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });

// Yields {event, data} for events and {comment} for comments. An error inside the stream is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection was lost.", "disconnected", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  let event = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith(":")) return { comment: line.slice(1).trim() };
    if (line.startsWith("event: ")) event = line.slice(7);
    if (line.startsWith("data: ")) data += line.slice(6);
  }
  if (data === "[DONE]") return { event: "done", data: null };
  const value = JSON.parse(data);
  if (value.error) throw new ApiError(value.error.message, value.error.code, 200);
  return { event, data: value };
}
