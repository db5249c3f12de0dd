"""Registration of the operators as ``torch.ops.tinydrop.*``.

``Library.define`` and ``impl`` cost 4 to 5 microseconds a call where ``custom_op`` costs 10 to 15 (docs/decisions.md).
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("tinydrop", "DEF")


def register(schema: str, fake: Callable, **implementations: Callable) -> Callable:
    """Define an operator and return it.

    Args:
        schema: as in ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the result, for tracing.
        implementations: dispatch key to function, such as ``CPU=reference.embed_tokens``.
    """
    name = LIBRARY.define(schema).split("(")[0].split("::")[-1]
    for key, function in implementations.items():
        LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"tinydrop::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tinydrop, name).default
