"""A drafter, a rule, a processor, a policy, a probe and a layout as a user would add them: an option and state each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emssd_compile.acceptance import Rule, Verdict, Verification
from emssd_compile.drafters import Draft, DraftContext, Drafter, PartSizes, TensorSpec, gather_tensors, tensors_of
from emssd_compile.layouts import PackedLayout
from emssd_compile.logits import LogitContext, LogitsProcessor, Processed, RowOption
from emssd_compile.policies import LengthPolicy, PolicyContext, Ranking
from emssd_compile.probes import Probe, ProbeContext, Probed, ReadingSpec
from emssd_compile.step.acceptance import first_accepted
from emssd_compile.step.drafting import Target

BANNED = 3
"""How many of the newest tokens `Ban` bans."""


class Ban(LogitsProcessor):
    """Bars the three newest tokens of rows that ask for it, and counts the steps that it was in."""

    def options(self) -> dict[str, RowOption]:
        return {"ban": RowOption(False, torch.bool)}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"steps": TensorSpec((), torch.int64, kept="forever")}

    def forward(self, context: LogitContext) -> Processed:
        asks = context.options["ban"][context.row_ids]  # [R]
        logits = torch.where(asks[:, None], ban(context), context.logits)
        return Processed(logits, {"steps": context.state["steps"] + 1})


def ban(context: LogitContext) -> Tensor:
    """The same for all rows; as a hook, too."""
    tokens = torch.arange(context.logits.shape[1])
    return context.logits.masked_fill((context.newest(BANNED)[:, :, None] == tokens).any(1), -torch.inf)


@torch.no_grad()
def banned(model: nn.Module, ids: Sequence[int], new_tokens: int) -> list[int]:
    """The text of one prompt, decoded alone with `Ban`: a full forward for each token, and plain Python."""
    text = list(ids)
    for _ in range(new_tokens):
        output = model(torch.tensor([text]))
        logits = getattr(output, "logits", output)[0, -1].clone()
        logits[text[-BANNED:]] = -torch.inf
        text.append(int(logits.argmax()))
    return text


class Timid(Drafter):
    """Drafts what another drafter drafts, or less if a row asks for it; counts the steps of each row."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__()
        self.inner = inner
        self.num_draft_tokens, self.max_depth, self.reads_ahead = (
            inner.num_draft_tokens,
            inner.max_depth,
            inner.reads_ahead,
        )

    def prepare(self, target: Target) -> None:
        self.inner.prepare(target)

    def options(self) -> dict[str, RowOption]:
        return {"most_drafts": RowOption(100, least=0)}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        own = {"steps": TensorSpec((sizes.rows,), torch.int64)}
        return gather_tensors({"inner": self.inner.tensors(sizes), "own": own})

    def forward(self, context: DraftContext) -> Draft:
        draft = self.inner(replace(context, state=tensors_of("inner", context.state)))
        steps = tensors_of("own", context.state)["steps"] + context.can_draft
        lengths = torch.minimum(draft.lengths, context.options["most_drafts"])
        return replace(draft, lengths=lengths, state=gather_tensors({"inner": draft.state, "own": {"steps": steps}}))


class Impatient(Rule):
    """Greedy matching that accepts no more drafts than a row asks for: lossless all the same."""

    guarantees = "tokens"

    def options(self) -> dict[str, RowOption]:
        return {"most_accepted": RowOption(100, least=0)}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"accepted": TensorSpec((sizes.rows,), torch.int64)}

    def forward(self, verification: Verification) -> Verdict:
        draft, choice = verification.draft, verification.logits.argmax(-1)
        node = torch.arange(draft.tokens.shape[1] + 1)
        wanted = choice[(verification.offsets[:-1, None] + node).clamp(max=choice.shape[0] - 1)]  # [B, N]
        verdict = first_accepted(draft, wanted)
        lengths = torch.minimum(verdict.accept_lengths, verification.options["most_accepted"])
        last = lengths[:, None] if verdict.path is None else verdict.path.gather(1, lengths[:, None])
        accepted = verification.state["accepted"] + lengths
        return replace(
            verdict, accept_lengths=lengths, next_tokens=wanted.gather(1, last).squeeze(1), state={"accepted": accepted}
        )


class Alternating(LengthPolicy):
    """Wants all drafts in every other step, and in the others as many as the greediest row allows all together."""

    def options(self) -> dict[str, RowOption]:
        return {"in_between": RowOption(1.0, torch.float32, least=0)}

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"steps": TensorSpec((1,), torch.int64, kept="forever")}

    def forward(self, context: PolicyContext) -> Ranking:
        steps = context.state["steps"] + 1
        by_place = context.proposed.T  # [K, B]
        ranks = (by_place.flatten().cumsum(0).view(by_place.shape) - 1).T
        few = context.options["in_between"].amax().to(torch.int64)
        return Ranking(ranks, torch.where(steps[0] % 2 == 0, context.proposed.sum(), few), {"steps": steps})


class Margin(Probe):
    """Tells how far the likeliest token was ahead of the next one, and in which step of the probe each came."""

    def options(self) -> dict[str, RowOption]:
        return {"margin": RowOption(False, torch.bool)}

    def readings(self, sizes: PartSizes) -> dict[str, ReadingSpec]:
        return {
            "margin": ReadingSpec(asked_by="margin"),
            "step": ReadingSpec((1,), torch.int64, asked_by="margin"),
        }

    def tensors(self, sizes: PartSizes) -> dict[str, TensorSpec]:
        return {"steps": TensorSpec((), torch.int64, kept="forever")}

    def forward(self, context: ProbeContext) -> Probed:
        steps = context.state["steps"] + 1
        top = context.logits.topk(2, -1).values[context.places]  # [B, D + 1, 2]
        values = {"margin": top[..., 0] - top[..., 1], "step": steps.expand(context.tokens.shape)[..., None]}
        return Probed(values, {"steps": steps})


class AlternatingLayout(PackedLayout):
    """Every row verifies what `Alternating` says."""

    def policy(self) -> LengthPolicy:
        return Alternating()
