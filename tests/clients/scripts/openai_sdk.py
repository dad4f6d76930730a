"""OpenAI's own SDK goes through everything once and prints what it saw as JSON."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0)
MODEL = os.environ["MODEL"]
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12, "seed": 3}
WEATHER = json.loads(os.environ["WEATHER"])
TOOLS = [{"type": "function", "function": WEATHER}]
FORCED = {"type": "function", "function": {"name": WEATHER["name"]}}
found = {}

found["whole"] = client.chat.completions.create(**ASK).choices[0].message.content
chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
found["streamed"] = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
found["usage"] = chunks[-1].usage.model_dump()

asked = [{"role": "user", "content": "How is the weather in Bonn?"}]
options = {"model": MODEL, "tools": TOOLS, "max_tokens": 100, "seed": 3}
with client.chat.completions.stream(messages=asked, tool_choice=FORCED, **options) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls[0].function
message = client.chat.completions.create(messages=asked, tool_choice=FORCED, **options).choices[0].message
call = message.tool_calls[0]
found["call"] = [call.function.name, json.loads(call.function.arguments)]
found["streamed_call"] = [streamed.name, json.loads(streamed.arguments)]
result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"}
final = client.chat.completions.create(messages=[*asked, message, result], tool_choice="none", **{**options, "max_tokens": 12})
found["after_call"] = final.choices[0].message.content

form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": json.loads(os.environ["SCHEMA"])}}
answer = client.chat.completions.create(
    model=MODEL, messages=[{"role": "user", "content": "Describe Rome."}], response_format=form, max_tokens=200, seed=3
)
found["shaped"] = json.loads(answer.choices[0].message.content)

packed = client.embeddings.create(model=MODEL, input=["one", "two"]).data  # asks for base64 by itself
plain = client.embeddings.create(model=MODEL, input="two", encoding_format="float").data[0].embedding
found["vectors"] = [item.embedding for item in packed]
found["plain"] = plain

errors = {}
for name, change in json.loads(os.environ["MISTAKES"]).items():
    try:
        client.chat.completions.create(**{**ASK, **change})
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.status_code, error.param, error.code]
found["errors"] = errors

long = client.chat.completions.create(**{**ASK, "max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True})
next(iter(long))
long.close()
print(json.dumps(found))
