"""Results on disk, one JSON file for each run: what makes an interrupted comparison resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.serving.scenario import Point, Scenario, Variant

Record = dict[str, Any]


class Results:
    """The files under `folder` that belong to this scenario as it is now.

    A file of another version of the scenario counts as absent and is overwritten in time.
    """

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self.folder = folder
        self.runs = folder / "runs"
        self.logs = folder / "logs"
        for path in (self.runs, self.logs):
            path.mkdir(parents=True, exist_ok=True)

    def tokens(self, variant: Variant) -> Record | None:
        """The token check of a variant, if it was made."""
        return self._read(variant, "tokens")

    def run(self, variant: Variant, point: Point) -> Record | None:
        """A run of a variant, if it was made."""
        return self._read(variant, point.key)

    def error(self, variant: Variant) -> str | None:
        """Why a variant did not run to its end, if it did not."""
        record = self._read(variant, "error")
        return str(record["error"]) if record else None

    def write(self, variant: Variant, what: str, record: Record) -> None:
        """Keep a record: `tokens`, `error`, or a point's key. Whole or not at all, whenever this is interrupted."""
        path = self._path(variant, what)
        partial = path.with_suffix(".partial")
        head: Record = {"scenario": self.scenario.name, "variant": variant.name, "machine": machine()}
        head["fingerprint"] = self._fingerprint(variant)
        partial.write_text(json.dumps(head | record, indent=1) + "\n")
        partial.replace(path)

    def forget_error(self, variant: Variant) -> None:
        """The variant is tried again."""
        self._path(variant, "error").unlink(missing_ok=True)

    def missing(self, variant: Variant) -> list[Point]:
        """Load points that are still to be run."""
        return [point for point in self.scenario.load.points() if self.run(variant, point) is None]

    def complete(self, variant: Variant) -> bool:
        """Whether nothing of a variant is left to do."""
        checked = self.scenario.check.requests == 0 or self.tokens(variant) is not None
        return checked and not self.missing(variant)

    def machines(self) -> list[Record]:
        """What the runs were measured with, each machine and set of versions once."""
        found: list[Record] = []
        for variant in self.scenario.variants:
            for point in self.scenario.load.points():
                run = self.run(variant, point)
                if run and run.get("machine") not in (None, *found):
                    found.append(run["machine"])
        return found

    def as_json(self, machine: Record) -> Record:
        """Everything in one record."""
        return {
            "scenario": self.scenario.name,
            "machine": machine,
            "variants": {
                variant.name: {
                    "kind": variant.kind,
                    "ranks": variant.ranks,
                    "error": self.error(variant),
                    "tokens": self.tokens(variant),
                    "runs": {point.key: self.run(variant, point) for point in self.scenario.load.points()},
                }
                for variant in self.scenario.variants
            },
        }

    def _fingerprint(self, variant: Variant) -> str:
        return self.scenario.fingerprint(variant)

    def _path(self, variant: Variant, what: str) -> Path:
        return self.runs / f"{variant.name}.{what}.json"

    def _read(self, variant: Variant, what: str) -> Record | None:
        path = self._path(variant, what)
        try:
            record: Record = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("fingerprint") == self._fingerprint(variant) else None
