"""The constants of the simulated tomograms, with units and reasons, and what makes a value impossible."""

import dataclasses
from collections.abc import Iterator

Range = tuple[float, float]  # lowest and highest value of a uniform draw


@dataclasses.dataclass(frozen=True)
class MotorPhantom:
    """Simulated cryo-electron tomograms of bacteria with and without flagellar motors."""

    seed: int = 0
    train_tomograms: int = 120  # folds 2, 3, 4 in turn
    validation_tomograms: int = 40  # fold 0: where thresholds are chosen
    test_tomograms: int = 48  # fold 1: where figures are reported
    shape: tuple[int, int, int] = (64, 208, 224)  # voxels z, y, x: at 15 angstrom about 0.1 x 0.31 x 0.34 micrometres
    shape_jitter: float = 0.06  # share by which an axis shrinks or grows, so that no axis can be taken for another
    spacings_angstrom: tuple[float, ...] = (13.1, 15.6, 16.8, 19.7)  # the four most frequent of the BYU 2025 data

    # What is in the ice
    motor_free_share: float = 0.4  # BYU 2025: 286 of 648 tomograms have no motor
    several_motors_share: float = 0.25  # of tomograms with a motor; then two to four of them
    close_pair_share: float = 0.5  # of tomograms with several motors: the second is closer than 1000 angstrom
    second_cell_share: float = 0.3
    no_cell_share: float = 0.1  # of motor-free tomograms: ice and contamination only
    hookless_share: float = 0.3  # motors seen without hook and filament: under assembly, or sheared off
    stator_share: float = 0.8  # motors whose ring of stators is engaged
    cell_radius_angstrom: Range = (2200.0, 4500.0)  # thin rods, the cells that electrons pass
    periplasm_angstrom: Range = (250.0, 310.0)  # inner to outer membrane
    undulation_angstrom: Range = (15.0, 60.0)  # amplitude of the envelope's waves
    motor_scale: Range = (0.92, 1.12)  # species differ in the C-ring's width
    motor_density: Range = (0.9, 1.15)  # occupancy of the rings, in units of protein
    motor_margin_angstrom: float = 150.0  # from the motor's centre to every face: most of the ring stays visible
    closest_motors_angstrom: float = 450.0  # two motors never share a ring; BYU's closest pair is 432 apart
    steepest_normal: float = 0.8  # largest |z| of a motor's axis: the wedge blinds membranes lying flat

    # What looks like a motor to a simple filter
    ribosomes_per_cubic_micrometre: float = 12000.0  # about half of a growing cell's, for the thin cells
    envelope_decoys: tuple[int, int] = (1, 4)  # per cell: discs and plugs at the membrane, without rod and rings
    array_share: float = 0.5  # of cells: a chemoreceptor array under the inner membrane
    vesicles: tuple[int, int] = (1, 4)
    granules: tuple[int, int] = (1, 4)  # polyphosphate storage granules
    granule_radius_angstrom: Range = (130.0, 300.0)
    filaments: tuple[int, int] = (0, 3)  # loose flagella, pili and cytoskeleton
    gold_beads: tuple[int, int] = (3, 12)
    gold_density: float = 8.0  # gold scatters about ten times as strongly as protein in ice
    carbon_share: float = 0.25  # tomograms that show the edge of the carbon film
    texture: float = 0.25  # standard deviation of the crowded cytoplasm, in units of protein

    # The microscope, at 300 kV
    tilt_limit_degrees: float = 60.0  # tilts of -60 to 60 degrees about the y axis
    defocus_micrometre: Range = (4.0, 8.0)  # cellular tomography trades resolution for contrast
    spherical_aberration_mm: float = 2.7
    amplitude_contrast: float = 0.07
    b_factor_angstrom2: Range = (2000.0, 5000.0)  # radiation damage, misalignment of tilts and interpolation
    dose_electrons_per_angstrom2: Range = (60.0, 140.0)  # over the whole tilt series
    quantum_efficiency: float = 0.5  # share of electrons that inform: detector, inelastic loss in 0.3 micrometre ice
    protein_potential_volt: float = 2.5  # mean inner potential of protein above vitreous ice
    detector_noise: float = 0.2  # white noise after reconstruction, as a share of the shot noise
    intensity_ramp: float = 0.5  # ice thickness: grey-level slope across the field, in image standard deviations
    clipped_percent: float = 0.4  # of voxels at either end of the grey scale, as in exported 8-bit tomograms
    jpeg_quality: int = 95

    def problems(self) -> Iterator[str]:
        """Yield one line per impossible value."""
        for name in ("seed", "train_tomograms", "validation_tomograms", "test_tomograms"):
            if getattr(self, name) < 0:
                yield f"{name}: expected 0 or more, got {getattr(self, name)}"
        if min(self.shape) < 48:
            yield f"shape: expected at least 48 voxels on every axis, got {self.shape}"
        if not self.spacings_angstrom or min(self.spacings_angstrom, default=0.0) < 5:
            yield f"spacings_angstrom: expected one or more of at least 5 angstrom, got {self.spacings_angstrom}"
        yield from self._impossible_ranges()
        for field in dataclasses.fields(self):
            if field.name.endswith("_share") and not 0 <= getattr(self, field.name) <= 1:
                yield f"{field.name}: expected a share between 0 and 1, got {getattr(self, field.name)}"
        if not 0 <= self.shape_jitter <= 0.2:
            yield f"shape_jitter: expected 0 to 0.2, got {self.shape_jitter}"
        if not 20 <= self.tilt_limit_degrees < 90:
            yield f"tilt_limit_degrees: expected 20 to below 90, got {self.tilt_limit_degrees}"
        if not 0 < self.quantum_efficiency <= 1:
            yield f"quantum_efficiency: expected above 0, at most 1, got {self.quantum_efficiency}"
        if not 0 <= self.clipped_percent < 50:
            yield f"clipped_percent: expected 0 to below 50, got {self.clipped_percent}"
        if not 1 <= self.jpeg_quality <= 95:
            yield f"jpeg_quality: expected 1 to 95, got {self.jpeg_quality}"

    def _impossible_ranges(self) -> Iterator[str]:
        may_be_zero = ("envelope_decoys", "vesicles", "granules", "filaments", "gold_beads", "undulation_angstrom")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("shape", "spacings_angstrom") or not isinstance(value, tuple):
                continue
            if (
                len(value) != 2
                or value[0] > value[1]
                or value[0] < 0
                or (value[0] == 0 and field.name not in may_be_zero)
            ):
                yield f"{field.name}: expected lowest and highest value, in this order and positive, got {value}"
        half_depth = min(self.shape) * (1 - self.shape_jitter) * min(self.spacings_angstrom, default=0.0) / 2
        if not 0 <= self.motor_margin_angstrom < 0.8 * half_depth:
            yield f"motor_margin_angstrom: expected 0 to below {0.8 * half_depth:.0f}, got {self.motor_margin_angstrom}"
