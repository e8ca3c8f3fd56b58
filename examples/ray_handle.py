"""Ask the model through Ray: the router's deployment handle, no HTTP. Run it beside `make serve`.

python examples/ray_handle.py [URL of the cluster's API]
"""

from __future__ import annotations

import sys

from diptych.cluster.control.connect import serve_handle

router = serve_handle(sys.argv[1] if len(sys.argv) > 1 else None)
body = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 24,
    "temperature": 0,
}
answer = router.chat.remote(body).result(timeout_s=120)
print(answer["choices"][0]["message"]["content"])
print(f"{answer['usage']['completion_tokens']} tokens out")
