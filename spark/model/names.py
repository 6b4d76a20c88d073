"""Names of encoders: timm's, or package.module:factory for one's own."""

import re


def is_own(name: str) -> bool:
    """Whether a name means one's own code, "package.module:factory"."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name))
