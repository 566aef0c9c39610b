"""Distances between two sets of images, in whatever features one gives them."""

import numpy as np
from scipy.spatial.distance import cdist


def energy_distance(x, y) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs, diagonals included, so that it is never negative.

    x: (N, D), y: (M, D). It is 0 only for equal distributions (Szekely and Rizzo 2013). Its unit is that of the
    features.
    """
    return float(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean())


def frechet_distance(x, y) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of the sets' means and covariances.

    x: (N, D), y: (M, D). Only in Inception's features is this FID (arXiv:1706.08500).
    """
    (mu_x, cov_x), (mu_y, cov_y) = ((np.mean(a, axis=0), np.cov(a, rowvar=False)) for a in (x, y))
    values, vectors = np.linalg.eigh(cov_x)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # tr (C_x C_y)^(1/2), by the symmetric matrix C_x^(1/2) C_y C_x^(1/2), which has the same eigenvalues.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    return float(np.sum((mu_x - mu_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)
