"""Which images of a folder are a volume: series by orientation, in order of place, with a verdict in words and in types.

Nothing is averaged over: steps are differences of positions along the normal, one by one. What can be put right by resampling
is (missing slices within reason, uneven steps, a tilted gantry), what cannot is refused and says why.
"""

import dataclasses
from collections import Counter, defaultdict
from typing import Literal

import numpy as np

from common.dicom.headers import Header
from common.dicom.pixels import decodes, stored_values, syntax_name
from common.scans import Floats

Status = Literal["ok", "repaired", "refused"]
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kinds
EVEN = 0.02  # of a step: positions are written with few digits
MULTIPLE = 0.1  # of a step by which a gap may miss a whole number of steps
LARGEST_GAP_MM = 20.0  # that interpolation may fill
SAME_PLACE_MM = 0.01
LARGEST_SHIFT_PIXEL = 0.25  # in plane over the whole stack that is left as it is
PARALLEL = 1e-3  # between unit vectors of one orientation


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing about a series: what kind of thing, what it does to the verdict, and in words."""

    code: str
    status: Status  # ok: worth knowing
    words: str


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Images of one series and orientation, in order of their place, each place once."""

    headers: list[Header]
    findings: list[Finding]

    @property
    def status(self) -> Status:
        """The verdict: the worst of the findings."""
        there = {finding.status for finding in self.findings}
        return "refused" if "refused" in there else "repaired" if "repaired" in there else "ok"

    @property
    def words(self) -> str:
        """The verdict as a sentence."""
        why = "; ".join(finding.words for finding in self.findings)
        return f"{self.status}{': ' * bool(why)}{why}"


def find_series(headers: list[Header]) -> list[Series]:
    """The series of images, each with its verdict, in order of series and orientation."""
    groups: dict[tuple[str, ...], list[Header]] = defaultdict(list)
    for header in headers:
        groups[header.study, header.series or str(header.path.parent), orientation_key(header)].append(header)
    orientations = Counter(key[:2] for key in groups)
    stacks: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for key, own in sorted(groups.items()):  # points in time may come as series of one number at the same places
        stacks[(key[0], own[0].number, stack_key(own)) if own[0].number else key].append(key)
    found = []
    for keys in stacks.values():
        kinds = orientations[keys[0][:2]]
        mixed = Finding(
            "mixed_orientations", "ok", f"the series holds {kinds} orientations or sizes, each judged alone"
        )
        found.append(judged([header for key in keys for header in groups[key]], [mixed] if kinds > 1 else []))
    return found


def stack_key(headers: list[Header]) -> str:
    """What points in time share: orientation and places; of images without a place, the series itself."""
    places = [header.position_mm for header in headers]
    if None in places:
        return headers[0].series
    rounded = sorted(tuple(round(v, 2) for v in place) for place in places if place is not None)
    return f"{orientation_key(headers[0])} {rounded}"


def orientation_key(header: Header) -> str:
    """What images of one stack share: directions, size and spacing, to the digits that scanners keep."""
    directions = [*(header.along_y or ()), *(header.along_x or ())]
    spacing = header.pixel_spacing_mm or ()
    return f"{[round(v, 3) + 0.0 for v in directions]} {header.shape} {[round(v, 4) for v in spacing]}"


def judged(headers: list[Header], known: list[Finding]) -> Series:
    """A series of images of one orientation."""
    refusal = refusal_of(headers)
    if refusal is not None:
        return Series(headers, [*known, refusal])
    place = places_mm(headers)
    order = np.argsort(place, kind="stable")
    headers, place = [headers[k] for k in order], place[order]
    headers, doubled = without_doubles(headers, place)
    findings = [*known, *doubled]
    if any(finding.status == "refused" for finding in doubled):
        return Series(headers, findings)
    findings += [*findings_of_steps(headers), *findings_of_shifts(headers), *findings_of_thickness(headers)]
    return Series(headers, [*findings, *findings_of_rescale(headers)])


def refusal_of(headers: list[Header]) -> Finding | None:
    """Why images are no volume of CT, whatever their pixels; None where they may be one."""
    first, count = headers[0], len(headers)
    if any(header.modality != "CT" for header in headers):
        return Finding("modality", "refused", f"modality {first.modality or 'not given'}; expected CT")
    if any("LOCALIZER" in header.image_type for header in headers):
        return Finding("localizer", "refused", f"{count} localizer images (scout, surview): projections, no slices")
    unplaced = sum(None in (h.position_mm, h.along_x, h.along_y, h.pixel_spacing_mm) for h in headers)
    is_secondary = all(header.sop_class.startswith(SECONDARY_CAPTURE) for header in headers)
    if not unplaced and not is_perpendicular(first):
        return Finding("geometry", "refused", "rows and columns are not perpendicular")
    if not unplaced and len(per_place := Counter(np.round(places_mm(headers), 2).tolist())) > 1:
        usual = min(per_place.values())
        if usual > 1:
            return Finding("four_dimensional", "refused",
                           f"{count} images at {len(per_place)} places, {usual} or more at each: points in time or phases, "
                           "not one volume; give one of them")  # fmt: skip
    if is_secondary:
        return Finding("secondary_capture", "refused", f"{count} secondary captures: pictures of a screen or a report")
    if unplaced:
        return Finding(
            "geometry", "refused", f"{unplaced} of {count} images say no position, orientation or pixel spacing"
        )
    if count == 1:
        return Finding("single_slice", "refused", "a single image; a volume has at least two")
    unknown = next((header for header in headers if not decodes(header)), None)
    if unknown is not None:
        return Finding(
            "codec", "refused", f"{syntax_name(unknown)} is not decoded here; convert it (dcmconv, gdcmconv)"
        )
    return None


def is_perpendicular(header: Header) -> bool:
    """Whether rows and columns are unit vectors at a right angle."""
    y, x = np.array(header.along_y), np.array(header.along_x)
    return bool(abs(y @ x) < 0.01 and abs(y @ y - 1) < 0.01 and abs(x @ x - 1) < 0.01)


def normal_of(header: Header) -> Floats:
    """The unit vector across the slices (3,), z, y, x, that with rows and columns is right-handed in DICOM's x, y, z."""
    y, x = np.array(header.along_y, float), np.array(header.along_x, float)
    normal = np.cross(x[::-1], y[::-1])[::-1]
    return np.asarray(normal / np.linalg.norm(normal), float)


def positions_mm(headers: list[Header]) -> Floats:
    """Positions (n, 3) of the first pixels."""
    return np.array([header.position_mm for header in headers], float)


def places_mm(headers: list[Header]) -> Floats:
    """Places (n,) along the normal."""
    return np.asarray(positions_mm(headers) @ normal_of(headers[0]), float)


def without_doubles(headers: list[Header], place: Floats) -> tuple[list[Header], list[Finding]]:
    """One image per place; several that are equal count once, several that differ are refused."""
    kept = [headers[0]]
    doubled, differing = 0, 0
    for header, step in zip(headers[1:], np.diff(place), strict=True):
        if step > SAME_PLACE_MM:
            kept.append(header)
            continue
        doubled += 1
        differing += not same_image(kept[-1], header)
    if differing:
        words = f"{differing} places hold different images; expected one volume (other reconstructions in one series?)"
        return kept, [Finding("duplicates", "refused", words)]
    if len(kept) == 1:
        return kept, [
            Finding("single_slice", "refused", f"{len(headers)} equal images at one place; a volume has at least two")
        ]
    words = f"{doubled} images stand twice with the same pixels; each counts once"
    return kept, [Finding("duplicates", "repaired", words)] if doubled else []


def same_image(one: Header, other: Header) -> bool:
    """Whether two images hold the same Hounsfield units."""
    if one.shape != other.shape or (one.slope, one.intercept) != (other.slope, other.intercept):
        return False
    return bool(np.array_equal(stored_values(one), stored_values(other)))


def base_step(steps: Floats) -> float:
    """The step of most slices: the median, or the smallest where gaps are as many as steps."""
    median, smallest = float(np.median(steps)), float(steps.min())
    ratio = median / smallest
    return smallest if abs(ratio - round(ratio)) < MULTIPLE and round(ratio) > 1 and len(steps) < 4 else median


def findings_of_steps(headers: list[Header]) -> list[Finding]:
    """Missing slices and uneven steps."""
    steps = np.diff(places_mm(headers))
    step = base_step(steps)
    if np.abs(steps - step).max() <= EVEN * step + 2e-3:
        return []
    times = steps / step
    whole = np.round(times)
    largest = float(steps.max())
    if (np.abs(times - whole) <= MULTIPLE).all() and whole.min() >= 1:
        missing, gaps = int((whole - 1).sum()), int((whole > 1).sum())
        words = f"{missing} slices missing in {gaps} gaps (step {step:.3g} mm, largest gap {largest:.3g} mm)"
        if largest > LARGEST_GAP_MM:
            return [Finding("missing_slices", "refused", f"{words}; more than {LARGEST_GAP_MM:g} mm are not filled")]
        return [Finding("missing_slices", "repaired", f"{words}; filled by interpolation")]
    words = f"uneven steps, {steps.min():.3g} to {largest:.3g} mm"
    if largest > LARGEST_GAP_MM:
        return [Finding("uneven_steps", "refused", f"{words}; more than {LARGEST_GAP_MM:g} mm are not filled")]
    return [Finding("uneven_steps", "repaired", f"{words}; resampled to {step:.3g} mm")]


def shifts_mm(headers: list[Header]) -> Floats:
    """How far each slice's first pixel lies from the line along the normal through that of the first slice (n, 2), y, x."""
    position, first = positions_mm(headers), headers[0]
    across = position - position[0]
    return np.stack([across @ np.array(first.along_y), across @ np.array(first.along_x)], 1)


def findings_of_shifts(headers: list[Header]) -> list[Finding]:
    """A tilted gantry, or slices that lie beside each other."""
    shifts, place = shifts_mm(headers), places_mm(headers)
    spacing = np.array(headers[0].pixel_spacing_mm)
    if (np.abs(shifts) <= LARGEST_SHIFT_PIXEL * spacing).all():
        return []
    depth = place - place[0]
    slope = (depth @ shifts) / (depth @ depth)  # mm in plane per mm across, y, x
    rest = np.abs(shifts - depth[:, None] * slope).max(0)
    degrees = float(np.degrees(np.arctan(np.linalg.norm(slope))))
    if (rest <= LARGEST_SHIFT_PIXEL * spacing).all():
        return [Finding("tilt", "repaired", f"stack sheared by {degrees:.1f} degrees (tilted gantry); straightened")]
    words = f"slices lie up to {np.abs(shifts).max():.3g} mm beside each other; each moved to its place"
    return [Finding("shifted_slices", "repaired", words)]


def findings_of_thickness(headers: list[Header]) -> list[Finding]:
    """Overlapping slices, and gaps between them: both keep their places."""
    thickness = headers[0].thickness_mm
    if thickness is None or thickness <= 0 or len(headers) < 2:
        return []
    step = base_step(np.diff(places_mm(headers)))
    if thickness > 1.05 * step:
        return [Finding("overlap", "ok", f"slices of {thickness:.3g} mm every {step:.3g} mm overlap; positions count")]
    if thickness < 0.95 * step:
        return [Finding("apart", "ok", f"slices of {thickness:.3g} mm every {step:.3g} mm leave gaps; positions count")]
    return []


def findings_of_rescale(headers: list[Header]) -> list[Finding]:
    """Slopes and intercepts that are missing or differ from slice to slice."""
    missing = sum(header.slope is None or header.intercept is None for header in headers)
    if missing:
        words = f"{missing} of {len(headers)} images give no rescale slope or intercept; taken as 1 and 0"
        return [Finding("no_rescale", "ok", words)]
    pairs = {(header.slope, header.intercept) for header in headers}
    if len(pairs) > 1:
        return [
            Finding("rescale_varies", "ok", f"{len(pairs)} pairs of slope and intercept, each applied to its slice")
        ]
    return []
