"""Figures told apart by kind of object and of input."""

import pytest

from train import breakdown
from train.breakdown import breakdowns, groups_of, index_entries, making


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        ({"attribution": "Google LLC (Google Scanned Objects)", "source_repo": "x"}, "scanned"),
        ({"attribution": "Kenney (kenney.nl)"}, "stylised"),
        ({"attribution": None, "source_repo": "someone/Quaternius-pack"}, "stylised"),
        ({"attribution": "OSRF"}, "other"),
        ({"attribution": "Kenney", "making": "scanned"}, "scanned"),  # the list's own word counts
    ],
)
def test_scanned_and_stylised(entry: dict, kind: str) -> None:
    assert making(entry) == kind


@pytest.mark.parametrize(
    ("elevation", "focal", "expected"),
    [
        (0.0, None, (breakdown.FRONTAL, breakdown.ORTHOGRAPHIC)),
        (-9.9, 35.0, (breakdown.FRONTAL, breakdown.WIDE_ANGLE)),
        (10.0, 50.0, (breakdown.STEEP, breakdown.WIDE_ANGLE)),
        (-15.0, 51.0, (breakdown.STEEP, breakdown.LONG)),
    ],
)
def test_inputs(elevation: float, focal: float | None, expected: tuple[str, str]) -> None:
    groups = groups_of({"elevation_deg": elevation, "focal_mm": focal}, None, indexed=False)
    assert (groups["elevation"], groups["camera"]) == expected
    assert set(groups) == {"elevation", "camera"}  # without an index nothing is known of the object


def test_every_object_is_in_one_group_of_each_dimension(tmp_path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "index.csv").write_text(
        "id,source_repo,attribution\ncup,a/scans,own scans\ncar,b/cars,Kenney\n", encoding="utf-8"
    )
    index = index_entries(tmp_path / "val")
    records = {
        "cup": {"elevation_deg": 5.0, "focal_mm": None},
        "car": {"elevation_deg": 30.0, "focal_mm": 24.0},
        "new": {"elevation_deg": 0.0, "focal_mm": 85.0},
    }
    found = breakdowns(records, index)
    assert found["making"] == {breakdown.UNLISTED: ["new"], "scanned": ["cup"], "stylised": ["car"]}
    assert found["source"] == {"a/scans": ["cup"], "b/cars": ["car"], breakdown.UNLISTED: ["new"]}
    for groups in found.values():
        assert sorted(name for names in groups.values() for name in names) == sorted(records)
    assert index_entries(tmp_path) == {}
