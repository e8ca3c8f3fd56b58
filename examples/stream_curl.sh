#!/usr/bin/env bash
# Stream an answer with nothing but curl: server-sent events, one JSON object each, [DONE] at the end.
#   examples/stream_curl.sh [URL]        the default is http://127.0.0.1:8000
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

curl --silent --show-error --fail --no-buffer "$url/v1/chat/completions" \
  --header 'Content-Type: application/json' \
  --data '{
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Name three colours."}],
    "temperature": 0, "max_tokens": 24, "stream": true, "stream_options": {"include_usage": true}
  }'
