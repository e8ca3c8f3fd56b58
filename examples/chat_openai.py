"""Talk to a running cluster with the official OpenAI client: one answer at once, one streamed, with token counts.

python examples/chat_openai.py [URL]        the default is http://127.0.0.1:8000
"""

from __future__ import annotations

import sys

from openai import OpenAI


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none-needed-on-loopback")
    model = next(iter(client.models.list())).id

    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
    )
    print(f"{model}: {answer.choices[0].message.content}")

    stream = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        temperature=0.7,
        seed=7,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")


if __name__ == "__main__":
    main()
