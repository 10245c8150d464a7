"""Results of a manager of continuous batching: in order, by request, by handler, cancelled, failed and left behind."""

import asyncio
import threading

import pytest

from tests.generation.batching import without_collections
from tests.generation.helpers import BOS, SHORT

pytestmark = pytest.mark.slow

LONG = {"max_gen_len": 400, "eos_token_id": [], "seed": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_collections(monkeypatch)


@pytest.fixture
def manager(tiny_model):
    """A manager that runs, and is stopped at the end whatever is in flight."""
    made = tiny_model.init_continuous_batching(max_gen_len=8, eos_token_id=[])
    made.start()
    yield made
    made.stop(hard_stop=True)


def lengths(results):
    return [len(result.generated_tokens) for result in results]


def test_streams_come_in_order_whoever_reads_which_first(manager):
    """Each request's results, all of them, while those of others wait."""
    names = [manager.add_request(SHORT, f"request {seed}", seed=seed, streaming=True) for seed in range(4)]
    for name in reversed(names):
        assert lengths(manager.request_id_iter(name)) == list(range(1, 9))
    assert manager.get_result(timeout=0) is None


def test_a_wait_for_one_request_leaves_the_others_results(manager):
    """Nor does it wait where nothing can come: for a request that is not in flight, or after its last result."""
    manager.add_request(SHORT, "first", seed=1)
    manager.add_request(SHORT, "second", seed=2, max_new_tokens=1)
    assert manager.get_result("first").request_id == "first"
    assert manager.get_result("first") is None and manager.get_result("no such") is None
    assert lengths(manager.request_id_iter("second")) == [1]
    manager.add_request(SHORT, "first", seed=1)  # an id is free again once its request is finished
    assert lengths([manager.get_result("first")]) == [8]
    manager.stop()
    assert list(manager) == []


def test_a_cancelled_request_is_not_heard_of_again(manager):
    """Its iterator ends, what waits is dropped, its copies are cancelled too, and its id is not taken twice."""
    manager.add_request(SHORT, "cancelled", streaming=True, **LONG)
    seen = []
    for result in manager.request_id_iter("cancelled"):
        seen.append(len(result.generated_tokens))
        if len(seen) == 3:
            manager.cancel_request("cancelled")
    assert seen == [1, 2, 3] and manager.get_result("cancelled") is None
    with pytest.raises(ValueError, match="request_id must be new, but 'cancelled' was cancelled: choose another"):
        manager.add_request(SHORT, "cancelled")
    manager.cancel_request("not yet")  # of no request, and so of none to come
    manager.add_request(SHORT, "not yet", seed=1)
    assert lengths(manager.request_id_iter("not yet")) == [8]
    with pytest.raises(ValueError, match="request_id must be new, but 'twice' is in flight"):
        for _ in range(2):
            manager.add_request(SHORT, "twice", **LONG)


@pytest.mark.parametrize("prompt", [SHORT, [BOS]], ids=["forked", "as requests"])
def test_copies_are_cancelled_with_their_request(tiny_model, prompt):
    """Whichever way transformers makes them."""
    with tiny_model.continuous_batching_context_manager(num_return_sequences=2) as manager:
        manager.add_request(prompt, "cancelled", streaming=True, **LONG)
        assert manager.get_result().request_id.startswith("cancelled")
        manager.cancel_request("cancelled")
    assert manager.get_result() is None


def test_a_failure_ends_every_wait(tiny_model):
    """Of the manager's thread: whoever waits hears of it, once the results are taken, and the cause comes along."""
    with tiny_model.continuous_batching_context_manager(max_gen_len=400) as manager:
        handle = tiny_model.register_forward_pre_hook(lambda module, args: 1 / 0)
        try:
            manager.add_request(SHORT, "failed")
            assert "division by zero" in manager.get_result().error
            for wait in (manager.get_result, lambda: next(iter(manager)), lambda: manager.add_request(SHORT)):
                with pytest.raises(RuntimeError, match="continuous batching failed: division by zero") as caught:
                    wait()
                assert isinstance(caught.value.__cause__, ZeroDivisionError)
        finally:
            handle.remove()


def test_handlers_hear_all_in_order_each_in_its_loop(manager):
    """One that comes late gets what was delivered before; one whose event loop was closed disturbs nobody."""

    async def listen(name, seed):
        heard, done = [], asyncio.Event()
        manager.add_request(SHORT, name, seed=seed, streaming=True)
        while not heard and manager.output_router.output_queue.qsize() < 3:
            await asyncio.sleep(0.001)

        def hear(result):
            heard.append((len(result.generated_tokens), threading.current_thread()))
            if result.is_finished():
                done.set()

        manager.register_result_handler(name, hear)
        await done.wait()
        assert heard == [(length, threading.current_thread()) for length in range(1, 9)]

    async def leave():
        manager.add_request(SHORT, "left", streaming=True, **LONG)
        manager.register_result_handler("left", lambda result: None)

    asyncio.run(leave())
    faults = []

    def run(name, seed):
        try:
            asyncio.run(listen(name, seed))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(f"heard {seed}", seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and manager.is_running()


def test_a_full_queue_is_refused_in_a_sentence(tiny_model):
    """And what was half added is forgotten."""
    from transformers import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(max_queue_size=1, page_size=32)
    manager = tiny_model.init_continuous_batching(max_gen_len=2, continuous_batching_config=config)
    manager.add_request(SHORT, "first", seed=1)
    with pytest.raises(RuntimeError, match="queue is full with max_queue_size=1 requests: start the manager"):
        manager.add_request(SHORT, "second", seed=1)
    manager.start()
    assert manager.get_result().request_id == "first" and manager.get_result("second") is None
    manager.stop()


def test_the_loop_ends_with_the_program(tiny_model, monkeypatch):
    """A manager that nobody stops would keep the program from ending; one that a thread still uses goes on."""
    manager = tiny_model.init_continuous_batching(max_gen_len=8, eos_token_id=[])
    manager.start()
    loop, ended, user = manager._generation_thread, threading.Thread(), threading.Thread()
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    monkeypatch.setattr(threading, "enumerate", lambda: [loop, user])
    manager.add_request(SHORT, seed=1)
    assert lengths([manager.get_result()]) == [8]
    monkeypatch.setattr(threading, "enumerate", lambda: [loop, ended])
    loop.join()
    manager.stop()
