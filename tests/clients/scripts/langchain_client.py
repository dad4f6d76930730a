"""langchain-openai goes through everything once and prints what it saw as JSON."""

import json
import os

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

OPTIONS = {"base_url": os.environ["BASE_URL"], "api_key": "none", "model": os.environ["MODEL"], "max_retries": 0}
WEATHER = json.loads(os.environ["WEATHER"])
found = {}

chat = ChatOpenAI(max_tokens=12, seed=3, stream_usage=True, **OPTIONS)
found["whole"] = chat.invoke("Name a colour.").content
chunks = list(chat.stream("Name a colour."))
found["streamed"] = "".join(chunk.content for chunk in chunks)
usage = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
found["usage"] = {"prompt_tokens": usage["input_tokens"], "completion_tokens": usage["output_tokens"]}

talker = ChatOpenAI(max_tokens=100, seed=3, **OPTIONS)
forced = talker.bind_tools([{"type": "function", "function": WEATHER}], tool_choice=WEATHER["name"])
asked = HumanMessage("How is the weather in Bonn?")
message = forced.invoke([asked])
gathered = None
for chunk in forced.stream([asked]):
    gathered = chunk if gathered is None else gathered + chunk
call = message.tool_calls[0]
found["call"] = [call["name"], call["args"]]
found["streamed_call"] = [gathered.tool_calls[0]["name"], gathered.tool_calls[0]["args"]]
idle = talker.bind_tools([{"type": "function", "function": WEATHER}], tool_choice="none")
found["after_call"] = idle.invoke([asked, message, ToolMessage("sunny, 25 degrees", tool_call_id=call["id"])]).content

schema = {"title": "city", "description": "A city.", **json.loads(os.environ["SCHEMA"])}
writer = ChatOpenAI(max_tokens=200, seed=3, **OPTIONS)
found["shaped"] = writer.with_structured_output(schema, method="json_schema", strict=True).invoke("Describe Rome.")
found["shaped_by_tool"] = writer.with_structured_output(schema, method="function_calling").invoke("Describe Rome.")

embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **OPTIONS)  # sends base64; else it would fetch a tokenizer
found["vectors"] = embeddings.embed_documents(["one", "two"])
found["plain"] = embeddings.embed_query("two")

errors = {}
for name, change in json.loads(os.environ["MISTAKES"]).items():
    try:
        messages = change.pop("messages", "Name a colour.")
        ChatOpenAI(**{**OPTIONS, "max_tokens": 12, **change}).invoke(messages)
    except Exception as error:
        errors[name] = [type(error).__name__, getattr(error, "status_code", None)]
found["errors"] = errors

long = ChatOpenAI(**OPTIONS, max_tokens=1500, extra_body={"ignore_eos": True}).stream("Name a colour.")
next(long)
long.close()
print(json.dumps(found))
