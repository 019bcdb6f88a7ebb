#!/bin/sh
# Asks a question with curl:  examples/curl.sh [URL] [MODEL]
url=${1:-http://127.0.0.1:8000}
model=${2:-smollm2-135m-instruct}
curl --silent --show-error --fail-with-body "$url/v1/chat/completions" \
    -H 'Content-Type: application/json' \
    -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    -d '{
        "model": "'"$model"'",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_completion_tokens": 100
    }'
