"""Decode with an exported ONNX model by numpy and onnxruntime alone: the loop that docs/export.md describes.

python examples/02_export_onnx.py demo.onnx
python examples/07_onnxruntime_loop.py demo.onnx --prompts "[[5, 6, 7], [8, 9]]" --max-new-tokens 32
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]


class Artifact:
    """The step, and the tensors that go in and come out of it.

    Attributes:
        manifest: what `manifest.json` says.
        tensors: every input but the sizes, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        self.tensors = {
            binding["name"]: np.full(binding["shape"], binding.get("option", {}).get("default", 0), binding["dtype"])
            for binding in self.manifest["inputs"]
            if binding["role"] != "size"
        }
        self.session = onnxruntime.InferenceSession(folder / "step.onnx", providers=["CPUExecutionProvider"])
        self._results = {binding["name"]: binding for binding in self.manifest["results"]}

    def step(self, **sizes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Run one step of these sizes; returns the report, `new_report`."""
        given = {**self.tensors, **{name: np.arange(size) for name, size in sizes.items()}}
        fresh = {name: np.empty(each["shape"], each["dtype"]) for name, each in self._results.items()}
        caches = self.manifest["details"]["in_place"]  # a result of these lies where its cache does
        binding = self.session.io_binding()
        for value in self.session.get_inputs():
            _bind(binding.bind_input, value.name, given[value.name])
        for value in self.session.get_outputs():
            name = value.name.removeprefix("new_")
            _bind(binding.bind_output, value.name, self.tensors[caches[name]] if name in caches else fresh[name])
        self.session.run_with_iobinding(binding)
        self.tensors.update((name, fresh[name]) for name in fresh.keys() & self.tensors.keys())
        return fresh["report"]


def _bind(bind: Any, name: str, array: np.ndarray[Any, Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def check(artifact: Artifact, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises ValueError for what the step would decode into nonsense: nobody checks it in there."""
    (_, capacity), (vocabulary,) = artifact.tensors["history"].shape, artifact.tensors["is_eos"].shape
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens} new tokens: at least 1 is needed")
    for number, prompt in enumerate(prompts):
        if not prompt or not all(0 <= token < vocabulary for token in prompt):
            raise ValueError(f"prompt {number} is no list of one or more tokens from 0 to {vocabulary - 1}")
        if len(prompt) + max_new_tokens > capacity:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, and with {max_new_tokens} new ones that is more than the "
                f"{capacity} that a row holds"
            )


def generate(artifact: Artifact, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Continue prompts greedily: as many at a time as there are rows, each of the others when a row is free."""
    check(artifact, prompts, max_new_tokens)
    tensors, chunk = artifact.tensors, artifact.manifest["chunk"]
    rows, drafts = tensors["draft_tokens"].shape
    eos = artifact.manifest["generation_config"].get("eos_token_id")
    tensors["is_eos"][[] if eos is None else eos] = True
    tensors["draft_budget"][...] = rows * drafts
    tensors["step_seconds"][...] = 1
    tensors["groups"][...] = np.arange(rows)
    texts = [[*prompt] for prompt in prompts]
    waiting, decoded = [*range(len(prompts))], dict[int, int]()  # which prompt each busy row has
    pending, draft_lengths = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    while waiting or decoded:
        for row in range(rows):
            if waiting and row not in decoded:
                decoded[row] = waiting.pop(0)
                start(artifact, row, prompts[decoded[row]], max_new_tokens)
                pending[row], draft_lengths[row] = len(prompts[decoded[row]]), 0
        wanted = np.where(tensors["active"], pending + draft_lengths, 0)
        tokens = min(int(wanted.sum()), chunk)
        report = artifact.step(
            token_range=tokens,
            logit_range=tokens,
            row_range=max(min(int(wanted.max()), chunk), drafts + 1),
            draft_range=max(tokens + rows, (drafts + 1) * rows),
        )
        counts, active, pending, draft_lengths, *_ = report[:, :6].T
        for row, index in [*decoded.items()]:
            texts[index] += report[row, 6 : 6 + counts[row]].tolist()
            if not active[row]:
                del decoded[row]
    return texts


def start(artifact: Artifact, row: int, prompt: list[int], max_new_tokens: int) -> None:
    """Have a row decode a prompt."""
    tensors = artifact.tensors
    parts = [binding["name"] for binding in artifact.manifest["inputs"] if binding["role"] == "row"]
    for name in ("lengths", "draft_lengths", *parts):
        tensors[name][row] = 0
    tensors["history"][row, : len(prompt)] = prompt
    tensors["known"][row] = tensors["prompt_lengths"][row] = len(prompt)
    tensors["limits"][row] = len(prompt) + max_new_tokens
    tensors["active"][row] = True


def main() -> None:
    """Decode what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="the folder")
    parser.add_argument("--prompts", default="[[1, 2, 3]]", type=json.loads, help="lists of token ids, as JSON")
    parser.add_argument("--max-new-tokens", default=32, type=int)
    arguments = parser.parse_args()
    try:
        texts = generate(Artifact(arguments.artifact), arguments.prompts, arguments.max_new_tokens)
    except ValueError as error:
        parser.error(str(error))
    for text in texts:
        print(json.dumps(text))


if __name__ == "__main__":
    main()
