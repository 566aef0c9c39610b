"""EDM's augmentation: what is done is what the labels say, and nothing else."""

import math

import torch

from meanflow.data.augment import augment


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(count)]


def test_mirroring_alone_where_the_probability_is_zero():
    x = torch.rand(64, 3, 8, 8) * 2 - 1
    out, labels = augment(x, 0.0, generators(64))
    mirrored = labels[:, 0] == 1
    assert 16 < mirrored.sum() < 48 and not labels[:, 1:].any()
    assert torch.equal(out[mirrored], x[mirrored].flip(-1)) and torch.equal(out[~mirrored], x[~mirrored])


def test_images_move_as_the_geometry_says():
    """An image that is a known function of place, against the function at the place computed by hand."""

    def image(x, y):
        return 0.6 * torch.cos(2 * x + 0.3) * torch.sin(1.5 * y + 0.2) + 0.2 * x

    side, count = 64, 32
    axis = (2 * torch.arange(side) + 1) / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    out, labels = augment(image(x, y).expand(count, 1, side, side), 1.0, generators(count))
    assert labels.shape == (count, 6) and (labels[:, 1:] != 0).float().mean() > 0.8
    checked = 0
    for k, random in enumerate(generators(count)):
        uniform, normal = torch.rand(6, generator=random).tolist(), torch.randn(4, generator=random).tolist()
        angle = (2 * uniform[4] - 1) * math.pi if uniform[3] < 0.5 else 0.0
        scale, stretch, shift_x, shift_y = normal
        expected = [uniform[0] < 0.5, scale, stretch * math.cos(angle), stretch * math.sin(angle), shift_x, shift_y]
        torch.testing.assert_close(labels[k], torch.tensor(expected, dtype=torch.float32))
        # Undone from the last to the first: the shift, the stretch along its axis, the scale, the mirror.
        a, b = x - 0.25 * shift_x, y - 0.25 * shift_y
        a, b = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
        a, b = a / 2 ** (0.2 * stretch), b * 2 ** (0.2 * stretch)
        a, b = a * math.cos(angle) + b * math.sin(angle), -a * math.sin(angle) + b * math.cos(angle)
        a, b = a / 2 ** (0.2 * scale), b / 2 ** (0.2 * scale)
        inside = (a.abs() < 0.9) & (b.abs() < 0.9)
        a = -a if uniform[0] < 0.5 else a
        assert (out[k, 0] - image(a, b))[inside].abs().max() < 3e-3  # bicubic; a wrong sign makes 2e-2 and more
        checked += int(inside.sum())
    assert checked > 0.3 * count * side * side


def test_share_of_each_is_the_probability():
    _, labels = augment(torch.zeros(4000, 1, 2, 2), 0.12, generators(4000))
    scale, stretch, shift = labels[:, 1] != 0, labels[:, 2:4].any(dim=1), labels[:, 4:].any(dim=1)
    for share in (scale, stretch, shift):
        assert abs(share.float().mean() - 0.12) < 0.02  # 4 standard deviations
    assert labels[scale, 1].std().sub(1).abs() < 0.15
