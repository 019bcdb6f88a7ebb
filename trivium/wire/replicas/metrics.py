"""Prometheus metrics of the replicas that this process calls, read at each scrape."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from trivium.wire.replicas.replica import ReplicaState
from trivium.wire.replicas.replica_set import ReplicaSetStatus

_LABELS = ["model_name", "replica"]


class ReplicaCollector(Collector):
    """`statuses` maps the model to the status of the replicas that serve it; the empty name, which
    Prometheus treats as no label, stands for replicas that serve all models."""

    def __init__(self, statuses: Mapping[str, Callable[[], ReplicaSetStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        """The current replicas; one that is gone disappears from the metrics too."""
        picked = CounterMetricFamily(
            "trivium_replica_picked", "Calls sent to this replica", labels=_LABELS
        )
        outstanding = GaugeMetricFamily(
            "trivium_replica_outstanding",
            "Calls in flight to this replica",
            labels=_LABELS,
        )
        state = GaugeMetricFamily(
            "trivium_replica_state",
            "1 for the replica's current state: serving, not_serving or unreachable",
            labels=[*_LABELS, "state"],
        )
        ejections = CounterMetricFamily(
            "trivium_replica_ejections",
            "Times this replica was ejected because its calls kept failing",
            labels=_LABELS,
        )
        retries = CounterMetricFamily(
            "trivium_replica_retries",
            "Retries of calls, by error code of the attempt before",
            labels=["model_name", "reason"],
        )
        for model, status_of in self._statuses.items():
            found = status_of()
            for reason, count in sorted(found.retries.items()):
                retries.add_metric([model, reason], count)
            for status in found.replicas:
                labels = [model, status.address]
                picked.add_metric(labels, status.picked)
                outstanding.add_metric(labels, status.outstanding)
                ejections.add_metric(labels, status.ejections)
                for replica_state in ReplicaState:
                    state.add_metric([*labels, replica_state.value], status.state is replica_state)
            if not found.replicas:  # so that an alert can tell no address from no process
                for replica_state in ReplicaState:
                    state.add_metric([model, "", replica_state.value], 0)
        yield from (picked, outstanding, state, ejections, retries)
