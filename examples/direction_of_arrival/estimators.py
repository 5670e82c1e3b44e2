"""Power spectra P(theta) of an array of sensors; their peaks are the directions of the sources.

A uniform line of M sensors, half a wavelength apart, has the steering vectors

    a(theta)_m = exp(-i pi m sin theta)

All functions take snapshots x (M, N), complex128, one column after the other, and directions theta
(G,) in degrees. They return P (G,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORGET, LOAD = 0.998, 1.0  # lambda, and the multiple of the identity that each covariance starts from


def steering(sensors: int, theta: Tensor) -> Tensor:
    """The steering vectors a(theta) (G, M) as rows."""
    return torch.polar(
        torch.ones(len(theta), sensors, dtype=torch.float64),
        -math.pi * torch.sin(torch.deg2rad(theta.double()))[:, None] * torch.arange(sensors),
    )


def updated(inverse: Tensor, x: Tensor, forget: float = FORGET) -> Tensor:
    """The inverse of forget * R + x x^H, given R^-1 (..., m, m) and x (..., m).

    By the matrix inversion lemma, with g = R^-1 x: (R^-1 - g g^H / (forget + x^H g)) / forget.
    """
    g = (inverse @ x[..., None])[..., 0]
    rest = forget + (x.conj() * g).sum(-1).real
    return (inverse - g[..., :, None] * g.conj()[..., None, :] / rest[..., None, None]) / forget


def constrained(inverse: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The w that minimises w^H R w with w^H a = 1, and that minimum.

    w = R^-1 a / (a^H R^-1 a), and the minimum is 1 / (a^H R^-1 a).
    """
    w = (inverse @ a[..., None])[..., 0]
    power = 1 / (a.conj() * w).sum(-1).real
    return w * power[..., None], power


def alternating(x: Tensor, theta: Tensor, blocks: int) -> Tensor:
    """P(theta) by alternating low-rank decomposition: our reconstruction, see README.md.

    The line is cut into D = blocks parts of M / D sensors. The decomposition S = I_D (x) s has one
    basis vector s (M / D,) for all parts. For each theta, each snapshot x(n) renews, one given the
    other, the weights w (D,) and s, and their inverse covariances:

        z = S^H x(n)                  R_D <- lambda R_D + z z^H
        w = R_D^-1 S^H a / (a^H S R_D^-1 S^H a)
        y = W^H x(n), W = w (x) I     R_s <- lambda R_s + y y^H
        s = R_s^-1 W^H a / (a^H W R_s^-1 W^H a), scaled to the norm 1

    P(theta) = 1 / (a^H S R_D^-1 S^H a) after the last snapshot.
    """
    length = len(x) // blocks
    a = steering(len(x), theta).unflatten(1, (blocks, length))
    s = a[:, 0] / math.sqrt(length)  # At first, a delay-and-sum of each part.
    of_weights = torch.eye(blocks, dtype=x.dtype).expand(len(theta), -1, -1) / LOAD
    of_basis = torch.eye(length, dtype=x.dtype).expand(len(theta), -1, -1) / LOAD
    power = torch.zeros(len(theta), dtype=torch.float64)
    for snapshot in x.T.unflatten(1, (blocks, length)):
        of_weights = updated(of_weights, s.conj() @ snapshot.T)
        w, power = constrained(of_weights, (a @ s.conj()[..., None])[..., 0])
        of_basis = updated(of_basis, w.conj() @ snapshot)
        s, _ = constrained(of_basis, (w.conj()[:, None] @ a)[:, 0])
        s = s / s.norm(dim=1, keepdim=True)
    return power


def capon(x: Tensor, theta: Tensor) -> Tensor:
    """P(theta) = 1 / (a^H R^-1 a) with R <- lambda R + x x^H of all M sensors."""
    inverse = torch.eye(len(x), dtype=x.dtype) / LOAD
    for snapshot in x.T:
        inverse = updated(inverse, snapshot)
    return constrained(inverse, steering(len(x), theta))[1]


def music(x: Tensor, theta: Tensor, sources: int) -> Tensor:
    """P(theta) = 1 / |E^H a|^2; E spans all but the `sources` largest eigenvectors of x x^H."""
    noise: Tensor = torch.linalg.eigh(x @ x.mH).eigenvectors[:, : len(x) - sources]
    return 1 / (steering(len(x), theta) @ noise.conj()).abs().square().sum(1)


def beamformer(x: Tensor, theta: Tensor) -> Tensor:
    """P(theta) = sum_n |a^H x(n)|^2, delay and sum."""
    return (steering(len(x), theta).conj() @ x).abs().square().sum(1)


def peaks(power: Tensor, theta: Tensor, count: int) -> Tensor:
    """The directions of the `count` highest local maxima of P, in order; fewer if P has fewer."""
    inside = power[1:-1]
    found = ((inside > power[:-2]) & (inside >= power[2:])).nonzero()[:, 0] + 1
    highest = found[power[found].argsort(descending=True)][:count]
    directions: Tensor = theta[highest].sort().values
    return directions
