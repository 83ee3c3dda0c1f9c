"""One address in front of the daemons of several boards: configurations for LiteLLM's proxy and for nginx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import yaml

from rkboard.fleet.inventory import Entry, address
from rkruntime.bundle.manifest import open_bundle
from rkruntime.errors import UsageError
from rkruntime.serve.settings import Limits

_LIMITS: Final = Limits()
# Longest time for an answer with the daemon's default settings, including the wait in its queue.
_ANSWER_S: Final = int(_LIMITS.wait_s + _LIMITS.request_s)
_CONNECT_S: Final = 3
# Seconds for which a board that failed is left out.
_PAUSE_S: Final = 10
_TRIES: Final = 3
_CHECK_S: Final = 30
_WRITTEN: Final = "# Written by `rkedge fleet proxy`; docs/fleet.md says what it does and what was tried."

_NGINX: Final = """\
{written}
# Belongs into the http block: /etc/nginx/conf.d/rkedge.conf. No key is in it: clients send one that all boards know.
upstream rkedge_boards {{
    zone rkedge_boards 64k;
    least_conn;
{servers}
}}

server {{
    # Where clients connect. Another address than loopback needs TLS: keys and conversations go through here.
    listen {listen};
    server_tokens off;
    client_max_body_size {body}m;

    # The OpenAI and Ollama interfaces, whose requests stand for themselves. Conversations that a board keeps
    # (/sessions) are on that board alone.
    location ~ ^/(v1|api)/ {{
        proxy_pass http://rkedge_boards;
        # With 1.0, an answer that breaks off looks like one that has ended.
        proxy_http_version 1.1;
        # A daemon without keys answers to localhost only, so that no web page reaches it by another name: it has to see
        # the name that the client used.
        proxy_set_header Host $http_host;
        # A token as soon as it is there.
        proxy_buffering off;
        proxy_connect_timeout {connect}s;
        proxy_read_timeout {answer}s;
        # As long as no part of an answer has arrived, another board can give it. Asking again does no harm there, so it
        # is done with POST, too. After the time for it, a request that nobody answers is an error.
        proxy_next_upstream error timeout invalid_header http_502 http_503 non_idempotent;
        proxy_next_upstream_tries {tries};
        proxy_next_upstream_timeout {again}s;
    }}

    location = /health {{
        proxy_pass http://rkedge_boards;
        proxy_set_header Host $http_host;
        proxy_connect_timeout {connect}s;
        proxy_read_timeout {connect}s;
        proxy_next_upstream error timeout invalid_header http_502 http_503;
    }}

    location / {{
        return 404;
    }}
}}
"""


def litellm(boards: Sequence[Entry]) -> str:
    """Return a config.yaml for `litellm --config`, with a model for each bundle and a deployment for each board.

    Raises:
        UsageError: A board has no address, or two bundles have the same model name.
        BundleError: A bundle cannot be read.
    """
    names = _models(boards)
    deployments = [_deployment(entry, names[entry.name]) for entry in boards]
    whole = {
        "model_list": deployments,
        "router_settings": {
            "routing_strategy": "least-busy",
            "num_retries": _TRIES - 1,
            # A board is left out after a single failure, unless it is the only one.
            "allowed_fails": 0,
            "cooldown_time": _PAUSE_S,
            "timeout": _ANSWER_S,
            "retry_after": 0,
        },
        "litellm_settings": {"request_timeout": _ANSWER_S, "telemetry": False},
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            # Each check is a request for one token.
            "background_health_checks": True,
            "health_check_interval": _CHECK_S,
            "enable_health_check_routing": True,
            "health_check_staleness_threshold": 3 * _CHECK_S,
            "health_check_ignore_transient_errors": True,
            "disable_spend_logs": True,
        },
    }
    return f"{_WRITTEN}\n{yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)}"


def _deployment(entry: Entry, model: str) -> dict[str, Any]:
    _expect_address(entry)
    return {
        "model_name": model,
        "litellm_params": {
            # The part after openai/ is the model in the request, which a daemon with one model ignores.
            "model": f"openai/{model}",
            "api_base": f"http://{entry.address}/v1",
            # A daemon without keys accepts any.
            "api_key": f"os.environ/{entry.key}" if entry.key else "none",
            "timeout": _ANSWER_S,
            "stream_timeout": _ANSWER_S,
        },
        # On a busy board, a health check waits like any other request.
        "model_info": {
            "id": entry.name,
            "mode": "chat",
            "health_check_max_tokens": 1,
            "health_check_timeout": int(_LIMITS.wait_s),
        },
    }


def nginx(boards: Sequence[Entry], listen: str) -> str:
    """Return a file for nginx's http block.

    Args:
        listen: An address and a port, in the syntax of nginx's `listen`.

    Raises:
        UsageError: A board has no address, or the boards have different bundles, between which nginx cannot choose.
        BundleError: A bundle cannot be read.
    """
    if address(listen) is None:
        raise UsageError(f"{listen[:80]!r} is not an address and a port.", hint="Such as 127.0.0.1:8090.")
    if len(models := sorted(set(_models(boards).values()))) > 1:
        raise UsageError(
            f"The boards have different models ({', '.join(models)}); nginx does not know which one a request names.",
            hint="Name boards with the same one: --group NAME. Or let LiteLLM choose: --for litellm.",
        )
    for entry in boards:
        _expect_address(entry)
    servers = "\n".join(
        f"    server {entry.address} max_fails=1 fail_timeout={_PAUSE_S}s;  # {entry.name}" for entry in boards
    )
    return _NGINX.format(
        written=_WRITTEN, servers=servers, listen=listen, body=int(_LIMITS.body_mb), connect=_CONNECT_S,
        answer=_ANSWER_S, tries=_TRIES, again=int(_LIMITS.wait_s),
    )  # fmt: skip


def _expect_address(entry: Entry) -> None:
    if not entry.host:
        raise UsageError(
            f"The inventory does not say where a proxy reaches the API of {entry.name}.",
            hint="Add its `url: http://HOST:PORT`; docs/fleet.md says how a board gets one.",
        )


def _models(boards: Sequence[Entry]) -> dict[str, str]:
    """Return the model name that clients use for each board, by the board's name."""
    names: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    for entry in boards:
        if entry.bundle is None:
            raise UsageError(f"The inventory names no bundle for {entry.name}.", hint="Add `bundle: FOLDER` to it.")
        made = open_bundle(entry.bundle).manifest
        names[entry.name] = made.name
        if fingerprints.setdefault(made.name, made.fingerprint) != made.fingerprint:
            raise UsageError(
                f"Two different bundles are called {made.name}: an answer could come from either.",
                hint="Name boards with the same one: --group NAME.",
            )
    return names
