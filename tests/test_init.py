"""What importing the package does to a program."""

import logging

import emssd_compile


def test_the_library_is_quiet_where_nobody_set_logging_up(monkeypatch):
    heard = list[logging.LogRecord]()
    monkeypatch.setattr(logging.root, "handlers", [])
    last = logging.Handler()
    monkeypatch.setattr(last, "emit", heard.append)
    monkeypatch.setattr(logging, "lastResort", last)
    logging.getLogger(f"{emssd_compile.__name__}.stream").warning("ours")
    logging.getLogger("another").warning("another's")
    assert [record.getMessage() for record in heard] == ["another's"]
