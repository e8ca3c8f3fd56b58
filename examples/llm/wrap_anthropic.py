"""A client of Anthropic whose calls take response_model=. Without ANTHROPIC_API_KEY a stand-in answers."""

from __future__ import annotations

import os

import httpx2
from pydantic import BaseModel

from diptych import llm

SCRIPT: list[object] = []


class User(BaseModel):
    name: str
    age: int


def stand_in(request: httpx2.Request) -> httpx2.Response:
    content = [{"type": "text", "text": '{"name": "Jason", "age": 25}'}]
    body = {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": content}
    usage = {"input_tokens": 1, "output_tokens": 1}
    return httpx2.Response(200, json={**body, "stop_reason": "end_turn", "stop_sequence": None, "usage": usage})


def main() -> None:
    try:
        from anthropic import Anthropic
    except ImportError:
        print("this example needs Anthropic's client: pip install anthropic")
        return
    if os.environ.get("ANTHROPIC_API_KEY"):
        plain = Anthropic()
    else:
        http = httpx2.Client(transport=httpx2.MockTransport(stand_in))
        plain = Anthropic(base_url="http://127.0.0.1", api_key="none", http_client=http)
    client = llm.wrap(plain, model="claude-sonnet-4-6")
    question = [{"role": "user", "content": "Jason is 25 years old."}]
    user = client.messages.create(response_model=User, messages=question, max_tokens=200)
    print(user)
    plain.close()


if __name__ == "__main__":
    main()
