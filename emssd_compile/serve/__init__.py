"""A server that speaks OpenAI's API: an app of FastAPI over a session. Comes with the extra `serve`."""

from emssd_compile.serve.app import create_app
from emssd_compile.serve.limits import Limits
from emssd_compile.serve.sampling import WARMED

__all__ = ["WARMED", "Limits", "create_app"]
