"""`capture`: any causal language model becomes one graph that shares its weights, or is refused."""

import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from emssd_compile.capture import capture, check_weights
from emssd_compile.errors import InvalidInputError, UnsupportedModelError
from tests.passes.graphs import TinyModel, causal, eager, ops, run


class _Returns(nn.Module):
    """Wraps the logits as a test wants them."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.inner, self.wrap = TinyModel(attend=causal), wrap
        self.eval()

    def forward(self, input_ids: Tensor):
        return self.wrap(self.inner(input_ids))


RETURNED = {
    "a tensor": lambda logits: logits,
    "a tuple": lambda logits: (logits, None),
    "a list": lambda logits: [logits],
    "a dictionary": lambda logits: {"logits": logits},
    "a dictionary without loss": lambda logits: {"loss": None, "logits": logits},
}


@pytest.mark.parametrize("wrap", RETURNED.values(), ids=RETURNED)
def test_logits_are_found_in(wrap):
    model = _Returns(wrap)
    graph_module = capture(model)
    for tokens in (2, 7, 30):
        torch.testing.assert_close(run(graph_module, tokens), eager(model.inner, tokens), rtol=1e-6, atol=1e-6)


def test_only_what_export_says_of_itself_is_not_logged():
    heard = list[str]()

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    own, of_export = logging.getLogger("app"), logging.getLogger("torch.export")

    def log(logits: Tensor) -> Tensor:
        own.warning("of the app")
        of_export.warning("of export")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(of_export.warning, "of another thread").result()
        return logits

    handler = Heard()
    own.addHandler(handler)
    of_export.addHandler(handler)
    try:
        capture(_Returns(log))
        during = {*heard}
        of_export.warning("of export")
    finally:
        own.removeHandler(handler)
        of_export.removeHandler(handler)
    assert during == {"of the app", "of another thread"}
    assert heard[-1] == "of export", "afterwards it is"


@pytest.mark.parametrize("result", ["text", 3, torch.tensor([1]), ()], ids=["str", "int", "integer tensor", "empty"])
def test_a_forward_without_logits_is_refused(result):
    with pytest.raises(UnsupportedModelError, match="holds no logits; return a float tensor"):
        capture(_Returns(lambda _: result))


def test_the_graph_has_token_ids_and_positions_of_any_number():
    graph_module = capture(TinyModel())
    names = {n.target: n for n in graph_module.graph.nodes if n.op == "placeholder"}
    assert list(names) == ["input_ids", "positions"]
    assert all(isinstance(n.meta["val"].shape[1], torch.SymInt) for n in names.values())
    assert not names["positions"].users


def test_weights_are_the_models_own():
    model = TinyModel(attend=causal)
    graph_module = capture(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in graph_module.parameters()} <= own
    before = run(graph_module, 5)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(run(graph_module, 5), before * 2)


def test_a_cache_is_not_asked_for():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TinyModel()

        def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
            assert not use_cache
            return self.inner(input_ids)

    assert ops(capture(Cached().eval()))["linear"] == 1


def test_a_cache_is_not_asked_for_among_keywords():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = TinyModel()
            self.config = SimpleNamespace(use_cache=True)

        def forward(self, input_ids: Tensor, **kwargs: bool) -> Tensor:
            assert not kwargs.get("use_cache", self.config.use_cache)
            return self.inner(input_ids)

    assert ops(capture(Cached().eval()))["linear"] == 1


def test_keywords_are_not_given_what_no_config_knows():
    class Strict(TinyModel):
        def forward(self, input_ids: Tensor, **kwargs: bool) -> Tensor:
            assert not kwargs
            return super().forward(input_ids)

    assert ops(capture(Strict()))["linear"] == 1


class _Colliding(TinyModel):
    """`w.1` and `w_1` are two weights; so are `w_1_` and the name that the second would get."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(16) for _ in range(2)])
        self.w_1 = nn.Parameter(torch.randn(16))
        self.w_1_ = nn.Parameter(torch.randn(16))
        self.register_buffer("w_0", torch.randn(16))
        self.w_0: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) * self.w[1] + self.w_1
        return self.lm_head(hidden * self.w[0] + self.w_1_ * self.w_0)


def test_weights_whose_names_collide_are_two_weights():
    model = _Colliding()
    graph_module = capture(model)
    held = [*graph_module.parameters(), *graph_module.buffers()]
    own = {t.data_ptr() for t in (*model.w, model.w_1, model.w_1_, model.w_0)}
    assert own <= {t.data_ptr() for t in held}
    torch.testing.assert_close(run(graph_module, 7), eager(model, 7), rtol=1e-6, atol=1e-6)


class _FixedLength(TinyModel):
    """The length becomes a Python float: the graph would be right for one length only."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * float(input_ids.shape[1]) ** 0.5


class _Branches(TinyModel):
    """Control flow on a value."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) if bool((input_ids > 3).any()) else self.embed(input_ids)


class _Counts(TinyModel):
    """Changes its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return super().forward(input_ids)


REFUSED = {
    "a fixed length": (_FixedLength, "_FixedLength fixes the number of tokens"),
    "control flow on token ids": (_Branches, "_Branches cannot be captured: torch.export failed with"),
    "state that changes": (_Counts, "the forward writes `model.calls`"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses(model, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        capture(model())


def _training() -> nn.Module:
    return TinyModel().train()


def _nan() -> nn.Module:
    model = TinyModel()
    with torch.no_grad():
        model.dense.weight[3, 4] = torch.nan
    return model


def _meta() -> nn.Module:
    return TinyModel().to("meta")


def _encoder_decoder() -> nn.Module:
    model = TinyModel()
    vars(model)["config"] = SimpleNamespace(is_encoder_decoder=True)
    return model


UNUSABLE = {
    "not a module": (lambda: "llama", InvalidInputError, "model is a str; pass a torch.nn.Module"),
    "training mode": (_training, InvalidInputError, "training mode.*model.eval"),
    "no weights": (_meta, InvalidInputError, "weight embed.weight is on the meta device.*offloaded"),
    "encoder-decoder": (_encoder_decoder, UnsupportedModelError, "is an encoder-decoder model"),
}


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(InvalidInputError, match=r"weight dense\.weight of the \w+ holds NaN"):
        check_weights(_nan())


@pytest.mark.parametrize(("make", "error", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_model_is_refused_before_any_work(make, error, reason, monkeypatch):
    model = make()
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("export ran"))
    with pytest.raises(error, match=reason):
        capture(model)
