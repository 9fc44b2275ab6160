"""What Prometheus reads adds up to what was decoded."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.servers import NAME, client, ids_of, new_tokens, spare_server, twin


def read(address: str) -> dict[str, float]:
    """Samples by name, with what tells them apart; each has the labels that all share."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
        for sample in family.samples:
            own = dict(sample.labels)
            assert (own.pop("model_name"), own.pop("engine")) == (NAME, "0")
            found[" ".join([sample.name.removeprefix("vllm:"), *own.values()])] = sample.value
    return found


def test_counters_are_those_of_decoding():
    bias = {70: 100.0}  # the same token again and again, which prompt lookup drafts
    twin().stats.reset()
    assert new_tokens("the cat", max_new_tokens=30, logit_bias=bias) == [70] * 30
    stats = twin().stats
    histogram = stats.acceptance_histogram
    with spare_server() as address, client(address) as asked:
        before = read(address)
        assert before["spec_decode_num_drafts_total"] == before["num_requests_running"] == 0
        for stream in (False, True):
            answer = asked.completions.create(
                model=NAME, prompt="the cat", max_tokens=30, logit_bias={"70": 100}, temperature=0, stream=stream
            )
            assert [*answer]
        asked.completions.create(model=NAME, prompt="x", max_tokens=5, temperature=0, logit_bias={"0": 100})
        found = read(address)
    assert found["spec_decode_num_drafts_total"] == 2 * stats.num_spec_steps > 0
    assert found["spec_decode_num_draft_tokens_total"] == 2 * stats.num_draft_tokens
    accepted = found["spec_decode_num_accepted_tokens_total"]
    assert 0 <= 2 * stats.num_accepted_draft_tokens - accepted <= 2, "the last may be followed by none"
    places = [
        value for name, value in found.items() if name.startswith("spec_decode_num_accepted_tokens_per_pos_total")
    ]
    assert sum(places) == accepted > 0
    assert places == sorted(places, reverse=True)
    assert places[0] == 2 * sum(histogram[1:])
    prompts = 2 * len(ids_of("the cat")) + len(ids_of("x"))
    assert found["prompt_tokens_total"] == found["request_prompt_tokens_sum"] == prompts
    assert found["generation_tokens_total"] == found["request_generation_tokens_sum"] == 61
    assert (found["request_success_total length"], found["request_success_total stop"]) == (2, 1)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert found[f"{name}_count"] == 3
    assert found["request_time_per_output_token_seconds_count"] == 2
    assert 0 < found["time_to_first_token_seconds_sum"] < found["e2e_request_latency_seconds_sum"]
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (0, 0)


def test_counters_follow_texts_that_have_not_ended():
    with spare_server() as address, client(address) as asked:
        stream = asked.completions.create(
            model=NAME, prompt="the cat", max_tokens=110, temperature=0, logit_bias={"0": -100}, stream=True
        )
        next(iter(stream))
        first = read(address)
        rest = [*stream]
        last = read(address)
    assert rest
    assert first["prompt_tokens_total"] == last["prompt_tokens_total"] == len(ids_of("the cat"))
    assert 0 < first["generation_tokens_total"] <= last["generation_tokens_total"] == 110
