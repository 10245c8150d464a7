"""Continuous batching with LLAMA2's rule: requests come and go while others are in flight, and none changes another's.

transformers' loop does the scheduling, the paged cache and the prefix sharing; `request_manager` gives each request
LLAMA2's rule and its own random stream. What this module does not do: it runs no loop, and it imports transformers'
classes for continuous batching only when it is called.
"""

import contextlib
import importlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from ..checks import PerRow, check_bool, check_count, check_int, check_seeds, first_not_none
from ..sampling.settings import SamplingSettings
from .adapters import soft_prompts_of, through_peft
from .inputs import check_lengths, read_prompts
from .model_info import (
    check_max_seq_len,
    eos_ids_of,
    refuse_unusable,
    scored_size_of,
    vocab_size_of,
)
from .model_state import modes_of, set_modes
from .options import (
    NEUTRAL,
    NO_EDIT,
    Call,
    choose_gen_lens,
    choose_temperature,
    choose_top_p,
    resolve_alias,
    sort_keywords,
)
from .probe import Probe, equal_up_to_rounding, window_of_model, with_short_windows

if TYPE_CHECKING:
    from .request_manager import LlamaBatchingManager, ManagerSettings

# Options of a generation config with the same meaning as in `generate`.
_TAKEN = {
    *("max_new_tokens", "max_length", "num_return_sequences", "do_sample", "temperature", "top_p", "eos_token_id"),
    *("pad_token_id", "bos_token_id", "transformers_version", "renormalize_logits"),
}
# On CPU transformers would take most of the memory for the cache, so its size follows from the requests.
CPU_PAGE, CPU_REQUESTS, CPU_CACHE_TOKENS, CPU_BATCH_TOKENS = 32, 16, 16_384, 256
# On CPU each token of a step is compared with the keys of all requests in flight, so run few long ones at a time.
_KEYS_IN_FLIGHT = 1536


class LlamaContinuousMixin:
    """transformers' three ways into continuous batching, with LLAMA2's rule and one stream per request."""

    @through_peft
    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        *,
        max_gen_len: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        logprobs: bool | None = None,
        max_seq_len: int | None = None,
        **kwargs: Any,
    ) -> "LlamaBatchingManager":
        r"""Make a manager that takes requests while others are in flight; its `start` and `stop` are the caller's.

        Settings of the manager are those of requests without their own. With its `seed`, a request's tokens are those
        of `generate(seeds=[seed])`, whatever else is in flight, up to the rounding of the logits.

        Args:
            generation_config (`GenerationConfig`, *optional*): sampling settings and limits, where the call has none.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*): transformers' own: the cache's size,
                offload, prefix sharing, CUDA graphs. Its `return_logprobs` means `logprobs`.
            workload_hints (`WorkloadHints`, *optional*): transformers' own.
            max_gen_len (`int`, *optional*): most new tokens of a request; `max_new_tokens` means the same.
            temperature (`float`, defaults to 0.6): 0 is greedy; `do_sample=False` means 0.
            top_p (`float`, defaults to 0.9): the nucleus.
            logprobs (`bool`): whether results hold raw logprobs: of the logits, without temperature and nucleus.
            max_seq_len (`int`, *optional*): most tokens of a request, prompt included; defaults to the model's context.
            kwargs: `eos_token_id` (an id or a list), `num_return_sequences`, `max_length`, `do_sample`.

        Raises:
            ValueError: a bad value, an option that has no place here, a model whose requests would not stay apart, or
                a transformers release without the API for it.
            TypeError: an unknown keyword, or a value of the wrong type.

        >>> manager = model.init_continuous_batching(max_gen_len=64)
        >>> manager.start()
        >>> manager.add_request([1, 306, 4658], temperature=0.8, seed=7)
        'req_0'
        """
        call = _read_call(self, generation_config, kwargs, "init_continuous_batching")
        most = resolve_alias("max_gen_len", max_gen_len, "max_new_tokens", _max_new_tokens(call, max_gen_len))
        draw = choose_temperature(temperature, call), choose_top_p(top_p, call)
        if any(isinstance(value, list) for value in draw):
            raise TypeError(
                "temperature and top_p of a manager must be one number each: requests have their own in add_request"
            )
        settings = _manager_settings(
            self,
            call,
            max_seq_len,
            _logprobs(logprobs, continuous_batching_config),
            draw=draw,  # type: ignore[arg-type]
            most=None if most is None else check_int("max_gen_len", most, least=0),
        )
        return _make_manager(self, continuous_batching_config, workload_hints, settings)

    @through_peft
    @contextlib.contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: Any = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints: Any = None,
        **settings: Any,
    ) -> Iterator["LlamaBatchingManager"]:
        r"""A manager that is started, and stopped at the end: requests in flight are finished, unless an error ends it.

        Args:
            block (`bool`): whether to wait at the end for requests in flight, at most `timeout` seconds.
            persistent_manager (`bool`): whether to keep the manager and its cache for the next call.
            warmup (`bool`): whether CUDA graphs are captured before the start.
            settings: all else that `init_continuous_batching` takes.

        >>> with model.continuous_batching_context_manager(max_gen_len=64) as manager:
        ...     manager.add_request([1, 306, 4658], seed=7, streaming=True)
        ...     for result in manager.request_id_iter("req_0"):
        ...         print(result.generated_tokens)
        """
        manager = self.init_continuous_batching(
            generation_config, continuous_batching_config, workload_hints, **settings
        )
        with _running(manager, persistent_manager, warmup, block=block, timeout=timeout):
            yield manager

    @through_peft
    def generate_batch(
        self,
        inputs: Tensor | Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        *,
        max_gen_len: int | Sequence[int] | None = None,
        temperature: PerRow | None = None,
        top_p: PerRow | None = None,
        seeds: int | Sequence[int] | None = None,
        logprobs: bool | None = None,
        max_seq_len: int | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        r"""Complete many prompts of any lengths by continuous batching: a row that is done makes room for the next.

        Args:
            inputs (lists of token ids, or a tensor (B, T) with its `attention_mask`): the prompts.
            generation_config, continuous_batching_config: as in `init_continuous_batching`.
            record_timestamps (`bool`): whether results hold the time of each token.
            progress_bar (`bool`): whether to show one.
            persistent_manager (`bool`): whether to keep the manager and its cache for the next call.
            warmup (`bool`): whether CUDA graphs are captured before the start.
            max_gen_len (`int` or one per row): most new tokens; `max_new_tokens` means the same.
            temperature (`float` or one per row, defaults to 0.6): 0 is greedy.
            top_p (`float` or one per row, defaults to 0.9): the nucleus.
            seeds (`int` or one per prompt, *optional*): an int means `seed, seed + 1, ...`. Drawn from torch's global
                generator if not given.
            logprobs (`bool`): whether results hold raw logprobs.
            max_seq_len (`int`, *optional*): most tokens of a row, prompt included.
            kwargs: `eos_token_id`, `num_return_sequences`, `max_length`, `do_sample`.

        Returns:
            transformers' `GenerationOutput` of each request by its id, in the order of the prompts: `generated_tokens`
            (EOS kept), `logprobs`. With `num_return_sequences` a request is followed by its children.

        Raises:
            ValueError: a bad value (the rule, the value, the row and the way out are named), or logits with nan or inf.
            RuntimeError: generation failed in another way, for want of memory for example.

        >>> out = model.generate_batch([[1, 306, 4658], [1, 450]], max_gen_len=16, seeds=[7, 8])
        >>> [result.generated_tokens for result in out.values()]
        """
        call = _read_call(self, generation_config, kwargs, "generate_batch")
        inputs = resolve_alias("inputs", inputs, "input_ids", call.to_model.pop("input_ids", None))
        prompts = read_prompts(inputs, attention_mask, vocab_size_of(self))
        drawn = SamplingSettings(choose_temperature(temperature, call), choose_top_p(top_p, call), seeds)
        settings = _manager_settings(self, call, max_seq_len, _logprobs(logprobs, continuous_batching_config))
        check_lengths(prompts, settings.max_seq_len)
        total = first_not_none(max_seq_len, call.option("max_length"))
        asked = resolve_alias("max_gen_len", max_gen_len, "max_new_tokens", _max_new_tokens(call, max_gen_len))
        limits = choose_gen_lens(asked, total, prompts)
        hints = _hints(prompts, limits, settings)
        reach = [len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)]
        manager = _make_manager(self, continuous_batching_config, hints, settings, reach=reach)
        with _running(manager, persistent_manager, warmup):
            ids = _add_rows(manager, prompts, limits, drawn, record_timestamps)
            return _collect(manager, ids, progress_bar)


def _read_call(model: Any, config: GenerationConfig | None, kwargs: dict[str, Any], method: str) -> Call:
    """Sort the call's options; refuse those that continuous batching, or this release, does not support."""
    _manager_module()
    refuse_unusable(model)
    if soft_prompts_of(model) is not None:
        raise ValueError(
            "continuous batching has no place for soft prompts, which stand before each text: use generate"
        )
    own = [name for name in inspect.signature(getattr(LlamaContinuousMixin, method)).parameters if name != "self"]
    call = sort_keywords(model, config, kwargs, own, method=method)
    others = {**call.to_loop, **{name: value for name, value in call.to_model.items() if name != "input_ids"}}
    others |= {
        name: value for name, value in call.options.items() if name not in _TAKEN and not _asks_nothing(name, value)
    }
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name} has no place in continuous batching, whose steps hold one token of each request: leave it "
                "out, or use generate"
            )
    return call


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether an option's value has no effect."""
    idle = {**NO_EDIT, **NEUTRAL, "disable_compile": True}
    return value is None or value is False or (name in idle and value == idle[name]) or name == "use_cache"


def _manager_module() -> Any:
    """Import `request_manager`; refuse a transformers release without the classes that it needs."""
    try:
        return importlib.import_module(".request_manager", __package__)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            "continuous batching with LLAMA2's rule needs the classes of transformers 5.23, and transformers "
            f"{transformers.__version__} has not all of them: install 5.23, or use generate"
        ) from error


def _max_new_tokens(call: Call, beside: Any) -> Any:
    return call.option("max_new_tokens", beside=beside)


def _manager_settings(
    model: Any,
    call: Call,
    max_seq_len: Any,
    logprobs: bool,
    *,
    draw: tuple[float, float] = (0.0, 1.0),
    most: Any = None,
) -> "ManagerSettings":
    """Read the settings of all requests, and the defaults of temperature, top_p and the limit."""
    total = resolve_alias("max_seq_len", max_seq_len, "max_length", call.option("max_length", beside=max_seq_len))
    copies = first_not_none(call.option("num_return_sequences"), 1)
    return _manager_module().ManagerSettings(  # type: ignore[no-any-return]
        temperature=draw[0],
        top_p=draw[1],
        max_gen_len=most,
        max_seq_len=check_max_seq_len(model, total),
        eos_ids=eos_ids_of(model, call.options),
        num_return_sequences=check_int("num_return_sequences", copies, least=1),
        logprobs=logprobs,
    )


def _logprobs(asked: bool | None, config: Any) -> bool:
    """Whether to return raw logprobs, from the call or from transformers' config."""
    return bool(getattr(config, "return_logprobs", False)) if asked is None else check_bool("logprobs", asked)


def requests_in_flight(reach: Sequence[int]) -> int:
    """Choose how many requests of these lengths to run at a time on a CPU."""
    return max(4, min(2 * CPU_REQUESTS, _KEYS_IN_FLIGHT * len(reach) // sum(reach)))


def _make_manager(
    model: Any, config: Any, hints: Any, settings: "ManagerSettings", *, reach: Sequence[int] = ()
) -> "LlamaBatchingManager":
    """Make a manager, or reuse the one that an earlier call kept."""
    module = _manager_module()
    if config is not None and not isinstance(config, transformers.ContinuousBatchingConfig):
        raise TypeError(
            f"continuous_batching_config must be a ContinuousBatchingConfig, got {type(config).__name__}: make one"
        )
    if config is not None and config.seed is not None:
        raise ValueError(
            f"seed={config.seed} of continuous_batching_config seeds no draw here: give each request its seed, or "
            "seeds to generate_batch"
        )
    kept = vars(model).get("_cached_continuous_batching_manager")
    if kept is not None:
        return _kept_manager(model, kept, module, config, settings)
    if not Probe(model, model.generate).keeps_requests_apart(lambda: _requests_stay_apart(model, module)):
        raise ValueError(
            f"{type(model).__name__} does not keep requests apart in transformers' continuous batching, whose pages "
            "its attention or its states do not read: use generate"
        )
    sized = _size_for_cpu(model, config, hints, reach)
    return module.LlamaBatchingManager(model, sized, hints, settings, asked=config)  # type: ignore[no-any-return]


def _requests_stay_apart(model: Any, module: Any) -> bool:
    """Try it out: run two greedy requests together in small steps, and compare their logprobs with `generate`'s.

    A window is made so short that these requests exceed it.
    """
    prompts = [[token % scored_size_of(model) for token in (1, 38, 75, 112, 149)[:length]] for length in (5, 3)]
    settings = module.ManagerSettings(0.0, 1.0, 4, None, (), 1, True)
    config = transformers.ContinuousBatchingConfig(
        page_size=4, num_blocks=16, max_batch_tokens=4, max_requests_per_batch=2, use_async_batching=False
    )
    config.use_cuda_graph = False
    modes = modes_of(model)
    try:
        if window_of_model(model) is not None:
            model = with_short_windows(model)
        found = module.LlamaBatchingManager(model.eval(), config, None, settings).answers_at_once(prompts)
        for prompt, result in zip(prompts, found, strict=True):
            alone = model.generate([prompt], max_gen_len=4, temperature=0, logprobs=True, eos_token_id=[])
            same = [token == wanted for token, wanted in zip(result.generated_tokens, alone.tokens[0], strict=True)]
            steps = (same.index(False) if False in same else 3) + 1  # tokens that differ must be equally probable
            mine, other = torch.tensor(result.logprobs[:steps]), torch.tensor(alone.logprobs[0][:steps])
            if not equal_up_to_rounding(mine, other, model.dtype):
                return False
    except Exception:  # whatever the error, the model cannot use pages
        return False
    finally:
        set_modes(modes)
    return True


def _kept_manager(model: Any, kept: Any, module: Any, config: Any, settings: Any) -> "LlamaBatchingManager":
    """Give the manager that an earlier call kept the settings of this call."""
    if not isinstance(kept, module.LlamaBatchingManager) or any(
        (
            config is not None and config != kept.asked,
            settings.logprobs != kept.settings.logprobs,
            settings.num_return_sequences != kept.settings.num_return_sequences,
        )
    ):
        raise ValueError(
            "the model keeps a manager of an earlier call with another continuous_batching_config, logprobs or "
            "num_return_sequences: call model.destroy_cached_continuous_batching_manager() first"
        )
    kept.settings = settings
    return kept  # type: ignore[no-any-return]


def _size_for_cpu(model: Any, config: Any, hints: Any, reach: Sequence[int]) -> Any:
    """Return the config; on CPU, fill in sizes that the caller left out, to fit the requests.

    `reach` holds the most tokens of each request, prompt included, if known.
    """
    asked = transformers.ContinuousBatchingConfig(page_size=CPU_PAGE) if config is None else config
    if model.device.type != "cpu" or asked.max_memory_percent is not None:
        return asked
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CPU_CACHE_TOKENS
    longest, requests = context, CPU_REQUESTS
    if hints is not None and hints.max_prompt_length:
        longest = hints.max_prompt_length + hints.max_generated_length
        requests = min(hints.num_requests, requests_in_flight(reach) if reach else CPU_REQUESTS)
    pages = math.ceil(longest / asked.page_size) + 1
    most = max(CPU_CACHE_TOKENS // asked.page_size, pages if hints is not None else 0)
    blocks = first_not_none(asked.num_blocks, min(pages * requests, most))
    return replace(
        asked,
        num_blocks=blocks,
        max_batch_tokens=first_not_none(asked.max_batch_tokens, CPU_BATCH_TOKENS),
        max_requests_per_batch=first_not_none(asked.max_requests_per_batch, requests if reach else None),
    )


def _hints(prompts: Sequence[Sequence[int]], limits: Sequence[int], settings: "ManagerSettings") -> Any:
    """Make transformers' `WorkloadHints`, by which it sizes a manager."""
    module = importlib.import_module("transformers.generation.continuous_batching.utils")
    longest = max(map(len, prompts))
    reach = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    if settings.max_seq_len is not None:
        reach = min(reach, settings.max_seq_len)
    return module.WorkloadHints(longest, reach - longest, len(prompts) * settings.num_return_sequences)


@contextlib.contextmanager
def _running(
    manager: Any, persistent: bool, warmup: bool, *, block: bool = True, timeout: float | None = None
) -> Iterator[None]:
    """Run the manager's thread. An error ends it at once; otherwise requests in flight are finished."""
    if warmup and not manager.warmed_up:
        manager.warmup()
    manager.start()
    kept = False
    try:
        yield
        kept = persistent
    except BaseException:
        manager.stop(block=block, timeout=timeout, hard_stop=True)
        raise
    else:
        manager.stop(block=block, timeout=timeout, keep_for_next_session=persistent)
    finally:
        if not kept:
            manager.destroy()
            if vars(manager.model).get("_cached_continuous_batching_manager") is manager:
                del manager.model._cached_continuous_batching_manager


def _add_rows(
    manager: "LlamaBatchingManager",
    prompts: list[list[int]],
    limits: Sequence[int],
    drawn: SamplingSettings,
    record_timestamps: bool,
) -> list[str]:
    """Add a request for each prompt, with its own settings; return the ids in the order of the prompts."""
    given = {name: _each(name, getattr(drawn, name), len(prompts)) for name in ("temperature", "top_p")}
    seeds = [None] * len(prompts) if drawn.seeds is None else check_seeds(drawn.seeds, len(prompts))
    rows = [
        {"max_new_tokens": limits[row], "seed": seed, **{name: values[row] for name, values in given.items()}}
        for row, seed in enumerate(seeds)
    ]
    return [one for one in manager.add_rows(prompts, rows, record_timestamps=record_timestamps) if one is not None]


def _each(name: str, value: Any, rows: int) -> Sequence[Any]:
    """One value per row."""
    if not isinstance(value, tuple):
        return [value] * rows
    check_count(name, len(value), rows)
    return value


def _collect(manager: "LlamaBatchingManager", ids: list[str], progress_bar: bool) -> dict[str, Any]:
    """Collect the results of all requests in order, each followed by its children's.

    Raises:
        ValueError: a result is an error.
        RuntimeError: the thread ended early.
    """
    rows = [[one, *manager.children_of(one)] for one in ids]
    results: dict[str, Any] = {}
    with tqdm(total=sum(map(len, rows)), disable=not progress_bar, unit="request") as bar:
        while len(results) < sum(map(len, rows)):
            for result in wait_for_results(manager):
                if result.is_finished():
                    results[result.request_id] = result
                    bar.update(1)
    for row, names in enumerate(rows):
        for result in (results[name] for name in names):
            if getattr(result, "bad_logits", False):
                raise ValueError(f"row {row}: {result.error}")
            if result.error is not None:
                _raise_failure(manager, result.error)
    return {name: results[name] for names in rows for name in names}


def wait_for_results(manager: "LlamaBatchingManager") -> list[Any]:
    """Wait for one result, and return it with all others that are ready.

    Raises:
        RuntimeError: the manager's thread ended early.
    """
    result = manager.get_result()
    results = []
    while result is not None:
        results.append(result)
        result = manager.get_result(timeout=0) if manager.output_router.output_queue.qsize() else None
    if not results or manager.background_thread_status.fatal_error is not None:
        _raise_failure(manager, "its thread ended")
    return results


def _raise_failure(manager: "LlamaBatchingManager", reason: str) -> None:
    """Raise an error from the exception that ended the manager's thread."""
    cause = manager.background_thread_status.fatal_error
    raise RuntimeError(f"continuous batching failed: {cause or reason}") from cause
