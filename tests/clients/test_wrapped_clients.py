"""`llm.wrap` around the official clients of OpenAI and Anthropic, and `llm.batch`, against a whole cluster whose
engines hold answers to their schemas.

Guards against requests that the clients send and the cluster refuses, and results that only a stand-in would give.
"""

from __future__ import annotations

import anthropic
import openai
import pytest
from pydantic import BaseModel

from diptych.agents import llm

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "Anybody."}]


class User(BaseModel):
    name: str
    age: int
    tags: list[str] = []


def test_the_client_of_openai(base_url: str) -> None:
    with openai.OpenAI(base_url=base_url, api_key="none") as made:
        client = llm.wrap(made, model="echo")
        user, completion = client.create_with_completion(response_model=User, messages=MESSAGES, max_tokens=200)
        assert isinstance(user, User)
        assert completion.usage.completion_tokens > 0
        *_, last = client.create_partial(response_model=User, messages=MESSAGES, max_tokens=200)
        assert last == user
        assert isinstance(client.create(response_model=int, messages=MESSAGES, max_tokens=50), int)


async def test_the_client_of_openai_asynchronously(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as made:
        client = llm.wrap(made, model="echo")
        users = [one async for one in client.create_partial(response_model=User, messages=MESSAGES, max_tokens=200)]
        assert isinstance(users[-1], User)
        assert await client.create(response_model=User, messages=MESSAGES, max_tokens=200) == users[-1]


def test_the_client_of_anthropic(base_url: str) -> None:
    with anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none") as made:
        client = llm.wrap(made, model="echo")
        user, message = client.messages.create_with_completion(response_model=User, messages=MESSAGES, max_tokens=200)
        assert isinstance(user, User)
        assert message.usage.output_tokens > 0
        *_, last = client.messages.create_partial(response_model=User, messages=MESSAGES, max_tokens=200)
        assert last == user


def test_a_batch(base_url: str) -> None:
    registry = llm.Registry(clusters={"pool": llm.Cluster(url=base_url.removesuffix("/v1"))}, environ={})

    @llm.call("pool/echo", output=User, registry=registry, max_tokens=200)
    def extract(text: str) -> str:
        return text

    seen: list[llm.BatchStatus] = []
    results = llm.batch(extract, [f"text {i}" for i in range(20)], poll_s=0.2, on_progress=seen.append)
    assert len(results.good) == 20, results.failed[:1]
    assert all(isinstance(one.value, User) for one in results)
    assert seen[-1].completed == 20
    assert results.spent.output_tokens > 0
