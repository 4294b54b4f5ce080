"""Least squares that take no rank for granted, on any device."""

import torch
from torch import Tensor


def least_squares(matrix: Tensor, right: Tensor, *, driver: str = "gelsy") -> Tensor:
    """The X (n, k) of least norm that brings matrix X (m, n) nearest to right (m, k), whatever the matrix's rank.

    On a GPU torch has but a driver that takes full rank for granted, and gives numbers that are none where it is less.

    Args:
        driver: LAPACK's, on the CPU: gelsy, or gelsd, which is slower and surer of a rank in doubt.
    """
    if matrix.device.type == "cpu":
        return torch.linalg.lstsq(matrix, right, driver=driver).solution
    return by_singular_values(matrix, right)


def by_singular_values(matrix: Tensor, right: Tensor) -> Tensor:
    """As `least_squares`, from the matrix's singular values."""
    return torch.linalg.pinv(matrix) @ right
