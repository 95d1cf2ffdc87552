"""The constants of the simulated electron-microscopy volumes, with units and reasons, and what makes a value impossible."""

import dataclasses
from collections.abc import Iterator

Range = tuple[float, float]  # lowest and highest value of a uniform draw
ROLES = ("train", "validation", "test")
FAULTS = ("missing", "shifted", "folded", "scratched", "blurred", "charged")  # of sections


@dataclasses.dataclass(frozen=True)
class EMPhantom:
    """Simulated neuropil: sections of a block packed with neurites, their membranes, mitochondria and synapses."""

    seed: int = 0
    train_volumes: int = 3
    validation_volumes: int = 1  # where thresholds are chosen
    test_volumes: int = 1  # where figures are reported
    shape: tuple[int, int, int] = (72, 192, 192)  # voxels z, y, x: 1.7 x 2.3 x 2.3 micrometres
    voxel_size_nm: tuple[float, float, float] = (
        24.0,
        12.0,
        12.0,
    )  # z, y, x: between FIB-SEM (8 isotropic) and serial sections (40 x 4 x 4)

    # Neurites
    thick_share: float = 0.24  # of the volume: dendrites and trunks
    thick_radius_nm: Range = (160.0, 360.0)
    thin_radius_nm: Range = (60.0, 130.0)  # axons and twigs; swellings reach twice as far
    sheet_share: float = 0.05  # of the volume: glia, winding between the tubes
    sheet_radius_nm: float = 28.0  # half its thickness
    packing: float = 1.15  # tubes' volume over the block's before they push each other aside
    bundle_share: float = 0.4  # of thin neurites that run beside others
    branch_share: float = 0.4  # of thick neurites that fork once
    ending_share: float = 0.2  # of neurites that end inside the block
    spines_per_micrometre: float = 1.0  # of thick neurites' length
    swellings_per_micrometre: float = 0.7  # of thin neurites' length: boutons
    persistence_nm: float = 1400.0  # path over which a neurite forgets its direction
    warp_nm: Range = (46.0, 13.0)  # amplitude of the coarse and the fine distortion that makes outlines irregular
    warp_length_nm: Range = (150.0, 55.0)  # their correlation lengths
    smallest_instance_voxels: int = 150  # smaller pieces go to a neighbour

    # Membranes
    membrane_nm: Range = (8.0, 12.0)  # thickness of either neurite's membrane, drawn on each side of their face
    gap_nm: float = 12.0  # between two neurites: voxels of label 0
    weak_share: float = 0.12  # of the membranes' area where contrast fades
    weak_contrast: float = 0.25  # what is left of it there

    # Inside neurites
    mitochondria_share: float = 0.07  # of the volume
    mitochondrion_radius_nm: Range = (95.0, 260.0)
    mitochondrion_length_nm: Range = (300.0, 1500.0)
    cristae_period_nm: Range = (62.0, 95.0)
    lysosomes_per_cubic_micrometre: float = (
        2.2  # dark and round without cristae: no mitochondria; a third multivesicular
    )
    lysosome_radius_nm: Range = (70.0, 170.0)
    dark_neurite_share: float = 0.07  # neurites whose cytoplasm is as dark as a mitochondrion's matrix
    microtubules_per_neurite: tuple[int, int] = (0, 7)
    reticulum_share: float = 0.22  # of the cytoplasm where sheets of endoplasmic reticulum may run
    synapses_per_cubic_micrometre: float = 2.0
    synapse_radius_nm: Range = (90.0, 170.0)
    synapse_depth_nm: float = 34.0  # of the density behind the postsynaptic face
    vesicles_per_synapse: tuple[int, int] = (20, 70)
    vesicle_radius_nm: Range = (17.0, 24.0)
    loose_vesicles_per_cubic_micrometre: float = 30.0  # half of them with a dense core

    # Grey levels before imaging, 0 black to 255 white
    cytoplasm_grey: Range = (146.0, 188.0)  # drawn per neurite
    dark_cytoplasm_grey: Range = (100.0, 124.0)
    membrane_grey: float = 62.0
    matrix_grey: Range = (92.0, 122.0)  # drawn per mitochondrion
    lysosome_grey: Range = (58.0, 104.0)
    density_grey: float = 48.0
    texture_grey: float = 13.0  # standard deviation of the cytoplasm's grain
    texture_nm: float = 13.0  # its size

    # The microscope
    point_spread_nm: float = 8.0  # standard deviation in the plane
    white_noise_grey: float = 8.0
    correlated_noise_grey: float = 5.0  # over one to two voxels
    brightness_grey: float = 4.0  # standard deviation between sections
    contrast_share: float = 0.06  # standard deviation of the contrast between sections
    shading_grey: float = 9.0  # slow change across the field
    curtain_grey: float = 3.0  # standard deviation of stripes along y that go on through sections

    # Spoilt sections: shares of all sections; one section has at most one fault
    missing_share: float = 0.012  # black, or a copy of the section before
    shifted_share: float = 0.04
    largest_shift_voxels: int = 3
    folded_share: float = 0.01
    scratched_share: float = 0.012
    blurred_share: float = 0.02
    charged_share: float = 0.015

    def problems(self) -> Iterator[str]:
        """Yield one line per impossible value."""
        for name in ("seed", "train_volumes", "validation_volumes", "test_volumes", "largest_shift_voxels"):
            if getattr(self, name) < 0:
                yield f"{name}: expected 0 or more, got {getattr(self, name)}"
        lengths = len(self.shape) == 3 and min(self.shape) >= 16
        if not lengths:
            yield f"shape: expected three lengths of at least 16 voxels, got {self.shape}"
        if len(self.voxel_size_nm) != 3 or not 4 <= min(self.voxel_size_nm) <= max(self.voxel_size_nm) <= 60:
            yield f"voxel_size_nm: expected three sizes between 4 and 60 nm (z, y, x), got {self.voxel_size_nm}"
        elif lengths and min(n * size for n, size in zip(self.shape, self.voxel_size_nm, strict=True)) < 300:
            yield f"shape: expected at least 300 nm on every axis, got {self.shape} voxels of {self.voxel_size_nm} nm"
        yield from self._impossible_ranges()
        yield from self._impossible_shares()
        yield from self._impossible_numbers()

    def _impossible_ranges(self) -> Iterator[str]:
        pairs = ("warp_nm", "warp_length_nm")  # coarse and fine, in this order
        may_be_zero = ("microtubules_per_neurite", "vesicles_per_synapse", "warp_nm")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("shape", "voxel_size_nm") or not isinstance(value, tuple):
                continue
            low, high = (min(value), max(value)) if field.name in pairs and len(value) == 2 else (value[0], value[-1])
            if len(value) != 2 or low > high or low < 0 or (low == 0 and field.name not in may_be_zero):
                yield f"{field.name}: expected lowest and highest value, in this order and positive, got {value}"
            elif field.name.endswith("_grey") and high > 255:
                yield f"{field.name}: expected grey levels up to 255, got {value}"

    def _impossible_shares(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            if field.name.endswith("_share") and not 0 <= getattr(self, field.name) <= 1:
                yield f"{field.name}: expected a share between 0 and 1, got {getattr(self, field.name)}"
        if self.thick_share + self.sheet_share > 0.9:
            yield f"thick_share + sheet_share: expected at most 0.9, got {self.thick_share + self.sheet_share:g}"
        if self.mitochondria_share > 0.3:
            yield f"mitochondria_share: expected at most 0.3, got {self.mitochondria_share}"
        spoilt = [getattr(self, f"{fault}_share") for fault in FAULTS]
        if max(spoilt) <= 1 < sum(spoilt):
            yield f"missing_share to charged_share: expected a sum of at most 1, got {sum(spoilt):g}"

    def _impossible_numbers(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_nm", "_micrometre", "_grey")) and isinstance(value, float) and value < 0:
                yield f"{field.name}: expected 0 or more, got {value}"
        if not 0 <= self.weak_contrast <= 1:
            yield f"weak_contrast: expected 0 to 1, got {self.weak_contrast}"
        if not 0.3 <= self.packing <= 2:
            yield f"packing: expected 0.3 to 2, got {self.packing}"
        if self.persistence_nm < 100:
            yield f"persistence_nm: expected at least 100, got {self.persistence_nm}"
        if self.smallest_instance_voxels < 1:
            yield f"smallest_instance_voxels: expected 1 or more, got {self.smallest_instance_voxels}"
        if 4 * self.largest_shift_voxels > min(self.shape[1:], default=0):
            yield f"largest_shift_voxels: expected at most a quarter of the section, got {self.largest_shift_voxels}"
