"""Everything this package raises on purpose; catch `EmssdError` to catch all of it.

A message says what was wrong, where, and what to do about it. An option that is known but not supported yet raises
Python's own `NotImplementedError` instead, naming the option.
"""


class EmssdError(Exception):
    """Base of every error of this package."""


class UnsupportedModelError(EmssdError):
    """The model cannot be compiled into an exact unpadded step, so it is refused rather than guessed at.

    Args:
        reason: what was found and why it rules the model out, as one sentence.
        node: name of the graph node that decided it.
        op: the operator of that node, e.g. `"aten.cumsum.default"`.
        module: qualified name of the submodule that produced the node, e.g. `"model.layers.0.mlp"`.
        remedy: what the user can do instead, as one sentence.
        longest: tokens a row could hold for the model to be taken, where that is all that is wrong.

    All six stay readable as attributes; those not given are `None` and left out of the message.
    """

    def __init__(
        self,
        reason: str,
        *,
        node: str | None = None,
        op: str | None = None,
        module: str | None = None,
        remedy: str | None = None,
        longest: int | None = None,
    ) -> None:
        self.reason = reason
        self.node = node
        self.op = op
        self.module = module
        self.remedy = remedy
        self.longest = longest
        super().__init__(self._message())

    def _message(self) -> str:
        named = {"node": self.node, "op": self.op, "module": self.module}
        place = ", ".join(f"{kind} {name!r}" for kind, name in named.items() if name is not None)
        message = f"{self.reason} (at {place})" if place else self.reason
        return f"{message}\n  What to do: {self.remedy}" if self.remedy else message


class InvalidInputError(EmssdError, ValueError):
    """A prompt, attention mask or other input tensor given to `generate` cannot be what the caller meant."""


class OptionError(EmssdError, ValueError):
    """An option has an unknown name or a value outside its range, or two options contradict each other."""


class CapacityError(EmssdError):
    """A request does not fit the KV capacity (tokens per row) that the compiled model was given."""


class ReentryError(EmssdError, RuntimeError):
    """A call was made from inside another call of the same object, such as `generate` in a stopping criterion."""


class SessionError(EmssdError, RuntimeError):
    """A session is closed and takes no more requests, or is open and has the model for itself."""


class QueueFullError(SessionError):
    """As many requests wait in a session as may."""


class StaleModelError(EmssdError):
    """The model is not what it was when it was compiled, in a way that the compiled step cannot follow by itself.

    Args:
        change: what is not as it was, as a clause.
    """

    def __init__(self, change: str) -> None:
        self.change = change
        super().__init__(
            f"the model was changed after it was compiled: {change}\n  What to do: undo that, or call fast.refresh() "
            "to compile the model anew as it is now (the same as calling optimize again)"
        )


class BackendError(EmssdError):
    """A backend cannot compile on this machine: no compiler, no place for what it compiles, or a failure of its own."""


class ArtifactError(EmssdError):
    """An exported artifact is damaged, incomplete, or was made for something other than what is loading it."""


class CheckpointError(EmssdError):
    """A drafter's checkpoint cannot be used: says which file or tensor, why, and what to do."""


class PartError(EmssdError):
    """A part of the step (drafter, rule, policy, logits processor or probe) does not keep to its contract; says how."""


class DrafterError(PartError):
    """A drafter does not fit the target model (vocabulary, hidden size), or broke the `Draft` contract."""


class RuleError(PartError):
    """An acceptance rule broke the `Verdict` contract."""


class ProcessorError(PartError):
    """A logits processor breaks its contract."""


class ProbeError(PartError):
    """A probe broke the `Probed` contract, or tells of something by a name that is taken."""


class GrammarError(EmssdError, ValueError):
    """A grammar cannot be compiled, or a text has nothing to go on with under it and the other options."""


class PolicyError(PartError):
    """A length policy broke the `Ranking` contract."""
