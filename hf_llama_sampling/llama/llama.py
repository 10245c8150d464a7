"""Meta's door: `Llama` with `build`, `generate`, `text_completion` and `chat_completion`.

A script written for ``from llama import Llama, Dialog`` changes that one line. What this module does not do: it never
looks at logits; `generation` does the work, and this turns text into token ids and back.
"""

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypedDict

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..checks import check_choice, check_int
from ..defaults import TEMPERATURE, TOP_P
from ..generation.mixin import LlamaForCausalLM, with_llama_generation
from ..generation.model_info import context_of, eos_ids_of, vocab_size_of
from ..generation.outputs import LlamaGenerateOutput
from ..generation.schedule import Schedule
from ..generation.trimming import Compat
from .checkpoint import is_meta_folder, load_meta_checkpoint
from .dialog import UNSAFE_ERROR, Dialog, Message, dialog_tokens, is_unsafe
from .loading import from_pretrained
from .tokenizer import TokenizerLike, TransformersTokenizer, is_hub_id, load_tokenizer

ChatFormat = Literal["auto", "llama2", "template"]
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


_CONTEXT = 4096  # LLAMA2's; Meta's checkpoints do not say


class _Completion(TypedDict):
    generation: str


class CompletionPrediction(_Completion, total=False):
    """What `text_completion` answers for a prompt; `tokens` (one string each) and `logprobs` where asked for."""

    tokens: list[str]
    logprobs: list[float]


class _Chat(TypedDict):
    generation: Message


class ChatPrediction(_Chat, total=False):
    """What `chat_completion` answers for a dialog; `tokens` (one string each) and `logprobs` where asked for."""

    tokens: list[str]
    logprobs: list[float]


class Llama:
    """A model and a tokenizer behind the interface of facebookresearch/llama, ``llama/generation.py``.

    - Same arguments, same defaults, same results; where the reference asserts, a `ValueError` names the rule.
    - `model` is the transformers model, with the reference's `model.params` beside it; logits are `model(ids).logits`.
    - Numbers come from torch's global generator, so that `torch.manual_seed(s)` gives the reference's tokens.
    - The reference's own schedule is the default; `schedule="auto"` answers ragged batches faster, with the same tokens
      up to the rounding of the logits.

    Args:
        model: any decoder-only causal language model of transformers.
        tokenizer: anything with Meta's five members, or a transformers tokenizer.
        max_seq_len: most tokens per row, prompt included; the model's context if not given.
        max_batch_size: most rows per call; no limit if not given.
        compat: `"meta"` keeps the reference's quirks, `"fixed"` mends them (the README has the table).
        schedule: see `LlamaGenerationMixin.generate`.

    Raises:
        ValueError: the tokenizer has more tokens than the model, or a value is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        compat: Compat = "meta",
        schedule: Schedule = "reference",
    ) -> None:
        check_choice("compat", compat, ("fixed", "meta"))
        check_choice("schedule", schedule, ("auto", "reference", "padded"))
        self.model: Any = copy.copy(with_llama_generation(model))  # a handle of its own, for `params`
        self.tokenizer: TokenizerLike = load_tokenizer(tokenizer)
        if self.tokenizer.n_words > vocab_size_of(model):
            raise ValueError(
                f"the model must embed every token, but the tokenizer has {self.tokenizer.n_words} and the model "
                f"{vocab_size_of(model)}: take the tokenizer that came with the model"
            )
        length = context_of(model) if max_seq_len is None else max_seq_len
        if length is None:
            raise ValueError("max_seq_len must be given: the model's config names no context length")
        self.max_seq_len = check_int("max_seq_len", length, least=1)
        self.max_batch_size = None if max_batch_size is None else check_int("max_batch_size", max_batch_size, least=1)
        self.compat: Compat = compat
        self.schedule: Schedule = schedule
        self.model.params = self._params()

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: Any,
        max_seq_len: int | None,
        max_batch_size: int | None,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        dtype: torch.dtype | str | None = None,
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        compat: Compat = "meta",
        schedule: Schedule = "reference",
    ) -> "Llama":
        """Load a checkpoint and its tokenizer, and seed torch's global generator.

        Args:
            ckpt_dir: Meta's own folder (`params.json`, `consolidated.*.pth`, however many shards), a transformers
                folder, a Hub id, or a GGUF file (or a folder that holds one).
            tokenizer_path: a SentencePiece file, a transformers tokenizer, or where to find one.
            max_seq_len: most tokens per row, prompt included; None for the checkpoint's context, or LLAMA2's 4,096
                where, as in Meta's format, the checkpoint does not say.
            max_batch_size: most rows per call; None for no limit.
            model_parallel_size: how many GPUs to use. Shards are merged whatever it says; without GPUs it is moot.
            seed: for `torch.manual_seed`, as in the reference.
            dtype: float16 on GPUs and float32 on CPU if not given.
            device_map: where accelerate puts the model: `"auto"`, a device, or a mapping of modules with `"cpu"` and
                `"disk"` for offload. The first GPU if there is one, else the CPU, if not given.
            max_memory: what `"auto"` may use of each device.
            offload_folder: for modules on `"disk"`; a temporary folder if not given.
            compat, schedule: see `Llama`.

        Returns:
            The `Llama`; the time that loading took is printed, as in the reference.

        Raises:
            FileNotFoundError: there is no such checkpoint or tokenizer, or a part of it is missing.
            ValueError: a checkpoint that cannot be read without running code, or parts that contradict one another.
        """
        start = time.time()
        torch.manual_seed(seed)
        gpus = torch.cuda.device_count()
        dtype = _floating(dtype)
        device_map = {"": "disk"} if device_map == "disk" else device_map
        if model_parallel_size is not None:
            check_int("model_parallel_size", model_parallel_size, least=1)
        if device_map is None and gpus:
            several = model_parallel_size is not None and model_parallel_size > 1
            rank = int(os.environ.get("LOCAL_RANK", 0))  # launchers start one process per GPU
            device_map = "auto" if several else f"cuda:{rank % gpus}"
            if several and max_memory is None and gpus > (model_parallel_size or 1):
                used = range(model_parallel_size or 1)
                max_memory = {index: torch.cuda.mem_get_info(index)[0] for index in used}
        if dtype is None:
            dtype = torch.float16 if gpus and device_map not in ("cpu", torch.device("cpu")) else torch.float32
        tokenizer = load_tokenizer(tokenizer_path)
        placement = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        model = load_model(ckpt_dir, dtype, placement, max_seq_len=max_seq_len, vocab_size=tokenizer.n_words)
        llama = Llama(
            model,
            tokenizer,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            compat=compat,
            schedule=schedule,
        )
        print(f"Loaded in {time.time() - start:.2f} seconds")
        return llama

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        logprobs: bool = False,
        echo: bool = False,
        *,
        streamer: Any = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Complete a ragged batch of token-id prompts.

        Args:
            prompt_tokens: lists of ids, each of 1 to `max_seq_len` tokens.
            max_gen_len: most new tokens per row.
            temperature: 0 is greedy.
            top_p: the nucleus.
            logprobs: whether to return each token's raw logprob.
            echo: whether the answers start with their prompts.
            streamer: gets the tokens as they come, as transformers' streamers do.

        Returns:
            ids per row, cut before EOS, and logprobs beside them, or None.

        Raises:
            ValueError: the batch is larger than `max_batch_size`, a prompt is empty or longer than `max_seq_len`, or a
                value is out of range.
        """
        rows = len(prompt_tokens) if hasattr(prompt_tokens, "__len__") else 0  # what is no batch is refused below
        if self.max_batch_size is not None and rows > self.max_batch_size:
            raise ValueError(
                f"a batch must not exceed max_batch_size={self.max_batch_size}, got {rows} prompts: "
                "split it, or raise max_batch_size"
            )
        output: LlamaGenerateOutput = self.model.generate(
            prompt_tokens,
            return_dict_in_generate=True,
            max_gen_len=max_gen_len,
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=echo,
            max_seq_len=self.max_seq_len,
            eos_token_id=self._eos_ids(),
            compat=self.compat,
            schedule=self.schedule,
            streamer=streamer,
        )
        assert output.tokens is not None
        return output.tokens, output.logprobs

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        streamer: Any = None,
    ) -> list[CompletionPrediction]:
        """Complete texts, each after a BOS.

        Args:
            max_gen_len: `max_seq_len - 1` if not given.
            others: see `generate`.

        Returns:
            per prompt `{"generation": text}`, with `logprobs` also `"tokens"`, one string each, and `"logprobs"`.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of texts, got {type(prompts).__name__}: wrap it as [prompt]")
        ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        tokens, scores = self.generate(
            prompt_tokens=ids,
            max_gen_len=self._gen_len(max_gen_len),
            temperature=temperature,
            top_p=top_p,
            logprobs=logprobs,
            echo=echo,
            **({} if streamer is None else {"streamer": streamer}),
        )
        return [
            {"generation": self.text_of(row), **self._details(row, beside)}  # type: ignore[typeddict-item]
            for row, beside in _beside(tokens, scores)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answer dialogs in LLAMA2's chat format: an optional system message, then user and assistant in turn.

        A dialog that contains one of the format's tags is unsafe and is answered with a fixed sentence. With
        `compat="meta"` it is generated all the same, as in the reference, and its tokens are returned with `logprobs`;
        with `compat="fixed"` it is not generated, and they are empty.

        Args:
            max_gen_len: `max_seq_len - 1` if not given.
            others: see `generate`.

        Returns:
            per dialog `{"generation": {"role": "assistant", "content": text}}`, with `logprobs` also `"tokens"`, one
            string each, and `"logprobs"`.

        Raises:
            ValueError: a dialog breaks a rule of the format; the dialog and the rule are named.
        """
        if not isinstance(dialogs, Sequence) or (dialogs and isinstance(dialogs[0], Mapping)):
            raise TypeError("dialogs must be a list of dialogs, and this is a single one or none: wrap it as [dialog]")
        unsafe = [is_unsafe(dialog, row=row) for row, dialog in enumerate(dialogs)]
        asked = [row for row, flagged in enumerate(unsafe) if self.compat == "meta" or not flagged]
        ids = [dialog_tokens(dialogs[row], self.tokenizer, row=row) for row in asked]
        answers: dict[int, tuple[list[int], list[float] | None]] = {}
        if ids or not dialogs:
            tokens, scores = self.generate(
                prompt_tokens=ids,
                max_gen_len=self._gen_len(max_gen_len),
                temperature=temperature,
                top_p=top_p,
                logprobs=logprobs,
            )
            answers = dict(zip(asked, _beside(tokens, scores), strict=True))
        predictions: list[ChatPrediction] = []
        for row, flagged in enumerate(unsafe):
            answer, beside = answers.get(row, ([], [] if logprobs else None))
            content = UNSAFE_ERROR if flagged else self.text_of(answer)
            message: Message = {"role": "assistant", "content": content}
            predictions.append({"generation": message, **self._details(answer, beside)})  # type: ignore[typeddict-item]
        return predictions

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer came with a chat format of its own."""
        return isinstance(self.tokenizer, TransformersTokenizer) and self.tokenizer.has_chat_template

    def encode_dialog(self, dialog: Dialog, chat_format: ChatFormat = "auto") -> list[int]:
        """The prompt of one dialog, for `generate`.

        Args:
            dialog: an optional system message, then user and assistant in turn, the last from the user.
            chat_format: `"llama2"`, the `"template"` that a transformers tokenizer came with, or `"auto"`: the template
                where there is one, else LLAMA2's.

        Raises:
            ValueError: a template is asked for and there is none, or the dialog breaks a rule of LLAMA2's format.
        """
        check_choice("chat_format", chat_format, ("auto", "llama2", "template"))
        if chat_format == "template" and not self.has_chat_template:
            raise ValueError('this tokenizer has no chat template: take chat_format="llama2"')
        if chat_format == "llama2" or not self.has_chat_template:
            return dialog_tokens(dialog, self.tokenizer)
        assert isinstance(self.tokenizer, TransformersTokenizer)
        return self.tokenizer.encode_chat([{**message} for message in dialog])  # type: ignore[dict-item]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Decoded tokens. Ids that a model embeds beyond its tokenizer's (padded vocabularies) stand for no text."""
        return self.tokenizer.decode([token for token in tokens if token < self.tokenizer.n_words])

    def _eos_ids(self) -> list[int]:
        """The tokenizer's EOS; with a transformers tokenizer also those that the checkpoint names."""
        ids = {self.tokenizer.eos_id} - {-1}
        if isinstance(self.tokenizer, TransformersTokenizer):
            ids |= set(eos_ids_of(self.model, {}))
        return sorted(ids)

    def _params(self) -> SimpleNamespace:
        """What scripts read from the reference's `model.params`; None where the model's config has no such thing."""
        config = self.model.config.get_text_config()
        return SimpleNamespace(
            dim=getattr(config, "hidden_size", None),
            n_layers=getattr(config, "num_hidden_layers", None),
            n_heads=getattr(config, "num_attention_heads", None),
            n_kv_heads=getattr(config, "num_key_value_heads", None),
            vocab_size=vocab_size_of(self.model),
            norm_eps=getattr(config, "rms_norm_eps", None),
            max_batch_size=self.max_batch_size,
            max_seq_len=self.max_seq_len,
        )

    def _gen_len(self, max_gen_len: int | None) -> int:
        return self.max_seq_len - 1 if max_gen_len is None else max_gen_len

    def _details(self, tokens: list[int], logprobs: list[float] | None) -> dict[str, Any]:
        if logprobs is None:
            return {}
        return {"tokens": [self.text_of([token]) for token in tokens], "logprobs": logprobs}


class TextStreamer:
    """Hand a single row's completion to `write` as text, as its tokens come.

    Bytes that do not make a character yet are held back. Follows transformers' streamers: `put`, then `end`.
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str], write: Callable[[str], object]) -> None:
        self.text_of = text_of
        self.write = write
        self.ids: list[int] | None = None  # None before the prompt has passed
        self.written = 0

    def put(self, value: torch.Tensor) -> None:
        """The prompt (1, T) first, then new ids (1,)."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.text_of(self.ids)
        if not text.endswith("\ufffd"):
            self.write(text[self.written :])
            self.written = len(text)

    def end(self) -> None:
        """Write what was held back."""
        self.write(self.text_of(self.ids or [])[self.written :])
        self.ids, self.written = None, 0


def _beside(tokens: list[list[int]], scores: list[list[float]] | None) -> list[tuple[list[int], list[float] | None]]:
    """Each row's tokens and logprobs, if there are any."""
    return list(zip(tokens, [None] * len(tokens) if scores is None else scores, strict=True))


def _floating(dtype: Any) -> torch.dtype | None:
    """A dtype, or the name of one, that weights can have."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be a floating-point type such as torch.float16, got {dtype!r}")
    if found is None and dtype is not None:
        raise ValueError(f"dtype must be a floating-point type such as 'float16', got {dtype!r}")
    return found


def load_model(
    ckpt_dir: str | Path,
    dtype: torch.dtype,
    placement: dict[str, Any],
    *,
    max_seq_len: int | None = None,
    vocab_size: int | None = None,
) -> PreTrainedModel:
    """A checkpoint in any form that `Llama.build` takes; `vocab_size` is the tokenizer's, which Meta's must have."""
    if not is_meta_folder(ckpt_dir):
        return _from_pretrained(ckpt_dir, dtype, {k: v for k, v in placement.items() if v is not None})
    return load_meta_checkpoint(
        ckpt_dir,
        max_seq_len=_CONTEXT if max_seq_len is None else check_int("max_seq_len", max_seq_len, least=1),
        vocab_size=vocab_size,
        dtype=dtype,
        model_class=LlamaForCausalLM,
        **placement,
    )


def _from_pretrained(name: str | Path, dtype: torch.dtype, placement: dict[str, Any]) -> PreTrainedModel:
    """A checkpoint in one of transformers' own forms."""
    path = Path(name)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"a checkpoint is a folder, a GGUF file or a Hub id, and {str(path)!r} is a file: give its folder"
        )
    if path.is_file():
        path, placement = path.parent, placement | {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) != 1:
            what = (
                f"{len(found)} GGUF files ({', '.join(found)}): name one" if found else "none of them: check the path"
            )
            raise FileNotFoundError(
                f"a checkpoint folder holds Meta's params.json and consolidated.*.pth, transformers' config.json, or "
                f"one GGUF file, and {str(path)!r} holds {what}"
            )
        placement = placement | {"gguf_file": found[0]}
    elif not path.exists() and not is_hub_id(str(name)):
        raise FileNotFoundError(f"a checkpoint is a folder, a GGUF file or a Hub id, and {str(name)!r} does not exist")
    source = str(path) if path.exists() else str(name)
    try:
        model: PreTrainedModel = from_pretrained(AutoModelForCausalLM, source, dtype=dtype, **placement)
        return model.eval()
    except OSError as error:
        if path.exists():
            raise
        raise FileNotFoundError(
            f"a checkpoint is a folder, a GGUF file or a Hub id, and {source!r} is none that can be had here "
            f"({str(error).splitlines()[0]}): check the name"
        ) from error
