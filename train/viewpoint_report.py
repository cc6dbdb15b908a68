"""The viewpoint protocol's `metrics.json` and `metrics.md` (see `train.viewpoint`)."""

from __future__ import annotations

from collections.abc import Mapping

from train.breakdown import Entry
from train.report import (
    COLUMNS,
    Record,
    common_summary,
    group_lines,
    left_out_lines,
    markdown_table,
    mean_row,
    opening,
)

ROWS: dict[str, str] = {"model": "model", "input": "input copied six times", "truth": "true views"}


def viewpoint_summary(
    records: Mapping[str, Record],
    settings: Record,
    index: Mapping[str, Entry],
    left_out_metrics: Mapping[str, str],
) -> Record:
    """Means over objects of the figures, of their spread over azimuths, and of the agreement."""
    measured = [record for record in records.values() if "left_out" not in record]
    summary = common_summary(records, settings, index, left_out_metrics)

    def means(key: str) -> Record:
        return {
            row: mean_row([r[key][row] for r in measured]) for row in (measured[0][key] if measured else ())
        }

    summary |= {"rows": means("rows"), "spread": means("spread"), "agreement": means("agreement")}
    summary["pairs_of_views"] = measured[0]["pairs_of_views"] if measured else 0
    summary["by_azimuth"] = [
        {"azimuth_deg": given[0]["azimuth_deg"], **mean_row(given)}
        for given in zip(*(record["by_azimuth"] for record in measured), strict=True)
    ]
    summary["stand_ins"] = {
        record["name"]: sorted(record["stand_ins"]["azimuths"], key=float)
        for record in measured
        if record["stand_ins"]["azimuths"]
    }
    return summary


def agreeing(summary: Record) -> dict[str, Record]:
    """The rows of agreement that say something; none where neither views nor meshes were compared."""
    rows: dict[str, Record] = summary["agreement"]
    return {row: values for row, values in rows.items() if any(v is not None for v in values.values())}


def viewpoint_markdown(summary: Record) -> str:
    """`metrics.md`: against the truth with spread, agreement, each azimuth, and what was left out."""
    count, pairs = summary["settings"]["azimuths"], summary["pairs_of_views"]
    lines = [opening(summary, f"each seen from {count} azimuths at elevation 0, orthographic"), ""]
    if summary["rows"]:
        rows = {}
        for row, values in summary["rows"].items():
            rows[f"{ROWS[row]}, mean"] = values
            rows[f"{ROWS[row]}, spread"] = summary["spread"][row]
        lines += ["Against the truth, over the input azimuths (spread: standard deviation over them):", ""]
        lines += [markdown_table(rows), ""]
    agreement = {ROWS[row]: values for row, values in agreeing(summary).items()}
    if agreement:
        lines += ["Agreement between inputs (as Table 6 of the paper):", "", markdown_table(agreement), ""]
    if pairs:
        lines.append(
            f"Views: {pairs} pairs of inputs an object, whose azimuths differ by a multiple of 60° so that "
            "their target cameras coincide."
        )
    else:
        lines.append(
            f"Views do not meet: no two of {count} azimuths differ by a multiple of 60°; give an even number."
        )
    if summary["settings"]["meshes"]:
        lines.append(
            "Meshes: every two inputs, turned into one frame; the true views' row compares two samplings of "
            "the true surface."
        )
    lines += [
        "Agreement says nothing of the truth: read it beside the first table.",
        *left_out_lines(summary),
    ]
    for name, azimuths in summary["stand_ins"].items():
        degrees = ", ".join(f"{azimuth}°" for azimuth in azimuths)
        lines.append(f"{name}: no surface fits the views from {degrees}; an ellipsoid stands in.")
    if summary["by_azimuth"]:
        rows = {f"{row['azimuth_deg']:g}°": row for row in summary["by_azimuth"]}
        lines += ["", "The model by input azimuth, from the side that faces +Z in the file:", ""]
        lines.append(markdown_table(rows))
    lines += group_lines(summary, COLUMNS)
    return "\n".join(lines) + "\n"
