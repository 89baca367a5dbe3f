"""Data sets as tensors: contents, files that are wrong, and batches that a resumed run repeats."""

from __future__ import annotations

import pathlib
import pickle
import sys

import numpy
import pytest
import torch
from PIL import Image

from swatfx import datasets
from swatfx.errors import InputError, SwatError, UnknownNameError


def _write_npz(path: pathlib.Path, count: int = 30, **changes: numpy.ndarray) -> pathlib.Path:
    random = numpy.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (count, 3, 32, 32)).astype(numpy.uint8),
        "y_train": numpy.arange(count) % 10,
        "x_test": random.integers(0, 256, (10, 3, 32, 32)).astype(numpy.uint8),
        "y_test": numpy.arange(10),
    }
    numpy.savez(path, **{key: array for key, array in (arrays | changes).items() if array.size})
    return path


def _epoch(data: datasets.Dataset, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    chosen = {"seed": 1, "epoch": 2, "device": "cpu"} | options
    return list(data.train_batches(32, **chosen))  # type: ignore[arg-type]


def test_digits_are_split_80_20_within_each_class() -> None:
    data = datasets.load("digits")
    assert data.train_images.shape == (1442, 1, 8, 8)
    assert data.test_images.shape == (355, 1, 8, 8)
    assert data.train_images.dtype == torch.float32
    assert float(data.train_images.min()) == 0 and float(data.train_images.max()) == 1
    train = torch.bincount(data.train_labels, minlength=10)
    test = torch.bincount(data.test_labels, minlength=10)
    assert torch.equal(test, (train + test) // 5)
    assert data.num_classes == 10 and not data.augment
    assert data.train_images.mean().item() == pytest.approx(data.mean[0], abs=2e-3)
    assert data.train_images.std().item() == pytest.approx(data.std[0], abs=2e-3)


def test_digits_is_the_same_at_every_load() -> None:
    first, second = datasets.load("digits"), datasets.load("digits")
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)


def test_digits_without_scikit_learn_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SwatError, match="pip install scikit-learn"):
        datasets.load("digits")


def test_limit_takes_the_first_images_and_a_fifth_to_test() -> None:
    whole, part = datasets.load("digits"), datasets.load("digits", limit=52)
    assert torch.equal(part.train_images, whole.train_images[:52])
    assert torch.equal(part.test_labels, whole.test_labels[:10])
    assert len(datasets.load("digits", limit=2).test_images) == 1
    with pytest.raises(InputError, match="limit"):
        datasets.load("digits", limit=0)


def test_unknown_name_lists_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="cifar10"):
        datasets.load("cifar-10")


@pytest.mark.parametrize("as_folder", [True, False])
def test_cifar10_from_an_npz(tmp_path: pathlib.Path, as_folder: bool) -> None:
    path = _write_npz(tmp_path / "cifar10.npz")
    data = datasets.load("cifar10", tmp_path if as_folder else path)
    assert data.train_images.shape == (30, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [*range(10)] * 3
    assert data.test_images.shape == (10, 3, 32, 32) and data.test_labels.dtype == torch.int64
    assert data.augment and data.num_classes == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": numpy.zeros(0)}, "x_test"),
        ({"x_train": numpy.zeros((30, 32, 32, 3), numpy.uint8)}, r"\[30, 32, 32, 3\]"),
        ({"x_train": numpy.zeros((30, 3, 32, 32), numpy.float32)}, "float32"),
        ({"y_train": numpy.arange(29) % 10}, r"labels torch.int64 \[29\]"),
        ({"y_train": (numpy.arange(30) % 10).reshape(30, 1)}, r"\[30, 1\]"),
        ({"y_train": numpy.arange(30) % 10 + 0.5}, "labels torch.float64"),
        ({"y_test": numpy.full(10, numpy.nan)}, "labels torch.float64"),
        ({"y_test": numpy.ones(10, bool)}, "labels torch.bool"),
        ({"y_test": numpy.array(["3"] * 10)}, "cannot read"),
        ({"y_test": numpy.array([None] * 10)}, "cannot read"),
        ({"y_test": numpy.full(10, 2**64 - 1, numpy.uint64)}, r"outside 0\.\.9"),
        ({"x_train": numpy.full((30, 3, 32, 32), numpy.nan)}, "float64"),
        ({"x_test": numpy.zeros((10, 3, 32), numpy.uint8)}, r"\[10, 3, 32\]"),
        ({"x_test": numpy.uint8(3).reshape(())}, r"\[\]"),
        ({"y_train": numpy.arange(30)}, r"outside 0\.\.9"),
    ],
)
def test_a_wrong_npz_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, numpy.ndarray], message: str
) -> None:
    path = _write_npz(tmp_path / "cifar10.npz", **changes)
    with pytest.raises(InputError, match=message):
        datasets.load("cifar10", path)


def test_a_file_that_is_no_npz_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cifar10.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match="cannot read"):
        datasets.load("cifar10", tmp_path)
    (tmp_path / "cifar10.npz").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot read"):
        datasets.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_how_to_get_it(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"no complete {name} .*download=True"):
        datasets.load(name, tmp_path)
    with pytest.raises(InputError, match="--data-root"):
        datasets.load(name)


def test_cifar100_from_torchvisions_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    random = numpy.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        entry = {
            "data": random.integers(0, 256, (count, 3072)).astype(numpy.uint8),
            "fine_labels": list(range(count)),
        }
        (folder / split).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a"] * 100}))
    # The checks of torchvision hold for the real files only.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = datasets.load("cifar100", tmp_path)
    assert data.train_images.shape == (20, 3, 32, 32) and data.num_classes == 100
    stored = pickle.loads((folder / "train").read_bytes())["data"]
    assert numpy.array_equal(data.train_images.numpy(), stored.reshape(20, 3, 32, 32))
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4]


def test_fake_takes_a_shape_and_repeats() -> None:
    data = datasets.load("fake/1x6x4/7")
    assert data.train_images.shape == (512, 1, 6, 4) and data.num_classes == 7
    assert torch.equal(data.train_images, datasets.load("fake/1x6x4/7").train_images)
    assert datasets.load("fake").test_images.shape == (128, 3, 32, 32)
    for wrong in ("fake/3x32/10", "fake/3x32x32", "fake/0x8x8/2", "fake/axbxc/2"):
        with pytest.raises(InputError, match="fake"):
            datasets.load(wrong)


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own() -> None:
    images = torch.arange(100).view(100, 1, 1, 1).float()
    labels = torch.arange(100)

    def order(seed: int, epoch: int) -> list[int]:
        read = datasets.batches(
            images,
            labels,
            32,
            seed=seed,
            epoch=epoch,
            augment=False,
            device="cpu",
            shuffle=True,
        )
        return [label for _, batch in read for label in batch.tolist()]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(found) == list(range(100)) for found in orders)
    assert len({tuple(found) for found in orders}) == 9
    assert orders[4] == order(1, 1)


def test_start_batch_continues_bit_for_bit() -> None:
    data = datasets.load("fake/3x8x8/10", limit=100)
    whole, rest = _epoch(data), _epoch(data, start_batch=2)
    assert len(whole) == data.train_batch_count(32) == 4 and len(rest) == 2
    for (images, labels), (images_again, labels_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    _epoch(datasets.load("fake/3x8x8/10", limit=64))
    assert torch.equal(before, torch.get_rng_state())


def test_a_last_training_batch_of_one_image_is_left_out() -> None:
    data = datasets.load("fake/1x8x8/2", limit=65)
    assert [len(labels) for _, labels in _epoch(data)] == [32, 32]
    assert datasets.batch_count(65, 32, shuffle=False) == 3
    assert datasets.batch_count(1, 32, shuffle=True) == 1
    assert datasets.batch_count(5, 1, shuffle=True) == 5
    with pytest.raises(InputError, match="batch size"):
        datasets.batch_count(5, 0, shuffle=True)


def test_pixels_are_normalised_after_augmentation() -> None:
    images = torch.full((4, 2, 8, 8), 255, dtype=torch.uint8)
    ((pixels, _),) = datasets.batches(
        images,
        torch.zeros(4, dtype=torch.int64),
        4,
        seed=0,
        epoch=0,
        augment=True,
        device="cpu",
        shuffle=False,
        normalise=((0.5, 0.25), (0.5, 0.25)),
    )
    # white is (1 - mean) / std; the padding is black before normalisation, so -mean / std.
    assert set(pixels[:, 0].unique().tolist()) == {-1.0, 1.0}
    assert set(pixels[:, 1].unique().tolist()) == {-1.0, 3.0}


def test_augmentation_is_a_crop_of_the_padded_image_flipped_or_not() -> None:
    count = 200
    images = torch.rand(count, 2, 8, 8)
    data = datasets.Dataset(
        images,
        torch.arange(count),
        images,
        torch.arange(count),
        count,
        (0.0, 0.0),
        (1.0, 1.0),
        "mine",
        True,
    )
    seen = set()
    for pixels, labels in _epoch(data):
        for crop, label in zip(pixels, labels.tolist(), strict=True):
            padded = torch.nn.functional.pad(images[label], (4, 4, 4, 4))
            found = [
                (row, column, flipped)
                for row in range(9)
                for column in range(9)
                for flipped in (False, True)
                if torch.equal(
                    crop.flip(2) if flipped else crop,
                    padded[:, row : row + 8, column : column + 8],
                )
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert {row for row, _, _ in seen} == {column for _, column, _ in seen} == set(range(9))
    assert {flipped for _, _, flipped in seen} == {False, True}


def test_imagenet_folders_repeat_an_epoch_and_resume(tmp_path: pathlib.Path) -> None:
    random = numpy.random.default_rng(0)
    for folder in ("train", "val"):
        for kind in ("ant", "bee"):
            (tmp_path / folder / kind).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 256, (240, 260, 3)).astype(numpy.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / kind / f"{index}.png")
    data = datasets.open_data("imagenet", tmp_path)
    assert isinstance(data, datasets.ImageFolders)
    assert data.num_classes == 2 and data.train_batch_count(3) == 3
    before = torch.get_rng_state()
    whole = list(data.train_batches(3, seed=0, epoch=1, device="cpu"))
    rest = list(data.train_batches(3, seed=0, epoch=1, device="cpu", start_batch=1))
    assert torch.equal(before, torch.get_rng_state())
    assert [tuple(images.shape) for images, _ in whole] == [(3, 3, 224, 224)] * 2 + [
        (2, 3, 224, 224)
    ]
    for (images, labels), (images_again, labels_again) in zip(whole[1:], rest, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)
    other = list(data.train_batches(3, seed=0, epoch=2, device="cpu"))
    assert not torch.equal(whole[0][0], other[0][0])
    test = list(data.test_batches(5, device="cpu"))
    assert torch.cat([labels for _, labels in test]).tolist() == [0] * 4 + [1] * 4


def test_imagenet_without_its_folders_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="open_data"):
        datasets.load("imagenet", tmp_path)
    for root in (None, tmp_path):
        with pytest.raises(InputError, match="train/"):
            datasets.open_data("imagenet", root)
    assert isinstance(datasets.open_data("fake"), datasets.Dataset)
