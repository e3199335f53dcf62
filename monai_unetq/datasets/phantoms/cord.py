"""A phantom of axial T2*-weighted MRI of the spinal cord in the neck, with its grey matter, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ..cases import Case
from .arguments import check_arguments
from .noise import Field, smooth_noise
from .shapes import coverage, ellipsoid, paint, tube

__all__ = ["cord_phantom"]


def cord_phantom(count: int = 8, size: int = 128, seed: int = 0, dimensions: int = 2) -> list[Case]:
    """Draw axial slices of necks that look like T2*-weighted MRI of the cervical spinal cord.

    Within the outline of a neck with muscles, fat, vessels, windpipe and a dark vertebra, the cord lies off
    the centre in bright cerebrospinal fluid: white matter, and in it the brighter grey matter in the shape
    of an H or butterfly, with wide horns to the front and thin ones to the back. The forms change slowly
    from slice to slice and much from person to person. Each person has another scanner, that is another
    spacing, contrast, noise, sensitivity of the coil and scale of the intensities. Muscle is as
    bright as white matter, fat and borders of tissues as grey matter, so that brightness alone does not tell
    it.

    Cord (about 90 mm²) and grey matter (15 to 25 mm²) have the size and contrast that they have in public
    data of the neck; the neck is scaled to the field of view.

    Slices of one person are correlated: split by group. The numbers come from one
    ``numpy.random.Generator`` (PCG64); the same arguments give the same cases, whatever the global random
    state. The 2D cases are slices of the 3D cases of the same arguments.

    Args:
        count: persons, at least 1.
        size: height and width in px, at least 48.
        seed: a number from 0.
        dimensions: 2 for one case a slice, 3 for one case a person.

    Returns:
        In 2D four to six cases a person, named ``"person01_00"``, … by person and slice of the volume; image
        (1, size, size), spacing (row, column) in mm. In 3D one case a person, named ``"person01"``, …; image
        (1, D, size, size) with 10 to 14 slices, spacing (slice, row, column) in mm. Spacing is 0.5 to 0.8 mm
        in the slice and 2.5 to 5 mm between slices. Images are float32, whole numbers from 0 in the
        scanner's own scale; labels uint8 of the same shape, 1 = grey matter. Rows run from front to back,
        columns from the person's right to left, slices from foot to head. The group is the person.

    Raises:
        ValueError: count, size or seed is too small, or dimensions is neither 2 nor 3.
    """
    check_arguments("cord_phantom", count, size, seed, dimensions, least_size=48)
    generator = np.random.default_rng(seed)
    cases: list[Case] = []
    for person in range(1, count + 1):
        group = f"person{person:02d}"
        scanner = _Scanner.draw(generator)
        slices = int(generator.integers(10, 15))
        chosen = np.rint(np.linspace(0, slices - 1, int(generator.integers(4, 7)))).astype(int)
        image, label = _neck((slices, size, size), scanner, generator)
        if dimensions == 3:
            spacing = (scanner.distance, scanner.spacing, scanner.spacing)
            cases.append(Case(group, image[np.newaxis], label[np.newaxis], spacing, group))
            continue
        cases += [
            Case(
                f"{group}_{index:02d}",
                image[index, np.newaxis],
                label[index, np.newaxis],
                (scanner.spacing, scanner.spacing),
                group,
            )
            for index in chosen
        ]
    return cases


@dataclass(frozen=True)
class _Scanner:
    """How one person is recorded. Brightness is relative to that of grey matter.

    Attributes:
        spacing: mm from pixel to pixel.
        distance: mm from slice to slice.
        gain: intensity of grey matter in the middle of the image.
        noise: standard deviation of the noise of one channel.
        shading: standard deviation of the logarithm of the coil's sensitivity.
        white: brightness of white matter.
        fluid: brightness of cerebrospinal fluid.
        muscle: brightness of muscle.
        fat: brightness of fat.
        bone: brightness of bone.
    """

    spacing: float
    distance: float
    gain: float
    noise: float
    shading: float
    white: float
    fluid: float
    muscle: float
    fat: float
    bone: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> _Scanner:
        return cls(
            spacing=round(generator.uniform(0.5, 0.8), 3),
            distance=round(generator.uniform(2.5, 5.0), 1),
            gain=math.exp(generator.uniform(math.log(300.0), math.log(3000.0))),
            noise=generator.uniform(0.025, 0.05),
            shading=generator.uniform(0.04, 0.11),
            white=generator.uniform(0.80, 0.85),
            fluid=generator.uniform(1.45, 1.9),
            muscle=generator.uniform(0.6, 0.82),
            fat=generator.uniform(0.7, 1.05),
            bone=generator.uniform(0.2, 0.4),
        )


@dataclass(frozen=True)
class _Frame:
    """Where the pixels of a neck lie.

    Attributes:
        shape: slices, rows, columns.
        scanner: it gives the spacings.
        generator: source of what varies.
        y: mm to the back of the cord's centre, shape of the image.
        x: mm to the left of the cord's centre, shape of the image.
    """

    shape: tuple[int, int, int]
    scanner: _Scanner
    generator: np.random.Generator
    y: Field
    x: Field

    def field(self, through: float, within: float) -> Field:
        """Smooth noise with these scales in mm through and within the slices."""
        distance, spacing = self.scanner.distance, self.scanner.spacing
        scale = (through / distance, within / spacing, within / spacing)
        return smooth_noise(self.shape, scale, self.generator)

    def course(self, mean: float, deviation: float, through: float = 14.0) -> Field:
        """A number that varies from slice to slice, within two deviations, shape (slices, 1, 1)."""
        noise = smooth_noise(self.shape[:1], (through / self.scanner.distance,), self.generator)
        return (mean + deviation * np.clip(noise, -2.0, 2.0))[:, np.newaxis, np.newaxis]


def _neck(
    shape: tuple[int, int, int], scanner: _Scanner, generator: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Image and label of one person, in the given shape."""
    slices, size, _ = shape
    view = size * scanner.spacing  # mm
    along = (np.arange(slices) - (slices - 1) / 2)[:, np.newaxis, np.newaxis] * scanner.distance
    pixel = (np.arange(size) - (size - 1) / 2) * scanner.spacing
    frame = _Frame(shape, scanner, generator, np.zeros(shape), np.zeros(shape))
    lean = generator.uniform(-0.04, 0.04, 2)  # the cord is not perpendicular to the slices
    reach = (view - 20.0) / 4  # keeps the cord in the image
    middle = generator.uniform(-0.6, 0.6, 2) * (reach, min(reach, 0.15 * view))
    y = pixel[np.newaxis, :, np.newaxis] - middle[0] - lean[0] * along - frame.course(0.0, 0.4)
    x = pixel[np.newaxis, np.newaxis, :] - middle[1] - lean[1] * along - frame.course(0.0, 0.4)
    roll = frame.course(generator.uniform(-0.1, 0.1), 0.02)
    frame = _Frame(
        shape, scanner, generator, np.cos(roll) * y - np.sin(roll) * x, np.cos(roll) * x + np.sin(roll) * y
    )

    height = frame.course(generator.uniform(4.0, 4.6), 0.12)  # half axes of the cord, mm
    width = frame.course(generator.uniform(6.1, 7.0), 0.2)
    canal_height = height + frame.course(generator.uniform(1.8, 3.2), 0.3)
    canal_width = width + frame.course(generator.uniform(2.5, 4.0), 0.4)
    image = _surroundings(frame, view, middle, canal_height, canal_width)
    _fluid(image, frame, canal_height, canal_width)
    _white_matter(image, frame, height, width)
    grey = _grey_matter(frame, height, width)
    paint(image, coverage(grey, scanner.spacing), 1.0 + 0.02 * frame.field(6.0, 2.0))
    label = grey + 0.12 * frame.field(3.0, 1.2) < 0.0  # the annotator's hand
    return _record(image, frame), label.astype(np.uint8)


def _surroundings(
    frame: _Frame, view: float, middle: Field, canal_height: Field, canal_width: Field
) -> Field:
    """Everything but the canal: neck, muscles, vertebra, windpipe, vessels."""
    scanner, generator, y, x = frame.scanner, frame.generator, frame.y, frame.x
    pixel = scanner.spacing
    image = np.zeros(frame.shape)
    bend = frame.field(30.0, 12.0)

    half_width = view * generator.uniform(0.38, 0.46)
    half_height = half_width * generator.uniform(0.85, 1.0)
    front = -0.3 * middle[0] - generator.uniform(0.2, 0.35) * half_height  # the neck's centre from the cord's
    side = -0.6 * middle[1]
    skin = ellipsoid((y - front, x - side), (half_height, half_width)) + 0.015 * view * bend
    paint(image, coverage(skin, pixel), scanner.fat)
    flesh = skin + generator.uniform(0.02, 0.05) * view
    muscle = scanner.muscle * (1.0 + 0.08 * frame.field(12.0, 3.0))
    paint(image, coverage(flesh, pixel), muscle)
    for scale in (11.0, 6.0):  # sheaths between muscles: bright fat around a dark line
        sheath = np.abs(frame.field(20.0, scale))
        paint(image, np.where(flesh < 0.0, np.exp(-np.square(sheath / 0.20)), 0.0), scanner.fat)
        paint(image, np.where(flesh < 0.0, np.exp(-np.square(sheath / 0.09)), 0.0), 0.4 * scanner.muscle)

    depth = generator.uniform(6.5, 8.5)
    body = ellipsoid(
        (y + canal_height + depth + 0.5, x), (depth, generator.uniform(8.5, 11.0))
    ) + 0.6 * frame.field(8.0, 4.0)
    marrow = scanner.bone * (1.0 + 0.25 * frame.field(4.0, 1.5)) + 0.25 * coverage(body + 2.0, 2.0)
    marrow *= 1.0 + 0.4 * np.sin(
        frame.course(generator.uniform(0.0, 6.0), 2.0, 20.0)
    )  # bone and disc in turn
    paint(image, coverage(body, pixel), np.maximum(marrow, 0.05))
    top = canal_height + generator.uniform(1.5, 3.0)
    for arm in (-1.0, 1.0):
        arch = tube((y, x), ((top, 0.0), (0.0, arm * (canal_width + 3.5))), (1.8, 2.4))
        paint(image, coverage(arch + 0.4 * bend, pixel), scanner.bone)
    spine = tube((y, x), ((top, 0.0), (top + generator.uniform(8.0, 16.0), 0.0)), (2.2, 1.6))
    paint(image, coverage(np.maximum(spine, flesh) + 0.4 * bend, pixel), scanner.bone)

    windpipe = ellipsoid(
        (y + canal_height + 2 * depth + generator.uniform(6.0, 10.0), x - generator.normal(0.0, 1.5)),
        (generator.uniform(3.5, 5.5), generator.uniform(6.0, 9.0)),
    )
    paint(image, coverage(windpipe + 0.5 * bend, pixel), 0.03)
    for arm in (-1.0, 1.0):
        for _ in range(3):
            away = generator.uniform(4.0, 14.0)
            vessel = ellipsoid(
                (
                    y + generator.uniform(0.0, 14.0) + frame.course(0.0, 0.5),
                    x - arm * (canal_width + away) + frame.course(0.0, 0.5),
                ),
                generator.uniform(1.2, 2.8, 2).tolist(),
            )
            paint(image, coverage(np.maximum(vessel, flesh), pixel), generator.uniform(0.9, 1.8))
    return image


def _fluid(image: Field, frame: _Frame, height: Field, width: Field) -> None:
    """Paint the canal: a dark sheath, bright fluid with pulsation, and roots of nerves in it."""
    scanner, generator, y, x = frame.scanner, frame.generator, frame.y, frame.x
    # The cord lies in the front half of the canal; the canal is flat where it meets the vertebra.
    canal = ellipsoid((y - 0.4 - 0.12 * height, x), (height, width)) + 0.35 * frame.field(12.0, 5.0)
    canal = np.maximum(canal, -(y + height + generator.uniform(-0.8, 0.2)))
    paint(image, coverage(canal - 0.8, scanner.spacing), 0.35)
    paint(image, coverage(canal, scanner.spacing), scanner.fluid * (1.0 + 0.05 * frame.field(5.0, 3.0)))
    for arm in (-1.0, 1.0):
        for level in (-0.3, 0.35):
            root = ellipsoid(
                (
                    y - frame.course(level, 0.15) * height,
                    x - arm * (width - generator.uniform(1.5, 2.5)) - frame.course(0.0, 0.3),
                ),
                (0.45, 0.8),
            )
            inside = coverage(root, scanner.spacing) * (canal < -0.3)
            paint(image, inside, 0.85 * scanner.white)


def _white_matter(image: Field, frame: _Frame, height: Field, width: Field) -> None:
    """Paint the cord, with the fissure that enters it from the front and the septum at the back."""
    scanner, y, x = frame.scanner, frame.y, frame.x
    cord = ellipsoid((y, x), (height, width)) + 0.15 * frame.field(8.0, 3.0)
    paint(image, coverage(cord, scanner.spacing), scanner.white * (1.0 + 0.03 * frame.field(6.0, 1.5)))
    fissure = tube((y, x), ((-height, 0.0), (-0.35 * height, frame.course(0.0, 0.1))), (0.3, 0.1))
    paint(image, 0.8 * coverage(fissure, scanner.spacing), 0.5 * (1.0 + scanner.fluid))
    septum = tube((y, x), ((0.35 * height, frame.course(0.0, 0.1)), (height, 0.0)), (0.1, 0.2))
    paint(image, 0.5 * coverage(septum, scanner.spacing), 0.85 * scanner.white)


def _grey_matter(frame: _Frame, height: Field, width: Field) -> Field:
    """Signed distance in mm to the surface of the grey matter."""
    generator, y, x = frame.generator, frame.y, frame.x
    centre = frame.course(generator.uniform(-0.05, 0.05), 0.02) * height
    bar = frame.course(generator.uniform(0.16, 0.24), 0.015) * width  # from the middle to where horns begin
    thickness = frame.course(generator.uniform(0.4, 0.55), 0.04)
    front = (generator.uniform(-0.5, -0.36), generator.uniform(0.30, 0.42), generator.uniform(0.85, 1.1))
    back = (generator.uniform(0.55, 0.72), generator.uniform(0.42, 0.58), generator.uniform(0.45, 0.58))
    swelling = frame.course(1.0, 0.08)  # of the front horns, where nerves of the arm arise
    grey = tube((y, x), ((centre, -bar), (centre, bar)), (thickness, thickness))
    for arm in (-1.0, 1.0):
        knee = (centre, arm * bar)
        tip = (
            frame.course(front[0], 0.03) * height,
            arm * frame.course(front[1], 0.025) * width * swelling,
        )
        grey = np.minimum(grey, tube((y, x), (knee, tip), (1.1 * thickness, front[2] * swelling)))
        neck = (
            centre + frame.course(0.45, 0.04) * (back[0] * height - centre),
            arm * (bar + frame.course(0.4, 0.05) * (back[1] * width - bar)),
        )
        end = (frame.course(back[0], 0.03) * height, arm * frame.course(back[1], 0.03) * width)
        grey = np.minimum(grey, tube((y, x), (knee, neck, end), (1.1 * thickness, 0.9 * back[2], back[2])))
    return grey + 0.10 * frame.field(4.0, 1.5)


def _record(image: Field, frame: _Frame) -> npt.NDArray[np.float32]:
    """Sensitivity of the coil, blur, noise of a magnitude image (Rice's distribution), whole numbers."""
    scanner, generator = frame.scanner, frame.generator
    view = image.shape[1] * scanner.spacing
    slope = generator.uniform(-1.0, 1.0, 2) * 2.5 * scanner.shading
    shading = scanner.shading * frame.field(60.0, view / 3) + (slope[0] * frame.y + slope[1] * frame.x) / view
    image = ndimage.gaussian_filter(image, (0.0, 0.45, 0.45)) * np.exp(shading)
    real = image + scanner.noise * generator.standard_normal(image.shape)
    magnitude = np.hypot(real, scanner.noise * generator.standard_normal(image.shape))
    recorded: npt.NDArray[np.float32] = np.rint(scanner.gain * magnitude).astype(np.float32)
    return recorded
