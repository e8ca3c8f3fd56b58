"""/v1/responses of a real model in a real cluster: the same tokens as chat's, and the documentation's example.

Guards against a conversation that is rendered otherwise than chat renders it.
"""

from __future__ import annotations

import openai
import pytest
from fences import URL, of_kind
from serving import Cluster

pytestmark = pytest.mark.ray
MODEL = "smollm2-135m-instruct"


def test_the_pages_example_runs_against_a_cluster(cluster: Cluster) -> None:
    (example,) = (one for one in of_kind("python openai") if one.page.stem == "responses")
    exec(compile(example.code.replace(URL, cluster.url), str(example), "exec"), {"__name__": "example"})


def test_an_answer_is_chats_answer(cluster: Cluster) -> None:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        said = {"role": "user", "content": "What is the capital of France?"}
        chat = client.chat.completions.create(model=MODEL, messages=[said], temperature=0, max_tokens=24)  # type: ignore[list-item]
        text = chat.choices[0].message.content
        whole = client.responses.create(model=MODEL, input=said["content"], temperature=0, max_output_tokens=24)
        assert whole.output_text == text
        with client.responses.stream(
            model=MODEL, input=said["content"], temperature=0, max_output_tokens=24, background=True
        ) as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == text
        turns = [said, {"role": "assistant", "content": text}, {"role": "user", "content": "And of Italy?"}]
        chat = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=24)  # type: ignore[arg-type]
        after = client.responses.create(
            model=MODEL, input="And of Italy?", temperature=0, max_output_tokens=24, previous_response_id=whole.id
        )
        assert after.output_text == chat.choices[0].message.content
        assert chat.usage is not None
        assert after.usage is not None
        assert after.usage.input_tokens == chat.usage.prompt_tokens
