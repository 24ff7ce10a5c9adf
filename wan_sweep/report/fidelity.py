"""How far each job's output is from that of the sweep's reference job."""

from collections.abc import Mapping, Sequence

from wan_sweep.record import Record
from wan_sweep.report.sheet import Row, Sheet, job_list

PSNR = "fidelity/psnr_db"
SSIM = "fidelity/ssim"
MAX_DIFF = "fidelity/max_abs_diff"
LATENTS_MAX_DIFF = "fidelity/latents_max_abs_diff"
LATENTS_PSNR = "fidelity/latents_psnr_db"
IS_EQUAL = "fidelity/is_bit_equal"

EQUAL = "equal"
REFERENCE = "reference"
SAME_VIDEO = "same video"


def has_fidelity(sheet: Sheet) -> bool:
    """Return whether any job says how its output compares, or why it does not."""
    return any(record.fidelity or IS_EQUAL in record.metrics for record in sheet.records)


def is_reference(row: Row) -> bool:
    """Return whether a job of this configuration is one that others are compared with."""
    return any((record.fidelity or {}).get("reference") == record.name for record in row.records)


def fidelity_cell(row: Row) -> str | None:
    """Return "equal", "reference", or the worst PSNR in dB over the repeats; None where nothing was compared."""
    equal, psnr, most = row.spread(IS_EQUAL), row.spread(PSNR), row.spread(MAX_DIFF)
    if equal is None or equal.low == 1:
        return REFERENCE if is_reference(row) else EQUAL if equal else None
    if psnr:
        return f"{psnr.low:.1f}"
    return SAME_VIDEO if most and most.high == 0 else None


def fidelity(sheet: Sheet) -> list[str]:
    """Return how outputs compare, equal distances together, and why some were not compared."""
    said: dict[tuple[str, str], list[Row]] = {}
    for row in sheet.rows:
        cell = fidelity_cell(row)
        told = _told_of(row)
        if cell not in {None, REFERENCE}:
            said.setdefault((_name(told.get("reference", ""), sheet), _distance(row, cell)), []).append(row)
        elif cell is None and told.get("reason"):
            said.setdefault(("", told["reason"].rstrip(".")), []).append(row)
    return [
        *(
            f"Compared with {reference}: {job_list(rows)}: {words}."
            if reference
            else f"Not compared: {job_list(rows)}: {words}."
            for (reference, words), rows in said.items()
        ),
        *_repeats(sheet),
    ]


def _repeats(sheet: Sheet) -> list[str]:
    """Return whether the runs of one configuration generated the same, where any ran more than once."""
    found = {row.number: are_repeats_equal(row.measured) for row in sheet.rows}
    words = {True: "All runs of a configuration are equal to the bit", False: "Runs of a configuration differ"}
    return [
        f"{said}: {job_list(rows)}."
        for is_equal, said in words.items()
        if (rows := [row for row in sheet.rows if found[row.number] is is_equal])
    ]


def are_repeats_equal(records: Sequence[Record]) -> bool | None:
    """Return whether runs of one configuration gave equal latents and frames; None where fewer than two tell."""
    told = [dict(record.outputs) for record in records if record.outputs]
    return all(one == told[0] for one in told) if len(told) > 1 else None


def row_words(row: Row) -> str:
    """Return how the output of one configuration compares, or why it was not compared; empty where nothing is known."""
    cell = fidelity_cell(row)
    told = _told_of(row)
    if cell in {None, REFERENCE}:
        return told.get("reason", "")
    return f"{_distance(row, cell)}, compared with {told.get('reference') or 'the reference'}"


def _distance(row: Row, cell: str | None) -> str:
    if cell == EQUAL:
        return "equal to the bit"
    distances = (
        ("PSNR {:.1f} dB", PSNR, False),
        ("SSIM {:.4f}", SSIM, False),
        ("at most {:g} of 255 levels apart", MAX_DIFF, True),
        ("latents at most {:.3g} apart", LATENTS_MAX_DIFF, True),
    )
    worst = ((words, row.spread(metric), is_high) for words, metric, is_high in distances)
    return ", ".join(words.format(one.high if is_high else one.low) for words, one, is_high in worst if one)


def _name(reference: str, sheet: Sheet) -> str:
    """Return a reference as the report calls it; by its folder where it is not of this sheet."""
    rows = [row for row in sheet.rows if any(record.name == reference for record in row.records)]
    return f"job {rows[0].number}" if rows else reference or "the reference"


def _told_of(row: Row) -> Mapping[str, str]:
    """Return what the first of a configuration's records that says anything says of its comparison."""
    return next((record.fidelity for record in row.records if record.fidelity), {})
