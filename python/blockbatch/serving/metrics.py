"""What /metrics tells: names of vLLM where it has the same thing, so that routers and dashboards work
unchanged, and `blockbatch:*` for what is special to these decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from blockbatch.serving.answers import Ended, phases

disable_created_metrics()  # a gauge of its own for each counter, which nobody reads
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_PER_FORWARD = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
# Name, what it is, its bounds.
_HISTOGRAMS = {
    "first": ("vllm:time_to_first_token_seconds", "Seconds until the first final text.", _SECONDS),
    "whole": ("vllm:e2e_request_latency_seconds", "Seconds from a request to its end.", _SECONDS),
    "queue": ("vllm:request_queue_time_seconds", "Seconds until the first forward began.", _SECONDS),
    "prompt": ("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
    "answer": ("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS),
    "per_forward": ("blockbatch:tokens_per_forward", "Tokens of an answer a forward.", _PER_FORWARD),
    "branches": ("blockbatch:request_branches", "Branches of a request.", (1, 2, 3, 4, 6, 8, 16, 32)),
}
_FINISHED = ("stop", "length", "abort", "error")


class Metrics:
    """The figures of one server.

    Args:
        model: the name that clients know.
        stats: gives the engine's `EngineStats`; None while there is no engine.
    """

    def __init__(self, model: str, stats: Callable[[], Any]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        own = {"model_name": model, "engine": "0"}

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*_LABELS, *more), registry=self._registry)

        self._histograms = {
            key: Histogram(name, text, _LABELS, buckets=bounds, registry=self._registry).labels(**own)
            for key, (name, text, bounds) in _HISTOGRAMS.items()
        }
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(**own)
        self._answer_tokens = counter("vllm:generation_tokens", "Tokens of answers.").labels(**own)
        self._adopted = counter("blockbatch:adopted_drafts", "Drafts that came true.").labels(**own)
        ended = counter("vllm:request_success", "Requests by how they ended.", "finished_reason")
        self._ended = {reason: ended.labels(**own, finished_reason=reason) for reason in _FINISHED}
        self._answers = counter("blockbatch:http_answers", "Answers of HTTP by status.", "status")
        self._own = own
        self._registry.register(_Engine(own, stats))

    def record(self, ended: Ended) -> None:
        """Counts a request that has ended."""
        usage = ended.usage
        self._ended[ended.outcome].inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._answer_tokens.inc(usage.completion_tokens)
        self._adopted.inc(usage.adopted)
        if ended.outcome not in ("stop", "length"):
            return
        if ended.first is not None:
            self._histograms["first"].observe(ended.first)
        self._histograms["whole"].observe(ended.seconds)
        self._histograms["prompt"].observe(usage.prompt_tokens)
        self._histograms["answer"].observe(usage.completion_tokens)
        for seconds in ended.queued:
            self._histograms["queue"].observe(seconds)
        for branches in usage.branches:
            self._histograms["branches"].observe(branches)
        if usage.forwards:
            self._histograms["per_forward"].observe(usage.completion_tokens / usage.forwards)

    def answered(self, status: int) -> None:
        """Counts an answer of HTTP, whole or begun."""
        self._answers.labels(**self._own, status=str(status)).inc()

    def text(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Engine:
    """The engine's own figures, asked for when somebody reads them."""

    def __init__(self, own: dict[str, str], stats: Callable[[], Any]) -> None:
        self._own, self._stats = own, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        gauges = {
            "vllm:num_requests_running": ("Requests that are decoded.", stats.running),
            "vllm:num_requests_waiting": ("Requests in the queue.", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Part of the K/V pages in use; 1 is all.", stats.cache_usage),
            "blockbatch:shared_pages": ("Pages that several rows read.", stats.shared_pages),
        }
        counters = {
            "blockbatch:steps": ("Packed forwards.", stats.steps),
            "blockbatch:computed_tokens": ("Tokens that forwards computed.", stats.tokens),
            "blockbatch:refreshes": ("Refreshes of requests.", stats.refreshes),
            "blockbatch:commits": ("Tokens that were committed.", stats.commits),
        }
        labels, values = tuple(self._own), tuple(self._own.values())
        for kind, rows in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in rows.items():
                family = kind(name, text, labels=labels)
                family.add_metric(values, float(value))
                yield family
        forwards = CounterMetricFamily("blockbatch:forwards", "Forwards by phase.", labels=(*labels, "phase"))
        for phase, count in phases(stats.forwards).items():
            forwards.add_metric((*values, phase), count)
        yield forwards
