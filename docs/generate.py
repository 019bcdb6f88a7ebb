"""Writes the parts of docs/ that the code knows best:  make docs

A page keeps them between `<!-- begin NAME -->` and `<!-- end NAME -->`; a test compares.
"""

import ast
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

import rest_facade.metrics
import tokenizer_svc.metrics
from bench import published_sizes
from generator_svc.config import GeneratorSettings
from generator_svc.engine import Load
from generator_svc.metering import Meter
from generator_svc.metrics import EngineCollector, RequestMetrics, register_info
from generator_svc.run.outcome import DeviceInfo
from generator_svc.usage import UsageMetrics
from rest_facade.config import FacadeSettings
from tests import compatibility
from tokenizer_svc.config import TokenizerSettings
from trivium.keys.rate_limits import LimitMetrics
from trivium.usage_log import UsageLog
from trivium.wire.errors import markdown_table
from trivium.wire.histogram import TokenHistogram
from trivium.wire.in_flight import InFlight
from trivium.wire.process_metrics import register_process
from trivium.wire.replicas.metrics import ReplicaCollector
from trivium.wire.replicas.replica import ReplicaState, ReplicaStatus
from trivium.wire.replicas.replica_set import ReplicaSetStatus
from trivium.wire.tls.metrics import CertificateCollector

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGES = ("rest_facade", "tokenizer_svc", "generator_svc", "trivium")
SECTION = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def folders() -> list[str]:
    """The packages and their subpackages that a person wrote, as paths."""
    found = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    generated = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*_pb2.py")}
    return sorted(
        (folder.relative_to(ROOT).as_posix() for folder in found - generated),
        key=lambda folder: (PACKAGES.index(folder.split("/")[0]), folder),
    )


def modules(folder: str) -> str:
    """One line for each module of a folder: the first sentence of its docstring."""
    lines = []
    for path in sorted((ROOT / folder).glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if text:
            name = folder.replace("/", ".") if path.stem == "__init__" else path.stem
            lines.append(f"- `{name}`: {first_sentence(text)}")
    return "\n".join(lines) + "\n"


def all_modules() -> str:
    """A heading and a list of modules for each folder."""
    return "\n".join(f"## {folder}\n\n{modules(folder)}" for folder in folders())


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0].rstrip(".") + "."


def settings(cls: type[BaseSettings]) -> str:
    """A table of a service's environment variables."""
    lines = ["| variable | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    # What services have alike comes after what is theirs.
    shared = [name for name in cls.model_fields if name not in cls.__annotations__]
    for name in (*(name for name in cls.model_fields if name not in shared), *shared):
        field = cls.model_fields[name]
        variable = f"{cls.model_config['env_prefix']}{name}".upper()
        row = (f"`{variable}`", default(field), allowed(field), field.description or "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """A setting's default as one would type it."""
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == ():
        return "not set"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


def allowed(field: FieldInfo) -> str:
    """A setting's choices, or its type and bounds."""
    choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if get_origin(field.annotation) is tuple:
        return "JSON list"
    types = [t for t in (get_args(field.annotation) or (field.annotation,)) if t is not type(None)]
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    kind = ", ".join(words.get(t.__name__, t.__name__.lower()) for t in types)
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if hasattr(bound, name)
    ]
    return " ".join((kind, ", ".join(bounds))).strip()


def metrics(families: Iterator[Metric]) -> str:
    """A table of a process's metrics; those about the process itself are left out."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in families:
        if family.name.startswith(("process_", "python_")):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in family_labels(family))
        lines.append(
            f"| `{name}` | {family.type} | {labels} | {family.documentation.rstrip('.')} |"
        )
    return "\n".join(lines) + "\n"


def family_labels(family: Metric) -> list[str]:
    """Names of the labels, from the one sample that `touched` made; buckets' own is left out."""
    labels = family.samples[0].labels if family.samples else {}
    return [label for label in labels if label != "le"]


def touched(registry: CollectorRegistry) -> Iterator[Metric]:
    """The registry's families, each with a sample, so that its labels can be seen."""
    for collector in list(registry._collector_to_names):
        if isinstance(collector, TokenHistogram):
            collector.labels("")
        names = getattr(collector, "_labelnames", ())
        if names and not getattr(collector, "_labelvalues", ()):
            collector.labels(*("" for _ in names))  # type: ignore[attr-defined]
    return iter(sorted(registry.collect(), key=lambda family: family.name))


class _Side(NamedTuple):
    """Of TLS."""

    certificate: Path
    expires_at: datetime


_CERTIFICATES = CertificateCollector(_Side(Path(), datetime.now(UTC)))


def generator_registry() -> CollectorRegistry:
    """The generator's metrics, without a generator."""
    registry = CollectorRegistry()
    idle = Load(*(1 for _ in Load.__dataclass_fields__))
    registry.register(EngineCollector(lambda: idle, lambda: 0.0, Meter(), "model"))
    RequestMetrics(registry, "model")
    UsageMetrics(registry, "model")
    UsageLog(None, "", 0, 0, registry)
    register_info(registry, "model", "", DeviceInfo("", "", 0, 0, 0), prefix_cache=True)
    register_process(registry, InFlight())
    registry.register(_CERTIFICATES)
    return registry


_ONE_REPLICA = ReplicaSetStatus([ReplicaStatus("", ReplicaState.SERVING, 0, 0, 0)], {"draining": 0})


def facade_registry() -> CollectorRegistry:
    """The facade's metrics, with a tokenizer."""
    facade = rest_facade.metrics.Metrics()
    LimitMetrics(facade.registry)
    UsageLog(None, "", 0, 0, facade.registry)
    facade.follow(lambda: _ONE_REPLICA, InFlight())
    facade.registry.register(_CERTIFICATES)
    return facade.registry


def tokenizer_registry() -> CollectorRegistry:
    """The tokenizer's metrics, with a generator."""
    registry = tokenizer_svc.metrics.Metrics().registry
    register_process(registry, InFlight())
    registry.register(_CERTIFICATES)
    registry.register(ReplicaCollector({"model": lambda: _ONE_REPLICA}))
    return registry


SECTIONS: dict[str, Callable[[], str]] = {
    "modules": all_modules,
    "settings-rest-facade": lambda: settings(FacadeSettings),
    "settings-tokenizer-svc": lambda: settings(TokenizerSettings),
    "settings-generator-svc": lambda: settings(GeneratorSettings),
    "metrics-rest-facade": lambda: metrics(touched(facade_registry())),
    "metrics-tokenizer-svc": lambda: metrics(touched(tokenizer_registry())),
    "metrics-generator-svc": lambda: metrics(touched(generator_registry())),
    "errors": markdown_table,
    "model-sizes": published_sizes.sizes_markdown,
    "model-cards": published_sizes.cards_markdown,
    "schema-keywords": compatibility.keywords_markdown,
    **{
        name: lambda rows=rows: compatibility.markdown(rows)
        for name, rows in compatibility.TABLES.items()
    },
}


def renewed(page: str) -> str:
    """`page` with every generated section as the code has it now."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}{SECTIONS[match[2]]()}{match[3]}"

    return SECTION.sub(replace, page)


def pages() -> list[Path]:
    """All pages, those without generated sections too."""
    return sorted(DOCS.rglob("*.md"))


def main() -> None:
    """Rewrites the pages that are out of date."""
    for page in pages():
        text = page.read_text()
        if renewed(text) != text:
            page.write_text(renewed(text))
            print(f"renewed {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
