"""What a saved model has beside it for tools that load by a folder's name and ``trust_remote_code``.

Such a tool imports the file of code that the config names. Ours has no code: it imports from the installed
packages, so the loaded classes are those of this package and not copies of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nl_models.files import write_bytes

MODULE = "modeling_nl_kernels"


class OwnClasses:
    """Of models and configs: stay what they are when an auto class has loaded them."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: transformers would then write a copy of this module's source beside each saved model."""


class RemoteCodeConfig(OwnClasses):
    """Of configs: name and write the file of code. Subclasses have :meth:`auto_classes`."""

    @classmethod
    def auto_classes(cls) -> dict[str, type]:
        """What each auto class of transformers is to load."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """All fields, and ``auto_map``."""
        names = {auto: f"{MODULE}.{found.__name__}" for auto, found in self.auto_classes().items()}
        return {**super().to_dict(), "auto_map": names}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the config, and the file of code that its ``auto_map`` names."""
        if not os.path.isfile(save_directory):  # of which the library complains
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            lines = ['"""The code of this model is in the package nl-kernels, which must be installed."""\n']
            lines += [f"from {c.__module__} import {c.__name__}" for c in self.auto_classes().values()]
            write_bytes(folder / f"{MODULE}.py", "\n".join([*lines, ""]).encode())
        super().save_pretrained(save_directory, **kwargs)
