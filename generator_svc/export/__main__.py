"""`python -m generator_svc.export SOURCE --out DIR`: an export without the rest of Trivium."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from generator_svc.export import DEVICES, PRECISIONS, ExportError, ExportOptions, export_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m generator_svc.export", description=__doc__)
    parser.add_argument("source", help="Hugging Face folder or id, .gguf file, or default name")
    parser.add_argument("--out", required=True, type=Path, help="the model directory to make")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    arguments = parser.parse_args()
    try:
        options = ExportOptions(arguments.precision, arguments.device)
        out = export_model(arguments.source, arguments.out, options, _show, force=arguments.force)
    except ExportError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def _show(step: str, done: int = 0, total: int | None = None) -> None:
    if done == 0:
        print(step, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
