"""transformers' interface of continuous batching: the tokens of `generate` for each prompt alone."""

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="its results are what is given")

from tokenizers import Tokenizer, models
from transformers import ContinuousBatchingConfig, GenerationConfig

from emssd_compile.errors import InvalidInputError, OptionError, SessionError
from emssd_compile.session import Session
from tests.export.subjects import VOCABULARY, prompt
from tests.sessions import NEW, WAIT, alone, fast, held

PROMPTS = [prompt(n) for n in (3, 8, 5, 11, 4)]
CONFIG = GenerationConfig(max_new_tokens=NEW, do_sample=False)


def _new(ids: list[int], **options: Any) -> list[int]:
    return alone(ids, **options)[len(ids) :]


def test_a_batch_by_names_in_order():
    found = fast().generate_batch(PROMPTS, CONFIG, record_timestamps=True)
    assert [*found] == [f"req_{index}" for index in range(5)]
    assert [each.prompt_ids for each in found.values()] == PROMPTS
    assert [each.generated_tokens for each in found.values()] == [*map(_new, PROMPTS)]
    assert all(each.is_finished() and each.error is None for each in found.values())
    times = found["req_3"].timestamps
    assert len(times) == NEW
    assert times == sorted(times)
    assert fast().generate_batch([]) == {}


def test_progress_is_of_requests(capfd):
    assert len(fast().generate_batch(PROMPTS[:3], CONFIG, progress_bar=True)) == 3
    out, err = capfd.readouterr()
    assert (out, "requests: 3/3" in err) == ("", True)


def test_options_of_the_call_and_of_the_batching():
    eos = _new(PROMPTS[0])[3]
    found = fast().generate_batch(PROMPTS[:2], max_new_tokens=7, eos_token_id=eos)
    assert found["req_0"].generated_tokens == _new(PROMPTS[0], max_new_tokens=7, eos_token_id=eos)
    sampled = GenerationConfig(max_new_tokens=NEW, do_sample=True, top_k=0)
    batching = ContinuousBatchingConfig(return_logprobs=True, seed=11, max_queue_size=1)
    found = fast().generate_batch(PROMPTS, sampled, batching)
    for index, ids in enumerate(PROMPTS):
        how: dict[str, Any] = {"do_sample": True, "top_k": 0, "seed": 11 + index}
        whole = fast().generate([ids], max_new_tokens=NEW, logprobs=True, return_dict_in_generate=True, **how)
        assert found[f"req_{index}"].generated_tokens == whole.sequences[0][len(ids) :]
        assert found[f"req_{index}"].logprobs == pytest.approx(whole.logprobs[0].tolist(), abs=1e-4)


def test_a_seed_is_that_of_generate():
    how: dict[str, Any] = {"do_sample": True, "top_k": 0, "seed": 7, "max_new_tokens": NEW}
    found = fast().generate_batch(PROMPTS[:2], **how)
    whole = fast().generate(PROMPTS[:2], **how)
    assert [each.prompt_ids + each.generated_tokens for each in found.values()] == whole


def test_nothing_is_taken_once_it_stops_and_a_refused_request_holds_nothing_up():
    manager = fast().init_continuous_batching(CONFIG)
    manager.start()
    manager.add_request(PROMPTS[0])
    with pytest.raises(InvalidInputError):
        manager.add_request([99999])
    manager.stop(block=False)
    with pytest.raises(SessionError, match="does not run"):
        manager.add_request(PROMPTS[1])
    manager.stop(timeout=WAIT)
    deadline = time.monotonic() + WAIT
    while manager.is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not manager.is_running()
    assert manager.get_result().generated_tokens == _new(PROMPTS[0])


def test_streaming_cancelling_and_results_of_one_request():
    with fast().continuous_batching_context_manager(CONFIG) as manager:
        (other,) = manager.add_requests(PROMPTS[:1])
        name = manager.add_request(PROMPTS[1], request_id="mine", max_new_tokens=40, streaming=True, eos_token_id=-1)
        results = manager.request_id_iter(name)
        first = next(results)
        assert first.generated_tokens == _new(PROMPTS[1], max_new_tokens=40)[:1]
        assert not first.is_finished()
        manager.cancel_request(name)
        *_, last = results
        assert last.is_finished()
        count = len(last.generated_tokens)
        assert last.generated_tokens == _new(PROMPTS[1], max_new_tokens=40)[:count]
        assert manager.get_result("mine", timeout=0) is None
        assert [each.request_id for each in manager] == [other]
    assert not manager.is_running()
    assert manager.get_result() is None


def test_a_request_that_is_refused_leaves_no_trace():
    manager = fast().init_continuous_batching(CONFIG)
    with pytest.raises(SessionError, match="start"):
        manager.add_request(PROMPTS[0])
    manager.start()
    with pytest.raises(InvalidInputError):
        manager.add_request([999], request_id="bad")
    assert manager.background_thread_status.fatal_error is None
    assert manager._run is not None
    with held(manager._run.session):
        manager.add_request(PROMPTS[0], request_id="bad")
        with pytest.raises(OptionError, match="'bad': a request of that name"):
            manager.add_request(PROMPTS[0], request_id="bad")
        assert manager.get_result(timeout=0.01) is None
        manager.add_request(PROMPTS[1], request_id="cancelled")
        manager.cancel_request("cancelled")
    manager.stop()
    assert manager.get_result("bad").generated_tokens == _new(PROMPTS[0])
    assert manager.get_result("cancelled").generated_tokens == []
    with pytest.raises(InvalidInputError):
        fast().generate_batch([PROMPTS[0], [999]], CONFIG)
    assert fast().generate([PROMPTS[0]], max_new_tokens=NEW) == [alone(PROMPTS[0])]


def test_a_stop_that_does_not_wait_cancels():
    manager = fast().init_continuous_batching(CONFIG)
    manager.start()
    assert manager._run is not None
    with held(manager._run.session):
        manager.add_requests(PROMPTS)
        stopping = threading.Thread(target=manager.stop, kwargs={"hard_stop": True})
        stopping.start()
    stopping.join(WAIT)
    assert not stopping.is_alive()
    results = [*manager]
    assert len(results) == len(PROMPTS)
    assert all(len(each.generated_tokens) < NEW for each in results[-2:])


def test_a_start_while_a_stop_is_ending_waits_for_it(monkeypatch):
    closed, go = threading.Event(), threading.Event()
    close = Session.close

    def slow(session: Session, wait: bool = False) -> None:
        close(session, wait)
        closed.set()
        assert go.wait(WAIT)

    manager = fast().init_continuous_batching(CONFIG)
    manager.start()
    monkeypatch.setattr(Session, "close", slow)
    threads = [threading.Thread(target=manager.stop)]
    threads[0].start()
    assert closed.wait(WAIT)
    threads += [threading.Thread(target=manager.start) for _ in range(2)]
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.2)
    go.set()
    for thread in threads:
        thread.join(WAIT)
    manager.add_request(PROMPTS[0], request_id="after")
    result = manager.get_result("after", timeout=WAIT)
    assert result is not None, "the event loop of the new session is not the one that was stopped"
    assert result.generated_tokens == _new(PROMPTS[0])
    manager.stop(timeout=WAIT)


def test_threads_that_start_and_stop_at_once():
    """A request between them is refused or decoded, and nothing is left running."""
    manager = fast().init_continuous_batching(CONFIG)
    wrong, names = list[object](), list[str]()

    def flip(number: int) -> None:
        try:
            for turn in range(6):
                manager.start()
                with contextlib.suppress(SessionError):
                    names.append(manager.add_request(PROMPTS[number], f"{number}/{turn}"))
                manager.stop(block=turn % 2 == 0, timeout=WAIT)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=flip, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    manager.stop(timeout=WAIT)
    results = {each.request_id: each.generated_tokens for each in manager}
    assert not wrong
    assert results == {name: _new(PROMPTS[int(name[0])]) for name in names}
    assert not [thread for thread in threading.enumerate() if thread.name == "emssd_compile.results"]


@pytest.fixture
def serving():
    """The manager of transformers' server, on ours."""
    utils = pytest.importorskip("transformers.cli.serving.utils", reason="it is the server's manager that is used")
    manager = utils.CBGenerateManager()
    manager.init_cb(fast(), CONFIG)
    assert manager.is_alive()
    yield manager
    manager.stop()


def test_the_manager_of_transformers_server_decodes_with_it(serving):
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))

    async def ask() -> list[Any]:
        asked = (
            serving.generate_non_streaming(fast(), tokenizer, {"input_ids": ids}, CONFIG, f"r{len(ids)}")
            for ids in PROMPTS
        )
        return await asyncio.gather(*asked)

    assert [ids for _, _, ids in asyncio.run(ask())] == [*map(_new, PROMPTS)]


def test_the_manager_of_transformers_server_streams_and_cancels_with_it(serving):
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, "0"))
    tokenizer = SimpleNamespace(_tokenizer=words)
    long = GenerationConfig(max_new_tokens=40, do_sample=False)

    async def read(ids: list[int], config: GenerationConfig, most: int) -> list[int]:
        queue, streamer = serving.generate_streaming(fast(), tokenizer, {"input_ids": ids}, config, f"r{len(ids)}")
        texts = list[str]()
        while (text := await asyncio.wait_for(queue.get(), WAIT)) is not None:
            texts.append(text)
            if len(texts) == most:
                streamer.cancel()
        return [int(text) for text in texts]  # one for each token

    async def main() -> list[list[int]]:
        return await asyncio.gather(read(prompt(6), long, 3), *(read(ids, CONFIG, 0) for ids in PROMPTS))

    left, *others = asyncio.run(main())
    assert left == _new(prompt(6), max_new_tokens=40)[: len(left)]
    assert others == [*map(_new, PROMPTS)]


def test_a_handler_gets_what_came_before_it():
    async def hear(manager: Any) -> list[Any]:
        heard, done = list[Any](), asyncio.Event()
        manager.add_request(PROMPTS[2], request_id="early", streaming=True)
        while not manager._results.wait(0):
            await asyncio.sleep(0.01)

        def take(result: Any) -> None:
            heard.append(result)
            if result.is_finished():
                done.set()

        manager.register_result_handler("early", take)
        await asyncio.wait_for(done.wait(), WAIT)
        return heard

    with fast().continuous_batching_context_manager(CONFIG) as manager:
        heard = asyncio.run(hear(manager))
    whole = _new(PROMPTS[2])
    assert [each.generated_tokens for each in heard] == [whole[: n + 1] for n in range(NEW)] + [whole]


def test_no_handler_is_kept_of_a_request_that_was_refused_or_never_came():
    class Handler:
        def __call__(self, result: Any) -> None: ...

    async def register(manager: Any, *names: str) -> list[weakref.ref[Any]]:
        handlers = [Handler() for _ in names]
        for name, handler in zip(names, handlers, strict=True):
            manager.register_result_handler(name, handler)
        return [weakref.ref(handler) for handler in handlers]

    manager = fast().init_continuous_batching(CONFIG)
    manager.start()
    refused, never, cancelled = asyncio.run(register(manager, "refused", "never", "cancelled"))
    with pytest.raises(InvalidInputError):
        manager.add_request([99999], request_id="refused")
    gc.collect()
    assert refused() is None
    manager.add_request(PROMPTS[0], request_id="cancelled", max_new_tokens=40)
    manager.cancel_request("cancelled")
    manager.stop(timeout=WAIT)
    gc.collect()
    assert (never(), cancelled()) == (None, None)
