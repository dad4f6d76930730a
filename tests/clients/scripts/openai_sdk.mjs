// OpenAI's own SDK for Node goes through everything once and prints what it saw as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "none", maxRetries: 0 });
const model = process.env.MODEL;
const ask = { model, messages: [{ role: "user", content: "Name a colour." }], max_tokens: 12, seed: 3 };
const weather = JSON.parse(process.env.WEATHER);
const found = {};

found.whole = (await client.chat.completions.create(ask)).choices[0].message.content;
found.streamed = "";
for await (const chunk of await client.chat.completions.create({
  ...ask, stream: true, stream_options: { include_usage: true },
})) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  found.usage = chunk.usage ?? found.usage;
}

const asked = [{ role: "user", content: "How is the weather in Bonn?" }];
const options = { model, tools: [{ type: "function", function: weather }], max_tokens: 100, seed: 3 };
const forced = { type: "function", function: { name: weather.name } };
const runner = client.chat.completions.stream({ ...options, messages: asked, tool_choice: forced });
const streamed = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function;
found.streamed_call = [streamed.name, JSON.parse(streamed.arguments)];
const { message } = (await client.chat.completions.create({ ...options, messages: asked, tool_choice: forced })).choices[0];
const call = message.tool_calls[0];
found.call = [call.function.name, JSON.parse(call.function.arguments)];
const result = { role: "tool", tool_call_id: call.id, content: "sunny, 25 degrees" };
const final = await client.chat.completions.create({ ...options, messages: [...asked, message, result], tool_choice: "none" });
found.after_call = final.choices[0].message.content;

const form = { type: "json_schema", json_schema: { name: "city", strict: true, schema: JSON.parse(process.env.SCHEMA) } };
const shaped = await client.chat.completions.create({
  model, messages: [{ role: "user", content: "Describe Rome." }], response_format: form, max_tokens: 200, seed: 3,
});
found.shaped = JSON.parse(shaped.choices[0].message.content);

const packed = await client.embeddings.create({ model, input: ["one", "two"] });
const plain = await client.embeddings.create({ model, input: "two", encoding_format: "float" });
found.vectors = packed.data.map((item) => item.embedding);
found.plain = plain.data[0].embedding;

found.errors = {};
for (const [name, change] of Object.entries(JSON.parse(process.env.MISTAKES))) {
  try {
    await client.chat.completions.create({ ...ask, ...change });
  } catch (error) {
    found.errors[name] = [error.constructor.name, error.status, error.param, error.code];
  }
}

const long = await client.chat.completions.create({ ...ask, max_tokens: 1500, ignore_eos: true, stream: true });
for await (const _ of long) long.controller.abort();
console.log(JSON.stringify(found));
