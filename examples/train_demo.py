"""Train the demo models of this project: a small Llama and a one-layer draft model distilled from it.

    python examples/train_demo.py --work build/demo --out examples/demo_model

Both learn from the source files of the running Python's standard library. A run that was stopped goes on at its last
checkpoint in `--work`. `--smoke` makes toy models in seconds.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.corpus import cut_prompts, pack, read_corpus, train_tokenizer
from demo_training.loop import Run, fit, training_windows

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """Sizes of one training run; the defaults are those of the shipped models."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    heads: int = 4
    kv_heads: int = 2
    layers: int = 8
    draft_layers: int = 1
    block: int = 1024  # longest context in tokens, and the unit in which the corpus is shuffled
    blocks_per_step: int = 2
    target_steps: int = 1400
    draft_steps: int = 400
    documents: int | None = None  # read only so many of each kind
    compile: bool = True


SMOKE = Settings(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    heads=2,
    kv_heads=1,
    layers=2,
    block=32,
    target_steps=4,
    draft_steps=4,
    documents=4,
    compile=False,
)


@dataclass(frozen=True)
class Data:
    """The token streams ``int64[tokens]``, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    train: torch.Tensor
    held_out: torch.Tensor
    prompts: list[dict[str, str]]
    files: int


def prepare_data(settings: Settings) -> Data:
    """Read the corpus and train its tokenizer; a minute for the whole of it."""
    train, held_out = (dict(list(part.items())[: settings.documents]) for part in read_corpus())
    tokenizer = train_tokenizer(train.values(), settings.vocab_size)
    return Data(
        tokenizer=tokenizer,
        train=pack(tokenizer, train.values()),
        held_out=pack(tokenizer, held_out.values()),
        prompts=cut_prompts(tokenizer, held_out),
        files=len(train),
    )


def build_model(settings: Settings, layers: int, eos: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings, in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=settings.block,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        # Attention written out: on a CPU its compiled backward is faster than the fused kernel's at these lengths.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).train()


def build_draft(target: LlamaForCausalLM, settings: Settings, eos: int) -> LlamaForCausalLM:
    """A model of fewer layers that starts as the target's embeddings, first layers and final norm."""
    draft = build_model(settings, settings.draft_layers, eos)
    weights = target.state_dict()
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    return draft


def logits_of(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Logits ``fp32[rows, context, V]`` of the next tokens, computed in bf16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits: torch.Tensor = model(input_ids=windows[:, :-1], use_cache=False).logits
    return logits.float()


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the text, nats per token."""
    return F.cross_entropy(logits_of(model, windows).flatten(0, 1), windows[:, 1:].flatten())


def distillation_loss(teacher: LlamaForCausalLM, model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model), nats per token (Hinton et al., 2015, at temperature 1)."""
    with torch.no_grad():
        goal = logits_of(teacher, windows).flatten(0, 1).log_softmax(-1)
    return F.kl_div(
        logits_of(model, windows).flatten(0, 1).log_softmax(-1), goal, reduction="batchmean", log_target=True
    )


def agreement(teacher: LlamaForCausalLM, model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Share of positions where both models find the same token likeliest."""
    return (logits_of(teacher, windows).argmax(-1) == logits_of(model, windows).argmax(-1)).float().mean()


@torch.no_grad()
def mean_over(measure: Loss, windows: torch.Tensor) -> float:
    """Mean of `measure` over ``windows[rows, context + 1]``, taken a few rows at a time."""
    return sum(measure(rows).item() * len(rows) for rows in windows.split(4)) / len(windows)


def train_model(
    model: LlamaForCausalLM, loss: Loss, data: Data, settings: Settings, steps: int, checkpoint: Path
) -> Run:
    """Fit `model` to `loss` on the training stream, evaluating it on every eighth held-out window."""
    windows = partial(
        training_windows, data.train, steps=steps, block=settings.block, blocks_per_step=settings.blocks_per_step
    )
    sample = data.held_out.unfold(0, settings.block // 2 + 1, settings.block // 2)[::8]
    compiled = torch.compile(loss, dynamic=False) if settings.compile else loss
    return fit(model, compiled, windows, lambda: mean_over(loss, sample), steps, checkpoint)


def ship(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Save `model` in bf16 with its tokenizer, and return what a user loads from `folder`, as fp32 and in eval mode."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def facts(run: Run, model: LlamaForCausalLM, settings: Settings) -> dict[str, float]:
    """What the card says of a run: the last training loss is the mean of the last 50 steps."""
    last = run.losses[-50:]
    return {
        "parameters": model.num_parameters(),
        "steps": run.step,
        "tokens_seen": run.step * settings.block * settings.blocks_per_step,
        "minutes": round(run.seconds / 60, 1),
        "train_loss": round(sum(last) / len(last), 3),
    }


def plot_losses(runs: dict[str, Run], path: Path) -> None:
    """Draw training and held-out losses, a panel a run."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, run) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        axes.plot(range(1, run.step + 1), run.losses, linewidth=0.5, label="training")
        axes.plot(list(run.held_out), list(run.held_out.values()), "o-", label="held out")
        axes.set(title=title, xlabel="step", ylabel="nats per token", ylim=(0, None))
        axes.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Train and ship the target, then the draft, then write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models, the prompts and the loss curve")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, help="training steps of the target")
    parser.add_argument("--draft-steps", type=int, help="training steps of the draft")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = SMOKE if options.smoke else Settings()
    settings = replace(
        settings,
        target_steps=options.steps or settings.target_steps,
        draft_steps=options.draft_steps or settings.draft_steps,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    make_models(settings, options.out, options.work)


def make_models(settings: Settings, out: Path, work: Path) -> None:
    """The whole run: data, target, draft, measurements."""
    data = prepare_data(settings)
    (out / "prompts.json").write_text(json.dumps(data.prompts, indent=1) + "\n", encoding="utf-8")
    eos = data.tokenizer.eos_token_id
    held_out = data.held_out.unfold(0, settings.block + 1, settings.block)

    target = build_model(settings, settings.layers, eos)
    target_run = train_model(
        target, partial(next_token_loss, target), data, settings, settings.target_steps, work / "target.pt"
    )
    teacher = ship(target, data.tokenizer, out / "target")

    draft = build_draft(teacher, settings, eos)
    distil = partial(distillation_loss, teacher, draft)
    draft_run = train_model(draft, distil, data, settings, settings.draft_steps, work / "draft.pt")
    student = ship(draft, data.tokenizer, out / "draft")

    plot_losses({"target: cross-entropy": target_run, "draft: KL from the target": draft_run}, out / "loss_curve.png")
    card = {
        "python": platform.python_version(),
        "files": data.files,
        "train_tokens": len(data.train),
        "held_out_tokens": len(data.held_out),
        "target": facts(target_run, target, settings)
        | {"held_out_loss": round(mean_over(partial(next_token_loss, teacher), held_out), 3)},
        "draft": facts(draft_run, draft, settings)
        | {
            "held_out_loss": round(mean_over(partial(next_token_loss, student), held_out), 3),
            "held_out_agreement": round(mean_over(partial(agreement, teacher, student), held_out), 3),
        },
    }
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
