"""The one way by which transformers' auto classes are asked to load: no code that comes with a checkpoint is ever run.

What this module does not do: it finds no files and knows no format.
"""

from typing import Any


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """``auto_class.from_pretrained``, which would else ask on standard input whether to run a checkpoint's own code.

    Raises:
        ValueError: the checkpoint cannot be loaded without code of its own.
    """
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        what = "tokenizer" if "Tokenizer" in auto_class.__name__ else "model"
        raise ValueError(
            f"code that comes with a checkpoint is never run here, and the {what} of {name!r} needs its own: load it "
            f"yourself with {auto_class.__name__}.from_pretrained(..., trust_remote_code=True) if you trust it, and "
            "give the object"
        ) from error
