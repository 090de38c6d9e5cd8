"""VQRAE at InternViT-6B scale. `VQRAE` and `SimVQ` load lazily: importing the package is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqrae_ds.models.simvq import SimVQ
    from vqrae_ds.models.vqrae import VQRAE

__version__ = "0.1.0"
__all__ = ["VQRAE", "SimVQ", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "VQRAE":
        from vqrae_ds.models.vqrae import VQRAE

        return VQRAE
    if name == "SimVQ":
        from vqrae_ds.models.simvq import SimVQ

        return SimVQ
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
