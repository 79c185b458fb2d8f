"""``broadsheet serve``: the pages and the API. Heavy imports wait until it is called."""

import json
import logging
from datetime import UTC, datetime
from typing import Annotated, Any

import typer


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.", min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Processes that answer requests.", min=1, max=64)] = 1,
    proxy: Annotated[
        str, typer.Option(help="Addresses of proxies whose X-Forwarded-For is believed, separated by commas.")
    ] = "",
    log: Annotated[str, typer.Option(help="text, or json: an object on each line.")] = "text",
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log every request.")] = False,
) -> None:
    """Serve the feed: pages, search, API. An empty home takes in the papers of the catalogue first."""
    import os

    from broadsheet.errors import InvalidInput, need
    from broadsheet.feed.settings import Settings

    need("fastapi", "web")
    uvicorn = need("uvicorn", "web")
    if log not in ("text", "json"):
        raise InvalidInput(f"--log {log!r}: expected text or json")
    _refuse_unless_free(host, port)
    settings = Settings.load()
    if "base_url" not in settings.model_fields_set:
        name = {"localhost": "localhost", "::1": "[::1]"}.get(host, "127.0.0.1")
        os.environ["BROADSHEET_BASE_URL"] = f"http://{name}:{port}"
    if workers > 1:
        # Before prometheus_client is imported anywhere: each worker writes its counts there, /metrics adds them up.
        folder = settings.home / "metrics"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.db"):
            old.unlink()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        _prepare(Settings.load())
    uvicorn.run(
        "broadsheet.web.app:create_app",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        access_log=False,  # ours says more
        log_config=_logging(log, "WARNING" if quiet else "INFO"),
        proxy_headers=bool(proxy),
        forwarded_allow_ips=proxy or None,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def _refuse_unless_free(host: str, port: int) -> None:
    """Say so in one sentence where nothing can listen there, before an index is built for nothing."""
    import errno
    import socket

    from broadsheet.errors import InvalidInput

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been left is free
            probe.bind(address)
    except OSError as error:
        why = "something listens there already" if error.errno == errno.EADDRINUSE else error.strerror
        raise InvalidInput(f"cannot open the feed at {host}, port {port} ({why}): choose another --port") from error


def _prepare(settings: Any) -> None:
    """Bring tables, papers and index up to date once, before several workers start beside each other."""
    from broadsheet.web.app import create_app, fill

    site = create_app(settings).state.site
    fill(site)
    site.db.close()


class JsonLines(logging.Formatter):
    """Each record as a JSON object on a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        # A request's line brings its parts along: they are values here, not words in a sentence.
        line |= getattr(record, "parts", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _logging(style: str, requests: str) -> dict[str, Any]:
    text = {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": "broadsheet.cli_web.JsonLines"} if style == "json" else text},
        "handlers": {"err": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "loggers": {
            "broadsheet": {"handlers": ["err"], "level": "INFO"},
            "broadsheet.access": {"level": requests},
            "uvicorn": {"handlers": ["err"], "level": "INFO", "propagate": False},
        },
    }
