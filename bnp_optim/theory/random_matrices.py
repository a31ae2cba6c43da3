"""Random-matrix limits."""

from __future__ import annotations

from bnp_optim.theory.mean_field import check_count

__all__ = ["product_spectrum_edge"]


def product_spectrum_edge(num_factors: int) -> float:
    """``(K+1)^(K+1)/K^K``: where the squared singular values of a product of K random square matrices end.

    For large matrices with independent entries of variance 1/N: the edge of the Fuss-Catalan law, 4 for K = 1. It is
    what J. Bjorck, C. Gomes, B. Selman, K. Weinberger (NeurIPS 2018, arXiv 1806.02375) read the conditioning of a deep
    linear network at initialization from: it grows with depth, and the bulk moves to zero at the same time.

    Args:
        num_factors: K, of at least 1.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is below 1.
    """
    check_count("num_factors", num_factors)
    k = num_factors
    return (k + 1) * ((k + 1) / k) ** k
