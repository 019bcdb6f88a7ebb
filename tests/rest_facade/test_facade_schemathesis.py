"""Schemathesis on our own OpenAPI document: the server behaves as documented."""

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "negative_data_rejection",
)


async def test_responses_conform_to_the_openapi_document(
    client: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Whatever is sent, valid or not: no 5xx, no undocumented status, media type or shape."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json"),
        *("--checks", ",".join(CHECKS)),
        *("--phases", "coverage,fuzzing"),
        *("--max-examples", "50"),
        *("--seed", "1"),
        "--generation-database=none",
        "--no-color",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()

    assert 0 == process.returncode, output.decode()
