"""`serve`: answer OpenAI's API with a saved model."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
from typing import Any

from rich.console import Console

from emssd_compile.cli.models import (
    PROGRAM,
    add_backend,
    add_command,
    add_memory,
    add_model,
    add_sizes,
    check_not_chosen,
    is_artifact,
    load_tokenizer,
    open_decoder,
    positive,
)
from emssd_compile.errors import OptionError

EXAMPLES = f"""
examples:
  {PROGRAM} serve --model llama/
      http://127.0.0.1:8000/v1 for any client of OpenAI's API, on this machine only
  {PROGRAM} serve --model llama/ --drafter small-llama/ --max-batch 16 --max-length 4096 --warmup temperature top_p
      a smaller model drafts; 16 texts at a time; steps that draw, and cut at top_p, are compiled before the first call
  {PROGRAM} serve --model llama/ --host 0.0.0.0 --port 80 --name llama --max-tokens 1024 --deadline 60
      for others, too: set EMSSD_API_KEY to a secret before, and clients have to show it

docs/serving.md says which fields of requests are supported. /metrics is for Prometheus, /health for load balancers.
"""

KEY = "EMSSD_API_KEY"
_GRACE = 30  # seconds that answers under way have when the server is asked to end


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "serve", "answer OpenAI's API over HTTP", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="what the model was made for")
    add_memory(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 is a free one (default: %(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: that of its folder)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"that clients have to show; {KEY} is safer, since others see command lines"
    )
    parser.add_argument(
        "--warmup",
        metavar="FIELD",
        nargs="*",
        default=["temperature"],
        help="fields of requests that steps are compiled for at the start: temperature, top_p, top_k, min_p, "
        "repetition_penalty, presence_penalty, frequency_penalty, logit_bias, logprobs, response_format "
        "(default: temperature). Others work, but all wait when one first comes",
    )
    parser.add_argument(
        "--max-queue", metavar="N", type=int, default=64, help="texts that may wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive, help="new tokens of a text (default: what fits its row)"
    )
    parser.add_argument(
        "--max-body-size", metavar="BYTES", type=positive, default=4 << 20, help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--deadline", metavar="SECONDS", type=float, help="after which a text ends with what it has (default: none)"
    )
    add_backend(parser)


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    try:
        import uvicorn

        from emssd_compile.serve import Limits, create_app
        from emssd_compile.serve.sampling import warmed_options
    except ImportError as error:
        raise OptionError(f'serve needs more ({error}): pip install "emssd_compile[serve]"') from error
    limits = Limits(arguments.max_queue, arguments.max_body_size, arguments.max_tokens, arguments.deadline)
    check_not_chosen(arguments)
    warmed_options(arguments.warmup)  # a wrong name is told before the model is loaded
    with _bound(arguments.host, arguments.port) as place:
        tokenizer = load_tokenizer(arguments.model)
        with notes.status("compiling"):
            app = create_app(
                open_decoder(arguments),
                tokenizer,
                name=arguments.name or arguments.model.resolve().name,
                api_key=arguments.api_key or os.environ.get(KEY),
                limits=limits,
                warmup=() if is_artifact(arguments.model) else arguments.warmup,
            )
        host, port, *_ = place.getsockname()
        notes.print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=_GRACE)).run(sockets=[place])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens at this address, before the work that would be lost if it is taken.

    It has to listen: of sockets that do not yet, there may be several at one address. Who connects waits meanwhile.
    """
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except (OSError, OverflowError) as error:
        made.close()
        raise OptionError(f"--host {host} --port {port}: the server cannot listen there: {error}") from error
    return made
