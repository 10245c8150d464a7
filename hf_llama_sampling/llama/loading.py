"""Load a model and a tokenizer, in every form that `Llama.build` takes.

All of transformers' formats go through `from_pretrained` here, which never runs code that comes with a checkpoint, and
never asks on standard input whether to. What this module does not do: it reads no format itself (`checkpoint` reads
Meta's, `tokenizer` SentencePiece's).
"""

import importlib.util
import json
import os
import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_int
from ..generation.mixin import LlamaForCausalLM
from .checkpoint import is_meta_folder, load_meta_checkpoint
from .placement import Placement
from .tokenizer import Tokenizer, TokenizerLike, TransformersTokenizer

_CONTEXT = 4096  # LLAMA2's; Meta's checkpoints do not say
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
_FORMS = "a checkpoint is a folder, a GGUF file or a Hub id"
# Raised for files that were cut short, or that are mere pointers of git lfs.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, json.JSONDecodeError)


def from_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """Call ``auto_class.from_pretrained`` without running a checkpoint's own code.

    Raises:
        ValueError: the checkpoint cannot be loaded without code of its own, or is of another kind.
    """
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            found = re.findall(r"(\w+)Config'>", str(error))
            raise ValueError(
                f"a checkpoint must be a decoder-only causal language model, and {name!r} is of another kind "
                f"({', '.join(found[:1])}): take one that {auto_class.__name__} loads"
            ) from error
        if "trust_remote_code" not in str(error):
            raise
        kind = "tokenizer" if "Tokenizer" in auto_class.__name__ else "model"
        raise ValueError(
            f"code that comes with a checkpoint is never run here, and the {kind} of {name!r} needs its own: load it "
            f"yourself with {auto_class.__name__}.from_pretrained(..., trust_remote_code=True) if you trust it, and "
            "give the object"
        ) from error


# Models


def load_model(
    ckpt_dir: str | Path,
    placement: Placement,
    *,
    max_seq_len: int | None = None,
    tokenizer: TokenizerLike | None = None,
) -> PreTrainedModel:
    """Load a model, in eval mode, from any form of checkpoint.

    Args:
        ckpt_dir: Meta's own folder, a transformers folder, a Hub id, a GGUF file or a folder that holds one, or the
            folder of an adapter that PEFT saved.
        placement: dtype and devices.
        max_seq_len: for Meta's format, which does not say; LLAMA2's 4,096 if None.
        tokenizer: for Meta's format, whose embedding must be as large.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a part of it is missing.
        TypeError: `ckpt_dir` is neither a text nor a path.
        ValueError: it cannot be read without running code, its parts contradict one another, or weights are missing.
    """
    check_checkpoint(ckpt_dir)
    if not is_meta_folder(ckpt_dir):
        return _load_transformers(ckpt_dir, placement)
    return load_meta_checkpoint(
        ckpt_dir,
        max_seq_len=_CONTEXT if max_seq_len is None else check_int("max_seq_len", max_seq_len, least=1),
        vocab_size=None if tokenizer is None else vocab_sizes(tokenizer),
        dtype=placement.dtype if isinstance(placement.dtype, torch.dtype) else None,
        device_map=placement.device_map,
        max_memory=placement.max_memory,
        offload_folder=placement.offload_folder,
        model_class=LlamaForCausalLM,
    )


def check_checkpoint(ckpt_dir: str | Path) -> None:
    """Refuse a path without a checkpoint, before a tokenizer is looked for or anything is loaded.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        TypeError: `ckpt_dir` is neither a text nor a path.
        ValueError: a file of another kind.
    """
    if not isinstance(ckpt_dir, (str, os.PathLike)):
        raise TypeError(f"{_FORMS}, and this is of type {type(ckpt_dir).__name__}: give its name")
    if not is_meta_folder(ckpt_dir):
        _find_checkpoint(ckpt_dir)


def vocab_sizes(tokenizer: TokenizerLike) -> Sequence[int]:
    """Return the vocabulary sizes that a model of this tokenizer may have: with none to all of its added tokens."""
    return range(tokenizer.n_words - getattr(tokenizer, "n_added", 0), tokenizer.n_words + 1)


def _load_transformers(name: str | Path, placement: Placement) -> PreTrainedModel:
    """Load a checkpoint in one of transformers' own forms, or an adapter of PEFT on its base model."""
    source, gguf = _find_checkpoint(name)
    if _is_adapter(source):
        return _load_adapter(source, placement)
    options: dict[str, Any] = {**placement.options(), **gguf}
    return _load(source, options, "fetch it again, or save it with save_pretrained of the model that it is of")


def _load_adapter(source: str, placement: Placement) -> PreTrainedModel:
    """Load an adapter and its base model, as transformers does; say where else to go if it cannot."""
    base = json.loads(Path(source, "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    way_out = "load both with PEFT's PeftModel.from_pretrained, and give Llama the object"
    if not isinstance(base, str):
        raise ValueError(f"an adapter must name its base model, and {source!r} names {base!r}: {way_out}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{source!r} is the folder of an adapter, which needs PEFT to be loaded: pip install peft")
    _find_checkpoint(base)
    try:
        return _load(source, placement.options(), way_out)
    except ValueError as error:
        if "prompt learning" not in str(error):
            raise
        raise ValueError(f"transformers loads no soft prompts, and {source!r} holds some: {way_out}") from error


def _load(source: str, options: dict[str, Any], way_out: str) -> PreTrainedModel:
    try:
        model, found = from_pretrained(
            AutoModelForCausalLM, source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except _UNREADABLE as error:
        raise _unreadable("checkpoint", source, error) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise _unreadable("checkpoint", source, error) from error
    except OSError as error:
        if Path(source).exists():
            raise
        raise _not_to_be_had(source, error) from error
    _refuse_random_weights(source, found, way_out)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _is_adapter(source: str) -> bool:
    """Whether this is a folder that holds an adapter of PEFT and no model."""
    return Path(source, "adapter_config.json").is_file() and not Path(source, "config.json").is_file()


def _refuse_random_weights(source: str, found: dict[str, Any], way_out: str) -> None:
    """Refuse a checkpoint that lacks weights of its model, which transformers would fill with random numbers."""
    shapes = {name: f"{name} is {list(its)} and not {list(ours)}" for name, its, ours in found["mismatched_keys"]}
    for rule, faults in (("lacks", sorted(found["missing_keys"])), ("differs:", sorted(shapes.values()))):
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise ValueError(
                f"a checkpoint must hold every weight of the model that its config.json describes, but {source!r} "
                f"{rule} {faults[0]}{more}: {way_out}"
            )


def _unreadable(kind: str, source: str, error: BaseException) -> ValueError:
    """Word the refusal of files that are there and cannot be read."""
    reason = (str(error).strip() or "they end too early").splitlines()[0].split(". ")[0].rstrip(".")
    return ValueError(
        f"the files of a {kind} must be whole, but those of {source!r} cannot be read ({reason}): fetch them again, "
        "with git lfs if they come by git"
    )


def _not_to_be_had(source: str, error: BaseException) -> FileNotFoundError:
    reason = str(error).splitlines()[0].rstrip(".")
    return FileNotFoundError(f"{_FORMS}, and {source!r} is none that can be had here ({reason}): check the name")


def _find_checkpoint(name: str | Path) -> tuple[str, dict[str, str]]:
    """Split a source into a folder or Hub id, and the name of the GGUF file in it, if any."""
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{_FORMS}, and {str(path)!r} is a file: give its folder")
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        ours = (path / "config.json").is_file() or _is_adapter(str(path))
        return str(path), {} if ours else {"gguf_file": _only_gguf(path)}
    if not is_hub_id(str(name)):
        raise FileNotFoundError(f"{_FORMS}, and {str(name)!r} does not exist: check the path{_or_hub_id(str(name))}")
    return str(name), {}


def _or_hub_id(name: str) -> str:
    """The second way out of a path that does not exist, where it may have been meant as a Hub id."""
    if not _is_repository_name(name):
        return ""
    if "/" in name:
        return f", or fetch the Hub's repository of this name first (hf download {name})"
    return ", or give a Hub id with its owner (owner/name)"


def _only_gguf(folder: Path) -> str:
    """Return the name of the only GGUF file in a folder."""
    found = sorted(file.name for file in folder.glob("*.gguf"))
    if len(found) != 1:
        holds = f"{len(found)} GGUF files ({', '.join(found)}): name one" if found else "none of them: check the path"
        raise FileNotFoundError(
            f"a checkpoint folder holds Meta's params.json and consolidated.*.pth, transformers' config.json, or one "
            f"GGUF file, and {str(folder)!r} holds {holds}"
        )
    return found[0]


# Tokenizers


def load_tokenizer_beside(
    ckpt_dir: str | Path, source: str | Path | TokenizerLike | PreTrainedTokenizerBase
) -> TokenizerLike:
    """Load the tokenizer; if it has the checkpoint's own Hub id, and that cannot be had, name the checkpoint."""
    try:
        return load_tokenizer(source)
    except FileNotFoundError as error:
        name = str(ckpt_dir)
        if str(source) != name or Path(name).exists() or _in_hub_cache(name):
            raise
        raise _not_to_be_had(name, error.__cause__ or error) from error


def load_tokenizer(source: str | Path | TokenizerLike | PreTrainedTokenizerBase) -> TokenizerLike:
    """Load the tokenizer at a path or Hub id, or wrap an object.

    Args:
        source: a SentencePiece file, of any name; a GGUF file; a folder with a transformers tokenizer, or else with
            ``tokenizer.model``; a Hub id; a transformers tokenizer; an object with Meta's five members, returned as is.

    Raises:
        FileNotFoundError: there is no such file, folder or repository, or no tokenizer in it.
        TypeError: an object of another kind.
        ValueError: the file is not a tokenizer.
    """
    if isinstance(source, TokenizerLike):
        return source
    if isinstance(source, PreTrainedTokenizerBase):
        return TransformersTokenizer(source)
    if not isinstance(source, str | Path):
        raise TypeError(
            "a tokenizer is a path, a Hub id, a transformers tokenizer or an object with n_words, bos_id, eos_id, "
            f"pad_id, encode and decode, and this is of type {type(source).__name__}: give one of these"
        )
    path = Path(source)
    if path.is_dir():
        return _load_tokenizer_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _load_transformers_tokenizer(str(path.parent), gguf_file=path.name)
    if path.name in _TOKENIZER_FILES and path.is_file():
        return _load_tokenizer_folder(path.parent)
    if isinstance(source, str) and not path.exists() and is_hub_id(source):
        return _load_transformers_tokenizer(source)
    return Tokenizer(path)


def _load_tokenizer_folder(folder: Path) -> TokenizerLike:
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return _load_transformers_tokenizer(str(folder))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder / "tokenizer.model")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1:
        return _load_transformers_tokenizer(str(folder), gguf_file=packed[0].name)
    raise FileNotFoundError(
        f"a tokenizer's folder holds tokenizer.json, tokenizer_config.json, tokenizer.model or one GGUF file, and "
        f"{str(folder)!r} holds none of them: give the folder or the file that does"
    )


def _load_transformers_tokenizer(name: str, **options: str) -> TransformersTokenizer:
    try:
        return TransformersTokenizer(from_pretrained(AutoTokenizer, name, **options))
    except json.JSONDecodeError as error:
        raise _unreadable("tokenizer", name, error) from error
    except (ValueError, ImportError):
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"a tokenizer is a file, a folder or a Hub id, and transformers finds no tokenizer under {name!r} "
            f"({str(error).splitlines()[0].rstrip('.')}): check the name, or give the path of a SentencePiece file"
        ) from error
    except Exception as error:  # tokenizers raises a bare Exception, transformers whatever it trips over
        raise _unreadable("tokenizer", name, error) from error


def is_hub_id(name: str) -> bool:
    """Whether to ask the Hub for a name that is no path, `owner/name` or one that its cache holds.

    A mistyped path must not be looked up there: without a network that costs a minute of retries.
    """
    if not _is_repository_name(name):
        return False
    return _in_hub_cache(name) or ("/" in name and not Path(name).parent.is_dir())


def _is_repository_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not name.endswith((".model", ".json", ".gguf"))


def _in_hub_cache(name: str) -> bool:
    return Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir()
