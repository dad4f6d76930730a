"""litellm as people call it, `openai/NAME` with an api_base, goes through everything once and prints what it saw as JSON."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a list of prices when imported
import litellm

OPTIONS = {
    "model": f"openai/{os.environ['MODEL']}", "api_base": os.environ["BASE_URL"], "api_key": "none", "num_retries": 0,
    "max_retries": 0,
}  # fmt: skip
ASK = {**OPTIONS, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 12, "seed": 3}
WEATHER = json.loads(os.environ["WEATHER"])
found = {}

found["whole"] = litellm.completion(**ASK).choices[0].message.content
chunks = list(litellm.completion(**ASK, stream=True, stream_options={"include_usage": True}))
found["streamed"] = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
found["usage"] = next(chunk.usage.model_dump() for chunk in chunks if getattr(chunk, "usage", None))

asked = [{"role": "user", "content": "How is the weather in Bonn?"}]
options = {**OPTIONS, "tools": [{"type": "function", "function": WEATHER}], "max_tokens": 100, "seed": 3}
forced = {"type": "function", "function": {"name": WEATHER["name"]}}
parts = list(litellm.completion(messages=asked, tool_choice=forced, stream=True, **options))
streamed = litellm.stream_chunk_builder(parts).choices[0].message.tool_calls[0].function
message = litellm.completion(messages=asked, tool_choice=forced, **options).choices[0].message
call = message.tool_calls[0]
found["call"] = [call.function.name, json.loads(call.function.arguments)]
found["streamed_call"] = [streamed.name, json.loads(streamed.arguments)]
result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 25 degrees"}
final = litellm.completion(messages=[*asked, message.model_dump(), result], tool_choice="none", **{**options, "max_tokens": 12})
found["after_call"] = final.choices[0].message.content

form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": json.loads(os.environ["SCHEMA"])}}
rome = [{"role": "user", "content": "Describe Rome."}]
shaped = litellm.completion(messages=rome, response_format=form, max_tokens=200, seed=3, **OPTIONS)
found["shaped"] = json.loads(shaped.choices[0].message.content)

packed = litellm.embedding(input=["one", "two"], encoding_format="base64", **OPTIONS).data
found["packed"] = [item["embedding"] for item in packed]
found["vectors"] = [
    item["embedding"] for item in litellm.embedding(input=["one", "two"], encoding_format="float", **OPTIONS).data
]
found["plain"] = litellm.embedding(input=["two"], encoding_format="float", **OPTIONS).data[0]["embedding"]

errors = {}
for name, change in json.loads(os.environ["MISTAKES"]).items():
    if "model" in change:
        change = {"model": f"openai/{change['model']}"}
    try:
        litellm.completion(**{**ASK, **change})
    except Exception as error:
        errors[name] = [type(error).__name__, getattr(error, "status_code", None)]
found["errors"] = errors

long = litellm.completion(**{**ASK, "max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True})
next(iter(long))
long.completion_stream.close()
print(json.dumps(found))
