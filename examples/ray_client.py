"""Ask the model from a Ray client: a Python process outside the cluster that holds one connection to it, no HTTP.

python examples/ray_client.py [ray://HOST:PORT]      RAY_AUTH_TOKEN_PATH as `diptych serve` says; without an argument
                                                     the cluster that runs on this machine is taken
"""

from __future__ import annotations

import os
import sys

if len(sys.argv) > 1:
    address = sys.argv[1]
else:
    from diptych.cluster.control.connect import running_cluster

    state = running_cluster()
    address = state.ray_client_address or f"ray://{state.ray_address}"
    # Ray reads these when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": state.token_path or ""}

import ray
from ray import serve

ray.init(address, namespace="diptych", log_to_driver=False)
router = serve.get_app_handle("diptych")
body = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 24,
    "temperature": 0,
}
answer = router.chat.remote(body).result(timeout_s=120)
print(answer["choices"][0]["message"]["content"])
text = router.complete.remote({"model": body["model"], "prompt": "Once upon a time", "max_tokens": 8}).result()
print(text["choices"][0]["text"])
try:
    router.chat.remote(body | {"temperature": "hot"}).result()
except Exception as error:  # Ray puts the way it went before what the router raised
    print(f"refused: {str(error).splitlines()[-1]}")
