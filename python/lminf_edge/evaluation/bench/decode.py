"""Decoding speed by depth: everything with one type of cache waits at its depth, and all have their turns in rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lminf_edge.errors import LMInfError
from lminf_edge.evaluation.bench import work
from lminf_edge.evaluation.bench.plan import (
    ENDLESS_METHODS,
    N_RECOMPUTED,
    RECOMPUTE,
    BenchSettings,
    Place,
    at_each_depth,
    bytes_per_token,
    decode_places,
    model_options,
    peer_place,
)
from lminf_edge.evaluation.bench.spread import Spread, spread_of
from lminf_edge.evaluation.bench.stations import IMPOSSIBLE, ModelStation, PeerStation, Station, last_of
from lminf_edge.evaluation.bench.step_bytes import StepBytes, step_bytes
from lminf_edge.evaluation.bench.work import Footprint, Tokens
from lminf_edge.evaluation.reader import StreamReader
from lminf_edge.evaluation.results import Record, ResultLog

N_LOGITS = 64
"""Tokens over which a peer's logits are compared with ours."""

N_LOSS = 512
"""Tokens over which its loss is."""

_Key = tuple[str, str, int]


class DecodeBench:
    """Measures decoding with one type of cache."""

    def __init__(
        self,
        settings: BenchSettings,
        cache_type: str,
        tokens: Tokens,
        bandwidth: float,
        log: ResultLog,
        on_progress: Callable[[str], object],
    ) -> None:
        """Plans it.

        Args:
            settings: The settings.
            cache_type: The type. A peer is measured with the first one of the settings.
            tokens: The text that is read in a circle.
            bandwidth: Bytes per second that this machine can read.
            log: Where the records go.
            on_progress: Called with what is being done now.
        """
        self._settings = settings
        self._tokens = tokens
        self._bandwidth = bandwidth
        self._log = log
        self._on_progress = on_progress
        self._places = decode_places(settings, cache_type)
        self._step: StepBytes = step_bytes(settings.setup.model, cache_type)
        is_first = cache_type == settings.setup.cache_types[0]
        self._peer_place = peer_place(settings) if is_first else None
        self._skipped = {
            (record["method"], record["cache_type"], record["depth"])
            for record in log.of_kind("bench.skipped")
            if record["part"] == "decode"
        }
        self._done = {_key(record) for record in log.of_kind("bench.decode")}

    def run(self) -> None:
        """Opens everything, lets all have their turns, and writes what came out."""
        wanted = [*self._places, *([self._peer_place] if self._peer_place else [])]
        if all(_key_of(place) in self._done | self._skipped for place in wanted):
            return
        with ExitStack() as stack:
            stations = self._open_all(stack)
            for number in range(self._settings.rounds):
                self._round(number, stations)
            footprints = {_key_of(station.place): station.footprint() for station in stations}
        for station in stations:
            for place in at_each_depth(station.place):
                if _key_of(place) not in self._done:
                    self._summarise(station, place, footprints[_key_of(station.place)])

    def _open_all(self, stack: ExitStack) -> list[Station]:
        stations: list[Station] = []
        state: bytes | None = None
        if any(place.filled == "copied" and place.method == "full" for place in self._places):
            state = self._read_state()
        for place in self._places:
            if _key_of(place) in self._skipped:
                continue
            self._on_progress(f"going there: {place.name}")
            try:
                station = ModelStation(self._settings, place, self._tokens, state, self._on_progress)
            except IMPOSSIBLE as error:
                self._skip(place, str(error))
                continue
            stack.callback(station.close)
            stations.append(station)
        if self._peer_place is not None:
            stations.append(self._open_peer(stack, self._peer_place))
        return stations

    def _read_state(self) -> bytes:
        """What plain contexts are filled with."""
        n_read = self._settings.n_read
        place = replace(self._places[0], method="full", depth=n_read, filled="read")
        self._on_progress(f"reading {n_read:,} tokens with full attention, to be copied")
        station = ModelStation(self._settings, place, self._tokens)
        try:
            return station.saved()
        finally:
            station.close()

    def _open_peer(self, stack: ExitStack, place: Place) -> PeerStation:
        self._on_progress(f"loading the model in {place.method}")
        station = PeerStation(self._settings, place, self._tokens)
        stack.callback(station.close)
        if not self._log.of_kind("bench.peer"):
            self._compare_with_peer(station)
        self._on_progress(f"going there: {place.name}")
        station.fill()
        return station

    def _compare_with_peer(self, station: PeerStation) -> None:
        """Whether it is the same model: logits and loss against ours with full attention and an f32 cache."""
        self._on_progress(f"comparing the logits of {station.place.method} with ours")
        few, more = self._tokens[:N_LOGITS], self._tokens[:N_LOSS]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "logits.npy")
            station.peer.ask("logits", tokens=few.tolist(), file=str(file))
            theirs = _log_softmax(np.load(file))
        loss = station.peer.ask("loss", tokens=more.tolist())["loss"]
        place = Place(method="full", cache_type="f32", depth=N_LOSS, filled="read")
        with StreamReader(model_options(self._settings, place)) as reader:
            ours = _log_softmax(last_of(reader.run(work.logits_after, few)))
            loss_here = last_of(reader.run(work.mean_loss, more))
        if theirs.shape != ours.shape:
            raise LMInfError(f"the peer's logits have the shape {theirs.shape}, ours {ours.shape}")
        difference = np.abs(theirs - ours)
        self._log.add(
            "bench.peer",
            method=station.place.method,
            versions=station.model.versions,
            n_logits=few.size,
            same_argmax=float(np.mean(theirs.argmax(axis=1) == ours.argmax(axis=1))),
            largest_difference=float(difference.max()),
            mean_difference=float(difference.mean()),
            n_loss=more.size,
            loss=loss,
            loss_here=loss_here,
        )

    def _round(self, number: int, stations: list[Station]) -> None:
        done = {_key(record) for record in self._log.of_kind("bench.round") if record["round"] == number}
        turned = number % max(1, len(stations))
        order = stations[turned:] + stations[:turned]
        for station in order if number % 2 == 0 else reversed(order):
            place = station.place
            if _key_of(place) in done or (place.method == RECOMPUTE and number >= N_RECOMPUTED):
                continue
            self._on_progress(f"round {number + 1} of {self._settings.rounds}: {place.name}")
            self._log.add("bench.round", **_where(place), round=number, **asdict(station.turn()))

    def _skip(self, place: Place, reason: str) -> None:
        self._on_progress(f"left out: {place.name}: {reason}")
        self._log.add("bench.skipped", part="decode", **_where(place), reason=reason)
        self._skipped.add(_key_of(place))

    def _summarise(self, station: Station, place: Place, footprint: Footprint) -> None:
        times = self._per_token(_key_of(station.place), "seconds")
        speed = spread_of([1 / seconds for seconds in times.values()])
        n_bytes = self._bytes_per_token(station, place, footprint)
        reference = self._reference(station.place, place)
        ratio = None if reference is None else self._ratio(times, reference)
        record: Record = {
            **_where(place),
            "tokens_per_second": asdict(speed),
            "ratio": None if ratio is None else asdict(ratio),
            "of": None if reference is None or ratio is None else _where_of(reference),
            **asdict(footprint),
            "bytes_per_token": n_bytes,
            "roofline": None if n_bytes is None else n_bytes * speed.median / self._bandwidth,
            "filled": place.filled,
        }
        if place.depth != station.place.depth:
            record["measured_at"] = station.place.depth
        if place.method == "middle":
            endless = self._ratio(times, ("endless", place.cache_type, place.depth))
            record["ratio_to_endless"] = None if endless is None else asdict(endless)
            scans = self._per_token(_key_of(place), "scan_seconds")
            record["scan_seconds"] = asdict(spread_of(list(scans.values())))
        self._log.add("bench.decode", **record)

    def _bytes_per_token(self, station: Station, place: Place, footprint: Footprint) -> int | None:
        if isinstance(station, PeerStation):
            return station.model.weight_bytes + footprint.kv_bytes
        n_bytes = bytes_per_token(self._settings, place, self._step)
        return None if n_bytes is None else n_bytes + footprint.scan_bytes

    def _reference(self, measured: Place, place: Place) -> _Key | None:
        """What a place is compared with: full attention at its depth, or the near depth for the far one."""
        settings = self._settings
        if measured is self._peer_place:
            return ("endless", settings.setup.cache_types[0], place.depth)
        if place.method == "full":
            return None
        if place.method in ENDLESS_METHODS and place.depth not in settings.depths:
            return (place.method, place.cache_type, settings.near) if place.depth == settings.far else None
        return ("full", place.cache_type, place.depth)

    def _ratio(self, times: dict[int, float], reference: _Key) -> Spread | None:
        """How much faster than the reference, in the rounds in which both had a turn."""
        others = self._per_token(reference, "seconds")
        common = sorted(times.keys() & others.keys())
        return spread_of([others[number] / times[number] for number in common]) if common else None

    def _per_token(self, key: _Key, seconds: str) -> dict[int, float]:
        """Seconds that a token took, or a part of them, by round."""
        return {
            record["round"]: record[seconds] / record["n_tokens"]
            for record in self._log.of_kind("bench.round")
            if _key(record) == key
        }


def _key(record: Record) -> _Key:
    return record["method"], record["cache_type"], record["depth"]


def _key_of(place: Place) -> _Key:
    return place.method, place.cache_type, place.depth


def _where(place: Place) -> dict[str, Any]:
    return _where_of(_key_of(place))


def _where_of(key: _Key) -> dict[str, Any]:
    return dict(zip(("method", "cache_type", "depth"), key, strict=True))


def _log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
