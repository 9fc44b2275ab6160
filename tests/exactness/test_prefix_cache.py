"""What is read once and found again changes no token, and is never what another text or other weights have left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from emssd_compile.errors import OptionError, SessionError
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.launch import Launcher
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import assert_exact, rechunked, target
from tests.exactness.models import Reference, prompt
from tests.exactness.pools import paged, watched_pools
from tests.exactness.trained_heads import NEW, PROMPTS, expected_texts, learn, make_head
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

ROWS, SIZE = 3, 8
SYSTEM = prompt(3 * SIZE + 2)
CHATS = [[*SYSTEM, *prompt(n)] for n in (5, 1, 20, 9, 13)]
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "seed": 5}


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with watched_pools(monkeypatch, SIZE):
        yield


def _cached(drafter: str = "prompt-lookup", kv_tokens: int | None = None) -> OptimizedModel:
    compiled = target("llama", ROWS)
    return paged(compiled.optimize(compiled.drafter(drafter)), kv_tokens, prefix_cache=True)


def _reads(fast: OptimizedModel, prompts: list[list[int]], **options: Any) -> int:
    """Decode exactly; returns how many tokens of prompts were found."""
    before = fast.stats.prefix_cache_hits
    assert_exact(fast, target("llama", ROWS).reference, prompts, 12, **options)
    return fast.stats.prefix_cache_hits - before


@pytest.mark.parametrize("drafter", ["none", "prompt-lookup", "sometimes-wrong", "random-tree"])
def test_what_was_read_is_not_read_again(drafter):
    """Whole blocks of the system prompt by the others of a call, and of whole prompts in the next one."""
    fast = _cached(drafter)
    assert _reads(fast, CHATS) == (len(CHATS) - 1) * 3 * SIZE
    fed = fast.stats.num_fed_tokens
    again = sum((len(chat) - 1) // SIZE * SIZE for chat in CHATS)
    assert _reads(fast, CHATS) == again
    assert fast.stats.prefix_cache_queries == 2 * sum(map(len, CHATS))
    if drafter == "none":  # of the prompts, what was not found; of what follows, all the same
        assert fast.stats.num_fed_tokens - fed == fed - (again - (len(CHATS) - 1) * 3 * SIZE)
    cache = fast.prefix_cache
    assert cache is not None
    assert (cache.hits, cache.queries) == (fast.stats.prefix_cache_hits, fast.stats.prefix_cache_queries)
    assert cache.num_tokens == SIZE * cache.num_blocks >= again - 4 * 3 * SIZE
    cache.clear()
    assert cache.num_blocks == 0
    assert _reads(fast, CHATS[:1]) == 0


def test_prompts_of_one_call_share_how_they_begin_and_nothing_is_left():
    compiled = target("llama", ROWS)
    fast = paged(compiled.optimize(compiled.drafter("prompt-lookup")))
    assert fast.prefix_cache is None
    for _ in range(2):
        assert _reads(fast, CHATS) == (len(CHATS) - 1) * 3 * SIZE
    with fast.session() as session:
        streams = [session.submit(chat, max_new_tokens=12) for chat in CHATS]
        assert [s.result() for s in streams] == [[*c, *compiled.reference(c, 12)] for c in CHATS]
    assert fast.stats.prefix_cache_queries == 2 * sum(map(len, CHATS)), "who the others are, a session does not know"


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_hits_are_misses_bit_for_bit_at_equal_sizes(options):
    """A first chunk that is just what is found later: the steps behind it are of the same sizes."""
    fast = rechunked(_cached("none"), 3 * SIZE)
    chat = CHATS[2]
    asked = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True, **options}
    before = fast._engine.sizes_used.copy()
    miss = fast.generate([chat], **asked)
    fast.prefix_cache.clear()  # type: ignore[union-attr]
    fast.generate([[*SYSTEM, 3]], max_new_tokens=1)
    fast._engine.sizes_used = before
    hit = fast.generate([chat], **asked)
    assert fast.stats.prefix_cache_hits == 3 * SIZE
    assert torch.equal(torch.stack(miss.logits), torch.stack(hit.logits))
    assert miss.sequences == hit.sequences


def test_what_was_generated_is_found_by_the_next_turn():
    fast = _cached()
    (first,) = fast.generate([CHATS[0]], max_new_tokens=30)
    second = [*first, 3, 4, 5]
    assert _reads(fast, [second]) == (len(first) - 1) // SIZE * SIZE


def test_a_pool_that_is_too_small_for_all_keeps_what_was_used_last():
    fast = _cached("random-tree", 17 * SIZE)
    others = [prompt(n) for n in (40, 17, 61)]
    for prompts in (CHATS, others, CHATS[::-1], [*others, *CHATS[:2]], CHATS[:1]):
        _reads(fast, prompts)
    assert _reads(fast, CHATS[:1]) == 3 * SIZE
    assert fast.stats.prefix_cache_hits < fast.stats.prefix_cache_queries


def test_where_the_host_is_a_step_behind():
    fast = _cached("random-tree", 200)
    engine = graph_engine(fast, 24, TapeDevice())
    for _ in engine.capture():
        pass
    for chats in (CHATS, CHATS[::-1]):
        requests = [Request(index, torch.tensor(chat), 12, scope=b"") for index, chat in enumerate(chats)]
        list(engine.run(requests))
        assert [r.output for r in requests] == [target("llama", ROWS).reference(chat, 12) for chat in chats]
    assert engine.memory.take_counts()["prefix_cache_hits"] > (2 * len(CHATS) - 1) * 3 * SIZE


def test_other_weights_have_read_nothing():
    """Written to in a way that no version counter notes."""
    fast = _cached()
    weight = next(p for name, p in fast.model.named_parameters() if "k_proj" in name)
    before = weight.detach().clone()
    _reads(fast, CHATS[:2])
    try:
        weight.data.mul_(-1.5)
        assert_exact(fast, Reference(fast.model), CHATS[:1], 12)
        assert fast.stats.prefix_cache_hits == 3 * SIZE, "found in the first call only"
    finally:
        weight.data.copy_(before)
    assert _reads(fast, CHATS[:1]) == 0


@pytest.mark.parametrize("case", ["eagle3-tree", pytest.param("mtp-modules", marks=pytest.mark.long)])
def test_heads_find_what_they_read_beside_the_target(case):
    """Their keys and values are in the same blocks: drafts behind what was found are as good as ever."""
    head = make_head("llama", case)
    learn(head, "llama")
    fast = paged(target("llama", ROWS).optimize(head), prefix_cache=True)
    lengths = []
    for _ in range(2):
        fast.stats.reset()
        assert fast.generate(PROMPTS, max_new_tokens=NEW) == expected_texts("llama")
        lengths.append(fast.stats.mean_acceptance_length)
    assert fast.stats.prefix_cache_hits > 0
    assert lengths[1] == pytest.approx(lengths[0], rel=0.05)
    assert lengths[0] > 1.5


def test_a_draft_model_reads_by_itself_what_the_target_need_not():
    """Into slabs of its own: it catches up, and drafts."""
    fast = _cached("draft-model")
    assert "slabs" in fast.explain().memory
    assert _reads(fast, CHATS) == (len(CHATS) - 1) * 3 * SIZE
    fast.stats.reset()
    assert _reads(fast, CHATS) > 0
    assert fast.stats.mean_acceptance_length > 1.5


def test_salts_keep_tenants_apart():
    fast = _cached()
    assert _reads(fast, CHATS[:2], cache_salt=["mine", "yours"]) == 0
    assert _reads(fast, CHATS[:2]) == 3 * SIZE, "no salt is another one"
    assert _reads(fast, CHATS[:1], cache_salt="mine") > 0
    for salt, message in ((7, "cache_salt=7 is no text"), (["a"], "cache_salt has 1 values for 2 prompts")):
        with pytest.raises(OptionError, match=message):
            fast.generate(CHATS[:2], max_new_tokens=2, cache_salt=salt)


def test_who_waits_for_a_prompt_that_is_being_read_holds_up_nobody():
    """Two of one long prompt, the second of which starts when the first has read; a third is through before that."""
    fast = rechunked(_cached("none"), 4)
    long, short = [*SYSTEM, *prompt(40)], prompt(5)
    with fast.session() as session:
        first, second = (session.submit(long, max_new_tokens=4) for _ in range(2))
        third = session.submit(short, max_new_tokens=4)
        assert third.result(60) == [*short, *target("llama", ROWS).reference(short, 4)]
        assert not first.tokens
        assert first.result(60) == second.result(60) == [*long, *target("llama", ROWS).reference(long, 4)]
    assert fast.stats.prefix_cache_hits == (len(long) - 1) // SIZE * SIZE


def test_requests_of_a_session_share_if_asked_to():
    fast, reference = _cached(), target("llama", ROWS).reference
    with fast.session() as session:
        streams = [session.submit(chat, max_new_tokens=12) for chat in CHATS]
        other = session.submit(CHATS[0], max_new_tokens=12, cache_salt="other")
        assert [s.result() for s in streams] == [[*chat, *reference(chat, 12)] for chat in CHATS]
        assert other.result() == streams[0].result()
        with pytest.raises(SessionError, match=r"prefix_cache\.clear: a session of this object is open"):
            fast.prefix_cache.clear()  # type: ignore[union-attr]
    assert fast.stats.prefix_cache_hits == (len(CHATS) - 1) * 3 * SIZE
    assert _reads(fast, CHATS[:1]) > 0


def test_a_request_that_cannot_start_leaves_no_block_behind(monkeypatch):
    fast = _cached("none")

    def fail(*arguments: object) -> None:
        raise RuntimeError("no copy")

    with monkeypatch.context() as broken:
        broken.setattr(Launcher, "copy_row", fail)
        with pytest.raises(RuntimeError, match="no copy"):
            fast.generate(CHATS[:1], num_return_sequences=2, max_new_tokens=9, **SAMPLING)
    _reads(fast, CHATS)  # that no block is missing, `watched_pools` looks
