// Conversations in this browser's IndexedDB. Where it is refused (private windows), they live as long as the page.

const NAME = "cake";
const TABLE = "conversations";
let opening = null;
const fallback = new Map();

function open() {
  opening ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return opening;
}

async function run(mode, action) {
  const database = await open();
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const request = action(database.transaction(TABLE, mode).objectStore(TABLE));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function all() {
  const found = (await run("readonly", (table) => table.getAll())) ?? [...fallback.values()];
  return found.sort((a, b) => b.changed - a.changed);
}

export async function save(conversation) {
  fallback.set(conversation.id, conversation);
  await run("readwrite", (table) => table.put(structuredClone(conversation)));
}

export async function remove(id) {
  fallback.delete(id);
  await run("readwrite", (table) => table.delete(id));
}
