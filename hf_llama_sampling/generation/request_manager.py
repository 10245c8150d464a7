"""transformers' continuous batching manager with LLAMA2's rule and one stream of random numbers per request.

This module subclasses transformers 5.23's classes for continuous batching, some of them not public; `continuous`
imports it only when called. What this module does not do: it schedules nothing (transformers does), and it reads no
settings of a call.
"""

import contextlib
import copy
import functools
import inspect
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from ..checks import check_int, check_seeds, check_temperature, check_top_p, first_not_none
from ..sampling.continuous import RequestSampler, RequestSettings, child_id, names_a_child
from .inputs import check_lengths, read_prompts
from .model_info import check_positions, eos_ids_of, forget_longer_texts, length_limit, vocab_size_of
from .model_state import ModelState, modes_of, set_modes
from .options import resolve_alias, sort_keywords
from .results import Router
from .turns import turns_of

_LOOP = "loop of continuous batching"  # a thread's name
_NEEDED = (ModelRunner._sample, ContinuousBatchProcessor.update_batch, RequestState.to_generation_output)


@dataclass(frozen=True)
class ManagerSettings:
    """Defaults of requests without their own settings, and settings of all requests."""

    temperature: float
    top_p: float
    max_gen_len: int | None  # most new tokens; None: each request must say
    max_seq_len: int | None  # most tokens of a request, prompt included; None: no limit
    eos_ids: tuple[int, ...]
    num_return_sequences: int
    logprobs: bool


class LlamaBatchingManager(ContinuousBatchingManager):
    """transformers' manager, whose requests are drawn by LLAMA2's rule, each from its own stream.

    Made by `model.init_continuous_batching` and `model.continuous_batching_context_manager`. It has the methods of
    transformers' manager. Results of a request come in order, whoever waits for which, and none of a cancelled one.
    """

    def __init__(
        self, model: Any, config: ContinuousBatchingConfig, hints: Any, settings: ManagerSettings, *, asked: Any = None
    ) -> None:
        self.asked = asked  # the config as the caller gave it
        self._manages = False  # whether it is between `start` and `stop`
        self._adds_rows = False  # whether `add_rows` adds requests
        self._switched = False  # whether the model's attention reads pages
        self._paged: list[tuple[Any, str]] = []  # configs, and the attention of each in a step
        own = GenerationConfig(do_sample=False, max_new_tokens=settings.max_gen_len or None)  # it refuses 0
        own.eos_token_id, own.num_return_sequences = list(settings.eos_ids) or -1, settings.num_return_sequences
        config = copy.copy(config)
        config.return_logprobs = True  # also needed to report logits with nan or inf
        with turns_of(model).without_others():
            modes, attention = modes_of(model), model.config._attn_implementation
            try:
                super().__init__(model, own, config, hints)
            finally:  # transformers switches both already here; a manager that never starts would leave them so
                set_modes(modes)
                if model.config._attn_implementation != attention:
                    model.set_attn_implementation(attention)
        self._original_attn_impl = None
        self.settings = settings
        self.sampler = self.logit_processor = RequestSampler(logprobs=settings.logprobs)
        self.output_router = Router(self._finish, self.cancel_request)
        self._state: ModelState | None = None  # in which the model computed what the cache holds

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copy nothing, so that a copy of a model with a kept manager begins without one: threads and pages stay."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickle as None, for the same reason."""
        return type(None), ()

    @contextlib.contextmanager
    def _paged_attention(self) -> Iterator[None]:
        """Switch the model to attention that reads pages, while no other forward runs; note which configs change."""
        if self._switched:
            yield
            return
        configs = list({id(config): config for config in map(_config_of, self.model.modules()) if config}.values())
        with turns_of(self.model).without_others():
            own = [config._attn_implementation for config in configs]
            try:
                self._switched = True
                self.switch_to_cb_friendly_attn(self.model, self.continuous_batching_config.auto_switch_to_flash)
                now = [config._attn_implementation for config in configs]
                self._paged = [(config, new) for config, old, new in zip(configs, own, now, strict=True) if old != new]
                yield
            finally:
                self._switched = False
                if self._original_attn_impl is not None:
                    self.model.set_attn_implementation(self._original_attn_impl)
                    self._original_attn_impl = None

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        """Let a step run alone, with paged attention: other threads may forward the model between two steps."""
        with turns_of(self.model).without_others():
            own = [(config, config._attn_implementation) for config, _ in self._paged]
            try:
                for config, attention in self._paged:
                    config._attn_implementation = attention
                yield
            finally:
                for config, attention in own:
                    config._attn_implementation = attention

    def _generation_step(self) -> None:
        with self._step():
            super()._generation_step()

    def _generation_loop_body(self, *args: Any, **kwargs: Any) -> bool:
        """End the loop with the program, which would wait for a manager that nobody stops."""
        return not _program_has_ended() and super()._generation_loop_body(*args, **kwargs)

    def warmup(self) -> None:
        """Capture CUDA graphs (transformers)."""
        with self._paged_attention():
            super().warmup()

    def start(self) -> None:
        """Start the thread that generates. Make the cache here, so that its errors are raised here."""
        if self.is_running():
            super().start()
            return
        self._forget_stale_keys()
        if not self._manages:
            turns_of(self.model).begin_managing(self.model)
            self._manages = True
        try:
            with self._paged_attention():
                forget_longer_texts(self.model)
                self.batch_processor = self._create_batch_processor()
                super().start()
                self._generation_thread.name = _LOOP
        except BaseException:
            self._restore_mode()
            raise

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stop the thread (transformers' arguments), and restore the model's training mode."""
        super().stop(*args, **kwargs)
        self._restore_mode()

    def _restore_mode(self) -> None:
        if self._manages:
            self._manages = False
            turns_of(self.model).end_managing()

    def add_request(
        self,
        input_ids: Any,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        max_gen_len: int | None = None,
        **others: Any,
    ) -> str | None:
        r"""Add a request. Its tokens are those of `model.generate([input_ids], seeds=[seed])` with the same settings.

        Args:
            input_ids (list of token ids, or a tensor of one dimension): the prompt, without padding.
            request_id (`str`, *optional*): its name; made up if not given.
            max_new_tokens (`int`, *optional*): most new tokens; the manager's if not given. `max_gen_len` means the
                same. `max_seq_len` may leave fewer.
            streaming (`bool`): whether a result comes with each token, or one at the end.
            record_timestamps (`bool`): whether to note the time of each token.
            eos_token_id (`int` or a list, *optional*): the ids that end it; the manager's if not given.
            temperature (`float`, *optional*): 0 is greedy; the manager's if not given.
            top_p (`float`, *optional*): the nucleus; the manager's if not given.
            seed (`int`, *optional*): of its stream of random numbers; one from torch's global generator if not given,
                so that `torch.manual_seed` before it makes it come out the same again.

        Returns:
            the request's id; None on the ranks of a parallel model that take no requests.

        Raises:
            ValueError: a bad value (the rule, the value and the way out are named), or a request that the cache cannot
                hold.
            TypeError: a value of the wrong type, or an unknown keyword.
            RuntimeError: the manager takes no requests any more.

        >>> manager.add_request([1, 306, 4658], max_new_tokens=16, temperature=0.8, top_p=0.9, seed=7)
        'req_0'
        """
        if not self.is_tp_driver:
            return None
        self._refuse_if_closed()
        if not self._adds_rows:
            self._forget_stale_keys()
        self._refuse_keywords(others)
        asked = resolve_alias("max_gen_len", max_gen_len, "max_new_tokens", max_new_tokens)
        prompt, limit = self._check_length(input_ids, first_not_none(asked, self.settings.max_gen_len))
        eos_ids = (
            self.settings.eos_ids if eos_token_id is None else eos_ids_of(self.model, {"eos_token_id": eos_token_id})
        )
        request_id = self._new_id() if request_id is None else self._check_id(request_id)
        given = RequestSettings(
            temperature=check_temperature(first_not_none(temperature, self.settings.temperature)),
            top_p=check_top_p(first_not_none(top_p, self.settings.top_p)),
            seed=int(torch.randint(2**63 - 1, ())) if seed is None else check_seeds([seed], 1)[0],
            request_id=request_id,
        )
        self.output_router.results.begin(request_id, self.children_of(request_id))
        if limit == 0:
            self._answer_at_once(request_id, prompt)
            return request_id
        state = RequestState(
            request_id=request_id,
            initial_tokens=prompt,
            max_new_tokens=limit,
            streaming=streaming,
            record_timestamps=record_timestamps,
            eos_token_id=list(eos_ids),
            logit_processor_kwargs={RequestSampler.KEY: given},
        )
        self._queue(self._with_children(state))
        return request_id

    def _queue(self, states: Sequence[RequestState]) -> None:
        """Hand requests to the loop; wait for room in transformers' queue if it goes on."""
        try:
            for state in states:
                self.input_queue.put(state, timeout=10 if self.is_running() else 0.01)
        except queue.Full as error:
            self.cancel_request(states[0].request_id)
            raise RuntimeError(
                f"the manager's queue is full with max_queue_size={self.input_queue.maxsize} requests: start the "
                "manager, wait for results, or raise max_queue_size of continuous_batching_config"
            ) from error
        self._wake_up_loop.set()

    def add_requests(
        self, inputs: Any, max_new_tokens: int | None = None, *, seeds: Any = None, **kwargs: Any
    ) -> list[str | None]:
        """Add several requests with the same settings; those of `add_request`, and `seeds`: an int or one per request.

        Prompts with a common beginning are added one after the other, so that they share it.
        """
        prompts = read_prompts(inputs, None, vocab_size_of(self.model))
        each = [None] * len(prompts) if seeds is None else check_seeds(seeds, len(prompts))
        rows = [{"seed": seed} for seed in each]
        return self.add_rows(prompts, rows, max_new_tokens=max_new_tokens, **kwargs)

    def add_rows(self, prompts: list[list[int]], rows: Sequence[dict[str, Any]], **common: Any) -> list[str | None]:
        """Add a request for each prompt with its own keywords and the common ones; return the ids in order."""
        self._refuse_if_closed()
        self._forget_stale_keys()
        self._adds_rows = True  # no request of these needs another look at the model
        try:
            return self._add_rows(prompts, rows, common)
        finally:
            self._adds_rows = False

    def _add_rows(self, prompts: list[list[int]], rows: Sequence[dict[str, Any]], common: Any) -> list[str | None]:
        names = [self._new_id() for _ in prompts]
        order = range(len(prompts))
        for row in sorted(order, key=prompts.__getitem__, reverse=True) if self._use_prefix_sharing else order:
            try:
                self.add_request(prompts[row], names[row], **rows[row], **common)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
        return [name if self.is_tp_driver else None for name in names]

    def answers_at_once(self, prompts: list[list[int]]) -> list[GenerationOutput]:
        """Run some requests with the manager's settings in this thread, without `start` and `stop`."""
        try:
            with self._paged_attention():
                processor = self._processor()
                names = self.add_rows(prompts, [{"seed": 0}] * len(prompts))
                while processor.prepare_next_batch():
                    processor._generation_step(self.model)
                    processor.update_batch()
                results = {result.request_id: result for result in list(self.output_router.output_queue.queue)}
                return [results[name] for name in names]
        finally:
            self.batch_processor = None

    def cancel_request(self, request_id: str) -> None:
        """Forget a request and its copies: no result comes any more, and others are not disturbed."""
        for name in (request_id, *self.children_of(request_id)):
            self.output_router.drop_handler(name)
            if self.output_router.results.forget(name):
                super().cancel_request(name)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        r"""Wait for a result and take it: the first that came, or the first of one request.

        Args:
            request_id (`str`, *optional*): whose result to take; those of others stay, in their order.
            timeout (`float`, *optional*): most seconds to wait.

        Returns:
            None after `timeout`, or if no result can come: the manager does not run, or the request is not in flight.

        Raises:
            RuntimeError: generation has failed, and all results are taken.
        """
        wanted = request_id if self.is_tp_driver else None  # other ranks take no requests, and hear of none
        result = self.output_router.results.take(wanted, timeout, self.is_running)
        cause = self.background_thread_status.fatal_error
        if result is None and cause is not None:
            raise RuntimeError(f"continuous batching failed: {cause}") from cause
        return result

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the manager has ended."""
        while (result := self.get_result()) is not None:
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Results of one request in order, until it is finished or cancelled."""
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        """Call `callback` with each result of a request in the running event loop, also with those that came before."""
        with self.output_router.handing_over(request_id):
            super().register_result_handler(request_id, callback)

    def _check_length(self, input_ids: Any, asked: Any) -> tuple[list[int], int]:
        """Check a prompt and its limit; return both, the limit cut to what `max_seq_len` leaves."""
        if asked is None:
            raise ValueError("max_new_tokens must be given: it is the most new tokens of a request")
        (prompt,) = read_prompts([input_ids], None, vocab_size_of(self.model))
        most = self.settings.max_seq_len
        check_lengths([prompt], most)
        limit = check_int("max_new_tokens", asked, least=0)
        limit = limit if most is None else min(limit, most - len(prompt))
        total = len(prompt) + limit
        check_positions(self.model, total)
        rotary = length_limit(self.model)
        if rotary is not None and total > rotary:
            raise ValueError(
                f"{type(self.model).__name__}'s rotary factors depend on the longest text beyond {rotary} tokens, and "
                f"requests share a forward, but this one may reach {total}: shorten it, or use generate"
            )
        cache = self._processor().cache
        room = cache.num_blocks * self.continuous_batching_config.page_size
        if total - 1 > room and limit:
            raise ValueError(
                f"a request must fit the cache of {room} tokens, but this one may reach {total - 1}: raise num_blocks "
                "of continuous_batching_config, or shorten it"
            )
        return prompt, limit

    def _refuse_keywords(self, others: dict[str, Any]) -> None:
        """Refuse keywords that `add_request` does not have, with `generate`'s sentence if it has one."""
        sort_keywords(self.model, None, others, _OWN_ARGUMENTS, method="add_request")
        for name in others:
            raise TypeError(
                f"add_request has no keyword {name!r}: a request has its own max_new_tokens, temperature, top_p, "
                "seed and eos_token_id, all else is the manager's"
            )

    def _new_id(self) -> str:
        while True:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
            if not self.output_router.results.knows(request_id):
                return request_id

    def _check_id(self, request_id: Any) -> str:
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a text, got {request_id!r}")
        if names_a_child(request_id):
            raise ValueError(f"request_id must not be the id of a child, got {request_id!r}: choose another")
        return request_id

    def _forget_stale_keys(self) -> None:
        """Drop cached keys and values if the model has changed since they were computed; refuse if requests use them.

        transformers would share them with any later request that begins alike, also in a manager that was kept.
        """
        with turns_of(self.model).beside_others():
            if self._state is not None and self._state.holds_for(self.model):
                return
        if self._state is not None and not self.is_running():
            self.batch_processor = None
        elif self._state is not None and self._use_prefix_sharing:
            self._evict_between_steps()
        self._state = ModelState(self.model)

    def _evict_between_steps(self) -> None:
        """Pause the loop and empty the cache; refuse if requests are in flight, or if other ranks would wait."""
        alone = (getattr(self.model, "tp_size", None) or 1) == 1
        if alone and self._generation_thread is not threading.current_thread():
            with self.pause():
                if not self.batch_processor.has_pending_requests():
                    self.batch_processor.cache.evict_cached_blocks()
                    return
        raise RuntimeError(
            "the model has changed while requests are in flight, and new ones could share the keys and values that it "
            "computed before: wait for their results, or stop the manager and start it again"
        )

    def _refuse_if_closed(self) -> None:
        denial = self.background_thread_status.can_accept_new_requests()
        cause = self.background_thread_status.fatal_error
        if cause is not None:
            raise RuntimeError(
                f"continuous batching failed: {cause}, and its manager takes no requests any more: make a new one"
            ) from cause
        if denial is not None:
            raise RuntimeError("the manager was stopped, and takes no requests any more: make a new one")

    def _with_children(self, state: RequestState) -> list[RequestState]:
        """Return the request, with its children as requests if transformers (5.23) might fail to fork them.

        transformers forks children in the step that forwards a prompt's tokens but the last. If these are cached
        already, by another request or by the step before (asynchronous), that step is empty, and alone it fails.
        """
        page = self.continuous_batching_config.page_size
        if not self.continuous_batching_config.use_async_batching and len(state.initial_tokens) % page != 1:
            state.num_children = self.num_return_sequences - 1
            return [state]
        return [state, *(state.fork(name) for name in self.children_of(state.request_id))]

    def children_of(self, request_id: str) -> list[str]:
        """Return the ids of the copies that `num_return_sequences` makes of a request."""
        return [child_id(request_id, number) for number in range(self.num_return_sequences - 1)]

    def _answer_at_once(self, request_id: str, prompt: list[int]) -> None:
        """Finish a request that may not generate any token, and its children, without the loop."""
        for name in [request_id, *self.children_of(request_id)]:
            state = RequestState(request_id=name, initial_tokens=prompt, max_new_tokens=0)
            state.status = RequestStatus.FINISHED
            self.output_router.deliver(state.to_generation_output())

    def _finish(self, output: GenerationOutput) -> GenerationOutput:
        """Prepare an output for the caller: fail it if its logits were nan or inf; drop logprobs not asked for."""
        bad = next((step for step, value in enumerate(output.logprobs) if math.isnan(value)), None)
        if bad is not None and output.error is None:
            if not output.is_finished():
                super().cancel_request(output.request_id)
            output.status, output.bad_logits = RequestStatus.FAILED, True
            output.error = (
                f"the model's logits must be finite, but those for position {len(output.prompt_ids) + bad} of request "
                f"{output.request_id!r} hold nan or inf: check the weights and the dtype (float16 overflows where "
                "bfloat16 and float32 do not)"
            )
        if not self.settings.logprobs:
            output.logprobs = []
        return output

    def _processor(self) -> ContinuousBatchProcessor:
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        return self.batch_processor

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        """Make transformers' processor, store our logprobs in it, and restore torch's generators, which it seeds."""
        if self.batch_processor is not None:  # the manager's thread restarts it
            return super()._create_batch_processor()
        device, offload = self.model.device, self.continuous_batching_config.cpu_offload_space
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                self._paged_attention(),
                torch.inference_mode(False),  # the loop's thread writes to these tensors, and is in none
            ):
                processor = super()._create_batch_processor()
        except RuntimeError as error:
            if offload and not torch.accelerator.is_available():
                raise ValueError(
                    f"cpu_offload_space={offload} keeps caches in pinned memory beside a device, and there is no "
                    "device here: leave it out, and requests that make room are read again"
                ) from error
            if "Async batching requires" in str(error):
                raise ValueError(
                    f"use_async_batching=True needs a model on a GPU, and this one is on {device}: leave it out"
                ) from error
            raise
        processor.model_runner._sample = functools.partial(self.sampler.store, processor.model_runner._sample)
        return processor


_OWN_ARGUMENTS = [name for name in inspect.signature(LlamaBatchingManager.add_request).parameters if name != "self"]


def _config_of(module: Any) -> Any:
    """Return a module's config, if it says which attention to use."""
    config = vars(module).get("config")
    return config if hasattr(config, "_attn_implementation") else None


def _program_has_ended() -> bool:
    """Whether nothing is left of the program but its daemons and loops of continuous batching."""
    main = threading.main_thread()
    others = (thread for thread in threading.enumerate() if thread is not main and thread.name != _LOOP)
    return not main.is_alive() and all(thread.daemon for thread in others)
