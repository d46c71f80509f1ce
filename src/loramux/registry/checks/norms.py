"""How much an adapter changes each linear: ||s B A|| relative to ||W||, both Frobenius.

Why: an update hundreds of times the weight it is added to drowns every other part of a mixture and overflows half
precision; one that is lost in rounding does nothing. In between, the numbers show outliers among uploads.
Letters: R rank rows, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loramux.formats.scaling import site_scaling
from loramux.formats.tensors import SiteTensors
from loramux.registry.checks.base import BaseShape


def relative_norms(
    config: Mapping[str, Any], sites: Mapping[str, SiteTensors], base: BaseShape
) -> dict[str, float]:
    """Module path -> norm of its update over that of its weight, or the norm itself where the base's is not known."""
    scaling = site_scaling(config, {path: site.rank for path, site in sites.items()})
    return {
        path: abs(scaling[path][2]) * update_norm(site) / (base.norms.get(path) or 1.0)
        for path, site in sites.items()
    }


def update_norm(site: SiteTensors) -> float:
    """||B A|| from the R x R Gram matrices, in double precision: fp32 factors can square beyond fp32."""
    a_RI, b_RO = (_doubles(matrix) for matrix in (site.a, site.b))
    product = np.sum((a_RI @ a_RI.T) * (b_RO @ b_RO.T))
    return float(np.sqrt(max(product, 0.0)))


def _doubles(matrix: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(matrix.floats(), dtype=np.float64)
