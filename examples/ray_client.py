"""Ask the model from a Ray client: a Python process outside the cluster that holds one connection to it, no HTTP.

python examples/ray_client.py [URL of the cluster's API | ray://HOST:PORT]

With ray://, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the `token` in the folder that `diptych serve` names.
"""

from __future__ import annotations

import os
import sys

from diptych.cluster.control.connect import running_cluster


def client_address(where: str | None) -> str:
    """The ray:// address of the cluster at `where`; sets what Ray reads from the environment when it is imported."""
    if where is not None and where.startswith("ray://"):
        return where
    state = running_cluster(where)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": state.token_path or ""}
    return state.ray_client_address or f"ray://{state.ray_address}"


def main() -> None:
    address = client_address(sys.argv[1] if len(sys.argv) > 1 else None)
    import ray
    from ray import serve

    ray.init(address, namespace="diptych", log_to_driver=False)
    router = serve.get_app_handle("diptych")
    model = "smollm2-135m-instruct"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    answer = router.chat.remote(body).result(timeout_s=120)
    print(answer["choices"][0]["message"]["content"])
    text = router.complete.remote({"model": model, "prompt": "Once upon a time", "max_tokens": 8}).result(timeout_s=120)
    print(text["choices"][0]["text"])
    try:
        router.chat.remote(body | {"temperature": "hot"}).result(timeout_s=120)
    except Exception as error:  # Ray puts the way it went before what the router raised
        print(f"refused: {str(error).splitlines()[-1]}")


main()
