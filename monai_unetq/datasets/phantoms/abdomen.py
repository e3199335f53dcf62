"""A phantom of axial CT of the upper abdomen, with its pancreas, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ..cases import Case
from .arguments import check_arguments
from .noise import Field, smooth_noise
from .shapes import coverage, ellipsoid, paint, tube

__all__ = ["abdomen_phantom"]

AIR, FAT = -1000.0, -100.0  # HU
HIGHEST = 1500.0  # HU
SLICES_PER_PATIENT = 5  # in 2D
SLICE_DISTANCE = 5.0  # mm
Point = tuple[float, float, float]


def abdomen_phantom(count: int = 8, size: int = 128, seed: int = 0, dimensions: int = 2) -> list[Case]:
    """Draw axial slices that look like CT of the upper abdomen after contrast medium.

    Within a wall of skin, fat, muscle and ribs lie spine, liver, spleen, kidneys, stomach, bowel with air
    and contrast medium, great vessels, and a pancreas: an elongated, lobulated organ that runs from its head
    beside the duodenum in front of the vena cava over the aorta to its tail at the spleen, upwards on its
    way, with fat in its clefts and the splenic and mesenteric veins along it. Place, course, thickness and
    texture differ from patient to patient. Muscle, unopacified bowel, liver and spleen are as bright as the
    pancreas or nearly so.

    Slices of one patient are correlated: split by group. The numbers come from one
    ``numpy.random.Generator`` (PCG64); the same arguments give the same cases, whatever the global random
    state. The 2D cases are slices of the 3D cases of the same arguments.

    Args:
        count: patients, at least 1.
        size: height and width in px, at least 48. The field of view is 340 to 420 mm whatever the size.
        seed: a number from 0.
        dimensions: 2 for one case a slice, 3 for one case a patient.

    Returns:
        In 2D five cases a patient, all with pancreas, named ``"PHANTOM_0001_012"`` by patient and slice of the
        volume; image (1, size, size), spacing (row, column) in mm. In 3D one case a patient, named
        ``"PHANTOM_0001"``; image (1, D, size, size) with 22 to 28 slices, those at both ends without
        pancreas; spacing (slice, row, column) in mm, with 5 mm between slices. Images are float32, whole HU
        from -1000 to 1500; labels uint8 of the same shape, 1 = pancreas. Rows run from front to back, columns
        from the patient's right to left, slices from foot to head. The group is the patient.

    Raises:
        ValueError: count, size or seed is too small, or dimensions is neither 2 nor 3.
    """
    check_arguments("abdomen_phantom", count, size, seed, dimensions, least_size=48)
    generator = np.random.default_rng(seed)
    cases: list[Case] = []
    for patient in range(1, count + 1):
        group = f"PHANTOM_{patient:04d}"
        image, label, pixel = _abdomen(size, generator)
        if dimensions == 3:
            spacing = (SLICE_DISTANCE, pixel, pixel)
            cases.append(Case(group, image[np.newaxis], label[np.newaxis], spacing, group))
            continue
        cases += [
            Case(
                f"{group}_{index:03d}",
                image[index, np.newaxis],
                label[index, np.newaxis],
                (pixel, pixel),
                group,
            )
            for index in _slices_with_pancreas(label)
        ]
    return cases


def _slices_with_pancreas(label: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Evenly spaced slices among those that show at least half as much pancreas as the median one."""
    areas = label.sum(axis=(1, 2), dtype=np.int64)
    shown = np.flatnonzero(areas >= 0.5 * np.median(areas[areas > 0]))
    return shown[np.rint(np.linspace(0, len(shown) - 1, SLICES_PER_PATIENT)).astype(int)]


@dataclass(frozen=True)
class _Part:
    """A patient, or a box cut out of one, while it is drawn. Its arrays have one shape, (slices, rows,
    columns); those of a box are views, so that what is painted there is painted in the patient.

    Attributes:
        image: HU.
        label: true in the pancreas.
        inside: mm to the inner surface of the body's wall, negative inside.
        bend: smooth noise of unit variance, which bends all surfaces.
        grain: finer noise of unit variance, which all tissues have.
        axes: mm up, back and left from the middle of the body, one array for each axis that broadcast to the
            shape.
        spacing: mm from pixel to pixel.
        half: half the volume's height, the body's depth and its width, mm.
        generator: source of what varies.
    """

    image: Field
    label: npt.NDArray[np.bool_]
    inside: Field
    bend: Field
    grain: Field
    axes: tuple[Field, Field, Field]
    spacing: float
    half: Point
    generator: np.random.Generator

    def near(self, points: Sequence[Point], reach: float) -> _Part:
        """The box that holds everything within a reach of some points, mm."""
        low, high = np.min(points, axis=0) - reach, np.max(points, axis=0) + reach
        up, back, left = (
            slice(*np.searchsorted(axis.ravel(), ends).tolist())
            for axis, ends in zip(self.axes, zip(low, high, strict=True), strict=True)
        )
        box = (up, back, left)
        return replace(
            self,
            image=self.image[box],
            label=self.label[box],
            inside=self.inside[box],
            bend=self.bend[box],
            grain=self.grain[box],
            axes=(self.axes[0][up], self.axes[1][:, back], self.axes[2][:, :, left]),
        )

    def field(self, scale: float) -> Field:
        """Smooth noise with this scale in mm."""
        scales = (scale / SLICE_DISTANCE, scale / self.spacing, scale / self.spacing)
        return smooth_noise(self.image.shape, scales, self.generator)

    def number(self, low: float, high: float) -> float:
        return self.generator.uniform(low, high)

    def place(self, point: Point, spread: float = 0.0) -> Point:
        """Where a point lies, mm, that is given in units of ``half``, and displaced by up to a spread in mm."""
        up, back, left = (
            at * half + spread * self.number(-1.0, 1.0) for at, half in zip(point, self.half, strict=True)
        )
        return up, back, left

    def organ(self, centre: Point, radii: Point, bend: float = 3.0, tilt: float = 0.0) -> tuple[_Part, Field]:
        """A bent ellipsoid: the box that holds it and the signed distance to its surface there, mm.

        Args:
            centre: in mm.
            radii: half axes, mm.
            bend: by how much its surface is displaced, mm, standard deviation.
            tilt: rad by which its left end is turned to the back.
        """
        part = self.near([centre], max(radii) + 3.5 * bend + self.spacing)
        up, back, left = (axis - at for axis, at in zip(part.axes, centre, strict=True))
        cosine, sine = np.cos(tilt), np.sin(tilt)
        turned = (up, cosine * back - sine * left, cosine * left + sine * back)
        return part, ellipsoid(turned, radii) + bend * part.bend

    def column(self, back: float, left: float, radius: float) -> tuple[_Part, Field]:
        """A vessel that runs from foot to head and wanders a little, as :meth:`organ`."""
        ends = [(end * self.half[0], back, left) for end in (-1.0, 1.0)]
        part = self.near(ends, radius + 9.0 + self.spacing)
        scale = (40.0 / SLICE_DISTANCE,)
        sway = [2.5 * smooth_noise(part.image.shape[:1], scale, self.generator)[:, None, None] for _ in "yx"]
        return part, np.hypot(part.axes[1] - back - sway[0], part.axes[2] - left - sway[1]) - radius

    def vessel(self, path: Sequence[Point], radii: Sequence[float], room: float = 0.0) -> tuple[_Part, Field]:
        """A tube along a path, as :meth:`organ`; the box has some more room around it, mm."""
        part = self.near(path, max(radii) + room + self.spacing)
        return part, tube(part.axes, path, radii)

    def paint(self, distance: Field, value: npt.ArrayLike, share: Field | float = 1.0) -> None:
        """Fill what has a negative distance with HU, or with a share of them."""
        paint(self.image, share * coverage(distance, self.spacing), value)


def _abdomen(
    size: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], float]:
    """Image in HU and label of one patient, (slices, size, size), and mm from pixel to pixel."""
    body = _wall(size, generator)
    _upper_organs(body)
    _spine(body)
    _bowel(body)
    course, radii = _course(body)
    _duodenum(course, body)
    _pancreas(course, radii, body)
    _vessels(course, radii, body)
    return _scan(body), body.label.astype(np.uint8), body.spacing


def _wall(size: int, generator: np.random.Generator) -> _Part:
    """A patient of air, table, skin, fat, muscle and ribs, filled with fat."""
    slices = int(generator.integers(22, 29))
    view = generator.uniform(340.0, 420.0)
    spacing = round(view / size, 4)
    width = view * generator.uniform(0.40, 0.46)
    depth = width * generator.uniform(0.66, 0.78)
    pixel = (np.arange(size, dtype=np.float64) - (size - 1) / 2) * spacing
    up = ((np.arange(slices, dtype=np.float64) - (slices - 1) / 2) * SLICE_DISTANCE)[:, None, None]
    back = (pixel - generator.uniform(-0.03, 0.03) * view)[None, :, None]
    left = (pixel - generator.uniform(-0.02, 0.02) * view)[None, None, :]
    shape = (slices, size, size)
    bend = smooth_noise(shape, (30.0 / SLICE_DISTANCE, 25.0 / spacing, 25.0 / spacing), generator)
    grain = smooth_noise(shape, (6.0 / SLICE_DISTANCE, 6.0 / spacing, 6.0 / spacing), generator)

    skin = ellipsoid((back, left), (depth, width)) + 2.0 * bend
    fat = generator.uniform(6.0, 22.0) * (1.0 - 0.3 * np.clip(back / depth, -1.0, 1.0))
    flesh = skin + fat
    inside = flesh + generator.uniform(8.0, 12.0) + 18.0 * np.exp(-np.square((back / depth - 0.75) / 0.25))
    body = _Part(
        image=np.full(shape, AIR),
        label=np.zeros(shape, dtype=bool),
        inside=inside,
        bend=bend,
        grain=grain,
        axes=(up, back, left),
        spacing=spacing,
        half=(slices * SLICE_DISTANCE / 2, depth, width),
        generator=generator,
    )
    table = np.abs(back - depth - body.number(8.0, 14.0) + np.square(left) / (3.0 * width))
    body.paint(table - 1.5, body.number(-300.0, 200.0))
    body.paint(skin, 20.0)
    body.paint(skin + 2.0, FAT + 8.0 * grain)
    body.paint(flesh, 52.0 + 8.0 * grain)
    body.paint(inside, FAT - 12.0 * grain)

    # A rib descends to the front, so a slice cuts several; they lie in the middle of the muscle.
    angle = np.arctan2(left, -back)
    turn = 9.0 * np.abs(angle) - up / 9.0 + body.number(0.0, 6.0)
    rib = np.maximum(np.abs(flesh + 5.0) - 3.5, 4.0 * (0.75 - np.cos(turn)))
    rib = np.where(np.abs(angle) > 0.6, rib, 10.0)
    body.paint(rib, 350.0 + 120.0 * coverage(-rib - 1.2, 1.5))
    return body


def _upper_organs(body: _Part) -> None:
    """Paint liver, spleen, kidneys and stomach."""
    part, liver = body.organ(
        body.place((0.55, -0.10, -0.50), 8.0),
        (0.95 * body.half[0], 0.66 * body.half[1], body.number(0.50, 0.60) * body.half[2]),
        5.0,
        body.number(0.1, 0.4),
    )
    liver = np.maximum(liver, part.inside + 2.0)
    brightness = body.number(95.0, 125.0)
    part.paint(liver, brightness + 4.0 * part.grain)
    branches = np.abs(part.field(16.0)) + 0.5 * np.abs(part.field(30.0))
    part.paint(liver + 8.0, brightness + 45.0, np.clip(1.5 - branches / 0.12, 0.0, 1.0))

    part, spleen = body.organ(
        body.place((0.5, 0.20, 0.70), 6.0),
        (body.number(42.0, 55.0), body.number(38.0, 50.0), body.number(22.0, 30.0)),
        4.0,
        body.number(-0.5, -0.1),
    )
    part.paint(np.maximum(spleen, part.inside + 2.0), body.number(105.0, 135.0) + 4.0 * part.grain)

    bright = body.number(150.0, 210.0)
    for side, height in ((-1.0, -0.35), (1.0, -0.1)):
        centre = body.place((height, 0.38, side * 0.42), 5.0)
        radii = (body.number(45.0, 55.0), body.number(25.0, 31.0), body.number(22.0, 27.0))
        part, kidney = body.organ(centre, radii, 2.0, side * body.number(-0.6, -0.2))
        medulla = 30.0 * coverage(kidney + 9.0, 4.0)
        part.paint(np.maximum(kidney, part.inside + 2.0), bright - medulla + 4.0 * part.grain)
        hilum = (centre[0], centre[1] - 4.0, centre[2] - side * 9.0)
        part, sinus = body.organ(hilum, (24.0, 8.0, 11.0), 3.0)
        part.paint(sinus, FAT + 20.0 * part.grain)
        part, pelvis = body.organ(hilum, (14.0, 4.0, 6.0), 2.0)
        part.paint(pelvis, body.number(20.0, 250.0))

    part, stomach = body.organ(
        body.place((0.75, -0.42, 0.30), 10.0),
        (body.number(45.0, 60.0), body.number(24.0, 36.0), body.number(40.0, 58.0)),
        5.0,
        body.number(0.0, 0.4),
    )
    _hollow(np.maximum(stomach, part.inside + 2.0), part, body.number(0.2, 0.7))


def _hollow(outer: Field, part: _Part, air: float) -> None:
    """Paint a hollow organ: a wall, fluid or contrast medium in it, and air above, which is in front.

    Args:
        outer: signed distance to its outer surface, mm.
        part: the box that holds it.
        air: the share of its depth down to which there is air, unless it is collapsed.
    """
    part.paint(outer, part.number(65.0, 100.0) + 6.0 * part.grain)
    lumen = outer + part.number(3.0, 6.0)
    filled = part.number(0.0, 1.0)
    if filled >= 0.7:  # collapsed: folds like the wall
        part.paint(lumen, part.number(70.0, 105.0) + 22.0 * part.field(3.5))
        return
    if filled < 0.3:  # contrast medium
        part.paint(lumen, part.number(200.0, 450.0) + 40.0 * part.grain)
    else:  # food or stool
        part.paint(lumen, part.number(0.0, 60.0) + 35.0 * part.grain)
    rows = np.flatnonzero((lumen < 0.0).any(axis=(0, 2)))
    if rows.size:
        back = part.axes[1]
        level = back[0, rows[0], 0] + air * rows.size * part.spacing
        part.paint(np.maximum(lumen, back - level), -950.0)


def _bowel(body: _Part) -> None:
    """Paint loops of bowel in front and at the left side, as far as there is room."""
    for _ in range(body.generator.integers(12, 19)):
        up, back, left = body.number(-1.1, 0.5), body.number(-0.62, -0.18), body.number(-0.45, 0.72)
        if left > 0.5:  # the descending colon lies further back
            back += 0.3
        radii = body.generator.uniform(10.0, 22.0, 3)
        radii[body.generator.integers(3)] *= 1.6
        part, loop = body.organ(
            body.place((up, back, left)), (radii[0], radii[1], radii[2]), 3.0, body.number(-1.0, 1.0)
        )
        _hollow(np.maximum(loop, part.inside + 3.0), part, body.number(0.0, 0.6))


def _spine(body: _Part) -> None:
    """Paint vertebrae and discs in turn, the canal behind them, processes, and the muscles of the back."""
    at = 0.48 * body.half[1]
    ends = [(end * body.half[0], at + 12.0, 0.0) for end in (-1.0, 1.0)]
    part = body.near(ends, 62.0)
    up, back, left = part.axes
    for side in (-1.0, 1.0):
        muscle = ellipsoid((back - at - 4.0, left - side * 38.0), (20.0, 15.0)) + 1.5 * part.bend
        part.paint(muscle, 55.0 + 6.0 * part.grain)
    phase = np.mod(up / 34.0 + body.number(0.0, 1.0), 1.0)  # a vertebra and its disc are 34 mm high
    bone = np.clip((np.abs(phase - 0.5) - 0.13) / 0.03, 0.0, 1.0)
    radii = (body.number(16.0, 19.0), body.number(21.0, 25.0))
    vertebra = ellipsoid((back - at, left), radii) + part.bend
    core = 210.0 + 60.0 * part.field(4.0) + 380.0 * coverage(-vertebra - 2.0, 2.0)
    part.paint(vertebra, 90.0 + bone * (core - 90.0))
    canal = at + 28.0
    for tip in ((canal + 34.0, 0.0), (canal + 6.0, 34.0), (canal + 6.0, -34.0)):
        process = tube((back, left), ((canal + 9.0, 0.0), tip), (body.number(4.0, 6.0), 3.0))
        process = np.maximum(process, part.inside - 22.0)  # it ends in the muscle
        part.paint(process, 500.0, np.clip(bone + 0.3, 0.0, 1.0))
    ring = ellipsoid((back - canal, left), (10.0, 13.0))
    part.paint(np.abs(ring) - 2.0, 450.0, bone)
    part.paint(ring + 2.0, 25.0)


def _course(body: _Part) -> tuple[list[Point], list[float]]:
    """The axis of the pancreas from the lower end of its head to its tail, in mm, and its half thickness."""
    rise = body.number(0.15, 0.4)
    low = body.number(-0.35, -0.15)
    points = [
        body.place((low - 0.15, 0.02, -0.17), 4.0),
        body.place((low + 0.05, -0.04, -0.19), 5.0),
        body.place((low + 0.20, -0.12, -0.10), 4.0),
        body.place((low + 0.25, -0.17, 0.00), 4.0),
        body.place((low + 0.30 + 0.3 * rise, -0.10, 0.13), 6.0),
        body.place((low + 0.30 + 0.7 * rise, 0.02, 0.27), 6.0),
        body.place((low + 0.30 + rise, 0.12, 0.40), 7.0),
    ]
    scale = body.number(0.85, 1.15)
    thickness = [11.0, 14.0, 11.5, 8.5, 10.0, 10.0, 8.0]
    radii = [scale * radius * body.number(0.9, 1.1) for radius in thickness]
    return points, radii


def _duodenum(course: Sequence[Point], body: _Part) -> None:
    """Paint the duodenum, which bends around the head of the pancreas and looks much like it."""
    low, head = course[0], course[1]
    path = [
        (head[0] + 22.0, head[1] - 8.0, head[2] - 12.0),
        (head[0], head[1], head[2] - 25.0),
        (low[0] - 14.0, low[1] + 6.0, low[2] - 18.0),
        (low[0] - 22.0, low[1] + 6.0, low[2] + 22.0),
    ]
    part, outer = body.vessel(path, [body.number(9.0, 12.0)] * len(path), 5.0)
    _hollow(outer + 1.5 * part.bend, part, body.number(0.0, 0.4))


def _pancreas(course: Sequence[Point], radii: Sequence[float], body: _Part) -> None:
    """Paint and label the pancreas."""
    part, surface = body.vessel(course, radii, 14.0)
    # Lobules are finer than the bends of the surface; in clefts between them lies fat.
    lobules = part.field(body.number(6.0, 8.0))
    surface = surface + 2.5 * part.field(14.0) + 1.8 * lobules
    cleft = body.number(10.0, 60.0) * np.clip(1.0 - np.abs(part.field(5.0)) / 0.35, 0.0, 1.0)
    brightness = body.number(80.0, 105.0)
    part.paint(surface, brightness + 7.0 * lobules - cleft)
    np.less(surface, 0.0, out=part.label)
    part, duct = body.vessel(course[2:], [1.2] * len(course[2:]))
    part.paint(duct, brightness - 40.0)


def _vessels(course: Sequence[Point], radii: Sequence[float], body: _Part) -> None:
    """Paint the great vessels and those along the pancreas, and take them out of its label."""
    front = 0.48 * body.half[1] - 20.0  # of the spine
    foot = -body.half[0]
    neck, (up, back, left) = course[3], course[2]
    behind = neck[1] + radii[3] + 5.0
    confluence = (neck[0], behind, neck[2] - 4.0)
    wide = body.number(4.5, 6.5)
    along = [(at[0], at[1] + radius + 3.0, at[2]) for at, radius in zip(course[4:], radii[4:], strict=True)]
    veins = [
        body.vessel([(foot, behind - 6.0, neck[2] - 2.0), confluence], [5.0, wide]),  # superior mesenteric
        body.vessel(  # portal
            [confluence, (up + 25.0, back + 4.0, left - 12.0), (up + 55.0, back, left - 45.0)],
            [wide, 6.5, 5.0],
        ),
        body.vessel([confluence, *along], [wide, 4.5, 4.0, 3.5]),  # splenic
    ]
    arteries = [
        body.vessel(  # superior mesenteric
            [(foot, behind - 4.0, neck[2] + 14.0), (neck[0] + 5.0, behind + 8.0, neck[2] + 12.0)], [3.5, 3.5]
        ),
        body.column(front - 12.0, 0.06 * body.half[2], body.number(8.5, 11.0)),  # aorta
    ]
    cava = body.column(front - 8.0, -0.15 * body.half[2], body.number(9.0, 12.0))
    enhancement = body.number(140.0, 230.0)
    for vessels, brightness in (
        ([cava], enhancement - body.number(20.0, 70.0)),
        (veins, enhancement - body.number(0.0, 30.0)),
        (arteries, enhancement + body.number(0.0, 80.0)),
    ):
        for part, distance in vessels:
            part.paint(distance, brightness)
            part.label[distance < 0.0] = False


def _scan(body: _Part) -> npt.NDArray[np.float32]:
    """Blur, noise with the grain of a reconstruction, whole HU."""
    image = ndimage.gaussian_filter(body.image, (0.0, 0.45, 0.45))
    noise = ndimage.gaussian_filter(body.generator.standard_normal(image.shape), (0.0, 0.6, 0.6))
    image += body.number(8.0, 16.0) / noise.std() * noise
    recorded: npt.NDArray[np.float32] = np.rint(np.clip(image, AIR, HIGHEST)).astype(np.float32)
    return recorded
