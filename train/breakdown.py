"""Kinds of objects and of input pictures, which the model's figures are told apart by."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FRONTAL_BELOW_DEG = 10.0
"""An input whose camera stands less than this above or below the object is frontal."""

WIDE_ANGLE_MM = 50.0
"""Focal lengths up to this (35 mm equivalent) are wide-angle."""

SCANNED: tuple[str, ...] = ("google scanned objects", "ycb object", "own scans")
STYLISED: tuple[str, ...] = ("quaternius", "kenney", "kay lousberg")
"""Parts of the attributions of those who publish scans, or stylised game assets."""

DIMENSIONS: dict[str, str] = {
    "source": "source",
    "making": "way of making (scans and stylised assets by their publishers)",
    "elevation": "elevation of the input",
    "camera": "camera of the input",
}
"""What groups are made by beside the category, by name in `metrics.json`."""

UNLISTED = "not in index.csv"

FRONTAL = f"frontal (less than {FRONTAL_BELOW_DEG:g}° up or down)"
STEEP = f"steep ({FRONTAL_BELOW_DEG:g}° or more)"
ORTHOGRAPHIC = "orthographic"
WIDE_ANGLE = f"wide-angle (up to {WIDE_ANGLE_MM:g} mm)"
LONG = f"long lens (over {WIDE_ANGLE_MM:g} mm)"

Entry = Mapping[str, str]
"""One object's line of `index.csv`."""


def index_entries(folder: Path) -> dict[str, Entry]:
    """Lines by object id of the `index.csv` beside a folder; empty where there is none."""
    path = folder.resolve().parent / "index.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as stream:
        return {row["id"]: row for row in csv.DictReader(stream) if row.get("id")}


def making(entry: Entry) -> str:
    """Scanned, stylised or other: the column `making` if there is one, else by who published it."""
    if entry.get("making"):
        return entry["making"]
    told = f"{entry.get('attribution') or ''} {entry.get('source_repo') or ''}".lower()
    if any(name in told for name in SCANNED):
        return "scanned"
    return "stylised" if any(name in told for name in STYLISED) else "other"


def groups_of(record: Mapping[str, Any], entry: Entry | None, indexed: bool) -> dict[str, str]:
    """The group of an object in each dimension that says something of it.

    Args:
        record: with `elevation_deg` and `focal_mm` (None: orthographic) if it has one input view.
        entry: its line of `index.csv`, if it has one.
        indexed: whether there is an `index.csv` at all.
    """
    groups: dict[str, str] = {}
    if indexed:
        groups["source"] = (entry or {}).get("source_repo") or UNLISTED
        groups["making"] = UNLISTED if entry is None else making(entry)
    if "elevation_deg" in record:
        groups["elevation"] = FRONTAL if abs(record["elevation_deg"]) < FRONTAL_BELOW_DEG else STEEP
        focal_mm = record["focal_mm"]
        if focal_mm is None:
            groups["camera"] = ORTHOGRAPHIC
        else:
            groups["camera"] = WIDE_ANGLE if focal_mm <= WIDE_ANGLE_MM else LONG
    return groups


def breakdowns(
    records: Mapping[str, Mapping[str, Any]], index: Mapping[str, Entry]
) -> dict[str, dict[str, list[str]]]:
    """Names of objects by dimension and group; in each dimension, every object is in one group."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, record in records.items():
        for dimension, group in groups_of(record, index.get(name), bool(index)).items():
            found.setdefault(dimension, {}).setdefault(group, []).append(name)
    order = [key for key in DIMENSIONS if key in found]
    return {key: dict(sorted(found[key].items())) for key in order}
