"""A client of OpenAI whose calls take response_model=. Without OPENAI_API_KEY a stand-in on this machine answers."""

from __future__ import annotations

import json
import os

import httpx2
from openai import OpenAI
from pydantic import BaseModel, Field

from diptych import llm

SCRIPT: list[object] = []
SAID = iter(['{"name": "Jason", "age": 250}', '{"name": "Jason", "age": 25}'])


class User(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)


def stand_in(request: httpx2.Request) -> httpx2.Response:
    message = {"role": "assistant", "content": next(SAID)}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
    return httpx2.Response(200, json={**body, "asked": json.loads(request.content)["model"]})


def main() -> None:
    if os.environ.get("OPENAI_API_KEY"):
        plain = OpenAI()
    else:
        http = httpx2.Client(transport=httpx2.MockTransport(stand_in))
        plain = OpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=http)
    client = llm.wrap(plain, model="gpt-5-mini")
    client.on("parse:error", lambda error, *, attempt_number: print(f"attempt {attempt_number}: {error}"))
    user, completion = client.chat.completions.create_with_completion(
        response_model=User,
        messages=[{"role": "user", "content": "Jason is 25 years old."}],
        max_retries=2,  # attempts beyond the first
    )
    print(user, completion.id)
    plain.close()


if __name__ == "__main__":
    main()
