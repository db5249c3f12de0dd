"""Names for types."""

from typing import Any, TypeAlias

# nn.Module types each of its attributes as Tensor | Module, which fits none of timm's.
TimmModule: TypeAlias = Any
