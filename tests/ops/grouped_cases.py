"""Operands of a grouped matmul and what must come out, by a loop over groups in NumPy."""

import numpy as np


def arrays(sizes, N, D, F, dtype):
    """x, w and dy; rows of x and dy that no group owns are NaN, to see whether they leak."""
    rng = np.random.default_rng(0)
    x_ND, dy_NF = rng.normal(size=(N, D)), rng.normal(size=(N, F))
    w_EDF = rng.normal(size=(len(sizes), D, F))
    x_ND[sum(sizes) :] = dy_NF[sum(sizes) :] = np.nan
    return tuple(a.astype(dtype) for a in (x_ND, w_EDF, dy_NF))


def loop(x_ND, w_EDF, dy_NF, sizes):
    """(y, dx, dw) of the owned rows, group by group in float64."""
    x_ND, w_EDF, dy_NF = (np.asarray(a, np.float64) for a in (x_ND, w_EDF, dy_NF))
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    y = np.concatenate([x_ND[rows] @ w for rows, w in zip(groups, w_EDF, strict=True)])
    dx = np.concatenate([dy_NF[rows] @ w.T for rows, w in zip(groups, w_EDF, strict=True)])
    return y, dx, np.stack([x_ND[rows].T @ dy_NF[rows] for rows in groups])
