"""Image data: labelled images in IDX files, as MNIST and Fashion-MNIST have them, sampled by number.

Layer 5; never imports torch. Without data of the user's it is Fashion-MNIST (Xiao et al., 2017; MIT licence) where Debian's
package puts it. Samples depend on the images, the seed and the sample's number only: never on how many ranks read them.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smartmoe.data import epoch_order, mix

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SYNTHETIC = "synthetic"
_NUM_SYNTHETIC, _SYNTHETIC_SIDE, _SYNTHETIC_CLASSES = 1024, 28, 10
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_HELP = (
    "install Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist: 60,000 images, 31 MB), or give "
    f'workload.data (--data) the folder of {FILES[0]} and {FILES[1]}, .gz or not; workload.data = ["{SYNTHETIC}"] makes '
    "images up, which says nothing about learning"
)


class ImageDataset:
    """Images [N, rows, columns] uint8 with labels [N] int64, in an order shuffled anew each epoch."""

    def __init__(self, name: str, image_NRC: np.ndarray, label_N: np.ndarray, seed: int = 1234):
        self.name, self.seed = name, seed
        self._image_NRC, self._label_N = image_NRC, label_N
        self._order: tuple[int | None, np.ndarray | None] = (None, None)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self._label_N)

    def describe(self) -> str:
        """What this is, for people."""
        rows, columns = self._image_NRC.shape[1:]
        return f"{self.num_samples} images of {rows} x {columns} from {self.name}"

    def sample(self, sample_idx: int) -> tuple[np.ndarray, int]:
        """(image [rows, columns] uint8, label) of a sample, counted from the start of training over all epochs."""
        epoch, place = divmod(sample_idx, self.num_samples)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.num_samples))
        idx = self._order[1][place]
        return self._image_NRC[idx], int(self._label_N[idx])


def load_images(data: Sequence[str] = (), num_classes: int = 10, seed: int = 1234) -> ImageDataset:
    """The images of `data`: one folder of IDX files, or "synthetic"; empty = Fashion-MNIST of this machine.

    Raises ValueError naming the file when one is missing (and how to get it), malformed, or has a label that the model's
    num_classes does not know.
    """
    if len(data) > 1:
        raise ValueError(f"data {list(data)}: images come from one folder; {_HELP}")
    if list(data) == [SYNTHETIC]:
        images = ImageDataset("nowhere: they are synthetic", *_made_up(seed), seed)
    else:
        folder = Path(data[0]) if data else FASHION_MNIST
        image_NRC, label_N = (_read_idx(folder, name) for name in FILES)
        if image_NRC.ndim != 3 or label_N.ndim != 1 or len(image_NRC) != len(label_N) or not image_NRC.size:
            shapes = f"{list(image_NRC.shape)} and {list(label_N.shape)}"
            raise ValueError(f"{folder}: images and labels have shapes {shapes}, expected [N, rows, columns] and [N]")
        images = ImageDataset(str(folder), image_NRC, label_N.astype(np.int64), seed)
    most = int(images._label_N.max())
    if most >= num_classes:
        raise ValueError(f"{images.name}: label {most} is outside model.swin.num_classes = {num_classes}")
    return images


def why_no_images(data: Sequence[str]) -> str:
    """What is missing of the images of `data` and how to get it; "" when it is there. Reads nothing."""
    if list(data) == [SYNTHETIC]:
        return ""
    folder = Path(data[0]) if data else FASHION_MNIST
    lacking = [name for name in FILES if _path(folder, name) is None]
    return f"{folder}: no {lacking[0]}(.gz) there: {_HELP}" if lacking else ""


def _path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of an IDX file of unsigned bytes: two zeros, the type 8, the number of dimensions, their sizes, the data."""
    path = _path(folder, name)
    if path is None:
        raise ValueError(f"{folder}: no {name}(.gz) there: {_HELP}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot read this file: {error}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of bytes (it does not begin with 00 00 08)")
    end = 4 + 4 * raw[3]
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4) if len(raw) >= end else (0,)
    if len(raw) != end + math.prod(shape):  # of Python's whole numbers, which do not overflow
        raise ValueError(f"{path}: {len(raw)} bytes do not hold an array of {list(shape)}: cut short?")
    return np.frombuffer(raw, np.uint8, offset=end).reshape(shape)


def _made_up(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each class a pattern of 4 x 4 grey squares, and noise on it."""
    side, num = _SYNTHETIC_SIDE, _NUM_SYNTHETIC
    salt = mix(np.array([seed % (1 << 64)], np.uint64))
    grey = (mix(np.arange(_SYNTHETIC_CLASSES * 16, dtype=np.uint64) + salt) >> np.uint64(56)).reshape(-1, 4, 4)
    pattern = grey.repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    noise = (mix(np.arange(num * side**2, dtype=np.uint64) + ~salt) >> np.uint64(56)).reshape(num, side, side)
    label_N = np.arange(num) % _SYNTHETIC_CLASSES
    return ((3 * pattern[label_N] + noise) // np.uint64(4)).astype(np.uint8), label_N
