"""What the sources list now beside what the lake has read: which units are new or changed, and which are gone.
Units lie in a temporary file and are compared in SQL, so that no more of a million files is held than of a thousand."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dreamlite_data.lake import Lake
from dreamlite_data.sources.base import Unit

UNITS_AT_ONCE = 2048
FACTS = pa.schema([("position", pa.int64()), ("source", pa.string()), ("shard", pa.string()), ("digest", pa.string()), ("remote", pa.bool_())])


class Listing:
    """The units of some sources in their order. A context: its files go with it."""

    def __init__(self, lake: Lake, units: Iterable[Unit]) -> None:
        self._lake = lake
        self._files = contextlib.ExitStack()
        self._units = self._files.enter_context(tempfile.TemporaryFile(dir=lake.staging))  # read by nobody else: it has no name
        self._facts = self._files.enter_context(tempfile.NamedTemporaryFile(dir=lake.staging, suffix=".parquet")).name
        self.count = 0
        with pq.ParquetWriter(self._facts, FACTS) as writer:
            waiting = iter(units)
            while portion := list(itertools.islice(waiting, UNITS_AT_ONCE)):
                pickle.dump(portion, self._units, pickle.HIGHEST_PROTOCOL)
                writer.write_table(pa.table({
                    "position": np.arange(self.count, self.count + len(portion)), "source": [unit.source for unit in portion],
                    "shard": [unit.shard for unit in portion], "digest": [unit.digest for unit in portion],
                    "remote": [unit.remote for unit in portion],
                }, FACTS))  # fmt: skip
                self.count += len(portion)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()

    def gone(self, sources: list[str]) -> list[tuple[str, str]]:
        """(source, shard) of what the lake has read of these sources and they list no more, sorted."""
        rows = self._lake.query(
            "SELECT source, shard FROM op_shard ANTI JOIN read_parquet($facts) listed USING (source, shard) "
            "WHERE list_contains($sources, source) ORDER BY ALL",
            {"facts": self._facts, "sources": sources},
        )
        return list(zip(rows["source"].to_pylist(), rows["shard"].to_pylist(), strict=True))

    def pending(self, version: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions, int64 [P] ascending, of the units that were not read with this content and op_version, and whether the lake has
        them in another state, bool [P]. What is read over the network is pending as long as it failed, for that may pass."""
        rows = self._lake.query(
            "SELECT position, s.shard IS NOT NULL AS replaces FROM read_parquet($facts) listed LEFT JOIN op_shard s USING (source, shard) "
            "WHERE s.digest IS DISTINCT FROM listed.digest OR s.op_version IS DISTINCT FROM $version OR (remote AND s.error IS NOT NULL) "
            "ORDER BY position",
            {"facts": self._facts, "version": version},
        )
        return rows["position"].to_numpy(), rows["replaces"].to_numpy()

    def at(self, positions: np.ndarray) -> Iterator[Unit]:
        """The units at ascending `positions`, read as they are asked for."""
        self._units.seek(0)
        first = 0
        for start in range(0, self.count, UNITS_AT_ONCE):
            portion = pickle.load(self._units)
            last = np.searchsorted(positions, start + len(portion))
            for position in positions[first:last].tolist():
                yield portion[position - start]
            first = last
