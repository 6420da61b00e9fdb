"""Neighbouring buckets of a text taken together."""

from __future__ import annotations

import math

from lminf_edge.evaluation.results import Record
from lminf_edge.report.runs import Way, way_of


def combined(records: list[Record], field: str, n_most: int) -> tuple[list[Record], int | None]:
    """Records of a limited number of positions: where there are more, neighbours are averaged.

    Errors of different buckets are taken to be independent, as they nearly are for buckets of thousands of tokens.

    Args:
        records: Records of one kind, with begin and end.
        field: The estimate in them that is averaged; of other fields the first bucket's is taken.
        n_most: Positions at most.

    Returns:
        The records, and the tokens of each position if some were averaged.
    """
    size = max((record["end"] - record["begin"] for record in records), default=1)
    end = max((record["end"] for record in records), default=0)
    n_together = -(-end // (size * n_most))
    if n_together < 2:
        return records, None
    groups: dict[tuple[Way, int], list[Record]] = {}
    for record in {(way_of(record), record["begin"], str(record.get("of"))): record for record in records}.values():
        groups.setdefault((way_of(record), record["begin"] // (size * n_together)), []).append(record)
    return [mean_of(group, field) for group in groups.values()], size * n_together


def mean_of(group: list[Record], field: str) -> Record:
    """One record for neighbouring buckets: the mean of an estimate, each weighted with its tokens."""
    weights = [record["end"] - record["begin"] for record in group]
    parts = [weight / sum(weights) for weight in weights]
    mean = sum(part * record[field]["mean"] for part, record in zip(parts, group, strict=True))
    estimate = {"mean": mean, "low": None, "high": None}
    if all(record[field]["low"] is not None and record[field]["high"] is not None for record in group):
        halves = [part * (rec[field]["high"] - rec[field]["low"]) / 2 for part, rec in zip(parts, group, strict=True)]
        estimate |= {"low": mean - math.hypot(*halves), "high": mean + math.hypot(*halves)}
    ends = {"begin": min(record["begin"] for record in group), "end": max(record["end"] for record in group)}
    return {**group[0], **ends, field: estimate}
