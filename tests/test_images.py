"""Image data: IDX files, the order of samples, batches, errors."""

import gzip
import struct

import numpy as np
import pytest
import torch

from smartmoe.config import ModelConfig
from smartmoe.images import FASHION_MNIST, load_images, why_no_images
from smartmoe.models import read_batch
from smartmoe.swin_sizes import SwinConfig

MODEL = ModelConfig(num_layers=2, seq_len=16, swin=SwinConfig(image_size=16, patch_size=4, window_size=4, depths=(2,)))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def write(path, array, gz=False):
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.with_name(path.name + ".gz" * gz).write_bytes(gzip.compress(raw) if gz else raw)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / IMAGES, rng.integers(256, size=(20, 8, 8), dtype=np.uint8), gz=True)
    write(tmp_path / LABELS, (np.arange(20) % 10).astype(np.uint8))
    return tmp_path


def test_an_epoch_has_every_image_once_and_the_next_another_order(folder):
    images = load_images([str(folder)])
    assert images.num_samples == 20 and images.describe() == f"20 images of 8 x 8 from {folder}"
    epochs = [[images.sample(epoch * 20 + place) for place in range(20)] for epoch in range(2)]
    keys = [[image.tobytes() for image, _ in epoch] for epoch in epochs]
    assert sorted(keys[0]) == sorted(keys[1]) and len(set(keys[0])) == 20 and keys[0] != keys[1]
    assert sorted(label for _, label in epochs[0]) == sorted(list(range(10)) * 2)
    again = load_images([str(folder)])
    assert again.sample(27)[0].tobytes() == keys[1][7]
    assert load_images([str(folder)], seed=2).sample(0)[0].tobytes() != keys[0][0]


def test_a_batch_is_resized_and_its_patches_are_numbered(folder):
    images, sample_B = load_images([str(folder)]), np.array([5, 6])
    image, token_id_BT, target_B1 = read_batch(images, sample_B, MODEL, torch.device("cpu"))
    assert image.shape == (2, 3, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
    raw = torch.from_numpy(np.stack([images.sample(5)[0], images.sample(6)[0]])).float()
    # twice the size, bilinear: a corner is the corner, the next along an edge three quarters of it and one of its neighbour
    torch.testing.assert_close(image[:, 0, 0, 0], raw[:, 0, 0] / 127.5 - 1)
    torch.testing.assert_close(image[:, 2, 0, 1], (3 * raw[:, 0, 0] + raw[:, 0, 1]) / 4 / 127.5 - 1)
    assert torch.equal(token_id_BT, torch.arange(5 * 16, 7 * 16).view(2, 16))
    assert target_B1.tolist() == [[images.sample(5)[1]], [images.sample(6)[1]]]


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"apt-get install dataset-fashion-mnist") as error:
        load_images([str(tmp_path)])
    assert f"{tmp_path}: no {IMAGES}(.gz) there" in str(error.value)
    assert f"no {IMAGES}(.gz) there" in why_no_images([str(tmp_path)])


def test_what_is_there_is_not_missing(folder):
    assert why_no_images([str(folder)]) == "" == why_no_images(["synthetic"])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / LABELS).write_bytes(b"hello"), "not an IDX file of bytes"),
        (lambda folder: (folder / LABELS).write_bytes(b"\0\0\x08\x01\0\0\0\x09abc"), "do not hold an array of [9]"),
        (lambda folder: (folder / LABELS).write_bytes(b"\0\0\x08\x01\0"), "do not hold an array"),
        (lambda folder: (folder / f"{IMAGES}.gz").write_bytes(b"\x1f\x8b\x08"), "cannot read this file"),
        (lambda folder: (folder / f"{IMAGES}.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\3\xff\xff"), "cannot read this file"),
        (lambda folder: (folder / LABELS).write_bytes(b"\0\0\x08\x03\x80\0\0\0\x80\0\0\0\0\0\0\4"), "do not hold an array"),
        (lambda folder: write(folder / LABELS, np.zeros(19, np.uint8)), "have shapes [20, 8, 8] and [19]"),
        (lambda folder: write(folder / LABELS, np.full(20, 10, np.uint8)), "label 10 is outside model.swin.num_classes = 10"),
    ],
)
def test_damaged_files_are_named(folder, damage, words):
    damage(folder)
    with pytest.raises(ValueError) as error:
        load_images([str(folder)])
    assert words in str(error.value) and str(folder) in str(error.value)


def test_images_come_from_one_folder(folder):
    with pytest.raises(ValueError, match="images come from one folder"):
        load_images([str(folder), str(folder)])


def test_synthetic_images_say_so():
    images = load_images(["synthetic"])
    assert "synthetic" in images.describe() and images.num_samples == 1024
    assert np.array_equal(images.sample(3)[0], load_images(["synthetic"]).sample(3)[0])


def test_fashion_mnist_of_this_machine():
    if why_no_images(()):
        pytest.skip(f"the images of Debian's dataset-fashion-mnist are not in {FASHION_MNIST}")
    images = load_images()
    assert images.num_samples == 60_000 and images.sample(0)[0].shape == (28, 28)
    assert sorted({images.sample(idx)[1] for idx in range(200)}) == list(range(10))
