#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.2", "psutil>=5.9"]
# ///
"""ocppboard: an OCPP central system and its dashboard in one file.

    station --Call--> unpack -> on_<action> -> Board -> event -> SSE -> whoever looks
    station <--Call-- pack <--- Link.call <--- REST, Controller <- decide
    station --Call--> UpstreamSession -> Translator --> upstream, whose answer goes back

Words, those of the standard:

    station      a Charging Station (1.6: Charge Point), known by its identity, the end of its URL
    evse         where one vehicle charges at a time; 1.6 has none, its connector n is (evse n, 1)
    Call         a request in an OCPP-J frame, answered by CallResult or CallError; Send is not
    transaction  one charging, from start to stop
    Board        ours: the one owner of all records
    State        ours: the file of what outlives a restart; a Keeper puts the Board into it
    WebSocket    a connection, as its server or its client (RFC 6455)
    Exchange     ours: the Calls of one side of a connection, one at a time
    Link         ours: one live connection of a station
    quirk        ours: a thing that a station does against the standard and that we put up with
    Controller   ours: shares the site's power; an Evse has what one may draw at worst
    upstream     the central system that the relay passes a station on to
    session      ours, UpstreamSession: one station's way upstream; its queue has QueuedCalls
    Translator   ours: stands between versions; its TransactionMapping has the ids of both sides

Units: W, Wh, A, V, s; names carry any other. Times are UTC seconds, on the wire ISO 8601 with Z.
"""

import argparse
import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import csv
import difflib
import fnmatch
import functools
import getpass
import gzip
import hashlib
import heapq
import hmac
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import platform
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import time
import tomllib
import uuid
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from ipaddress import ip_address, ip_network
from itertools import islice
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, Protocol, final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import psutil
import tornado
from tornado import gen
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest
from tornado.ioloop import IOLoop, PeriodicCallback
from tornado.iostream import IOStream, StreamBufferFullError, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.routing import Matcher, PathMatches, Rule
from tornado.tcpclient import TCPClient
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

if sys.platform != "win32":
    import fcntl
    import resource

VERSION = "0.1.0"
log = logging.getLogger("ocppboard")

# What a stranger makes us keep is cut to these sizes; what grows is dropped beyond these numbers.
TEXT_KEPT = 255             # characters of any text a station puts into a record's field
RAW_SEARCHED = 16_384       # of such a frame, for what is secret in it; the rest is not kept
RAW_KEPT = 2048             # characters of a frame that could not be read
IDENTITY_LENGTH = 128       # the standard allows 48 (OCPP-J 2.0.1 3.1.1), chargers take more
MESSAGE_ID_LENGTH = 255     # the standard allows 36 (OCPP-J 4.1.4)
CONNECTORS_KEPT = 100       # of one station
SERIES_KEPT = 240           # readings of a transaction; beyond it every second one goes
POINTS_KEPT = 60            # of them in the State
TRACKS_KEPT = 6             # registers of other bases in a transaction; the least one goes
INTERVALS_KEPT = 60         # times of a transaction's interval energies, to know a repeated one
SEQUENCE_JUMP = 10_000      # no gap is so large: a station counts anew
SEQUENCE_GAP = 100          # missing seqNo of a transaction that may still come; more are counted
PROBLEMS_KEPT = 10          # alerts of one connector; the oldest goes first
SAMPLES_READ = 2000         # meter values in a message, and sampled values in each, the last ones
QUIRKS_KEPT = 50            # kinds of quirk of one station
LINKS_LOGGED = 200          # lines a minute of the log about stations that come and go
KNOCKING_KEPT = 200         # refused upgrades, same ones counted together
SESSIONS_KEPT = 1000        # logins to the board; the oldest goes first
ADDRESSES_KEPT = 10_000     # addresses whose failed logins are remembered
STREAMS_OPEN = 200          # SSE clients at a time
QUEUE_BYTES = 4 << 20       # of message payloads that one of them has not read
CALLS_WAITING = 50          # commands queued for one station
LATE_CALLS_KEPT = 20        # timed-out commands of a station whose answer we would still recognise
BODY_BYTES = 1024 * 1024    # of a REST request
FILES_SPARE = 20            # files kept free for what is not a connection
SLICE, SLICE_BYTES = 100, 256 * 1024    # of records, written before the loop gets its turn

RECENT_IN_OVERVIEW, RECENT_IN_DETAIL = 10, 50
LOGIN_FAILURES, LOGIN_WINDOW_S = 10, 300    # failures from one address, and how long each counts
ENTRY_FAILURES = 50         # of all stations with one password, from one address
STREAM_PAUSE_S = 0.1        # between two writes of a stream; what comes meanwhile goes out together
IDLE_HTTP_S = 75            # an HTTP connection without a request is closed
COALESCE_S = 60             # the same refusal within this time is counted, not recorded again
RATE_WINDOW_S, LATENCY_WINDOW_S = 10, 60
SKEW_TOLERANCE_S = 5        # how far a clock's skew may be misjudged
CLOCK_SET_S = 10            # a station's clock that is so near ours was set by it
CLOCK_LOST_S = 365 * 86400  # who tells an older time has lost it
CLOCK_JUMP_S = 2            # from here on a step of our own wall clock is told
RESUMED_S = 600             # so long a StartTransaction without a readable time may be repeated
CONNECTOR_MOST_W = 400_000  # what a connector can give; registers that rise faster are no registers
BEGUN_BEFORE_S = 3600       # how long ago a begin may be whose register comes with a later one
REGISTER_SLACK_WH = 10_000  # and this at once: clocks are set, registers are coarse
FULL_COUNTERS = (2**31 - 1, 2**32 - 1)       # of no register
JUMP_WH, DOUBTED = 1000, 5  # a step of more, beyond what power allows, has to hold so many readings
SERIES_LEAST_S = 60         # a chart of less is no use: readings that come faster are left out
POWER_BASE_S = 30           # the least time that power is worked out over
NESTING = 100               # of a payload's arrays and objects
BURST_S = 10                # a station may save up this many seconds of its call rate
COSTLY_BYTES = 32 * 1024    # a frame counts once more for each of these


# --- Errors -------------------------------------------------------------------------------
# What we raise on purpose. Each class knows its HTTP status and its OCPP error code (the 2.x
# word; Versions has the spelling of 1.6). The text is for the one who asked.


class BoardError(Exception):
    """An error with an answer: `http_status` and `headers` on REST, `ocpp_code` to a station."""

    http_status, ocpp_code = 500, "InternalError"
    headers: Mapping[str, str] = {}

    def body(self) -> dict:
        """The JSON of the answer to a REST request."""
        return {"error": str(self)}


class ConfigError(BoardError):
    """The configuration cannot be used; the text is one line for whoever starts the daemon."""


class BadRequest(BoardError):
    """A parameter or a body that the REST API cannot read."""

    http_status = 400


class Unauthorized(BoardError):
    """No session, or credentials that are wrong; `hint` says which where that helps."""

    http_status = 401

    def __init__(self, hint: str = ""):
        super().__init__("Unauthorized")
        self.hint = hint

    def body(self) -> dict:
        return {"error": "Unauthorized"} | ({"message": self.hint} if self.hint else {})


class Forbidden(BoardError):
    """A session past its time, or a request from another site's page."""

    http_status = 403


class NotFound(BoardError):
    """No such path, station or record."""

    http_status = 404


class MethodNotAllowed(BoardError):
    """The path is there, the method is not; `allowed` are."""

    http_status = 405

    def __init__(self, allowed: str):
        super().__init__("Method not allowed")
        self.headers = {"Allow": allowed}


class Conflict(BoardError):
    """The station is in no state for it: offline, mostly."""

    http_status = 409


class TooLarge(BoardError):
    """A request body over `BODY_BYTES`; what is left of it is not read."""

    http_status = 413
    headers: Mapping[str, str] = {"Connection": "close"}


class TooMany(BoardError):
    """Too many of something; to wait `retry_after` seconds will help."""

    http_status = 429

    def __init__(self, text: str, retry_after: int):
        super().__init__(text)
        self.headers = {"Retry-After": str(retry_after)}


class Unavailable(BoardError):
    """What was asked for cannot be had now; later it can."""

    http_status = 503


class Busy(BoardError):
    """A bound of ours is reached: streams, waiting commands."""

    http_status = 503


class CallFailed(BoardError):
    """The station answered a command with CALLERROR."""

    http_status = 502

    def __init__(self, code: str, description: str, details: dict):
        super().__init__(f"The station answered {code}")
        self.code, self.description, self.details = code, description, details

    def body(self) -> dict:
        return {"error": str(self), "errorCode": self.code,
                "errorDescription": self.description, "errorDetails": self.details}


class NoAnswer(BoardError):
    """The station did not answer a command in time."""

    http_status = 504


class Refused(BoardError):
    """A station's WebSocket upgrade that we do not accept; the text says why.

    `category` is the security event to make of it, "" if there is one already.
    """

    def __init__(self, http_status: int, text: str, category: str = "POLICY_REJECTION"):
        super().__init__(text)
        self.http_status, self.category = http_status, category


class UnknownAction(BoardError):
    """The Action is not known in this version (OCPP-J 1.6 4.2.3)."""

    http_status, ocpp_code = 400, "NotImplemented"


class NotSupported(BoardError):
    """The other side of the relay has nothing like it (OCPP-J 1.6 4.2.3)."""

    http_status, ocpp_code = 400, "NotSupported"


class FormatViolation(BoardError):
    """The payload is not what the Action takes (OCPP-J 1.6 4.2.3)."""

    http_status, ocpp_code = 400, "FormatViolation"


class MissingField(FormatViolation):
    """A required field is missing."""

    ocpp_code = "OccurrenceConstraintViolation"


class WrongType(FormatViolation):
    """A field has another type than the standard gives it."""

    ocpp_code = "TypeConstraintViolation"


class WrongValue(FormatViolation):
    """A field has a value that the standard does not allow."""

    ocpp_code = "PropertyConstraintViolation"


class SecurityError(BoardError):
    """The station is not approved yet (2.0.1 B02.FR.09)."""

    http_status, ocpp_code = 403, "SecurityError"


class BadFrame(BoardError):
    """Not an OCPP-J message. `id_text` is the message id as it stood there, of a CALL with one."""

    http_status, ocpp_code = 400, "FormatViolation"

    def __init__(self, text: str, id_text: str = "", action: str = ""):
        super().__init__(text)
        self.id_text, self.action = id_text, action


# --- Configuration ------------------------------------------------------------------------
# SETTINGS is all there is. A key comes from the file, OCPPBOARD_SECTION_KEY overrides it, the
# command line overrides both. What is wrong ends the start with one line that says what.


class Setting(NamedTuple):
    """One key: its default, whose type it must have, and what it may be."""

    section: str
    key: str
    default: Any
    allowed: tuple | None = None     # (least, most) of a number; or the words to choose from
    built: bool = True               # False: only its default is accepted, the feature is to come


MODES, ACCEPT = ("token", "credentials", "none"), ("any", "listed", "ask")
VALIDATE, AUTHORIZE = ("off", "warn", "strict", "auto"), ("any", "listed")
PROTOCOLS = ("ocpp2.1", "ocpp2.0.1", "ocpp1.6")
PORT, KEPT = (0, 65535), (1, 10_000_000)
WHEN_DOWN = ("answer", "close")
STRATEGIES = ("equal_share", "priority", "time_of_use", "first_come", "solar")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
# Which phases of the grid (R, S, T) a station's L1, L2, L3 are wired to (1.6 9.1.8
# ConnectorPhaseRotation, whose words these are).
ROTATIONS = ("", "RST", "RTS", "SRT", "STR", "TRS", "TSR")

SETTINGS = (
    Setting("server", "address", ""),
    Setting("server", "port", 9000, PORT),
    Setting("server", "tls_certificate", "", built=False),
    Setting("server", "tls_private_key", "", built=False),
    Setting("server", "trust_proxy", False),
    Setting("auth", "mode", "token", MODES),
    Setting("auth", "token", ""),
    Setting("auth", "username", "admin"),
    Setting("auth", "password", ""),
    Setting("auth", "session_ttl_seconds", 86400, (60, 31_536_000)),
    Setting("sse", "heartbeat_ms", 15000, (100, 3_600_000)),
    Setting("sse", "queue", 1000, (1, 1_000_000)),
    Setting("telemetry", "interval_ms", 2000, (100, 3_600_000)),
    Setting("telemetry", "history", 1800, KEPT),
    Setting("store", "max_messages", 10000, KEPT),
    Setting("store", "max_message_bytes", 33554432, (1_048_576, 1 << 40)),
    Setting("store", "max_connections", 2000, KEPT),
    Setting("store", "max_transactions", 1000, KEPT),
    Setting("store", "max_security_events", 1000, KEPT),
    Setting("store", "max_errors", 2000, KEPT),
    Setting("store", "max_system_events", 1000, KEPT),
    Setting("store", "max_smart_charge_sessions", 500, KEPT),
    Setting("store", "max_proxy_events", 1000, KEPT),
    Setting("ocpp", "path", "/ocpp"),
    Setting("ocpp", "port", 0, PORT),
    Setting("ocpp", "tls_port", 0, PORT, built=False),
    Setting("ocpp", "client_ca", "", built=False),
    Setting("ocpp", "protocols", list(PROTOCOLS), PROTOCOLS),
    Setting("ocpp", "accept", "any", ACCEPT),
    Setting("ocpp", "heartbeat_interval_seconds", 300, (10, 86400)),
    Setting("ocpp", "call_timeout_seconds", 30, (1, 3600)),
    Setting("ocpp", "ping_interval_seconds", 25, (0, 3600)),
    Setting("ocpp", "max_frame_bytes", 1048576, (1024, 1 << 30)),
    Setting("ocpp", "max_calls_per_second", 50, (0, 1_000_000)),
    Setting("ocpp", "validate", "auto", VALIDATE),
    Setting("ocpp", "authorize", "any", AUTHORIZE),
    Setting("ocpp", "id_tokens", []),
    Setting("smart_charge", "enabled", False),
    Setting("smart_charge", "strategy", "equal_share", STRATEGIES),
    Setting("smart_charge", "site_limit_a", 0.0, (0, 10_000)),
    Setting("smart_charge", "site_limit_kw", 0.0, (0, 10_000)),
    Setting("smart_charge", "safety_margin_percent", 5.0, (0, 50)),
    Setting("smart_charge", "voltage", 230.0, (100, 400)),
    Setting("smart_charge", "minimum_a", 6, (6, 80)),
    Setting("smart_charge", "step_a", 1, (1, 16)),
    Setting("smart_charge", "fallback_a", 0, (0, 80)),
    Setting("smart_charge", "limit_valid_seconds", 120, (30, 86400)),
    Setting("smart_charge", "raise_a_per_30s", 3, (1, 1000)),
    Setting("smart_charge", "rotate_minutes", 15, (1, 1440)),
    Setting("smart_charge", "timezone", ""),
    Setting("smart_charge", "meter", False),
    Setting("smart_charge", "meter_lost_a", 0.0, (0, 10_000)),
    Setting("smart_charge", "solar_on_seconds", 60, (0, 900)),
    Setting("smart_charge", "solar_off_seconds", 180, (0, 900)),
    Setting("proxy", "journal", ""),
    Setting("state", "path", ""),
    Setting("state", "transactions_days", 400, (1, 36_500)),
    Setting("state", "history_days", 0, (0, 3650)),
)
STATION_SETTINGS = (                                   # of one [stations."…"]
    Setting("stations", "password", ""),
    Setting("stations", "protocol", "", ("", *PROTOCOLS)),
    Setting("stations", "priority", 1, (1, 100)),
    Setting("stations", "max_a", 32, (1, 1000)),
    Setting("stations", "phases", 3, (1, 3)),
    Setting("stations", "phase_rotation", "", ROTATIONS),
    Setting("stations", "managed", True),
)
CIRCUIT_SETTINGS = (                                   # of one [[smart_charge.circuit]]
    Setting("smart_charge.circuit", "name", ""),
    Setting("smart_charge.circuit", "parent", ""),
    Setting("smart_charge.circuit", "limit_a", 0.0, (1, 10_000)),
    Setting("smart_charge.circuit", "stations", []),
)
WINDOW_SETTINGS = (                                    # of one [[smart_charge.window]]
    Setting("smart_charge.window", "from", "00:00"),
    Setting("smart_charge.window", "to", "24:00"),
    Setting("smart_charge.window", "days", list(DAYS), DAYS),
    Setting("smart_charge.window", "factor", 1.0, (0, 1)),
)
UPSTREAM_SETTINGS = (                                  # of one [[proxy.upstream]]
    Setting("proxy.upstream", "url", ""),
    Setting("proxy.upstream", "protocol", "", ("", *PROTOCOLS)),
    Setting("proxy.upstream", "stations", ["*"]),
    Setting("proxy.upstream", "password", ""),
    Setting("proxy.upstream", "ca", ""),
    Setting("proxy.upstream", "when_down", "answer", WHEN_DOWN),
    Setting("proxy.upstream", "queue", 1000, (1, 100_000)),
)
LISTED = {("smart_charge", "circuit"): CIRCUIT_SETTINGS,
          ("smart_charge", "window"): WINDOW_SETTINGS,
          ("proxy", "upstream"): UPSTREAM_SETTINGS}
LISTED_MOST = 500                    # tables in such a list
SITE = "site"                        # the circuit that all others hang at
ENVIRONMENT = "OCPPBOARD_"
TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
              list: "a list of texts"}


class Config(SimpleNamespace):
    """The settings as `config.<section>.<key>`; `stations` is {pattern: its settings}."""

    source: str
    stations: dict
    ignored: list                       # variables that look like ours and are of no section

    def station(self, identity: str) -> SimpleNamespace | None:
        """The settings of the entry that fits this identity best, None where none does.

        Its own name fits best, then the pattern with the most letters that are not wildcards.
        """
        return self.stations.get(best_fit(identity, self.stations))

    def upstream(self, identity: str) -> SimpleNamespace | None:
        """The [[proxy.upstream]] whose `stations` fit this identity best, None where none does."""
        patterns = {p: upstream for upstream in reversed(self.proxy.upstream)
                    for p in upstream.stations}
        return patterns.get(best_fit(identity, patterns))


def best_fit(identity: str, patterns: dict) -> str | None:
    """The pattern that fits an identity best, None where none does."""
    if identity in patterns:
        return identity
    fitting = [p for p in patterns if fnmatch.fnmatchcase(identity, p)]
    return max(fitting, key=lambda p: len(re.sub(r"[*?]", "", p)), default=None)


def read_config(path: str | None = None, environ: Mapping[str, str] | None = None,
                **overrides) -> Config:
    """The configuration: defaults, then the file, then the environment, then `server` overrides.

    `path` is what --config said; without it the usual places are tried (see `find_config`).

    Raises: ConfigError with one line that names the place, the key and what is wrong.
    """
    environ = os.environ if environ is None else environ
    source = find_config(path, environ) or ""
    data = _load_toml(source) if source else {}
    config = Config(source=source, stations={}, ignored=[])
    for setting in SETTINGS:
        section = config.__dict__.setdefault(setting.section, SimpleNamespace())
        setattr(section, setting.key, setting.default)
    for section, key in LISTED:
        setattr(config.__dict__[section], key, [])
    _apply_file(config, data, source)
    _apply_environment(config, environ)
    for key, value in overrides.items():
        if value is not None:
            setting = next(s for s in SETTINGS if (s.section, s.key) == ("server", key))
            config.server.__dict__[key] = _checked(setting, value, "command line", f"--{key}")
    _check_together(config)
    return config


def find_config(path: str | None, environ: Mapping[str, str]) -> str | None:
    """The first that is there: --config, $OCPPBOARD_CONFIG, ./ocppboard.toml, /etc/ocppboard.toml.

    The first two were asked for, so they are returned even if the file is missing.
    """
    asked = path or environ.get(ENVIRONMENT + "CONFIG")
    usual = ("ocppboard.toml", "/etc/ocppboard.toml")
    return asked or next((name for name in usual if os.path.isfile(name)), None)


def _load_toml(source: str) -> dict:
    try:
        return tomllib.loads(Path(source).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:    # with line and column; not UTF-8; [[[[…
        raise ConfigError(f"{source}: not a TOML file: {error}") from None


def _apply_file(config: Config, data: dict, source: str) -> None:
    sections = sorted({s.section for s in SETTINGS} | {"stations"})
    for name, table in data.items():
        if name not in sections:
            raise ConfigError(f"{source}: unknown section [{name}]{_nearest(name, sections)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: {name} must be a section, [{name}]")
        if name != "stations":
            _apply_table(config.__dict__[name], name, SETTINGS, table, source, name)
            continue
        for pattern, entry in table.items():
            where = f'stations."{pattern}"'
            if not isinstance(entry, dict):
                raise ConfigError(f'{source}: {where} must be a section, [stations."{pattern}"]')
            config.stations[pattern] = _entry(STATION_SETTINGS, entry, source, where)


def _entry(settings: tuple, table: dict, source: str, where: str) -> SimpleNamespace:
    """One of many tables of the same keys, its defaults filled in."""
    entry = SimpleNamespace(**{s.key: s.default for s in settings})
    _apply_table(entry, settings[0].section, settings, table, source, where)
    return entry


def _apply_table(target: SimpleNamespace, section: str, settings: tuple, table: dict,
                 source: str, where: str) -> None:
    known = {s.key: s for s in settings if s.section == section}
    for key, value in table.items():
        if entries := LISTED.get((section, key)):
            if type(value) is not list or not all(type(entry) is dict for entry in value):
                raise ConfigError(f"{source}: {where}.{key} must be sections, [[{where}.{key}]]")
            if len(value) > LISTED_MOST:
                raise ConfigError(f"{source}: more than {LISTED_MOST} [[{where}.{key}]]")
            target.__dict__[key] = [_entry(entries, entry, source, f"[[{where}.{key}]] {n}")
                                    for n, entry in enumerate(value, 1)]
            continue
        if key not in known:
            raise ConfigError(f"{source}: unknown key {where}.{key}{_nearest(key, known)}")
        target.__dict__[key] = _checked(known[key], value, source, f"{where}.{key}")


def _apply_environment(config: Config, environ: Mapping[str, str]) -> None:
    """Override keys by OCPPBOARD_SECTION_KEY; a variable of no section of ours is not for us."""
    known = {f"{ENVIRONMENT}{s.section}_{s.key}".upper(): s for s in SETTINGS}
    ours = tuple({f"{ENVIRONMENT}{s.section}_".upper() for s in SETTINGS})
    for name, text in environ.items():
        if name in known:
            setting = known[name]
            value = _checked(setting, _from_text(setting, text, name), "environment", name)
            config.__dict__[setting.section].__dict__[setting.key] = value
        elif name.startswith(ours):
            raise ConfigError(f"environment: unknown key {name}{_nearest(name, known)}")
        elif name.startswith(ENVIRONMENT) and name != ENVIRONMENT + "CONFIG":
            config.ignored.append(name)                  # OCPPBOARD_SERVICE_HOST and the like


def _from_text(setting: Setting, text: str, name: str) -> Any:
    kind = type(setting.default)
    if kind is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"environment: {name} must be {TYPE_WORDS[kind]}, not {text!r}") from None


def _checked(setting: Setting, value: Any, source: str, where: str) -> Any:
    """The value, if it is of the setting's type and among what is allowed."""
    kind, allowed = type(setting.default), setting.allowed
    secret = setting.key in ("password", "token")
    shown = "" if secret else f", not {value!r}"
    if kind is float and type(value) is int:
        value = float(value)
    fits = type(value) is kind and (kind is not list or all(type(v) is str for v in value))
    if not fits:
        raise ConfigError(f"{source}: {where} must be {TYPE_WORDS[kind]}{shown}")
    if not setting.built and value != setting.default:
        raise ConfigError(f"{source}: {where} is not available in this version")
    if kind in (int, float) and allowed and not allowed[0] <= value <= allowed[1]:
        raise ConfigError(f"{source}: {where} must be from {allowed[0]} to {allowed[1]}{shown}")
    words = value if kind is list else [value] if kind is str else []
    for word in words:
        if allowed and word not in allowed:
            raise ConfigError(f"{source}: {where} must be {' | '.join(filter(None, allowed))}, "
                              f"not {word!r}{_nearest(word, allowed)}")
    return value


def _check_together(config: Config) -> None:
    """What no single key can tell."""
    source = config.source or "configuration"
    if config.auth.mode == "credentials" and not config.auth.password:
        raise ConfigError(f'{source}: auth.mode = "credentials" needs auth.password')
    if not config.ocpp.protocols:
        raise ConfigError(f"{source}: ocpp.protocols must name at least one version")
    path = config.ocpp.path
    if not path.startswith("/") or path.startswith("/api") or "?" in path:
        raise ConfigError(f"{source}: ocpp.path must start with / and not lie in /api: {path!r}")
    if config.ocpp.port and config.ocpp.port == config.server.port:
        raise ConfigError(f"{source}: ocpp.port is server.port; 0 serves both on one port")
    for where, text in [("auth.password", config.auth.password)] + [
            (f'stations."{p}".password', s.password) for p, s in config.stations.items()]:
        if text.startswith(HASH_PREFIX) and not PASSWORD_HASH.fullmatch(text):
            raise ConfigError(f"{source}: {where} is not a hash that `hash-password` prints")
    _check_smart_charge(config.smart_charge, source)
    for number, upstream in enumerate(config.proxy.upstream, 1):
        _check_upstream(upstream, f"{source}: [[proxy.upstream]] {number}")
    named = Counter(p for upstream in config.proxy.upstream for p in set(upstream.stations))
    if twice := [pattern for pattern, count in named.items() if count > 1]:
        raise ConfigError(f'{source}: proxy: "{twice[0]}" stands in two [[proxy.upstream]]')
    if config.smart_charge.limit_valid_seconds < 2 * config.ocpp.call_timeout_seconds:
        raise ConfigError(f"{source}: smart_charge.limit_valid_seconds must be at least twice "
                          "ocpp.call_timeout_seconds, or limits end before they are renewed")


def _check_smart_charge(settings: SimpleNamespace, source: str) -> None:
    """What no single key of [smart_charge] can tell."""
    def wrong(text: str) -> ConfigError:
        return ConfigError(f"{source}: smart_charge: {text}")
    _check_circuits(settings.circuit, wrong)
    for window in settings.window:
        for key in ("from", "to"):
            if not re.fullmatch(r"(?:[01]\d|2[0-3]):[0-5]\d|24:00", window.__dict__[key]):
                raise wrong(f"a window's {key} must be a time as 18:00, "
                            f"not {window.__dict__[key]!r}")
    try:
        _ = settings.timezone and ZoneInfo(settings.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise wrong(f"timezone {settings.timezone!r} is not known here; "
                    'a name is as "Europe/Berlin"') from None
    if settings.site_limit_a and settings.site_limit_kw:
        raise wrong("say either site_limit_a or site_limit_kw, not both")
    if settings.enabled and not settings.site_limit_a and not settings.site_limit_kw:
        raise wrong("what the site can must be said, by either site_limit_a or site_limit_kw")
    if settings.strategy == "time_of_use" and not settings.window:
        raise wrong('strategy = "time_of_use" needs a [[smart_charge.window]]')
    if settings.strategy == "solar" and not settings.meter:
        raise wrong('strategy = "solar" needs meter = true: the site\'s meter tells what is left')
    if settings.fallback_a and settings.fallback_a < settings.minimum_a:
        raise wrong(f"fallback_a must be 0 or at least minimum_a ({settings.minimum_a} A), "
                    "or no car would charge at it")


def _check_circuits(circuits: list[SimpleNamespace], wrong: Callable[[str], ConfigError]) -> None:
    """The circuits make one tree below the site, and no station hangs in it twice."""
    parents = {circuit.name: circuit.parent or SITE for circuit in circuits}
    for circuit in circuits:
        if circuit.name in ("", SITE) or len(circuit.name) > TEXT_KEPT:
            raise wrong(f'a circuit needs a name, and not "{SITE}"')
        if not circuit.limit_a:
            raise wrong(f'circuit "{circuit.name}" needs a limit_a')
        if circuit.parent and circuit.parent not in parents:
            raise wrong(f'circuit "{circuit.name}" hangs at "{circuit.parent}", which is no '
                        f"circuit{_nearest(circuit.parent, parents)}")
        if circuit.name in (line := _line_of(circuit.name, parents))[1:]:
            raise wrong(f"circuits hang at each other: {' - '.join(line)}")
    if len(parents) < len(circuits):
        raise wrong("two circuits have the same name")
    named = Counter(name for circuit in circuits for name in set(circuit.stations))
    if twice := [name for name, count in named.items() if count > 1]:
        raise wrong(f'"{twice[0]}" stands in two circuits')


def _check_upstream(upstream: SimpleNamespace, where: str) -> None:
    """What no single key of a [[proxy.upstream]] can tell."""
    try:
        parts = urlsplit(upstream.url)
        good = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
    except ValueError:                   # a port that is no number, half an IPv6 address
        good = False
    if not good or parts.query or parts.fragment:
        raise ConfigError(f'{where}: url must be as "wss://csms.example.com/ocpp"; the identity is '
                          "appended")
    if parts.username or parts.password:
        raise ConfigError(f"{where}: the password stands in `password`, not in the url")
    if not upstream.stations:
        raise ConfigError(f'{where}: stations must name some, or be ["*"]')
    if upstream.ca and not os.path.isfile(upstream.ca):
        raise ConfigError(f"{where}: ca is no file: {upstream.ca!r}")


def _line_of(name: str, parents: dict) -> list[str]:
    """A circuit and all that it hangs at, up to the site; in a ring, up to where it closes."""
    line = [name]
    while line[-1] != SITE and line[-1] not in line[:-1]:
        line.append(parents[line[-1]])
    return line


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), [w for w in words if w], 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


# A hash names its own cost, so that a later version may raise it: scrypt$n$r$p$salt$key.
HASH_PREFIX = "scrypt$"
PASSWORD_HASH = re.compile(r"scrypt\$(2048|4096|8192|16384|32768|65536)\$(8)\$([1-4])"
                           r"\$([0-9a-f]{32})\$([0-9a-f]{64})")


# --- Records ------------------------------------------------------------------------------
# What is kept, and the bounded stores that keep it. Records hold data; `view` is the JSON that
# REST and streams show of one. Only the Board changes them.


def iso(when: float | None) -> str | None:
    """UTC seconds as ISO 8601 with milliseconds and Z; None stays None."""
    if when is None:
        return None
    second, fraction = divmod(when, 1)   # rounded to microseconds, then cut, as isoformat does
    second, ms = divmod(int(second) * 1000 + round(fraction * 1e6) // 1000, 1000)
    return f"{_iso_second(second)}.{ms:03}Z"


@functools.lru_cache(64)                 # most times that are written are of now
def _iso_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def kept(text: Any, length: int = TEXT_KEPT) -> str:
    """A stranger's text as a record's field may hold it: a str, cut."""
    return (text if isinstance(text, str) else str(text))[:length]


def shown(text: Any, length: int = 80) -> str:
    """A stranger's text as a log line may show it: cut, on one line, in ASCII."""
    return ascii(kept(text, length))


to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Record:
    """What every record of a Store has: its number in its store, and JSON."""

    __slots__ = ("number", "changed")
    number: int
    changed: int                        # by which event last, of a record that changes
    size = 0                            # bytes that a stranger's text takes, where it has no bound

    def view(self) -> dict:
        """The record as REST shows it."""
        raise NotImplementedError

    def json(self) -> str:
        """`view` as JSON text on one line."""
        return to_json(self.view())


@dataclass(slots=True)
class LoggedMessage(Record):
    """One OCPP-J frame, in or out."""

    identity: str
    protocol: str
    direction: str                      # IN | OUT
    type: str                           # CALL | CALLRESULT | CALLERROR | SEND | CALLRESULTERROR
    method: str                         # the Action; of an answer: the one it answers
    message_id: str
    payload: str                        # JSON text, on one line
    timestamp: float
    response_ms: float | None = None    # from a CALL to its answer, on both
    error_code: str | None = None
    error_description: str | None = None
    size: int = 0                       # bytes that the payload takes in memory
    number: int = 0

    def view(self) -> dict:
        return self.head() | {"payload": json.loads(self.payload)}

    def json(self) -> str:
        # The payload is JSON already; a page of large messages would take its time to parse.
        return f'{to_json(self.head())[:-1]},"payload":{self.payload}}}'

    def mentions(self, text: str) -> bool:
        """Whether the text, given in lower case, stands anywhere in it in any case."""
        words = (self.identity, self.method, self.message_id, self.error_code or "",
                 self.error_description or "")
        return text in "\n".join(words).lower() or text in self.payload.lower()

    def head(self) -> dict:
        """`view` without the payload."""
        head = {
            "id": f"msg-{self.number}", "identity": self.identity, "method": self.method,
            "direction": self.direction, "type": self.type, "timestamp": iso(self.timestamp),
            "messageId": self.message_id, "protocol": self.protocol,
            "responseTime": None if self.response_ms is None else round(self.response_ms, 3),
        }
        if self.error_code is not None:
            head |= {"errorCode": self.error_code, "errorDescription": self.error_description}
        return head


@dataclass(slots=True)
class Event(Record):
    """Something that happened: a security event, an error or a system event."""

    kind: str                           # its category; of a system event its type
    identity: str
    message: str
    details: dict
    timestamp: float
    severity: str | None = None         # low | medium | high | critical, of a security event only
    kind_name: str = "category"
    prefix: str = "evt"
    number: int = 0

    def view(self) -> dict:
        severity = {"severity": self.severity} if self.severity else {}
        return {"id": f"{self.prefix}-{self.number}", self.kind_name: self.kind,
                "identity": self.identity, "message": self.message, **severity,
                "details": self.details, "timestamp": iso(self.timestamp)}


@dataclass(slots=True)
class ProxyEvent(Record):
    """What the relay did with a message, or what became of its connection."""

    kind: str                           # translation | error | refused | connected | disconnected
    identity: str                       # | buffered | delivered
    from_protocol: str
    to_protocol: str
    direction: str                      # UP, to the upstream system | DOWN, to the station
    method: str
    timestamp: float
    message_id: str = ""
    to_method: str | None = None
    payload: str | None = None          # JSON text
    translated: str | None = None       # JSON text
    latency_ms: float | None = None
    error: str | None = None
    size: int = 0                       # bytes that the payloads take in memory
    number: int = 0

    def view(self) -> dict:
        return {
            "id": f"px-{self.number}", "type": self.kind, "identity": self.identity,
            "fromProtocol": self.from_protocol, "toProtocol": self.to_protocol,
            "direction": self.direction, "method": self.method, "toMethod": self.to_method,
            "messageId": self.message_id,
            "payload": None if self.payload is None else json.loads(self.payload),
            "translated": None if self.translated is None else json.loads(self.translated),
            "latencyMs": None if self.latency_ms is None else round(self.latency_ms, 3),
            "error": self.error, "timestamp": iso(self.timestamp)}


@dataclass(slots=True)
class Sample(Record):
    """The telemetry at one moment."""

    timestamp: float
    values: dict
    number: int = 0

    def view(self) -> dict:
        return self.values | {"timestamp": iso(self.timestamp)}


NOMINAL_V = 230.0                   # phase to neutral, where no meter says
PHASES = ("L1", "L2", "L3")
FLOWS = ("power_w", "current_a")    # what a state can end: nothing flows any more
PHASED = ("current_a", "voltage_v")  # kept by phase; of other quantities the total counts
REST_LEAST = 0.15                   # of the power: less in phases not told of is noise
BALANCED = 0.2                      # how far phases of one car may differ


class Base(NamedTuple):
    """The register that power is worked out from, and its time by our monotonic clock."""

    mono: float
    wh: float


@dataclass(slots=True)
class Reading:
    """The last state of a meter, in one unit for each quantity. None is unknown, not zero."""

    at: float                           # when the station says it was read
    energy_wh: float | None = None      # the import register
    power_w: float | None = None
    current_a: dict = field(default_factory=dict)    # {"L1": A, …}; {"": A} without a phase
    voltage_v: dict = field(default_factory=dict)    # {"L1": V, …}
    offered_a: float | None = None
    soc: float | None = None            # percent
    temperature_c: float | None = None
    frequency_hz: float | None = None
    derived: bool = False               # power was worked out, no meter said it
    derived_current: bool = False       # so was the current of one phase or more
    stale: bool = False                 # the station has gone since
    at_mono: float = -math.inf          # `at` by our monotonic clock, as far as the skew is known
    flow_mono: float = -math.inf        # the same, of the last current or power
    current_mono: float = -math.inf     # and of the last current that a meter said
    power_mono: float = -math.inf       # and of the last such power
    ended_mono: float = -math.inf       # when a state of the charging ended the flow
    instant: dict = field(default_factory=dict)      # {field: {phase: value}} of the time `at`
    base: Base | None = None
    shown_at: float | None = None       # `at` by our wall clock

    def update(self, at: float, found: dict, at_mono: float | None = None,
               shown_at: float | None = None) -> bool:
        """Take the samples of one instant, {field: {phase: value}}; other quantities stay.

        Phases of one instant may come in several messages. A reading from before the last one is
        history, and is not taken; `at_mono` and `shown_at` are its time by our clocks. Returns
        whether it was taken.
        """
        at_mono = at if at_mono is None else at_mono
        if at_mono < self.at_mono - SKEW_TOLERANCE_S:
            return False
        if at_mono < self.ended_mono:
            found = {name: phases for name, phases in found.items() if name not in FLOWS}
        if abs(at - self.at) < 1 and self._adds_to_instant(found):
            found = {name: self.instant.get(name, {}) | phases for name, phases in found.items()}
            self.instant = self.instant | found
        else:
            self.instant = found
        measured, flows = "power_w" in found, "current_a" in found
        if measured:
            self.derived, self.power_mono = False, at_mono
        elif self.derived or self.power_w is None or (
                flows and at_mono - self.power_mono > POWER_BASE_S):
            self.power_w = self._derived_power(at_mono, found)
            self.derived = self.power_w is not None
        for name, phases in found.items():
            if name in PHASED:
                setattr(self, name, phases)
            elif "" in phases:
                setattr(self, name, phases[""])
            else:
                setattr(self, name, _total(name, phases))
        if flows or (measured and at_mono - self.current_mono > POWER_BASE_S):
            self._derive_currents()
        if flows:
            self.current_mono = at_mono
        if flows or measured:
            self.flow_mono = at_mono
        self.at, self.at_mono, self.stale = at, at_mono, False
        self.shown_at = at if shown_at is None else shown_at
        return True

    def _adds_to_instant(self, found: dict) -> bool:
        """Whether the samples tell more of the last instant, and no phase of it otherwise."""
        instant = self.instant
        for name, phases in found.items():
            known = instant.get(name)
            if known is not None and (known.keys() == phases.keys() or any(
                    known.get(phase, value) != value for phase, value in phases.items())):
                return False             # the next instant
        return bool(instant)

    def flow(self, phases: int, voltage: float) -> tuple[list, list] | None:
        """The current in L1, L2 and L3 of a station with so many phases; None if no meter says it.

        Twice: a current of no phase may be that of each or the sum of all, so the first figures
        are the worst that the meter may mean, the second the best.
        """
        amps = self.current_a
        none = [0.0] * (3 - phases)
        if any(phase in amps for phase in PHASES):
            worse = [max(0.0, amps.get(phase, 0.0)) for phase in PHASES]
            missing = [n for n, phase in enumerate(PHASES[:phases]) if phase not in amps]
            better, rest_a = worse.copy(), self._rest_w() / voltage
            for n in missing:            # it may be on any of them
                worse[n], better[n] = rest_a, rest_a / len(missing)
            return worse, better
        if "" in amps:
            worst, best = max(0.0, amps[""]), max(0.0, amps[""]) / phases
        elif "N" in amps:                # a single-phase car's, on whichever phase it is
            worst = best = max(0.0, amps["N"])
        elif self.power_w is not None and not self.derived:
            worst = best = max(0.0, self.power_w) / (phases * voltage)
        else:
            return None
        return [worst] * phases + none, [best] * phases + none

    def end_flow(self, at_mono: float) -> None:
        """Nothing flows from then on, whatever the meter said before."""
        self.ended_mono = at_mono
        if self.flow_mono <= at_mono:
            self._set_flow(0.0, dict.fromkeys(self.current_a, 0.0))

    def forget_flow(self) -> None:
        """What flows is unknown until the next reading: the station has started anew."""
        self._set_flow(None, {})

    def _set_flow(self, power_w: float | None, current_a: dict) -> None:
        self.power_w, self.current_a = power_w, current_a
        self.derived, self.derived_current = power_w is not None, False
        self.instant, self.base = {}, None

    def _volts(self, phase: str) -> float:
        return self.voltage_v.get(phase, self.voltage_v.get("", NOMINAL_V))

    def _derived_power(self, at_mono: float, found: dict) -> float | None:
        """Power from current and voltage, else from energy and time."""
        if current := found.get("current_a"):
            self.voltage_v = found.get("voltage_v") or self.voltage_v
            phases = ([p for p in PHASES if p in current] or [p for p in current if not p]
                      or list(current))
            return round(sum(current[p] * self._volts(p) for p in phases), 1)
        if "energy_wh" not in found:
            return self.power_w
        register = _total("energy_wh", found["energy_wh"])
        since, base = self.base or (at_mono, math.inf)
        if register < base:
            self.base = Base(at_mono, register)
        elif at_mono - since >= POWER_BASE_S:            # shorter, and the register's grain shows
            self.base = Base(at_mono, register)
            power_w = (register - base) / (at_mono - since) * 3600
            return round(power_w, 1) if power_w <= CONNECTOR_MOST_W else None
        return self.power_w

    def _derive_currents(self) -> None:
        """Currents of the phases of which only power tells: by phase, or in the sum of all."""
        amps, watts = self.instant.get("current_a", {}), self.instant.get("power_w", {})
        if "L1" in amps and "L2" in amps and "L3" in amps:
            self.derived_current = False
            return
        if "" in amps or (not amps and not any(p in watts for p in PHASES)):
            return
        derived = {p: watts[p] / self._volts(p) for p in PHASES if p in watts and p not in amps}
        missing = [p for p in PHASES if p not in amps]
        of_one_w = max(amps.get(p, 0.0) * self._volts(p) for p in PHASES)
        if not derived and missing:      # a car that takes the same from each phase
            each_w = self._rest_w() / len(missing)
            if each_w > 0 and abs(each_w - of_one_w) < BALANCED * of_one_w:
                derived = {p: each_w / self._volts(p) for p in missing}
        self.current_a = amps | {phase: round(a, 2) for phase, a in derived.items()}
        self.derived_current = bool(derived)

    def _rest_w(self) -> float:
        """The measured power that flows in phases whose current the same instant does not tell."""
        amps, watts = self.instant.get("current_a", {}), self.instant.get("power_w", {})
        if not watts or not amps:
            return 0.0
        power_w = self.power_w or 0.0
        rest_w = power_w - sum(amps.get(p, 0.0) * self._volts(p) for p in PHASES)
        return rest_w if rest_w > REST_LEAST * power_w else 0.0

    def view(self) -> dict:
        """`quality`: measured, derived, or stale; `derived`: the fields that no meter said."""
        quality = "stale" if self.stale else "derived" if self.derived else "measured"
        return {"timestamp": iso(self.at if self.shown_at is None else self.shown_at),
                "energyWh": self.energy_wh, "powerW": self.power_w,
                "currentA": self.current_a, "voltageV": self.voltage_v, "offeredA": self.offered_a,
                "soc": self.soc, "temperatureC": self.temperature_c,
                "frequencyHz": self.frequency_hz, "quality": quality,
                "derived": ["powerW"] * self.derived + ["currentA"] * self.derived_current}


def _total(name: str, phases: dict) -> float:
    """One figure of a quantity: the total, where it is given, rather than our sum of phases."""
    if "" in phases:
        return phases[""]
    if name in ("power_w", "energy_wh"):
        return round(sum(phases.values()), 3)
    return max(phases.values())


class Point(NamedTuple):
    """A register and its time: by our monotonic clock, and as the station told it."""

    mono: float
    at: float
    wh: float


def most_wh(earlier: Point, later: Point, slack_wh: float = REGISTER_SLACK_WH) -> float:
    """What a connector can give between two readings, and a margin for clocks that were set."""
    seconds = max(abs(later.mono - earlier.mono), abs(later.at - earlier.at))
    return slack_wh + CONNECTOR_MOST_W / 3600 * seconds


@dataclass(slots=True)
class Track:
    """Registers that one meter can have shown: they only rise, and as fast as power allows."""

    first: Point
    last: Point
    before: float                       # the register before the last, by which a spike is known
    doubted: int = 0                    # how many more points a jump has to hold

    def step(self, point: Point) -> float | None:
        """How far the point goes beyond the track, in Wh; None if it does not continue it."""
        if point.mono >= self.first.mono and point.wh >= self.last.wh:
            gap = point.wh - self.last.wh    # earlier than the last, for a clock that fell
            return gap if gap <= most_wh(self.last, point) else None
        if point.mono <= self.first.mono and point.wh <= self.first.wh:
            gap = self.first.wh - point.wh
            return gap if gap <= most_wh(point, self.first) else None
        if self.first.mono <= point.mono <= self.last.mono and (
                self.first.wh <= point.wh <= self.last.wh):
            return 0.0
        return None

    def is_noise(self, point: Point) -> bool:
        """Whether the point is this meter's, seen late or with a small step back.

        A fall to under half is a register that was reset, or another one.
        """
        return self.last.wh / 2 <= point.wh <= self.last.wh

    def extend(self, point: Point) -> None:
        """Take a point that continues the track, or is noise of it."""
        if point.mono >= self.first.mono and point.wh >= self.last.wh:
            if point.mono > self.last.mono:
                self._watch_jump(point)
            self.last = point._replace(mono=max(point.mono, self.last.mono))
        elif point.mono <= self.first.mono and point.wh <= self.first.wh:
            self.first = point
        elif point.mono > self.last.mono and self.is_spike(point):
            self.last, self.doubted = point, 0

    def _watch_jump(self, point: Point) -> None:
        """Keep the register before a step that power hardly allows, until that has held."""
        if point.wh - self.last.wh > most_wh(self.last, point, JUMP_WH):
            self.before, self.doubted = (self.before if self.doubted else self.last.wh), DOUBTED
        elif self.doubted:
            self.doubted -= 1
        else:
            self.before = self.last.wh

    def is_spike(self, point: Point) -> bool:
        """Whether this later point, lower than the last, says that the last was none."""
        return self.before <= point.wh < (self.before + self.last.wh) / 2


class Register:
    """The energy of a transaction, from its meter's registers in whatever order they come.

    Some chargers mix registers of two bases (of the session, of the meter's life), start at a
    placeholder, reset, or show a spike. So registers are sorted into tracks that one meter can
    have shown. Tracks that follow each other add up; one beside another is another base.
    """

    __slots__ = ("start", "stop", "pieced", "_tracks", "_intervals", "_interval_wh",
                 "_partial_at", "_before_partial", "_stop_is_none")

    def __init__(self) -> None:
        self.start: Point | None = None
        self.stop: Point | None = None
        self._stop_is_none = False       # what was told as the stop's register
        self.pieced = False              # the energy is the sum of several tracks
        self._tracks: list[Track] = []
        self._intervals: deque[Point] = deque(maxlen=INTERVALS_KEPT)
        self._interval_wh: float | None = None
        self._partial_at: float | None = None            # the time of a register of some phases
        self._before_partial: list[Track] = []

    def begin(self, point: Point) -> None:
        """The register at the start of the transaction; another one later changes nothing."""
        if self.start is None and point.wh >= 0 and point.wh not in FULL_COUNTERS:
            self.start = point
            self.add(point)

    def end(self, point: Point) -> None:
        """The register at its end; one that repeats the start's says nothing of those between."""
        self._stop_is_none = point.wh in FULL_COUNTERS
        if point.wh >= 0 and not self._stop_is_none:
            self.stop = point
            if self.start is None or point.wh != self.start.wh:
                self.add(point)

    def add(self, point: Point) -> None:
        """A register in between."""
        if point.wh < 0 or (self.start and point.mono < self.start.mono - SKEW_TOLERANCE_S):
            return                       # none of this transaction, whatever it is
        if self.start and point.mono < self.start.mono:
            point = point._replace(mono=self.start.mono)
        if len(self._tracks) == 1:       # as it mostly is
            track = self._tracks[0]
            if point.mono > track.last.mono and not track.doubted and (
                    0 <= point.wh - track.last.wh <= JUMP_WH):
                track.before, track.last = track.last.wh, point
                return
        steps = [(gap, -n, track) for n, track in enumerate(self._tracks)
                 if (gap := track.step(point)) is not None]
        if steps:                        # the nearest, or one that began later and has grown, too
            nearest, latest = min(steps, key=lambda s: s[:2]), min(steps, key=lambda s: s[1])
            grown = latest[2].first != latest[2].last
            chosen = latest if grown and latest[0] <= 2 * nearest[0] else nearest
            chosen[2].extend(point)
            return
        for track in reversed(self._tracks):
            if track.is_noise(point) or (point.mono > track.last.mono and track.is_spike(point)):
                track.extend(point)
                return
        if len(self._tracks) >= TRACKS_KEPT:
            self._tracks.remove(min(self._tracks[1:], key=lambda t: t.last.wh - t.first.wh))
        self._tracks.append(Track(point, point, point.wh))

    def add_some_phases(self, point: Point) -> None:
        """A register of which more phases may come under the same time: each replaces the last."""
        if self._partial_at == point.at:
            self._tracks = self._before_partial
        self._partial_at = point.at
        self._before_partial = [replace(track) for track in self._tracks]
        self.add(point)

    def add_interval(self, point: Point) -> None:
        """The energy of one interval, where a meter tells no register; each time counts once."""
        known, oldest = self._intervals, self._intervals[0].mono if self._intervals else -math.inf
        if 0 <= point.wh <= 10 * REGISTER_SLACK_WH and all(p.at != point.at for p in known) and (
                len(known) < INTERVALS_KEPT or point.mono > oldest):
            known.append(point)
            self._interval_wh = (self._interval_wh or 0.0) + point.wh

    @property
    def first_wh(self) -> float | None:
        """The first register that was seen."""
        return min(track.first for track in self._tracks).wh if self._tracks else None

    @property
    def last_wh(self) -> float | None:
        """The last register of the meter that showed the first one."""
        return self._tracks[0].last.wh if self._tracks else None

    def energy_wh(self) -> float | None:
        """The energy so far, in Wh; None if no meter said anything. Sets `pieced`.

        Where start and stop are both there and plausible, their difference is the energy.
        """
        self.pieced = self._stop_is_none
        total = self._sum()
        if self._interval_wh is not None and not total:
            total, self.pieced = self._interval_wh, True
        if self.start and self.stop:
            energy_wh = self.stop.wh - self.start.wh
            if 0 <= energy_wh <= most_wh(self.start, self.stop) and (
                    energy_wh or not total) and not self._rose_between():
                self.pieced = False
                return round(energy_wh, 3)
            self.pieced = True
            if self._stop_counts_session():
                total = self.stop.wh
        return None if total is None else round(total, 3)

    def _rose_between(self) -> bool:
        """Whether the stop's register is one that began above the start's: of another base."""
        home = next((t for t in self._tracks if self.stop in (t.first, t.last)), None)
        return home is not None and home is not self._tracks[0] and (
            home.first.wh > self._tracks[0].last.wh)

    def _stop_counts_session(self) -> bool:
        """Whether the stop's register is that of the session, after those of the meter's life."""
        first, last = self._tracks[0], self._tracks[-1]
        if self.stop is None or last is first or not last.first == last.last == self.stop:
            return False
        more_wh = self.stop.wh - (first.last.wh - first.first.wh)
        return self.stop.wh < first.first.wh and (
            0 <= more_wh <= most_wh(first.last, self.stop, JUMP_WH))

    def _sum(self) -> float | None:
        """What the tracks that follow each other have gained."""
        if len(self._tracks) == 1:
            return self._tracks[0].last.wh - self._tracks[0].first.wh
        total, former = None, None
        for track in sorted(self._tracks, key=lambda t: t.first.mono):
            gained = track.last.wh - track.first.wh
            if former is not None:
                beside = track.first.mono < former.last.mono or (
                    track.first.mono == former.last.mono and former.last != former.first)
                if beside:
                    continue
                # It was reset and counts from zero, if a second register says so.
                if track.first.wh < former.last.wh and (
                        track.first != track.last or track.last == self.stop) and (
                        track.first.wh <= most_wh(former.last, track.first, JUMP_WH)):
                    gained = track.last.wh
                self.pieced |= gained > 0
            total, former = (total or 0.0) + gained, track
        return total


class Series:
    """What the meter of a transaction said over time, for a chart: at most SERIES_KEPT readings.

    Beyond it every second one goes, and later ones are taken half as often: the whole stays.
    """

    __slots__ = ("start", "_numbers", "_step")
    FIELDS = ("power_w", "energy_wh", "soc")
    CURRENTS = (*PHASES, "")
    WIDTH = 1 + len(FIELDS) + len(CURRENTS)              # seconds since start, …

    def __init__(self, start: float):
        self.start = start
        self._numbers = array("f")                       # WIDTH for each reading; unknown is NaN
        self._step = 0.0                                 # seconds between two of them, at least

    def __len__(self) -> int:
        return len(self._numbers) // self.WIDTH

    @property
    def points(self) -> list[list[float | None]]:
        """The readings as their numbers, at most POINTS_KEPT of them, spread over the whole."""
        stride = max(1, -(-len(self) // POINTS_KEPT))
        rows = (self._numbers[n * self.WIDTH:(n + 1) * self.WIDTH]
                for n in range(0, len(self), stride))
        return [[None if math.isnan(n) else round(n, 2) for n in row] for row in rows]

    @points.setter
    def points(self, points: list[list[float | None]]) -> None:
        """Raises: WrongType, where one has not WIDTH numbers, or too many."""
        if len(points) > SERIES_KEPT or any(len(p) != self.WIDTH or p[0] is None for p in points):
            raise WrongType("a curve has other points")
        self._numbers = array("f", (math.nan if n is None else n for p in points for n in p))

    def add(self, at: float, power_w: float | None, energy_wh: float | None, soc: float | None,
            current_a: dict) -> None:
        """Keep a reading in the place of its time, unless it is too near another one."""
        since, numbers, width = at - self.start, self._numbers, self.WIDTH
        place = len(numbers)
        while place and since < numbers[place - width]:
            place -= width
        if (place and since - numbers[place - width] <= self._step) or (
                place < len(numbers) and numbers[place] - since <= self._step):
            return
        known = (power_w, energy_wh, soc, *map(current_a.get, self.CURRENTS))
        numbers[place:place] = array("f", [
            since, *[math.nan if value is None else value for value in known]])
        if len(self) > SERIES_KEPT:
            self._numbers = array("f", (value for n in range(0, len(self), 2)
                                        for value in numbers[n * width:(n + 1) * width]))
            span = numbers[-width] - numbers[0]
            self._step = 1.8 * max(span, SERIES_LEAST_S) / SERIES_KEPT   # they come a little early

    def view(self) -> list[dict]:
        """The readings as REST shows them, oldest first."""
        return [self._point(self._numbers[n:n + self.WIDTH])
                for n in range(0, len(self._numbers), self.WIDTH)]

    def _point(self, numbers: array) -> dict:
        power_w, energy_wh, soc, *currents = [
            None if math.isnan(n) else round(n, 3) for n in numbers[1:]]
        return {"timestamp": iso(self.start + round(numbers[0], 3)), "powerW": power_w,
                "energyWh": energy_wh, "soc": soc,
                "currentA": {phase: a for phase, a in zip(self.CURRENTS, currents, strict=True)
                             if a is not None}}


@dataclass(slots=True, eq=False)
class Transaction(Record):
    """A charging, from its start (or from when we first heard of it) to its stop."""

    id: int | str
    identity: str
    evse_id: int
    connector_id: int
    id_token: str | None
    started_at: float
    meter_start: float | None = None    # Wh
    start_key: tuple | None = None      # tells a repeated StartTransaction
    status: str = "active"              # active | stopped | orphan | abandoned
    stopped_at: float | None = None
    meter_stop: float | None = None
    stop_key: tuple | None = None       # tells a repeated stop of an orphan
    register: Register = field(default_factory=Register)
    energy_wh: float | None = None
    started_mono: float = -math.inf     # the times by our monotonic clock
    stopped_mono: float = math.inf
    began_unseen: bool = False          # its start did not come (yet)
    sequence: "EventSequence | None" = None  # of its TransactionEvents
    interrupted_mono: float | None = None            # the station booted meanwhile
    assumed_connector: bool = False     # only its EVSE was told
    reading: Reading | None = None
    series: Series | None = None
    connector: "Connector | None" = None             # while it is active there
    soc: float | None = None
    reason: str | None = None
    charging_state: str | None = None
    state_mono: float = -math.inf       # since when, by our monotonic clock
    estimated: bool = False             # its start was not seen, or its register is pieced together
    key: str = ""                       # of its rows in the State
    row_crc: int = 0                    # of what stands there
    durable_as: str = ""                # the status that is on disk
    not_durable: bool = False           # its station was answered before that was there
    number: int = 0
    changed: int = 0

    def view(self) -> dict:
        return {
            "id": self.id, "identity": self.identity, "evse": self.evse_id,
            "connector": self.connector_id, "idToken": self.id_token,
            "startedAt": iso(self.started_at), "stoppedAt": iso(self.stopped_at),
            "meterStart": self.meter_start, "meterStop": self.meter_stop,
            "energyWh": self.energy_wh, "powerW": self.reading and self.reading.power_w,
            "soc": self.soc, "reason": self.reason, "status": self.status,
            "chargingState": self.charging_state, "estimated": self.estimated,
            "missingEvents": self.sequence.missing if self.sequence else 0,
            "notDurable": self.not_durable, "meter": self.reading and self.reading.view(),
        }

    def mentions(self, text: str) -> bool:
        """Whether the text, given in lower case, stands anywhere in it in any case."""
        words = (self.identity, str(self.id), self.id_token or "", self.reason or "")
        return text in "\n".join(words).lower()

    def latest_mono(self) -> float:
        """When it was last heard of, by our monotonic clock."""
        return max(self.started_mono, self.reading.at_mono if self.reading else -math.inf)

    def count_energy(self) -> None:
        """Work the energy out anew, after something was told to the register."""
        register = self.register
        self.energy_wh = register.energy_wh()
        if register.start is not None:
            self.meter_start = register.start.wh
        elif register.first_wh is not None:
            self.meter_start = register.first_wh
        self.estimated = self.began_unseen or register.pieced or self.status == "abandoned" or (
            self.energy_wh is not None and register.start is None)


class EventSequence:
    """The seqNo of a transaction's events: which came last, and how many between are missing.

    They count the events of an EVSE, so the first need not be 0 (2.0.1 E01, "seqNo").
    """

    __slots__ = ("last", "at_mono", "_first", "_missing", "_beyond")

    def __init__(self) -> None:
        self.last: int | None = None
        self.at_mono = -math.inf         # of the newest event
        self._first = 0
        self._missing: set[int] = set()
        self._beyond = 0                 # missing ones that are only counted

    @property
    def missing(self) -> int:
        """How many events between the first and the last did not come."""
        return len(self._missing) + self._beyond

    def add(self, number: int | None, at_mono: float) -> bool:
        """Take an event. Returns whether it is the newest: by its time, or its number."""
        newest = at_mono > self.at_mono or (at_mono == self.at_mono and (
            number is None or self.last is None or number >= self.last)) or (
            number is not None and self.last is not None and number > self.last)
        later = at_mono > self.at_mono
        self.at_mono = max(self.at_mono, at_mono)
        if number is not None:
            self._count(number, later)
        return newest

    def _count(self, number: int, later: bool) -> None:
        if self.last is None or (later and number < self._first) or (
                abs(number - self.last) > SEQUENCE_JUMP):    # it counts anew, after a reboot
            self._first = self.last = number
        elif number > self.last:
            self._miss(self.last + 1, number)
            self.last = number
        elif number < self._first:
            self._miss(number + 1, self._first)
            self._first = number
        else:
            self._missing.discard(number)

    def _miss(self, first: int, end: int) -> None:
        most = max(0, SEQUENCE_GAP - len(self._missing))
        self._missing.update(range(first, min(end, first + most)))
        self._beyond += max(0, end - first - most)


@dataclass(slots=True, eq=False)
class ChargeSession(Record):
    """What the site's power controller does for one transaction."""

    identity: str
    transaction_id: int | str
    evse_id: int
    connector_id: int
    circuit: str
    strategy: str
    priority: int
    phases: int                         # that the car uses, as far as it is known
    started_at: float
    updated_at: float
    status: str = "waiting"             # active | waiting | paused | limited-by-station |
                                        # uncontrollable | offline | ended
    allocated_a: float = 0.0            # A per phase that the station has accepted
    allocated_kw: float = 0.0
    target_a: float = 0.0               # A per phase that it is to get
    measured_a: float | None = None     # of the strongest phase
    min_a: int | None = None            # set on the board
    max_a: int | None = None
    phases_set: int | None = None
    reason: str = ""                    # one sentence: why this much
    ended_at: float | None = None
    number: int = 0
    changed: int = 0

    def view(self) -> dict:
        return {
            "sessionId": f"sc-{self.number}", "identity": self.identity, "strategy": self.strategy,
            "allocatedKw": self.allocated_kw, "status": self.status,
            "startedAt": iso(self.started_at), "updatedAt": iso(self.updated_at),
            "transactionId": self.transaction_id, "evse": self.evse_id,
            "connector": self.connector_id, "circuit": self.circuit, "phases": self.phases,
            "allocatedA": self.allocated_a, "targetA": self.target_a,
            "measuredA": self.measured_a, "priority": self.priority, "minA": self.min_a,
            "maxA": self.max_a, "phasesSet": self.phases_set, "reason": self.reason,
            "endedAt": iso(self.ended_at),
        }


class Problem(NamedTuple):
    """What a 2.x station alerted of, and when by our monotonic clock; text None: it is over."""

    text: str | None
    mono: float


@dataclass(slots=True, eq=False)
class Connector:
    """What a station says of one connector. (0, 0) is the station itself."""

    evse_id: int
    connector_id: int
    status: str | None = None
    error_code: str | None = None
    vendor_error_code: str | None = None
    info: str | None = None
    problems: dict[str, Problem] = field(default_factory=dict)
    since: float | None = None
    status_mono: float = -math.inf      # when the station says that the status began
    reading: Reading | None = None
    inlet: Reading | None = None        # of the grid's side, where a meter is there
    transaction: Transaction | None = None
    interrupted: Transaction | None = None           # that a reboot ended, unless it is resumed
    released_mono: float = -math.inf    # when its last transaction ended

    def cause(self) -> tuple[str | None, str | None]:
        """(error code, text) of what is wrong with it, if anything is."""
        problems = {name: text for name, (text, _) in self.problems.items() if text is not None}
        if not problems:
            return self.error_code, self.info
        names = ([self.error_code] if self.error_code not in (None, "NoError") else [])
        return ", ".join([*names, *problems]), "; ".join(
            filter(None, [self.info, *problems.values()])) or None

    def view(self) -> dict:
        error_code, info = self.cause()
        return {"evse": self.evse_id, "connector": self.connector_id, "status": self.status,
                "errorCode": error_code, "vendorErrorCode": self.vendor_error_code, "info": info,
                "since": iso(self.since),
                "transactionId": self.transaction and self.transaction.id,
                "meter": self.reading and self.reading.view(),
                "inlet": self.inlet and self.inlet.view()}


class StationClock:
    """How far a station's clock is ahead of ours, from the times that it tells.

    A message may be late, so the foremost of the last times counts. A clock that was set back is
    told from late messages by this: its times agree with ours, or, without that, for a while with
    one another.
    """

    __slots__ = ("shift_s", "_recent", "_other", "_given")

    def __init__(self) -> None:
        self.shift_s = 0.0               # the skew, but steady: what was told once stays in order
        self._recent: deque = deque(maxlen=8)
        self._other: tuple | None = None             # (skew, since when, how many times) behind it
        self._given = False              # our time was given to it since

    @property
    def skew_s(self) -> float | None:
        """Seconds, once it is known."""
        return max(self._recent) if self._recent else None

    def moved(self, ours_s: float) -> None:
        """Our own clock was set on by so much."""
        self.shift_s -= ours_s if self._recent else 0.0
        self._recent = deque((skew - ours_s for skew in self._recent), maxlen=8)
        self._other = None

    def give(self) -> None:
        """The station was answered with our time: from here on it should be right."""
        self._given = True

    def tell(self, skew_s: float, now_mono: float) -> None:
        """A message told a time that is so far ahead of ours."""
        recent = self._recent
        if recent and self._other is None and abs(skew_s - self.shift_s) <= SKEW_TOLERANCE_S:
            recent.append(skew_s)        # as it mostly is
            self._given = False
            return
        skew = self.skew_s
        if skew is None and skew_s < -SKEW_TOLERANCE_S:
            skew = 0.0                   # what comes first is often of the past
            self._recent.append(skew)
        if skew is not None and skew_s < skew - SKEW_TOLERANCE_S:
            was_set = (abs(skew_s) <= CLOCK_SET_S < skew) or (self._given and skew_s > 0)
            if not was_set and not self._agrees(skew_s, now_mono):
                return
            self._recent.clear()
            self._other = None
        elif skew is not None and skew_s > skew + SKEW_TOLERANCE_S:
            self._recent.clear()         # back at once, if this was an exception
            self._other = skew, now_mono - SKEW_TOLERANCE_S, 2
        self._recent.append(skew_s)
        self._given = False
        if len(self._recent) == 1 or abs(skew_s - self.shift_s) > SKEW_TOLERANCE_S:
            self.shift_s = max(self._recent)

    def _agrees(self, skew_s: float, now_mono: float) -> bool:
        """Whether the clock has been that far behind for three times and some seconds."""
        skew, since, times = self._other or (skew_s, now_mono, 0)
        if abs(skew_s - skew) > SKEW_TOLERANCE_S:
            skew, since, times = skew_s, now_mono, 0
        self._other = skew, since, times + 1
        return times >= 2 and now_mono - since >= SKEW_TOLERANCE_S


@dataclass(slots=True, eq=False)
class Station(Record):
    """A charging station, from its first connection until it is forgotten."""

    identity: str
    protocol: str
    remote_address: str
    connected_at: float
    link: Any = None                    # its live Link; None: offline
    disconnected_at: float | None = None
    forgotten: bool = False             # its record is removed; this is the last that is told of it
    security_profile: int = 0
    message_count: int = 0
    last_message_at: float | None = None
    error_count: int = 0
    evicted_count: int = 0
    registration: str | None = None     # what its last BootNotification was answered
    info: dict = field(default_factory=dict)         # vendor, model, serial, firmware, …
    connectors: dict = field(default_factory=dict)   # {(evse_id, connector_id): Connector}
    quirks: dict = field(default_factory=dict)       # {name: [count, last message id]}
    clock: StationClock = field(default_factory=StationClock)
    budget: Any = None                  # of its calls, over all of its connections
    heartbeat_s: float | None = None    # what it was told with its boot
    pongs: tuple = (False, False)       # whether it answered a ping: on this connection, the last
    seen_since_start: bool = True       # False: known from an earlier run alone
    booted_since_start: bool = False
    introduce_mono: float | None = None  # when it is asked to boot; inf: it was, or need not be
    has_spoken: bool = False            # on its present, or its last, connection
    boot_unanswered: bool = False       # upstream has yet to answer its BootNotification
    row_crc: int = 0                    # of what stands in the State
    changed: int = 0

    @property
    def quirk_counts(self) -> dict[str, int]:
        """{name: how often}; the ids of messages are of one run."""
        return {name: count for name, (count, _) in self.quirks.items()}

    @quirk_counts.setter
    def quirk_counts(self, counts: dict[str, int]) -> None:
        self.quirks = {name: [count, None] for name, count in counts.items()}

    @property
    def connector_list(self) -> list[Connector]:
        """The connectors, as they came."""
        return list(self.connectors.values())

    @connector_list.setter
    def connector_list(self, connectors: list[Connector]) -> None:
        self.connectors = {(c.evse_id, c.connector_id): c for c in connectors}

    @property
    def clock_skew_s(self) -> float | None:
        """The station's clock less ours."""
        return None if self.clock.skew_s is None else round(self.clock.skew_s, 1)

    def view(self) -> dict:
        return {
            "identity": self.identity, "remoteAddress": self.remote_address,
            "protocol": self.protocol, "connectedAt": iso(self.connected_at),
            "disconnectedAt": iso(self.disconnected_at),
            "status": "forgotten" if self.forgotten else "online" if self.link else "offline",
            "messageCount": self.message_count, "lastMessageAt": iso(self.last_message_at),
            "securityProfile": self.security_profile, "errorCount": self.error_count,
            "evictedCount": self.evicted_count, "registration": self.registration,
            "seenSinceStart": self.seen_since_start,
            "station": dict.fromkeys(("vendor", "model", "serial", "firmware")) | self.info,
            "connectors": [c.view() for _, c in sorted(self.connectors.items())],
            "clockSkewSeconds": self.clock_skew_s,
            "quirks": [{"name": name, "count": count, "lastMessageId": message_id}
                       for name, (count, message_id) in self.quirks.items()],
        }


@dataclass(slots=True)
class Knock(Record):
    """An upgrade that was refused; same ones are counted together."""

    ip: str
    path: str
    headers: dict
    http_status: int
    reason: str
    url: str                            # that would work
    first: float
    last: float = 0.0
    count: int = 0

    def view(self) -> dict:
        return {"path": self.path, "ip": self.ip, "headers": self.headers,
                "status": self.http_status, "reason": self.reason, "url": self.url,
                "count": self.count, "firstAt": iso(self.first), "lastAt": iso(self.last)}


NUMBER_OF = attrgetter("number")


class Store:
    """The newest records of one kind, numbered from 1; the oldest go beyond `limit`.

    With `max_bytes` they also go while the sizes of all, together, are over it. `total` is the
    last number given, `before` the last one that an earlier run gave.
    """

    __slots__ = ("records", "limit", "max_bytes", "bytes", "total", "before")

    def __init__(self, limit: int, max_bytes: int | None = None):
        self.records: deque = deque()
        self.limit, self.max_bytes = limit, max_bytes
        self.bytes = self.total = self.before = 0

    def __len__(self) -> int:
        return len(self.records)

    @property
    def count(self) -> int:
        """How many records came since the start."""
        return self.total - self.before

    @property
    def first(self) -> int:
        """The number of the oldest record; of the next one when there is none."""
        return self.records[0].number if self.records else self.total + 1

    def restore(self, records: Iterable[Any], last: int) -> None:
        """Take over the records of earlier runs, which numbered them up to `last`.

        What came since the start is numbered anew, after them.
        """
        came = list(self.records)
        self.records.clear()
        self.bytes = 0
        for record in records:
            number = record.number
            self.append(record)
            record.number = number
        self.total = self.before = last
        for record in came:
            self.append(record)

    def append(self, record: Record) -> Record | None:
        """Keep the record and number it. Returns the one that went for it, if one did."""
        self.total = record.number = self.total + 1
        records = self.records
        records.append(record)
        gone = records.popleft() if len(records) > self.limit else None
        if self.max_bytes is not None:
            self.bytes += record.size if gone is None else record.size - gone.size
            while self.bytes > self.max_bytes:
                gone = records.popleft()
                self.bytes -= gone.size
        return gone

    def make_room(self, over: Callable[[Any], bool]) -> Any:
        """When it is full, remove the oldest that is over, else the oldest. Returns that one."""
        if len(self.records) < self.limit:
            return None
        index = next((i for i, record in enumerate(self.records) if over(record)), 0)
        gone = self.records[index]
        del self.records[index]
        return gone

    def page(self, limit: int, offset: int = 0,
             match: Callable[[Any], bool] | None = None) -> tuple[list, int]:
        """(records, newest first; how many match in all)."""
        newest = reversed(self.records)
        if match is None:
            return list(islice(newest, offset, offset + limit)), len(self.records)
        found = [record for record in newest if match(record)]
        return found[offset:offset + limit], len(found)

    def get(self, number: int) -> Any:
        """The record of that number, or None when it is gone, or never was."""
        index = bisect_left(self.records, number, key=NUMBER_OF)
        found = self.records[index] if index < len(self.records) else None
        return found if found is not None and found.number == number else None

    def newest(self, limit: int, match: Callable[[Any], bool]) -> list:
        """The newest that match; reads no further than it must."""
        return list(islice(filter(match, reversed(self.records)), limit))

    def since(self, number: int) -> tuple[list, int]:
        """(records after that number of this run, oldest first; how many of them are gone)."""
        index = bisect_right(self.records, number, key=NUMBER_OF)
        records = list(islice(self.records, index, None))
        return records, max(0, self.total - number - len(records))


# --- State --------------------------------------------------------------------------------
# The SQLite file of what outlives a restart: JSON under a kind and a key. `put` writes behind,
# `committed` waits for the disk. A thread writes, so that no disk holds up the loop; a file that
# fails is tried again by itself, a damaged one is set aside, and neither stops the board.

STATE_ID, STATE_VERSION = 0x4F435050, 1     # SQLite's application_id and user_version
STATE_TABLE = """
    CREATE TABLE IF NOT EXISTS kept (kind TEXT NOT NULL, key TEXT NOT NULL, at REAL NOT NULL,
        value TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (kind, key));
    CREATE INDEX IF NOT EXISTS kept_at ON kept (kind, at);"""
LOCK_MARK = b"ocppboard"             # in the file that is locked, once the state is ours
STATE_PUT = """INSERT INTO kept VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, key) DO UPDATE
    SET at = excluded.at, value = excluded.value, crc = excluded.crc"""
STATE_REMOVE = """DELETE FROM kept WHERE rowid IN (
    SELECT rowid FROM kept WHERE kind = ? AND at < ? LIMIT ?)"""
WRITE_BEHIND_S = 300                # so long what can wait does
STATE_WAITING, STATE_WAITING_BYTES = 50_000, 16 << 20    # not written yet; the oldest go beyond it
STATE_RETRY_S = (1, 60)             # the first and longest pause after a failed write
COMMIT_S = 2                        # so long an answer waits for the disk
STATE_STOP_S = 3                    # and the end of the process
LOCKED_S = 1                        # and a write for another program's lock
CHECKED_BYTES = 64 << 20            # a file up to this size is checked whole at the start
REMOVED_AT_ONCE = 2000              # rows that became old; a start or a stop may wait for them
SET_ASIDE_KEPT = 3                  # damaged files; the oldest is removed
SALVAGED_AT_ONCE = 5000             # rows of one of them
SALVAGE_TRIES = 1000                # bad pages of one of them, behind which reading goes on


class StateRow(NamedTuple):
    """A value of the state: `at` is its own time in UTC seconds, `text` its JSON; None: removed."""

    kind: str
    key: str
    at: float
    text: str | None

    @property
    def crc(self) -> int:
        """By which a row that was altered, or torn, is known."""
        return zlib.crc32(f"{self.kind}\0{self.key}\0{self.at!r}\0{self.text}".encode())

    @property
    def value(self) -> Any:
        """The JSON, read."""
        return json.loads(self.text or "null")


class StateInUse(BoardError):
    """Another board has this state file."""


class State:
    """What outlives a restart. Without a path nothing does, and all methods do nothing.

    `tell(kind, "", text, details)` is called in the loop when the file fails, works again, or was
    damaged.
    """

    def __init__(self, path: str = "", clock: Callable[[], float] = time.time):
        self.path, self.clock = path and os.path.realpath(path), clock
        self.tell: Callable[[str, str, str, dict], Any] = lambda *event: None
        self.sources: list[Callable[[], Any]] = []   # each puts all it knows, into a new file
        self.before_write: list[Callable[[], Any]] = []      # each puts what is announced
        self.when_written: list[Callable[[], Any]] = []
        self.failing_since: float | None = None
        self.error = ""
        self.writes = self.lost = self.bytes_written = 0
        self.durable = 0                             # puts that an answer has to wait for
        self._durable_written = 0
        self._pending: OrderedDict[tuple[str, str], StateRow] = OrderedDict()
        self._pending_bytes = 0
        self._removals: dict[str, float] = {}        # {kind: time}: older rows are to go
        self._waiters: list[tuple[int, asyncio.Future]] = []     # for so many durable puts
        self._due = asyncio.Event()
        self._retry = 0
        self._renewed = False                        # all that is known is to be put
        self._made_anew = False                      # the file was gone
        self.stuck = False                           # at the end a write has not come back
        self._told: list[tuple] = []                 # by the thread, for `tell`
        self._lock_fd: int | None = None
        self._copy: Any = None                       # the folder of a copy that is read
        self._is_ours = False            # the file is from a run of ours
        self._opened = False
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        if path:
            self._writer = concurrent.futures.ThreadPoolExecutor(1, "state")
            self._reader = concurrent.futures.ThreadPoolExecutor(1, "state-reader")

    def __bool__(self) -> bool:
        return bool(self.path)

    # The start

    def open(self) -> None:
        """Open the file, before anything reads it. Raises: StateInUse.

        One that cannot be opened is tried again while the board runs.
        """
        if not self.path:
            return
        self._lock()
        try:
            self._db = self._connect()
            if os.path.getsize(self.path) <= CHECKED_BYTES:
                found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
        except (OSError, sqlite3.Error) as error:
            self._opened_badly(error)
        self._opened = True
        self._tell_all()

    def _opened_badly(self, error: Exception) -> None:
        if not self._is_damage(error):
            self._failed(error)
            self._db = self._connect_read_only()
            return
        try:
            self._set_aside(error)
        except (OSError, sqlite3.Error) as again:
            self._failed(again)

    def rows(self, kind: str, limit: int = -1, most_bytes: float = math.inf) -> list[StateRow]:
        """The rows of a kind, or the newest of them, the oldest first; damaged ones left out."""
        if self._db is None:
            return []
        try:
            found = self._db.execute("SELECT kind, key, at, value, crc FROM kept WHERE kind = ? "
                                     "ORDER BY at DESC, rowid DESC LIMIT ?", (kind, limit))
            read = []
            for row in found:
                read.append((StateRow(*row[:4]), row[4]))
                most_bytes -= _row_bytes(read[-1][0])
                if most_bytes < 0:
                    break
        except sqlite3.Error as error:
            self._opened_badly(error)
            return self.rows(kind, limit, most_bytes) if self._is_damage(error) and self._db else []
        good = [row for row, crc in read if self.is_good(row, crc)]
        if len(good) < len(read):
            self._told.append(("STATE_DAMAGED", f"{len(read) - len(good)} rows of {kind} in "
                               f"{self.path} are damaged and left out", {"kind": kind}))
            log.error("%s", self._told[-1][1])
        self._tell_all()
        return good[::-1]

    @staticmethod
    def is_good(row: StateRow, crc: Any) -> bool:
        """Whether a row is as it was written; bits on a disk turn types, too."""
        try:
            json.loads(row.text or "")
            return row.crc == crc
        except (ValueError, TypeError, RecursionError):
            return False

    # Writing

    def put(self, kind: str, key: str, value: Any, at: float | None = None,
            durable: bool = False) -> None:
        """Keep a value under its key; None removes it. `durable`: an answer waits for it."""
        if not self.path:
            return
        row = StateRow(kind, key, self.clock() if at is None else float(at),
                       None if value is None else to_json(value))
        former = self._pending.pop((kind, key), None)
        self._pending[kind, key] = row
        self._pending_bytes += _row_bytes(row) - (_row_bytes(former) if former else 0)
        if durable:
            self.durable += 1
        if durable or self._pending_bytes > STATE_WAITING_BYTES // 16:
            self._due.set()
        self._drop_beyond_bounds()

    def announce(self) -> None:
        """Something durable will be put `before_write`, as it is then: an answer waits for it."""
        if self.path:
            self.durable += 1
            self._due.set()

    def write_soon(self) -> None:
        """Do not let what was put wait for WRITE_BEHIND_S."""
        self._due.set()

    def remove_before(self, kind: str, at: float) -> None:
        """Remove what is older of a kind, with the next write."""
        self._removals[kind] = at

    def write_at_start(self) -> None:
        """Write what was put before the loop runs; what fails waits."""
        if not self.path:
            return
        batch, self._pending, self._pending_bytes = self._pending, OrderedDict(), 0
        try:
            self._write(batch, {})
        except (OSError, sqlite3.Error) as error:
            self._merge_back(batch, {})
            self._failed(error)

    def committed(self) -> Awaitable[bool] | None:
        """What to await before an answer: whether all that is durable is on disk, in COMMIT_S.

        None: there is nothing to wait for; either it is there, or the file fails (`failing_since`).
        """
        if self.durable == self._durable_written or self.failing_since is not None:
            return None
        return self._wait(self.durable)

    async def _wait(self, durable: int) -> bool:
        if self._durable_written < durable and self.failing_since is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append((durable, waiter))
            await asyncio.wait({waiter}, timeout=COMMIT_S)
            if self._durable_written < durable:
                self._failed(TimeoutError("the disk does not answer"))
                self._release()
                self._tell_all()
        return self._durable_written >= durable

    async def run(self) -> None:
        """Write what is put, until cancelled."""
        while self.path:
            pause_s = WRITE_BEHIND_S
            if self.failing_since is not None:           # nothing new makes it try sooner
                first_s, longest_s = STATE_RETRY_S
                await asyncio.sleep(min(longest_s, first_s * 2 ** self._retry))
                pause_s = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
            await self.write()

    async def write(self) -> None:
        """Write all that waits, in one transaction."""
        self._due.clear()
        for put in self.before_write:
            put()
        batch, self._pending, self._pending_bytes = self._pending, OrderedDict(), 0
        removals, self._removals = self._removals, {}
        durable, loop = self.durable, asyncio.get_running_loop()
        try:
            left: dict[str, float] = {}
            if batch or removals or self.failing_since is not None:
                left = await loop.run_in_executor(self._writer, self._write, batch, removals)
        except asyncio.CancelledError:
            self._merge_back(batch, removals)
            raise
        except (OSError, sqlite3.Error) as error:
            self._merge_back(batch, removals)
            self._failed(error)
        else:
            self._durable_written = durable
            self._removals = left | self._removals
            if left:
                self._due.set()
            self._works()
            for tell in self.when_written:
                tell()
            self._renew()
        self._release()
        self._tell_all()

    def _renew(self) -> None:
        """Put all that is known, where the file is a new one or rows were dropped."""
        if not self._renewed:
            return
        self._renewed = False
        if self._made_anew:
            self._made_anew = False
            text = f"The state file was gone, and is made anew: {self.path}"
            log.warning("%s", text)
            self._told.append(("STATE_RENEWED", text, {}))
            with contextlib.suppress(StateInUse):
                self._lock()                 # of a folder that was gone, too
        for source in self.sources:
            source()
        self._due.set()

    def _release(self) -> None:
        """Let go on whoever waits for what is written now, or all, while the file fails."""
        waiters, self._waiters = self._waiters, []
        for durable, waiter in waiters:
            if durable > self._durable_written and self.failing_since is None:
                self._waiters.append((durable, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    def _merge_back(self, batch: dict, removals: dict) -> None:
        """What was not written waits again, under what came since."""
        newer, self._pending = self._pending, OrderedDict(batch)
        self._pending.update(newer)
        self._pending_bytes = sum(map(_row_bytes, self._pending.values()))
        self._removals = removals | self._removals
        self._drop_beyond_bounds()

    def _drop_beyond_bounds(self) -> None:
        while len(self._pending) > STATE_WAITING or self._pending_bytes > STATE_WAITING_BYTES:
            _, row = self._pending.popitem(last=False)
            self._pending_bytes -= _row_bytes(row)
            self.lost += 1
            if self.failing_since is not None:
                self._renewed = True         # what is in memory yet is put anew, once it works

    def _failed(self, error: Exception) -> None:
        self.error = kept(f"{self.path}: {error}")
        if self.failing_since is not None:
            self._retry = min(self._retry + 1, 10)
            return
        self.failing_since, self._retry = self.clock(), 0
        log.error("The state cannot be written, and a restart would forget it: %s", self.error)
        self._told.append(("STATE_FAILING", f"The state cannot be written: {self.error}", {}))

    def _works(self) -> None:
        if self.failing_since is None:
            return
        self.failing_since, self.error = None, ""
        log.warning("The state is written again: %s", self.path)
        self._told.append(("STATE_WORKS", "The state is written again", {"lost": self.lost}))

    def _tell_all(self) -> None:
        while self._told:
            kind, text, details = self._told.pop(0)
            self.tell(kind, "", text, details)

    async def stop(self) -> None:
        """Write what waits, within STATE_STOP_S."""
        if not self.path:
            return
        self.stuck = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATE_STOP_S):
                await self.write()
                await asyncio.get_running_loop().run_in_executor(self._writer, self._close)
                await asyncio.get_running_loop().run_in_executor(self._reader, lambda: None)
                self.stuck = False
        for executor in (self._writer, self._reader):
            executor.shutdown(wait=False, cancel_futures=True)

    async def query(self, ask: Callable[[sqlite3.Connection], Any]) -> Any:
        """What a function reads from the file, off the loop. Raises: Unavailable."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._reader, self._query, ask)
        except (OSError, sqlite3.Error) as error:
            raise Unavailable(f"The state cannot be read: {kept(error)}") from None

    def view(self) -> dict:
        """The file as REST shows it; sizes in bytes."""
        return {"path": self.path or None, "sizeBytes": _size_of(self.path),
                "writes": self.writes, "bytesWritten": self.bytes_written,
                "waiting": len(self._pending), "lost": self.lost,
                "failingSince": iso(self.failing_since), "error": self.error or None}

    # In the threads

    def _query(self, ask: Callable[[sqlite3.Connection], Any]) -> Any:
        with contextlib.closing(sqlite3.connect(_address(self.path, mode="ro"), LOCKED_S,
                                                uri=True)) as db:
            return ask(db)

    def _write(self, batch: dict[tuple, StateRow],
               removals: dict[str, float]) -> dict[str, float]:
        """Write rows, and remove old ones. Returns the removals that go on."""
        if self._db is not None and not self._is_there():
            self._close()
        try:
            return self._write_to(self._db or self._connect(), batch, removals)
        except sqlite3.DatabaseError as error:
            if self._db is not None and "full" in str(error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")      # that has most of it
            elif self._is_damage(error):
                self._set_aside(error)
            else:
                raise
            return self._write_to(self._db or self._connect(), batch, removals)

    def _write_to(self, db: sqlite3.Connection, batch: dict[tuple, StateRow],
                  removals: dict[str, float]) -> dict[str, float]:
        self._db, left = db, {}
        try:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("DELETE FROM kept WHERE kind = ? AND key = ?", [
                row[:2] for row in batch.values() if row.text is None])
            db.executemany(STATE_PUT, ((*row, row.crc) for row in batch.values()
                                       if row.text is not None))
            for kind, at in removals.items():
                gone = db.execute(STATE_REMOVE, (kind, at, REMOVED_AT_ONCE)).rowcount
                if gone == REMOVED_AT_ONCE:
                    left[kind] = at
            db.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        self.writes += 1
        self.bytes_written += sum(map(_row_bytes, batch.values()))
        return left

    def _is_there(self) -> bool:
        """Whether the file is still the one that was opened."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def _connect(self) -> sqlite3.Connection:
        """Open the file, made where there is none. Raises: OSError, sqlite3.Error."""
        with contextlib.suppress(FileExistsError):       # id tokens are nobody's
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._renewed = self._made_anew = self._opened
        db = sqlite3.connect(_address(self.path), LOCKED_S, isolation_level=None, uri=True,
                             check_same_thread=False)
        db.text_factory = _decoded
        try:
            owner, = db.execute("PRAGMA application_id").fetchone()
            version, = db.execute("PRAGMA user_version").fetchone()
            tables, = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if (owner or tables) and owner != STATE_ID:
                raise sqlite3.DatabaseError("it is another program's file")
            if version > STATE_VERSION:
                raise sqlite3.OperationalError(f"it is of a newer version ({version})")
            if owner and not tables:
                raise sqlite3.DatabaseError("its table is gone")
            if not owner:                # of small ones a small change writes less
                db.execute("PRAGMA page_size = 1024")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA wal_autocheckpoint = 4000")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA journal_size_limit = 4194304")
            if not owner:
                db.executescript(f"PRAGMA application_id = {STATE_ID}; PRAGMA user_version = "
                                 f"{STATE_VERSION}; {STATE_TABLE}")
            self._is_ours = True
            if self._lock_fd is not None:
                os.pwrite(self._lock_fd, LOCK_MARK, 0)
        except BaseException:
            db.close()
            raise
        self._inode = os.stat(self.path).st_ino
        return db

    def _connect_read_only(self) -> sqlite3.Connection | None:
        """A copy of a file that takes no writes, for what is in it and in its WAL."""
        try:
            self._copy = tempfile.TemporaryDirectory()
            copy = os.path.join(self._copy.name, "state")
            for suffix in ("", "-wal"):
                if os.path.exists(self.path + suffix):
                    shutil.copyfile(self.path + suffix, copy + suffix)
            db = sqlite3.connect(copy, check_same_thread=False)
            db.text_factory = _decoded
            owner, = db.execute("PRAGMA application_id").fetchone()
        except (OSError, sqlite3.Error):
            return None
        if owner == STATE_ID:
            return db
        db.close()
        return None

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def _set_aside(self, error: Exception) -> None:
        """Keep a damaged file under another name; what can be read goes into a new one.

        Raises: OSError, sqlite3.Error.
        """
        self._close()
        name = f"{self.path}.damaged-{int(self.clock())}"
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path + suffix, name + suffix)
        folder, pattern = os.path.split(f"{self.path}.damaged-")
        aside = sorted(f for f in os.listdir(folder or ".") if f.startswith(pattern)
                       and f[len(pattern):].isdigit())
        for old in aside[:-SET_ASIDE_KEPT]:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, old + suffix))
        self._db, self._renewed = self._connect(), True
        rows, values = _salvaged(name), 0
        while batch := {row[:2]: row for row in islice(rows, SALVAGED_AT_ONCE)}:
            self._write_to(self._db, batch, {})
            values += len(batch)
        why = kept(" ".join(str(error).split()), 100)
        text = (f"The state file was damaged ({why}): it is now {name}, and "
                f"{values} values of it are kept")
        log.error("%s", text)
        self._told.append(("STATE_DAMAGED", text, {"file": name, "values": values}))

    def _lock(self) -> None:
        """See that no other board has the file. Raises: StateInUse.

        The file beside it that is locked says whether a board of ours has used that path.
        """
        name = f"{self.path}-lock"
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None
        try:
            self._lock_fd = os.open(name, os.O_CREAT | os.O_RDWR, 0o600)
            self._is_ours = self._is_ours or os.pread(self._lock_fd, 16, 0) == LOCK_MARK
            if sys.platform != "win32":
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateInUse(f"another board uses {self.path}") from None
        except OSError:
            pass                         # read-only, or a file system without locks

    def _is_damage(self, error: Exception) -> bool:
        """Whether the file itself is damaged: not locked, not full, and not somebody else's."""
        return type(error) is sqlite3.DatabaseError and self._is_ours


def _address(path: str, **options: str) -> str:
    """The URI of a file for this process alone.

    So the index of the WAL stays in memory (sqlite.org/wal.html, 8): on disk it would take more
    bytes than the rows.
    """
    if os.name == "posix":
        options["vfs"] = "unix-excl"
    return f"file:{quote(path)}?{urlencode(options)}"


def _decoded(data: bytes) -> str:
    return data.decode(errors="replace")     # what was altered is known by its checksum


def _row_bytes(row: StateRow) -> int:
    return len(row.key) + len(row.text or "") + 100


def _size_of(path: str) -> int | None:
    try:
        return os.path.getsize(path) if path else None
    except OSError:
        return None


def _salvaged(path: str) -> Iterator[StateRow]:
    """What can still be read of a damaged file: behind a bad page it goes on, further each time."""
    _pad(path)
    with contextlib.closing(sqlite3.connect(path, LOCKED_S)) as db:
        db.text_factory = _decoded
        last, step = 0, 1
        for _ in range(SALVAGE_TRIES):
            try:
                for rowid, *columns, crc in db.execute(
                        "SELECT rowid, kind, key, at, value, crc FROM kept NOT INDEXED "
                        "WHERE rowid > ? ORDER BY rowid", (last,)):
                    if rowid > last:                     # a damaged tree may lead back
                        last, step = rowid, 1
                    row = StateRow(*columns)
                    if State.is_good(row, crc):
                        yield row
                return
            except sqlite3.DatabaseError:
                last, step = min(last + step, 1 << 62), step * 2


def _pad(path: str) -> None:
    """Make a file that was cut as long as its header says, or SQLite reads nothing of it."""
    with open(path, "rb") as file:
        header = file.read(32)
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 1 << 16 if page_bytes == 1 else page_bytes      # sqlite.org/fileformat2 1.3.2
    whole = page_bytes * int.from_bytes(header[28:32], "big")
    if os.path.getsize(path) < whole < 1 << 36:
        os.truncate(path, whole)


# --- Messages -----------------------------------------------------------------------------
# OCPP-J frames (OCPP-J 1.6 chapter 4; 2.0.1 and 2.1 part 4), no I/O. A message is its frame
# taken apart once: the payload as data, and as the text that is kept.


@final
class Call(NamedTuple):
    """[2, id, Action, payload]. `id_text` is the id as JSON, to be given back as it came."""

    id_text: str
    action: str
    payload: dict
    text: str            # the payload as JSON on one line


@final
class Send(NamedTuple):
    """[6, id, Action, payload]: needs no answer (2.1)."""

    id_text: str
    action: str
    payload: dict
    text: str


@final
class CallResult(NamedTuple):
    """[3, id, payload]."""

    id_text: str
    payload: dict
    text: str


@final
class CallError(NamedTuple):
    """[4, id, code, description, details]."""

    id_text: str
    code: str
    description: str
    details: dict
    text: str            # the details as JSON


@final
class CallResultError(NamedTuple):
    """[5, id, code, description, details]: the other side cannot use our CALLRESULT (2.1)."""

    id_text: str
    code: str
    description: str
    details: dict
    text: str


Message = Call | Send | CallResult | CallError | CallResultError


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):        # 1e999 reads as infinity, which nobody could write again
        raise ValueError("number out of range")
    return number


_read = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite).raw_decode
# `[type, id, ` and, where a second text follows (Action, error code), that too.
_STRING = r'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_HEAD = re.compile(rf'\s*\[\s*([0-9]+)\s*,\s*({_STRING}|0|-?[1-9][0-9]*)\s*,\s*'
                   rf'(?:({_STRING})\s*,\s*)?')
_BARE = re.compile(rf'\s*\[\s*([345])\s*,\s*({_STRING}|0|-?[1-9][0-9]*)\s*\]\s*\Z')
_CALL_ID = re.compile(rf'\s*\[\s*2\s*,\s*("[^"\\\x00-\x1f]{{1,{MESSAGE_ID_LENGTH}}}")')
_TAIL = re.compile(r"\s*\]\s*\Z")
_COMMA = re.compile(r"\s*,\s*")

UNKNOWN_ERROR = "UnknownError"       # the code of a CALLERROR that tells none

# Tried on a frame that is not JSON, one after the other until it is. The names become quirks.
REPAIRS = (
    ("json_empty_value", re.compile(r":\s*(?=\])"), ":["),            # "configurationKey":]
    ("json_missing_value", re.compile(r":\s*(?=[,}])"), ":null"),
    ("json_trailing_comma", re.compile(r",\s*(?=[\]}])"), ""),
    ("json_control_character", re.compile(r"[\x00-\x1f]"), " "),        # C's \0 at the end, too
)


def unpack(frame: str) -> Message:
    """Take a frame apart.

    Raises: BadFrame, with the id if it is a CALL whose id can be read.
    Spec: OCPP-J 1.6 4.1, 4.2; 2.1 part 4, 4.2.
    """
    head = _HEAD.match(frame)
    if not head:
        if bare := _BARE.match(frame):               # some clients answer so
            return unpack(f"[{bare[1]},{bare[2]},null]")
        call = _CALL_ID.match(frame)
        raise BadFrame("not an OCPP-J message: [type, id, …] expected", call[1] if call else "")
    kind, id_text, second = head.groups()
    if len(id_text) > MESSAGE_ID_LENGTH:
        raise BadFrame("the message id is too long")
    if "\\" in id_text and not _is_json(id_text):
        raise BadFrame("the message id cannot be read")
    if kind in ("2", "6"):
        return _unpack_request(frame, kind, id_text, second, head)
    if kind == "3":
        # A text in the payload's place is no payload; `_payload` says so.
        payload, text = _payload(frame, head.start(3) if second else head.end(), id_text="")
        return CallResult(id_text, payload, text)
    if kind in ("4", "5"):
        return _unpack_error(frame, kind, id_text, second, head.end())
    raise BadFrame(f"unknown message type {kind[:10]}")


def _is_json(text: str) -> bool:
    try:
        return _read(text)[1] == len(text)
    except ValueError:
        return False


def _unpack_request(frame: str, kind: str, id_text: str, second: str | None,
                    head: re.Match) -> Call | Send:
    answer_to = id_text if kind == "2" else ""
    if second is None:
        raise BadFrame("an Action and a payload expected", answer_to)
    try:
        # One text for all messages of an Action, which the records share.
        action = sys.intern(second[1:-1] if "\\" not in second else _read(second)[0])
    except ValueError:
        raise BadFrame("the Action cannot be read", answer_to) from None
    if len(action) > 64:
        raise BadFrame("the Action is too long", answer_to)
    payload, text = _payload(frame, head.end(), answer_to, action)
    return Call(id_text, action, payload, text) if kind == "2" else Send(
        id_text, action, payload, text)


def _unpack_error(frame: str, kind: str, id_text: str, code: str | None,
                  at: int) -> CallError | CallResultError:
    # Chargers leave out the description or the details; what is there is taken.
    rest: list[Any] = []
    try:
        if code is None:
            code, at = _read(frame, at)
            if comma := _COMMA.match(frame, at):
                at = comma.end()
        else:
            code = _read(code)[0]
        while len(rest) < 3 and not _TAIL.match(frame, at):
            item, at = _read(frame, at)
            rest.append(item)
            if comma := _COMMA.match(frame, at):
                at = comma.end()
    except (ValueError, RecursionError):
        raise BadFrame("the error message cannot be read") from None
    description = rest[0] if rest and isinstance(rest[0], str) else ""
    details = rest[-1] if rest and isinstance(rest[-1], dict) else {}
    if deeper(details, NESTING):
        raise BadFrame("the error's details are nested too deeply")
    return (CallError if kind == "4" else CallResultError)(
        id_text, kept(code or UNKNOWN_ERROR, 64), kept(description), details, to_json(details))


def _payload(frame: str, start: int, id_text: str, action: str = "") -> tuple[dict, str]:
    """The object that stands at `start` and ends the frame, as data and as one line of text."""
    try:
        payload, end = _read(frame, start)
    except (ValueError, RecursionError) as error:    # RecursionError: [[[[… without end
        raise BadFrame(f"the payload is not JSON: {kept(error, 100)}", id_text, action) from None
    if not _TAIL.match(frame, end):
        raise BadFrame("the payload is not the end of the message", id_text, action)
    if payload is None:                              # null where {} was meant
        return {}, "{}"
    if type(payload) is not dict:
        raise BadFrame("the payload is not an object", id_text, action)
    text = frame[start:end]
    if text.count("{") + text.count("[") > NESTING and deeper(payload, NESTING):
        raise BadFrame("the payload is nested too deeply", id_text, action)
    if "\n" in text or "\r" in text:                 # only between values, so a space will do
        text = text.replace("\r", " ").replace("\n", " ")
    return payload, text


def deeper(value: Any, limit: int) -> bool:
    """Whether arrays and objects are nested beyond `limit`, where recursion on them might fail."""
    level = [value]
    for _ in range(limit + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return bool(level)


def unpack_mended(frame: str) -> tuple[Message, list[str]]:
    """A frame that `unpack` refuses, put right if we know its faults: (message, their names).

    Raises: BadFrame, as `unpack` did.
    """
    faults = []
    for name, pattern, instead in REPAIRS:
        mended = pattern.sub(instead, frame)
        if mended != frame:
            frame = mended
            faults.append(name)
            with contextlib.suppress(BadFrame):
                return unpack(frame), faults
    raise BadFrame("no known fault")


def message_id(id_text: str) -> str:
    """The id as a text: of "abc" the abc."""
    if id_text[0] != '"':
        return id_text
    return id_text[1:-1] if "\\" not in id_text else _read(id_text)[0]


def same_id(one: str, other: str) -> bool:
    """Whether two ids are one, however they are written: "\\u00e9" is "é"."""
    return one == other or message_id(one) == message_id(other)


def pack(message: Call | CallResult | CallError) -> str:
    """The frame of a message that we send."""
    if isinstance(message, CallResult):
        return f"[3,{message.id_text},{message.text}]"
    if isinstance(message, Call):
        return f'[2,{message.id_text},"{message.action}",{message.text}]'
    return (f"[4,{message.id_text},{to_json(message.code)},{to_json(message.description)},"
            f"{message.text}]")


# --- WebSocket ----------------------------------------------------------------------------
# RFC 6455 with permessage-deflate (RFC 7692), for both roles. A Codec has no I/O; a WebSocket
# reads and writes a socket with it, whatever the other side does: it may go, or not read.

TEXT_FRAME, BINARY_FRAME = 0x1, 0x2                                  # opcodes (RFC 6455 5.2)
CLOSE_FRAME, PING_FRAME, PONG_FRAME = 0x8, 0x9, 0xA
FINAL, RSV1, CONTROL, OPCODE = 0x80, 0x40, 0x08, 0x0F                # bits of the first byte
WHOLE_TEXT = FINAL | TEXT_FRAME
# What a frame may begin with: no control frame is a fragment, no other bits have a meaning.
FIRST_BYTES = frozenset((0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A))
DEFLATED_FIRST_BYTES = FIRST_BYTES | {0x41, 0x42, 0xC1, 0xC2}        # RSV1: compressed
CLOSE_CODES = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}     # on the wire
NO_CODE, NO_CLOSE = 1005, 1006       # never on it: a Close frame without a code, and none at all
CONTROL_BYTES = 125                  # in a control frame
READ_BYTES = 16 * 1024               # from one connection, then others have their turn
CLOSE_S, LINGER_S = 5, 1             # for the answer to our Close; for reading why, after an error
HEAD_BYTES = 16 * 1024               # of the answer to our upgrade
CLOGGED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)     # try again later
# Deflate and inflate of a connection take 43 kB with these, 68 kB if the peer's window is 2^15.
WINDOW_BITS, MEMORY_LEVEL = 12, 3
DEFLATE_TAIL = b"\x00\x00\xff\xff"   # the end of every message, which is not sent (RFC 7692 7.2.1)


class WebSocketError(Exception):
    """The other side breaks the protocol; `code` is for our Close frame."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


class HandshakeError(OSError):
    """No connection came about. The text says why, with the HTTP status if there is one."""


class Deflate(NamedTuple):
    """The parameters of permessage-deflate that were agreed on, seen from our side."""

    send_bits: int = WINDOW_BITS         # the window is 2^bits bytes
    receive_bits: int = WINDOW_BITS
    send_afresh: bool = False            # without the context of the messages before
    receive_afresh: bool = False


class Codec:
    """The frames of one connection, from bytes and to bytes (RFC 6455 5)."""

    def __init__(self, client: bool, max_size: int, deflate: Deflate | None = None):
        self._client, self._max_size, self._deflate = client, max_size, deflate
        self._mask_bit = 0x80 if client else 0           # that we set, and the other side does not
        self._first_bytes = DEFLATED_FIRST_BYTES if deflate else FIRST_BYTES
        self._unread = bytearray()                       # the beginning of a frame
        self._inflater: Any = None                       # these are made when needed
        self._deflater: Any = None
        self._needed = 0                                 # bytes of it, before it is looked at again
        self._fragments = bytearray()                    # of a message
        self._begun = 0                                  # first byte of their first frame
        self._over = False                               # nothing has a meaning any more

    def feed(self, data: bytes) -> Iterator[tuple[int, Any]]:
        """Read on: yields (TEXT_FRAME, str), (BINARY_FRAME, bytes), (PING_FRAME or PONG_FRAME,
        bytes) and (CLOSE_FRAME, (code, reason)).

        One at a time, so that one is dealt with before the next is inflated. After a Close, an
        error, or messages that were not asked for, there are no more.

        Raises: WebSocketError.
        """
        if self._over:
            return
        if self._unread and not (data := self._with_unread(data)):
            return
        at, end, self._over = 0, len(data), True
        while end - at >= 2:
            first, second = data[at], data[at + 1]
            size, start = second & 0x7F, at + 2
            if size >= 126:
                start += 2 if size == 126 else 8
                size = int.from_bytes(data[at + 2:start], "big") if start <= end else 0
            self._check(first, second, size)
            mask_at = start
            if not self._client:
                start += 4
            if start + size > end:
                self._needed = start + size - at
                break
            payload = data[start:start + size]
            if not self._client:
                payload = masked(data[mask_at:start], payload)
            at = start + size
            if first == WHOLE_TEXT:                              # nearly all are
                yield TEXT_FRAME, decoded(payload)
            elif message := self._message(first, payload):
                yield message
                if first == FINAL | CLOSE_FRAME:
                    return
        if at < end:
            self._unread += data[at:]
        self._over = False

    def _with_unread(self, data: bytes) -> bytes:
        """The data after what was not read before; nothing, while that is no frame yet."""
        self._unread += data
        if len(self._unread) < self._needed:
            return b""
        data, self._needed = bytes(self._unread), 0
        self._unread.clear()
        return data

    def _check(self, first: int, second: int, size: int) -> None:
        """RFC 6455 5.1, 5.2 and 5.5."""
        if first not in self._first_bytes:
            raise WebSocketError(1002, f"a frame begins with 0x{first:02x}")
        if second & 0x80 == self._mask_bit:
            raise WebSocketError(1002, f"a frame is {'' if self._client else 'not '}masked")
        if first & CONTROL:
            if size > CONTROL_BYTES:
                raise WebSocketError(1002, f"a control frame of more than {CONTROL_BYTES} bytes")
        elif bool(first & OPCODE) == bool(self._begun):
            raise WebSocketError(1002, "a message within another, or a fragment of none")
        elif size >> 63:                 # "the most significant bit MUST be 0"
            raise WebSocketError(1002, "a length with its highest bit set")
        elif size + len(self._fragments) > self._max_size:
            raise self._too_long()

    def _too_long(self) -> WebSocketError:
        return WebSocketError(1009, f"a message of more than {self._max_size} bytes")

    def _message(self, first: int, payload: bytes) -> tuple[int, Any] | None:
        """What a frame says, or the message that it completes (RFC 6455 5.4, 5.5)."""
        if first == FINAL | CLOSE_FRAME:
            return CLOSE_FRAME, closing(payload)
        if first & CONTROL:
            return first & OPCODE, payload
        self._begun = self._begun or first
        if self._fragments or not first & FINAL:
            self._fragments += payload
            if not first & FINAL:
                return None
            payload = bytes(self._fragments)
            self._fragments.clear()
        begun, self._begun = self._begun, 0
        if begun & RSV1:
            payload = self._inflated(payload)
        return begun & OPCODE, decoded(payload) if begun & OPCODE == TEXT_FRAME else payload

    def _inflated(self, data: bytes) -> bytes:
        """RFC 7692 7.2.2. However large it would become, not more than `max_size` is inflated."""
        agreed = self._deflate or Deflate()
        if self._inflater is None or agreed.receive_afresh:
            self._inflater = zlib.decompressobj(wbits=-agreed.receive_bits)
        try:
            message = self._inflater.decompress(data + DEFLATE_TAIL, self._max_size + 1)
        except zlib.error:
            raise WebSocketError(1007, "a message cannot be inflated") from None
        if len(message) > self._max_size:
            raise self._too_long()
        if self._inflater.eof:           # a block with BFINAL (RFC 7692 7.2.3.4)
            if self._inflater.unused_data.lstrip(b"\0") != b"\xff\xff":
                raise WebSocketError(1007, "a message goes on after its end")
            self._inflater = None
        return message

    def frame(self, opcode: int, data: bytes) -> bytes:
        """The frame that sends `data`, compressed where that is agreed."""
        first = FINAL | opcode
        if self._deflate and not first & CONTROL:
            first, data = first | RSV1, self._deflated(data)
        size = len(data)
        if size < 126:
            head = bytes((first, self._mask_bit | size))
        elif size < 65536:
            head = bytes((first, self._mask_bit | 126, size >> 8, size & 0xFF))
        else:
            head = bytes((first, self._mask_bit | 127)) + size.to_bytes(8, "big")
        if not self._client:
            return head + data
        mask = os.urandom(4)             # "a strong source of entropy" (RFC 6455 5.3)
        return head + mask + masked(mask, data)

    def forget(self) -> None:
        """The connection is over: its buffers go at once, not with what else refers to it."""
        self._over = True
        self._inflater = self._deflater = None
        self._unread, self._fragments = bytearray(), bytearray()

    def _deflated(self, data: bytes) -> bytes:
        """RFC 7692 7.2.1."""
        agreed = self._deflate or Deflate()
        if self._deflater is None or agreed.send_afresh:
            self._deflater = zlib.compressobj(wbits=-agreed.send_bits, memLevel=MEMORY_LEVEL)
        data = self._deflater.compress(data) + self._deflater.flush(zlib.Z_SYNC_FLUSH)
        return data[:-len(DEFLATE_TAIL)]


def masked_slowly(mask: bytes, data: bytes) -> bytes:
    """`data` masked, or unmasked (RFC 6455 5.3). One XOR of large numbers is Python's fastest."""
    size = len(data)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    return (int.from_bytes(data, "little") ^ key).to_bytes(size, "little")


try:
    from tornado.speedups import websocket_mask as masked
except ImportError:                      # Tornado was built without its part in C
    masked = masked_slowly


def decoded(data: bytes) -> str:
    """A text of a message. Raises: WebSocketError, where it is not UTF-8 (RFC 6455 8.1)."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise WebSocketError(1007, "a text is not UTF-8") from None


def closing(data: bytes) -> tuple[int, str]:
    """Code and reason of a Close frame (RFC 6455 5.5.1, 7.4)."""
    if not data:
        return NO_CODE, ""
    code = int.from_bytes(data[:2], "big")
    if len(data) == 1 or code not in CLOSE_CODES:
        raise WebSocketError(1002, f"a Close frame with code {code}")
    return code, decoded(data[2:])


# Handshake

# zlib cannot compress with a window of 2^8: who insists on it goes without compression.
_BITS = frozenset(map(str, range(9, 16)))
DEFLATE_PARAMETERS = {                   # and their values (RFC 7692 7.1)
    "server_no_context_takeover": {""}, "client_no_context_takeover": {""},
    "server_max_window_bits": _BITS, "client_max_window_bits": _BITS | {""}}
# A server that cannot limit its window has to decline the first, and may take the second.
DEFLATE_OFFER = (f"permessage-deflate; server_max_window_bits={WINDOW_BITS}; "
                 f"client_max_window_bits={WINDOW_BITS}, "
                 "permessage-deflate; client_max_window_bits")


def deflate_offers(header: str) -> list[dict[str, str]]:
    """The parameters of each permessage-deflate in Sec-WebSocket-Extensions that we can do."""
    offers = []
    for name, *parameters in (extension.split(";") for extension in header.split(",")):
        pairs = [(key.strip(), value.strip().strip('"')) for key, _, value in (
            parameter.partition("=") for parameter in parameters)]
        if name.strip() == "permessage-deflate" and len(dict(pairs)) == len(pairs) and all(
                value in DEFLATE_PARAMETERS.get(key, ()) for key, value in pairs):
            offers.append(dict(pairs))
    return offers


def accept_deflate(header: str) -> tuple[str, Deflate | None]:
    """What a server makes of a client's offers: (Sec-WebSocket-Extensions of its answer, meaning).

    Windows are limited by name only where the client did so: simple clients know no parameters.
    """
    for offer in deflate_offers(header)[:1]:
        for name in ("server_max_window_bits", "client_max_window_bits"):
            if name in offer:
                offer[name] = str(min(WINDOW_BITS, int(offer[name] or 15)))
        parameters = [f"{name}={value}" if value else name for name, value in offer.items()]
        return "; ".join(["permessage-deflate", *parameters]), _deflate(offer, "server", "client")
    return "", None


def agreed_deflate(header: str) -> Deflate | None:
    """What a client makes of the answer to DEFLATE_OFFER.

    Raises: HandshakeError.
    """
    if not header:
        return None
    agreed = deflate_offers(header)
    if not agreed or "," in header or agreed[0].get("client_max_window_bits") == "":
        raise HandshakeError(f"it answered with the extensions {kept(header, 80)}")
    return _deflate(agreed[0], "client", "server")


def _deflate(agreed: dict[str, str], us: str, them: str) -> Deflate:
    # Ours may be smaller than agreed, and theirs be taken for larger.
    return Deflate(min(WINDOW_BITS, int(agreed.get(f"{us}_max_window_bits", 15))),
                   max(WINDOW_BITS, int(agreed.get(f"{them}_max_window_bits", 15))),
                   f"{us}_no_context_takeover" in agreed, f"{them}_no_context_takeover" in agreed)


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept to a Sec-WebSocket-Key (RFC 6455 4.2.2)."""
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(),
                          usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def http_head(first_line: str, headers: dict[str, str | None]) -> bytes:
    """The head of a request or answer; a header without a value is left out."""
    lines = [first_line, *(f"{name}: {value}" for name, value in headers.items() if value)]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header has more than one line")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def accept_websocket(handler: RequestHandler, max_size: int, subprotocol: str | None = None,
                     compress: bool = True) -> "WebSocket":
    """Answer an upgrade that is in order with 101 (RFC 6455 4.2.2); `handler` is done then."""
    headers = handler.request.headers
    extensions, deflate = accept_deflate(
        ",".join(headers.get_list("Sec-WebSocket-Extensions")) if compress else "")
    head = http_head("HTTP/1.1 101 Switching Protocols", {
        "Upgrade": "websocket", "Connection": "Upgrade",
        "Sec-WebSocket-Accept": accept_key(headers.get("Sec-WebSocket-Key", "")),
        "Sec-WebSocket-Protocol": subprotocol, "Sec-WebSocket-Extensions": extensions})
    websocket = WebSocket(handler.detach(), Codec(False, max_size, deflate), subprotocol)
    websocket.send(head)
    return websocket


async def open_websocket(url: str, subprotocols: Iterable[str], max_size: int,
                         headers: dict[str, str] | None = None, compress: bool = True,
                         ssl_options: ssl.SSLContext | None = None,
                         timeout_s: float = 10) -> "WebSocket":
    """Connect as a client (RFC 6455 4.1). TCP, TLS and the upgrade may take `timeout_s` each.

    Raises: HandshakeError, whose text is one line.
    """
    key, stream, websocket = base64.b64encode(os.urandom(16)).decode(), None, None
    try:
        where, subprotocols = urlsplit(url), list(subprotocols)
        if where.scheme not in ("ws", "wss") or not where.hostname:
            raise ValueError("the URL is not one of a WebSocket")
        target = (where.path or "/") + (f"?{where.query}" if where.query else "")
        head = http_head(f"GET {target} HTTP/1.1", {
            "Host": where.netloc.rpartition("@")[2], "Upgrade": "websocket",
            "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key,
            "Sec-WebSocket-Protocol": ", ".join(subprotocols),
            "Sec-WebSocket-Extensions": DEFLATE_OFFER if compress else "", **(headers or {})})
        stream = await _connected(where, ssl_options, timeout_s)
        async with asyncio.timeout(timeout_s):
            await stream.write(head)
            answer = await stream.read_until(b"\r\n\r\n", max_bytes=HEAD_BYTES)
        subprotocol, deflate = read_answer(answer, key, subprotocols)
        websocket = WebSocket(stream, Codec(True, max_size, deflate), subprotocol)
        return websocket
    except (OSError, ValueError, gen.TimeoutError) as error:
        raise HandshakeError(_one_line(error)) from None
    finally:
        if stream is not None and websocket is None:
            stream.close()


async def _connected(where: SplitResult, ssl_options: ssl.SSLContext | None,
                     timeout_s: float) -> IOStream:
    secure = where.scheme == "wss"
    stream = await TCPClient().connect(where.hostname or "", where.port or (443 if secure else 80),
                                       timeout=timeout_s)
    if not secure:
        return stream
    if stream.closed():                  # it hung up already
        raise StreamClosedError(stream.error)
    # Tornado 6.2 forgets a socket whose TLS handshake is given up, open: hence a second handle.
    with stream.socket.dup() as handle:
        try:
            async with asyncio.timeout(timeout_s):
                return await stream.start_tls(False, ssl_options, where.hostname)
        except BaseException:
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)
            raise


def _one_line(error: Exception) -> str:
    if isinstance(error, StreamClosedError):
        return _one_line(error.real_error) if isinstance(
            error.real_error, Exception) else "it closed the connection"
    text = getattr(error, "strerror", None) or str(error) or "no answer in time"
    return text.splitlines()[0]


def read_answer(head: bytes, key: str,
                subprotocols: list[str]) -> tuple[str | None, Deflate | None]:
    """Read a server's answer to our upgrade (RFC 6455 4.1): (its subprotocol, its compression).

    Raises: HandshakeError.
    """
    status, *lines = head.decode("latin-1").split("\r\n")
    if not re.match(r"HTTP/1\.1 101\b", status):
        raise HandshakeError(f"it answered {kept(status.partition(' ')[2] or status, 80)}")
    headers = {name.strip().lower(): value.strip() for name, _, value in (
        line.partition(":") for line in lines)}
    if headers.get("upgrade", "").lower() != "websocket" or (
            headers.get("sec-websocket-accept") != accept_key(key)):
        raise HandshakeError("it does not speak WebSocket")
    chosen = headers.get("sec-websocket-protocol") or None
    if chosen and chosen not in subprotocols:
        raise HandshakeError(f"it wants to speak {kept(chosen, 40)}, not {', '.join(subprotocols)}")
    return chosen, agreed_deflate(headers.get("sec-websocket-extensions", ""))


# The connection


class WebSocket:
    """An open connection. `start` it, `write` and `close` it; any end calls `on_close` once.

    Tornado's stream opens and closes it. In between the socket is ours: to have a stream read it
    takes as long as all that is done with a message.
    """

    def __init__(self, stream: IOStream, codec: Codec, subprotocol: str | None):
        self.subprotocol = subprotocol
        self.last_sign = self.last_ping = time.monotonic()       # of theirs, of ours
        self.last_pong: float | None = None
        self.closed_by_us = False                        # also for what the other side did wrong
        self._stream, self._codec, self._loop = stream, codec, IOLoop.current()
        self._socket: Any = stream.socket                # None, if it is gone already
        self._unsent = bytearray()                       # what a clogged socket did not take
        self._sent: asyncio.Future | None = None         # done when it has
        self._waiting: asyncio.Task | None = None        # until a message can be dealt with
        self._on_message: Any = None                     # set by `start`
        self._on_close: Callable[[int, str], Any] | None = None
        self._end = (NO_CLOSE, "connection lost")        # for `on_close`
        self._ending = False                             # a Close has come or gone
        self._close_came = False
        self._timeout: asyncio.TimerHandle | None = None
        with contextlib.suppress(AttributeError, OSError):       # gone already
            stream.set_nodelay(True)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def start(self, on_message: Callable[[str | bytes], Awaitable | None],
              on_close: Callable[[int, str], Any]) -> None:
        """Begin to read. Nothing is read while what `on_message` returned is awaited.

        `on_close` gets code and reason of the first Close, theirs or ours; 1006 if there was none.
        """
        self._on_message, self._on_close = on_message, on_close
        stream = self._stream
        stream.max_buffer_size = QUEUE_BYTES
        stream.set_close_callback(self._ended)
        try:                             # what came with the handshake
            early: Any = stream.read_bytes(QUEUE_BYTES, partial=True)
        except (StreamClosedError, StreamBufferFullError):
            self.drop()
            return
        if not stream.closed():
            self._loop.remove_handler(self._socket)
            self._loop.add_handler(self._socket, self._on_event, IOLoop.READ)
            self._listen()
        if early.done() and not early.exception():
            self._take(self._codec.feed(early.result()))

    def write(self, text: str) -> Awaitable | None:
        """Send a text. If the socket is clogged: what can be awaited until it is not.

        That raises StreamClosedError when the connection ends, and may be ignored.
        """
        return None if self._ending else self.send(self._codec.frame(TEXT_FRAME, text.encode()))

    def ping_if_due(self, now: float, interval: float) -> None:
        """Send a Ping each `interval` seconds."""
        if now - self.last_ping >= interval:
            self.last_ping = now
            self.ping()

    def ping(self) -> None:
        """Send a Ping; `last_sign` and `last_pong` show the answer."""
        if not self._ending:
            self.send(self._codec.frame(PING_FRAME, b""))

    def close(self, code: int = 1000, reason: str = "",
              within_s: float = CLOSE_S) -> Awaitable | None:
        """Send a Close (RFC 6455 7.1.2). After `within_s` at most the connection is dropped."""
        if self._ending or self._stream.closed():
            return None
        text = reason.encode(errors="replace")[:CONTROL_BYTES - 2].decode(errors="ignore")
        self._ending, self.closed_by_us, self._end = True, True, (code, text)
        self._timeout = asyncio.get_running_loop().call_later(within_s, self.drop)
        data = b"" if code == NO_CODE else code.to_bytes(2, "big") + text.encode()
        return self.send(self._codec.frame(CLOSE_FRAME, data))

    def drop(self) -> None:
        """End the connection at once."""
        self._ending = True
        if not self._stream.closed():
            self._loop.remove_handler(self._socket)
        self._stream.close()                             # calls `_ended`, also if closed already

    def send(self, data: bytes) -> Awaitable | None:
        """Send bytes as they are, as `write` does."""
        if self._unsent:
            self._unsent += data
            self._send_rest()
        elif (sent := self._try_to_send(data)) < len(data):      # mostly it takes all
            self._unsent += data[sent:]
        if not self._unsent or self._stream.closed():
            return None
        if len(self._unsent) > QUEUE_BYTES:
            if not self._ending:
                self.closed_by_us, self._end = True, (1008, "does not read")
            self.drop()
        elif self._sent is None:
            self._sent = asyncio.get_running_loop().create_future()
            self._listen()
        return self._sent

    def _try_to_send(self, data: bytes | bytearray) -> int:
        """How much the socket took. Where it is broken, the connection ends."""
        try:
            return self._socket.send(data)
        except CLOGGED:
            pass
        except (AttributeError, OSError):
            self.drop()
        return 0

    def _send_rest(self) -> None:
        del self._unsent[:self._try_to_send(self._unsent)]
        if self._sent and not self._unsent:
            self._sent.set_result(None)
            self._sent = None
            self._listen()

    def _listen(self) -> None:
        """Have the loop tell what we wait for; nothing is read while a message is awaited."""
        if self._on_message and not self._stream.closed():
            self._loop.update_handler(self._socket, (0 if self._waiting else IOLoop.READ) | (
                IOLoop.WRITE if self._unsent else 0))

    def _on_event(self, _: Any, event: int) -> None:
        if event == IOLoop.WRITE:
            self._send_rest()
            return
        try:                             # a record of TLS is no larger: nothing stays in its layer
            data = self._socket.recv(READ_BYTES)
        except CLOGGED:
            return
        except OSError:
            data = b""
        if not data:
            self.drop()
            return
        self.last_sign = time.monotonic()
        self._take(self._codec.feed(data))

    def _take(self, messages: Iterator[tuple[int, Any]]) -> None:
        """Deal with what was read, up to a message that has to wait."""
        try:
            for opcode, content in messages:
                if opcode > BINARY_FRAME:
                    later = self._control(opcode, content)
                else:
                    later = None if self._ending else self._on_message(content)
                if later is not None:
                    self._waiting = asyncio.create_task(self._take_after(later, messages))
                    self._listen()
                    return
            if self._close_came:
                self.drop()
        except WebSocketError as error:
            self.close(error.code, str(error), LINGER_S)
        except Exception:
            self._failed()

    async def _take_after(self, later: Awaitable, messages: Iterator) -> None:
        try:
            await later
        except StreamClosedError:
            self.drop()
        except Exception:
            self._failed()
        else:
            self._waiting = None
            self._take(messages)
        self._listen()

    def _failed(self) -> None:
        self._waiting = None
        log.exception("A message could not be handled")
        self.close(1011, "internal error", LINGER_S)

    def _control(self, opcode: int, content: Any) -> Awaitable | None:
        """RFC 6455 5.5. Nothing is read while a Pong is unsent: who does not read cannot go on."""
        if opcode == PONG_FRAME:
            self.last_pong = self.last_sign
        elif opcode == PING_FRAME and not self._ending:
            return self.send(self._codec.frame(PONG_FRAME, content))
        elif opcode == CLOSE_FRAME:
            self._close_came = True
            if not self._ending:
                later, self.closed_by_us = self.close(*content), False
                return later
        return None

    def _ended(self) -> None:
        self._ending = True
        self._codec.forget()
        self._unsent.clear()
        if self._sent:
            self._sent.set_exception(StreamClosedError())
            self._sent.exception()                       # nobody has to await it
            self._sent = None
        if self._timeout:
            self._timeout.cancel()
        on_close, self._on_close = self._on_close, None
        if on_close:
            on_close(*self._end)


# --- Versions -----------------------------------------------------------------------------
# What 1.6, 2.0.1 and 2.1 call things, how they write times, and their official schemas. A
# comparison with a version stands here or nowhere: elsewhere it is a table look-up.

_COMMANDS_16 = frozenset("""
    CancelReservation CertificateSigned ChangeAvailability ChangeConfiguration ClearCache
    ClearChargingProfile DataTransfer DeleteCertificate ExtendedTriggerMessage
    GetCompositeSchedule GetConfiguration GetDiagnostics GetInstalledCertificateIds
    GetLocalListVersion GetLog InstallCertificate RemoteStartTransaction RemoteStopTransaction
    ReserveNow Reset SendLocalList SetChargingProfile SignedUpdateFirmware TriggerMessage
    UnlockConnector UpdateFirmware""".split())
_COMMANDS_201 = frozenset("""
    CancelReservation CertificateSigned ChangeAvailability ClearCache ClearChargingProfile
    ClearDisplayMessage ClearVariableMonitoring CostUpdated CustomerInformation DataTransfer
    DeleteCertificate GetBaseReport GetChargingProfiles GetCompositeSchedule GetDisplayMessages
    GetInstalledCertificateIds GetLocalListVersion GetLog GetMonitoringReport GetReport
    GetTransactionStatus GetVariables InstallCertificate PublishFirmware RequestStartTransaction
    RequestStopTransaction ReserveNow Reset SendLocalList SetChargingProfile SetDisplayMessage
    SetMonitoringBase SetMonitoringLevel SetNetworkProfile SetVariableMonitoring SetVariables
    TriggerMessage UnlockConnector UnpublishFirmware UpdateFirmware""".split())
_COMMANDS_21 = _COMMANDS_201 | frozenset("""
    AFRRSignal AdjustPeriodicEventStream ChangeTransactionTariff ClearDERControl ClearTariffs
    GetDERControl GetPeriodicEventStream GetTariffs NotifyAllowedEnergyTransfer
    NotifyWebPaymentStarted RequestBatterySwap SetDERControl SetDefaultTariff UpdateDynamicSchedule
    UsePriorityCharging""".split())

# The Actions that a central system may send to a station.
COMMANDS = {"ocpp1.6": _COMMANDS_16, "ocpp2.0.1": _COMMANDS_201, "ocpp2.1": _COMMANDS_21}

# Error codes that are spelt otherwise than in 2.x. "Occurence" is the standard's own spelling.
ERROR_CODES = {
    "ocpp1.6": {"FormatViolation": "FormationViolation",
                "OccurrenceConstraintViolation": "OccurenceConstraintViolation"},
    "ocpp2.0.1": {},
    "ocpp2.1": {},
}
ERROR_CODES_16 = frozenset("""FormatViolation GenericError InternalError NotImplemented NotSupported
    OccurrenceConstraintViolation PropertyConstraintViolation ProtocolError SecurityError
    TypeConstraintViolation""".split())              # in the spelling of 2.x
ERROR_CODES_2X = ERROR_CODES_16 | {"MessageTypeNotSupported", "RpcFrameworkError"}
KNOWN_CODES = {"ocpp1.6": ERROR_CODES_16, "ocpp2.0.1": ERROR_CODES_2X, "ocpp2.1": ERROR_CODES_2X}
BOOT_ANSWER = {                      # some clients read by place: the order is the schema's
    "ocpp1.6": ("status", "currentTime", "interval"),
    "ocpp2.0.1": (_BOOT_2X := ("currentTime", "interval", "status")), "ocpp2.1": _BOOT_2X}
UNKNOWN_ID_TOKEN = {"ocpp1.6": "Invalid", "ocpp2.0.1": "Unknown", "ocpp2.1": "Unknown"}
ASSUMED_PROTOCOL = "ocpp1.6"         # of a station that offers none (field experience: all are 1.6)

# Statuses of a connector and charging states of a transaction.
STATUSES = {"ocpp1.6": frozenset("""Available Preparing Charging SuspendedEVSE SuspendedEV Finishing
                Reserved Unavailable Faulted""".split()),
            "ocpp2.0.1": (_STATUSES_2X := frozenset(
                "Available Occupied Reserved Unavailable Faulted".split())),
            "ocpp2.1": _STATUSES_2X}
CHARGING_STATES = frozenset("Charging EVConnected SuspendedEV SuspendedEVSE Idle".split())
ANSWER_STATUSES = frozenset("""Accepted Rejected Failed NotSupported NotImplemented Scheduled
    RebootRequired Unknown Unlocked UnlockFailed Occupied Faulted Unavailable VersionMismatch
    UnknownMessageId UnknownVendorId NoTransaction NotFound Pending""".split())
EVENT_TRIGGERS = frozenset("Alerting Delta Periodic".split())
EVENT_TYPES = frozenset("Started Updated Ended".split())
CHARGING = frozenset("Charging SuspendedEV SuspendedEVSE".split())       # a transaction runs
SUSPENDED = frozenset(("SuspendedEV", "SuspendedEVSE"))
NO_FLOW = frozenset("""Available Preparing SuspendedEV SuspendedEVSE Finishing Reserved Unavailable
    EVConnected Idle""".split())
# With these no transaction can be open (1.6 4.9, state A; in 2.x TxStartPoint may be Authorized),
# and with these what ran before a boot runs no more.
NO_TRANSACTION = {"ocpp1.6": frozenset({"Available"}), "ocpp2.0.1": frozenset(),
                  "ocpp2.1": frozenset()}
ENDED_BY_BOOT = {"ocpp1.6": frozenset({"Preparing", "Finishing"}),
                 "ocpp2.0.1": frozenset({"Available"}), "ocpp2.1": frozenset({"Available"})}
EXPORT_IS_ODD = {"ocpp1.6": True, "ocpp2.0.1": True, "ocpp2.1": False}   # 2.1 has V2X
REPORTING = {                            # where a 2.x station alerts of nothing that is wrong
    ("Connector", "AvailabilityState"), ("EVSE", "AvailabilityState"),
    ("ChargingStation", "AvailabilityState")}

# Whether a StatusNotification is triggered of one connector at a time (2.0.1 F06.FR.12).
TRIGGERED_EACH = {"ocpp1.6": False, "ocpp2.0.1": True, "ocpp2.1": True}

# Fields that only one version's body has: a station that sends them elsewhere mixes versions.
TELLTALES = {
    "ocpp1.6": {"BootNotification": "chargingStation", "StatusNotification": "connectorStatus",
                "MeterValues": "evseId"},
    "ocpp2.0.1": {"BootNotification": "chargePointVendor", "StatusNotification": "errorCode",
                  "MeterValues": "connectorId"},
    "ocpp2.1": {"BootNotification": "chargePointVendor", "StatusNotification": "errorCode",
                "MeterValues": "connectorId"},
}

# Before the board's user approves a station it may tell what it likes but gets nothing
# (2.0.1 B02.FR.09: SecurityError). A transaction is a fact and kept; its id token is refused.
NEEDS_APPROVAL = frozenset("""
    Authorize BatterySwap DataTransfer Get15118EVCertificate GetCertificateChainStatus
    GetCertificateStatus NotifyEVChargingNeeds PullDynamicScheduleUpdate SignCertificate
    VatNumberValidation""".split())

# Actions whose payload may hold a secret, and the fields and variables that do: by their names,
# of any vendor. A KeyCode is one wherever an IdToken stands (2.0.1 C04.FR.04).
SECRET_ACTIONS = frozenset("""
    ChangeConfiguration DataTransfer GetConfiguration GetReport GetVariables NotifyReport
    SetNetworkProfile SetVariables GetLog GetDiagnostics UpdateFirmware SignedUpdateFirmware
    NotifyCustomerInformation NotifyEvent PublishFirmware""".split())
TOKEN_ACTIONS = frozenset("""
    Authorize BatterySwap CustomerInformation RequestBatterySwap RequestStartTransaction ReserveNow
    SendLocalList TransactionEvent""".split())
# As in "SIMPIN", "WifiPin", "admin_pin2"; but "Spin" is none.
_PIN = r"(?-i:(?<![A-Za-z])[Pp]in|(?<=[a-z0-9])Pin|PIN)|(?:sim|wifi|user|admin|access|service)pin"
_SECRET_NAME = (r"password|passwd|passphrase|pwd|authorizationkey|auth.?key|basic.?auth|secret|"
                r"(?<!id)token|private.?key|key.?private|authentication\b|credential|psk\b|puk\b|"
                r"(?-i:(?:[a-z]P|(?<![A-Za-z])[Pp])ass|(?<![A-Za-z])PASS|(?<![A-Za-z])(?:pw|PW)|"
                r"[a-z]P[wW])\b|(?:shared|wifi|wpa|api|encryption|ssh|hmac|aes).?key|"
                rf"(?:{_PIN})(?:.?code)?\d*\b")
_SECRET_WORD = re.compile(_SECRET_NAME, re.I)
_PAIR = re.compile(r"""\b([\w.-]{3,64})(["']?\s*[=:]\s*["']?)[^\s"',;&{}]+""")    # name=value
_KEY_CODE = re.compile(r"keycode|\\u00", re.I)         # or letters that are written as numbers
_SECRET_IN_URL = re.compile(r"//[^/\s]*@")
SECRET_LEAST = 3                     # characters, before a secret is looked for in other texts
HIDDEN = "***"

# Security events of a station, by how much they should worry who reads them, which is our
# judgement; others are "medium". Names: 1.6 security extension and 2.0.1 part 2, appendices.
EVENT_SEVERITY = {
    "TamperDetectionActivated": "critical", "SecurityLogWasCleared": "critical",
    "InvalidFirmwareSignature": "high", "InvalidFirmwareSigningCertificate": "high",
    "InvalidCsmsCertificate": "high", "InvalidCentralSystemCertificate": "high",
    "InvalidChargePointCertificate": "high", "InvalidChargingStationCertificate": "high",
    "FailedToAuthenticateAtCsms": "high", "FailedToAuthenticateAtCentralSystem": "high",
    "CsmsFailedToAuthenticate": "high", "CentralSystemFailedToAuthenticate": "high",
    "InvalidTLSVersion": "high", "InvalidTLSCipherSuite": "high",
    "AttemptedReplayAttacks": "high", "MemoryExhaustion": "high",
    "FirmwareUpdated": "low", "SettingSystemTime": "low", "StartupOfTheDevice": "low",
    "ResetOrReboot": "low", "ReconfigurationOfSecurityParameters": "low",
}


def error_code(protocol: str, code: str) -> str:
    """An error code in the spelling of a version."""
    return ERROR_CODES[protocol].get(code, code)


def error_code_across(source: str, target: str, code: str) -> str:
    """An error code of one version in another; GenericError where that has none like it."""
    meant = {theirs: ours for ours, theirs in ERROR_CODES[source].items()}.get(code, code)
    return error_code(target, meant if meant in KNOWN_CODES[target] else "GenericError")


def without_secrets(action: str, payload: dict, text: str) -> str:
    """The payload as JSON for the record: `text` itself, or with what is secret in it hidden."""
    if action and action not in SECRET_ACTIONS and (
            action not in TOKEN_ACTIONS or not _KEY_CODE.search(text)):
        return text
    hidden = _hide(payload)              # also where nobody knows what it answers
    return text if hidden == payload else to_json(hidden)


def hidden_texts(action: str, payload: dict) -> list[str]:
    """The secrets of a command, the longest first: some stations say them again in their answer."""
    found: list[str] = []

    def look(value: Any, shown_value: Any) -> None:
        if isinstance(value, dict) and isinstance(shown_value, dict):
            for key, inner in value.items():
                look(inner, shown_value[key])
        elif isinstance(value, list) and isinstance(shown_value, list):
            for inner, shown_inner in zip(value, shown_value, strict=True):
                look(inner, shown_inner)
        elif shown_value == HIDDEN and isinstance(value, str) and len(value) >= SECRET_LEAST:
            found.append(value)

    if action in SECRET_ACTIONS or action in TOKEN_ACTIONS:
        look(payload, _hide(payload))
    return sorted(found, key=len, reverse=True)


def without_texts(text: str, hidden: Iterable[str]) -> str:
    """A text in which others are hidden."""
    for secret in hidden:
        text = text.replace(secret, HIDDEN)
    return text


def _hide(value: Any) -> Any:
    if isinstance(value, list):
        return [_hide(item) for item in value]
    if isinstance(value, str):
        return hide_in_text(value)
    if not isinstance(value, dict):
        return value
    # {"key": "AuthorizationKey", "value": …} and {"variable": {"name": "BasicAuthPassword"},
    # "attributeValue": …}: one field names what another holds.
    named = any(isinstance(name, str) and _SECRET_WORD.search(name) for name in _names_of(value))
    fields: tuple[str, ...] = (
        "value", "attributeValue", "variableAttribute", "actualValue", "data") if named else ()
    fields += ("key",) if "server" in value else ()          # a VPN's shared secret
    fields += ("idToken", "additionalIdToken") if is_key_code(value) else ()
    return {key: HIDDEN if (key in fields or _SECRET_WORD.search(key)) and item not in (None, "")
            else _hide(item) for key, item in value.items()}


def _names_of(value: dict) -> list:
    """What says what a field of the object is of."""
    named = [inner for field_ in ("variable", "component")
             if isinstance(inner := value.get(field_), dict)]
    return [value.get("key"), value.get("messageId"),
            *(inner.get(word) for inner in named for word in ("name", "instance"))]


def hide_in_text(text: str) -> str:
    """A text without what is secret in it: vendors write objects into it, or URLs."""
    if text[:1] in "{[" and len(text) > 1:
        with contextlib.suppress(ValueError, RecursionError):
            inner = _read(text)[0]
            if not deeper(inner, NESTING):
                hidden = _hide(inner)
                return text if hidden == inner else to_json(hidden)
    text = _SECRET_IN_URL.sub(f"//{HIDDEN}@", text)
    return _PAIR.sub(lambda pair: f"{pair[1]}{pair[2]}{HIDDEN}" if _SECRET_WORD.search(pair[1])
                     else pair[0], text)


def is_key_code(id_token: dict) -> bool:
    """Whether an IdToken is a code that was typed in (2.0.1 C04)."""
    kind = id_token.get("type")
    return type(kind) is str and kind.strip().lower() == "keycode"


def raw_without_secrets(raw: str) -> str:
    """A frame that could not be read, for the record: cut, and where it speaks of a secret, with
    its values hidden."""
    raw = _SECRET_IN_URL.sub(f"//{HIDDEN}@", raw[:RAW_SEARCHED])
    if _SECRET_WORD.search(raw) or _KEY_CODE.search(raw):
        raw = re.sub(r"""([:=]\s*)("(?:[^"\\]|\\.)*"?|'[^']*'?|[^\s,"'{}\[\]]+)""",
                     rf'\g<1>"{HIDDEN}"', raw)
    return kept(raw, RAW_KEPT)


def parse_time(text: Any) -> tuple[float, bool]:
    """A station's time as (UTC seconds, whether it had a zone). Without one, UTC is meant.

    Raises: WrongValue when it is no time at all.
    """
    try:
        when = datetime.fromisoformat(text.upper())
        zoned = when.tzinfo is not None
        seconds = (when if zoned else when.replace(tzinfo=UTC)).timestamp()
    except (AttributeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < 1 << 33:       # beyond it no calendar of ours can write it again
        raise WrongValue(f"{shown(text)} is not an ISO 8601 time")
    return seconds, zoned


def wire_time(when: float) -> str:
    """A time as we send it: whole seconds and Z, which every charger can read."""
    return _iso_second(int(when)) + "Z"


def required(payload: dict, key: str, kind: type) -> Any:
    """A field that must be there. A number or a text that stands in the other's form is taken.

    Raises: MissingField, WrongType.
    """
    if payload.get(key) is None:
        raise MissingField(f"{key} is required")
    return _typed(payload[key], key, kind)


def optional(payload: dict, key: str, kind: Any, default: Any = None) -> Any:
    """A field that may be missing.

    Raises: WrongType.
    """
    value: Any = payload.get(key)
    return default if value is None else _typed(value, key, kind)


def lenient(payload: dict, key: str, kind: Any, default: Any = None) -> Any:
    """A field that is worth less than what stands beside it: of a wrong type, it is missing."""
    try:
        return optional(payload, key, kind, default)
    except WrongType:
        return default


DECIMAL_COMMA = re.compile(r"\s*[+-]?\d{1,18},\d{0,9}\s*")       # "1234,5", meant as 1234.5


LARGEST = 1 << 63                    # beyond it arithmetic fails


def _typed(value: Any, key: str, kind: type) -> Any:
    if type(value) is kind and kind is not int:
        return value
    if kind in (int, float) and type(value) in (int, float, str):
        if type(value) is str and DECIMAL_COMMA.fullmatch(value):
            value = value.replace(",", ".")
        try:
            number = kind(value)
            whole = kind is not int or type(value) is not float or number == value
            if whole and abs(number) < LARGEST:
                return number
        except (ValueError, OverflowError):
            pass
    if kind is str and type(value) in (int, float):
        return str(value)
    told = "" if isinstance(value, (dict, list)) else f" {shown(value, 40)}"
    raise WrongType(f"{key} must not be {type(value).__name__}{told}")


class Violation(NamedTuple):
    """Where and how a payload leaves its schema: a JSON pointer, a sentence, the error to raise."""

    pointer: str
    text: str
    error: type[FormatViolation]


class Schemas:
    """The official JSON schemas, where the packages `ocpp` and `fastjsonschema` are installed.

    A schema is compiled when it is first needed, outside the loop's thread: it takes up to 0.1 s.
    """

    RULES: ClassVar = {"required": MissingField, "type": WrongType,
                       "additionalProperties": FormatViolation}         # others: WrongValue
    FOLDERS: ClassVar = {"ocpp1.6": ("v16", ""), "ocpp2.0.1": ("v201", "Request"),
                         "ocpp2.1": ("v21", "Request")}

    def __init__(self, folder: Path, compiler: Any):
        self._folder, self._compiler = folder, compiler
        self._compiled: dict = {}            # {(protocol, action, part): function}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "schemas")

    @classmethod
    def installed(cls) -> "Schemas | None":
        """The schemas, or None if the packages are not there."""
        ocpp, compiler = map(importlib.util.find_spec, ("ocpp", "fastjsonschema"))
        if not ocpp or not ocpp.submodule_search_locations or not compiler:
            return None
        return cls(Path(ocpp.submodule_search_locations[0]),
                   importlib.import_module("fastjsonschema"))

    def ready(self, protocol: str, action: str) -> bool:
        """Whether the schemas of this Action are compiled."""
        return (protocol, action, "Response") in self._compiled

    async def prepare(self, protocol: str, action: str) -> None:
        """Compile the schemas of an Action, unless they are ready."""
        if self.ready(protocol, action):
            return
        await asyncio.get_running_loop().run_in_executor(
            self._pool, self._compile, protocol, action)

    def check(self, protocol: str, action: str, part: str, payload: dict) -> Violation | None:
        """The first thing in the payload that its schema does not allow.

        `part` is "Request" or "Response". An Action without schema has nothing to violate.
        """
        try:
            self._compiled.get((protocol, action, part), dict)(payload)
        except self._compiler.JsonSchemaValueException as error:
            pointer = "".join(f"/{part}" for part in error.path[1:])
            return Violation(kept(pointer), kept(error.message),
                             self.RULES.get(error.rule, WrongValue))
        except ArithmeticError:          # a number of 400 digits, divided
            return Violation("", "a number is out of range", WrongValue)
        return None

    def _compile(self, protocol: str, action: str) -> None:
        if self.ready(protocol, action):             # by the one before us in the queue
            return
        folder, request = self.FOLDERS[protocol]
        compiled = {}
        for part, names in (("Request", (action + request, action)),     # a Send is no Request
                            ("Response", (action + "Response",))):       # and has no Response
            files = [self._folder / folder / "schemas" / f"{name}.json" for name in names]
            compiled[protocol, action, part] = next(
                (self._compiler.compile(json.loads(file.read_text("utf-8-sig")))
                 for file in files if file.exists()), dict)
        self._compiled.update(compiled)


# --- Translation --------------------------------------------------------------------------
# A Call of one version in, what the other side is to be asked in its version out; no I/O. The
# pivot is 2.0.1: `lift_…` turns 1.6 into it, `lower_…` it into 1.6, `newer` and `older` are the
# steps to 2.1 and back. A converter is a generator: it yields (Action, payload) for the other
# side, is sent the answer's payload, and returns the answer in the words of who asked.
#
#   1 ids of both sides    5 charging profiles           9 transactions up    13 certificates
#   2 fields               6 what a station is          10 transactions down  14 who speaks what
#   3 id tokens            7 statuses                   11 configuration      15 2.0.1 and 2.1
#   4 places               8 meter values               12 commands           16 one version
#
# `t` is the Translator; `station_id` and `upstream_id` are both sides' names of a transaction. None
# as an answer: the other side has nothing to say to it, and the board's own answer is good.

# 1. Ids of both sides

Steps = Generator[tuple, dict, dict | None]
MAPPINGS_KEPT = 200                 # transactions of a station whose ids we remember


@dataclass(slots=True)
class TransactionMapping:
    """A transaction under the names that it has on both sides."""

    station_id: int | str                     # the station's transaction id
    upstream_id: int | str | None             # upstream's; None until a 1.6 one has given it
    evse_id: int = 0
    id_token: str | None = None         # as upstream was told it
    seq_no: int = 0                     # 2.x upstream: of the next event
    state: str = ""                     # the chargingState told last
    charged: bool = False               # energy has flowed
    ended: bool = False
    end_reported: bool = False              # and upstream has heard of it
    left: bool = False                  # and the vehicle has left
    started: str = ""                   # 2.x station: when it began
    register: int | None = None         # Wh, as last heard
    base: int = 0                       # what it was where a 1.6 upstream had to be told 0
    start_key: tuple = ()               # 1.6 station: what makes a repeated start the same one
    answer: dict = field(default_factory=dict)       # 2.x station: upstream's to the start
    end_key: tuple = ()                 # 1.6 station: of the stop that was told
    ended_by_us: bool = False           # the station has not said so (yet)
    seq_reserved: int = 0               # up to this seqNo the state knows that it may be used
    stored: tuple = ()                  # what the state has of it


class Translator:
    """Stands between a station and an upstream of another version, and knows what is whose id.

    With one version on both sides it only knows transaction ids that the board gave out while
    upstream was away, and `passes` whatever does not speak of them.
    """

    def __init__(self, station: str, upstream: str, new_id: Callable[[], int],
                 clock: Callable[[], float] = time.time):
        self.station, self.upstream, self.new_id, self.clock = station, upstream, new_id, clock
        self.mappings: OrderedDict = OrderedDict()      # {the station's id: TransactionMapping}
        self.statuses: dict = {}             # {(evse, connector): the station's word}
        self.faults: dict = {}               # {evse: 1.6's errorCode}
        self.shown: dict = {}                # {evse: the word that a 1.6 upstream has heard last}
        self.remote_starts: list = []        # [(evse or 0, id token, remoteStartId)]
        self.token_types: OrderedDict = OrderedDict()    # {id token: its type, as upstream says}
        self.long_tokens: OrderedDict = OrderedDict()    # {idTag: the token that it stands for}
        self.boot_reason = "Unknown"         # of the next BootNotification; 1.6 says none
        self.firmware_request: int | None = None
        self.log_request: int | None = None
        self.signed_firmware = self.diagnostics = False  # which of 1.6's two ways upstream took
        self._told: list = []
        self._request_id = int(clock()) & 0x7FFFFFF

    def up(self, action: str, payload: dict, transaction_id: int | None = None) -> Steps:
        """A Call of the station, for upstream; a StartTransaction with the id that it is given.

        Raises (as it runs): NotSupported, MissingField.
        """
        options = {} if transaction_id is None else {"transaction_id": transaction_id}
        return _through(self, STAGES[self.station, self.upstream][0], action, payload, **options)

    def down(self, action: str, payload: dict) -> Steps:
        """A Call of upstream, for the station. Raises (as it runs): NotSupported, MissingField."""
        return _through(self, STAGES[self.station, self.upstream][1], action, payload)

    def told(self) -> list[Steps]:
        """What upstream is to be told beyond the answers, such as reports; each but once."""
        told, self._told = self._told, []
        return [_through(self, TELLING[self.upstream], *call) for call in told]

    def tell(self, action: str, payload: dict) -> None:
        """Have upstream told something, in 2.0.1."""
        self._told.append((action, payload))

    def passes(self, action: str, up: bool) -> bool:
        """Whether a frame of this Action goes on as it is, byte for byte."""
        if self.station != self.upstream:
            return False
        if not self.mappings:
            return True
        return action not in (RENAMED_UP if up else RENAMED_DOWN).get(self.station, ())

    def next_request(self) -> int:
        """A request id for what 1.6 asks without one."""
        self._request_id = self._request_id % 0x7FFFFFFF + 1
        return self._request_id

    def mapping(self, station_id: int | str, **facts: Any) -> TransactionMapping:
        """The transaction that the station calls so, made if it is not known."""
        found = self.mappings.get(station_id)
        if found is None:
            found = self.mappings[station_id] = TransactionMapping(station_id, **facts)
            if len(self.mappings) > MAPPINGS_KEPT:
                oldest = next((key for key, c in self.mappings.items() if c.ended),
                              next(iter(self.mappings)))
                del self.mappings[oldest]
        return found

    def by_upstream_id(self, upstream_id: int | str | None) -> TransactionMapping | None:
        """The transaction that upstream calls so."""
        if upstream_id is None:                # no name, though upstream may not have given one yet
            return None
        return next((c for c in reversed(self.mappings.values())
                     if c.upstream_id == upstream_id), None)

    def begun(self, payload: dict) -> int | None:
        """The id of the transaction that runs by just this StartTransaction already."""
        return next((c.station_id for c in reversed(self.mappings.values())
                     if self.began_by(c, payload) and not c.ended), None)

    @staticmethod
    def began_by(mapping: TransactionMapping, payload: dict) -> bool:
        """Whether a transaction began by just this StartTransaction."""
        return mapping.start_key == _start_key(payload)

    @property
    def ends_for_station(self) -> bool:
        """Whether the end of a transaction can be told in the station's name: 1.6 has no seqNo."""
        return self.station != self.upstream and "ocpp1.6" in (self.station, self.upstream)

    def open_mappings(self) -> list[TransactionMapping]:
        """The transactions that run, as far as upstream knows."""
        return [mapping for mapping in self.mappings.values()
                if mapping.upstream_id is not None and not (mapping.ended or mapping.ended_by_us)]

    def open_at(self, evse_id: int) -> TransactionMapping | None:
        """The transaction that runs at an EVSE."""
        return next((c for c in reversed(self.mappings.values())
                     if c.evse_id == evse_id and not c.ended), None)


async def carry(steps: Steps, ask: Callable[[str, dict], Awaitable[dict]],
                asked: tuple | None = None) -> dict | None:
    """Go through a translation: `ask` sends each Call of it, and returns the answer's payload.

    A BoardError that `ask` raises is told to the translation; after another error it can go on
    with what was `asked` last. Returns what it comes to.
    """
    try:
        asked = asked or next(steps)
        while True:
            try:
                answered = await ask(*asked)
            except BoardError as error:
                asked = steps.throw(error)
            else:
                asked = steps.send(answered)
    except StopIteration as end:
        return end.value


def _through(t: Translator, stages: list, action: str, payload: dict, **options: Any) -> Steps:
    """A Call through converters, one after another, as one; `options` are for the first."""
    if not stages:
        return (yield action, payload)
    steps = stages[0](t, action, payload, **options)
    try:
        asked = next(steps)
        while True:
            try:
                answer = yield from _through(t, stages[1:], *asked)
            except BoardError as error:
                asked = steps.throw(error)
            else:
                asked = steps.send(answer)
    except StopIteration as end:
        return end.value


# 2. Fields. A row says how one field crosses: its names in 1.6 and 2.x, and its value both ways.


class Row(NamedTuple):
    """A field that both versions have."""

    old: str                            # 1.6's name
    new: str                            # 2.x's name
    lift: Callable[[Translator, Any], Any]      # 1.6's value as 2.x's; None: it cannot be said
    lower: Callable[[Translator, Any], Any]
    old_default: Any = None             # what 1.6 needs where 2.x says nothing
    new_default: Any = None


def lifted(t: Translator, payload: dict, rows: Iterable[Row]) -> dict:
    """What 1.6 says, as 2.0.1 says it. Raises: MissingField."""
    return _crossed(t, payload, [(r.old, r.new, r.lift, r.new_default) for r in rows])


def lowered(t: Translator, payload: dict, rows: Iterable[Row]) -> dict:
    """What 2.0.1 says, as 1.6 says it. Raises: MissingField."""
    return _crossed(t, payload, [(r.new, r.old, r.lower, r.old_default) for r in rows])


NEEDED = object()                       # as a default: without the field there is no message


def _crossed(t: Translator, payload: dict, ways: list) -> dict:
    crossed = {}
    for source, target, convert, default in ways:
        if not target:                   # it is in one version's words only
            continue
        value = payload.get(source)
        if value is not None:
            value = convert(t, value)
        if value is None:
            if default is NEEDED:
                raise MissingField(f"{source} is required")
            value = default
        if value is not None:
            crossed[target] = value
    return crossed


def _text(length: int) -> Callable:
    return lambda t, value: (str(value)[:length] if isinstance(value, (str, int, float)) else None)


def _whole(t: Translator, value: Any) -> int | None:
    try:
        return _typed(value, "", int)
    except WrongType:
        return None


def _count(t: Translator, value: Any) -> int:
    """A number of 1.6 that is -1 where there is nothing to count (5.10), as 2.x has it."""
    return max(0, _whole(t, value) or 0)


def _time(t: Translator, value: Any) -> str | None:
    """A time as it was written, unless that was not what the standard wants."""
    try:
        when, zoned = parse_time(value)
    except WrongValue:
        return None
    return value if zoned and "T" in value else wire_time(when)


def _word(words: dict, other: str | None = None) -> Callable:
    """An enumeration's value; one that is not among the words is `other`."""
    return lambda t, value: words.get(value, other) if isinstance(value, str) else other


def row(old: str, new: str, lift: Callable, lower: Callable, needed: bool = False,
        **defaults: Any) -> Row:
    """A field; one that is `needed` makes a message without it impossible."""
    if needed:
        defaults = {"old_default": NEEDED, "new_default": NEEDED}
    return Row(old, new, lift, lower, **defaults)


def text_row(old: str, new: str, old_length: int, new_length: int, **more: Any) -> Row:
    """A text, cut to what the other side takes."""
    return row(old, new, _text(new_length), _text(old_length), **more)


def exact_row(old: str, new: str, old_length: int, new_length: int, **more: Any) -> Row:
    """A text of which no part is one, such as a URL or a certificate. Raises: NotSupported."""
    def fitting(key: str, length: int) -> Callable:
        def convert(t: Translator, value: Any) -> str | None:
            text = _text(1 << 30)(t, value)
            if text is not None and len(text) > length:
                raise NotSupported(f"{key} is longer than the {length} of the other version")
            return text
        return convert
    return row(old, new, fitting(old, new_length), fitting(new, old_length), **more)


def whole_row(old: str, new: str, **more: Any) -> Row:
    """A whole number."""
    return row(old, new, _whole, _whole, **more)


def time_row(old: str, new: str, **more: Any) -> Row:
    """A time, as it was written."""
    return row(old, new, _time, _time, **more)


def word_row(old: str, new: str, pairs: dict, back: dict | None = None, *,
             old_other: str | None = None, new_other: str | None = None, **more: Any) -> Row:
    """An enumeration: {1.6's word: 2.x's}, `back` {what else 2.x says: 1.6's word for it}.

    A word that is in neither becomes the other side's `…_other`; without one, it is left out.
    """
    lower = {value: key for key, value in reversed(pairs.items())} | (back or {})
    return row(old, new, _word(pairs, new_other), _word(lower, old_other), **more)


def _same(*names: str) -> dict:
    return {name: name for name in names}


def _dicts(items: Any) -> list[dict]:
    """The objects in a list; what is no list has none."""
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _some(payload: dict, key: str) -> list[dict]:
    """The objects in a list without which there is no message. Raises: MissingField, WrongType."""
    found = _dicts(required(payload, key, list))
    if not found:
        raise MissingField(f"{key} is empty")
    return found


def _when(t: Translator, message: dict) -> str:
    """The `timestamp` of a message; our time where it has none that can be read."""
    return _time(t, message.get("timestamp")) or wire_time(t.clock())


def status_rows(*both: str, lift: dict | None = None, lower: dict | None = None,
                worst: str) -> tuple:
    """The `status` of an answer: words of both, of one side only, and what stands for others."""
    pairs = _same(*both) | (lift or {})
    return (word_row("status", "status", pairs, lower, old_other=worst, new_other=worst,
                     old_default=worst, new_default=worst),)


YES_NO = status_rows("Accepted", "Rejected", worst="Rejected")

# 3. Id tokens

TOKENS_KEPT = 1000                  # of a station, whose type, or full text, we remember
TOKEN_TYPES = frozenset("Central eMAID ISO14443 ISO15693 KeyCode Local MacAddress "
                        "NoAuthorization".split())
TOKEN_LENGTH = {"ocpp1.6": 20, "ocpp2.0.1": 36, "ocpp2.1": 255}
_UID = re.compile(r"(?:[0-9A-Fa-f]{8}|[0-9A-Fa-f]{14}|[0-9A-Fa-f]{20})\Z")


def shortened(token: str, length: int) -> str:
    """A token that fits: itself, or a text that no other token has.

    Just cut, two tokens could be the same one, and the wrong customer would pay.
    """
    if len(token) <= length:
        return token
    return f"{token[:length - 11]}~{hashlib.sha256(token.encode()).hexdigest()[:10]}"


def _lift_token(t: Translator, tag: Any) -> dict | None:
    if not isinstance(tag, (str, int)):
        return None
    token = t.long_tokens.get(tag) or str(tag)
    kind = t.token_types.get(token)
    if kind is None:
        kind = ("NoAuthorization" if not token else "ISO14443" if _UID.match(token) else "Central")
    return {"idToken": shortened(token, 36), "type": kind}


def _lower_token(t: Translator, token: Any) -> str | None:
    text = token.get("idToken") if isinstance(token, dict) else None
    if not isinstance(text, str):
        return None
    tag = shortened(text, 20)
    if tag != text:
        _remember(t.long_tokens, tag, text)
    kind = lenient(token, "type", str)
    if kind in TOKEN_TYPES:
        _remember(t.token_types, text, kind)
    return tag


def _remember(memory: OrderedDict, key: Any, value: Any) -> None:
    if len(key) + len(value) > 2 * TOKEN_LENGTH["ocpp2.1"]:
        return                           # no id token is that long
    memory[key] = value
    if len(memory) > TOKENS_KEPT:
        memory.popitem(last=False)


def token_row(old: str, new: str, **more: Any) -> Row:
    """An id token: a text in 1.6, an object with its type in 2.x."""
    return row(old, new, _lift_token, _lower_token, **more)


TOKEN_INFO = (
    word_row("status", "status", _same("Accepted", "Blocked", "Expired", "Invalid", "ConcurrentTx"),
             {"Unknown": "Invalid", "NoCredit": "Blocked", "NotAllowedTypeEVSE": "Blocked",
              "NotAtThisLocation": "Blocked", "NotAtThisTime": "Blocked"},
             old_other="Invalid", new_other="Invalid", old_default="Invalid",
             new_default="Invalid"),
    time_row("expiryDate", "cacheExpiryDateTime"),
    token_row("parentIdTag", "groupIdToken"),
)


def _nested(rows: tuple) -> tuple[Callable, Callable]:
    return (lambda t, value: lifted(t, value, rows) if isinstance(value, dict) else None,
            lambda t, value: lowered(t, value, rows) if isinstance(value, dict) else None)


def _list_of(rows: tuple) -> tuple[Callable, Callable]:
    return (lambda t, value: [lifted(t, item, rows) for item in _dicts(value)] or None,
            lambda t, value: [lowered(t, item, rows) for item in _dicts(value)] or None)


ACCEPTED = {"status": "Accepted"}
ID_TOKEN_INFO = Row("idTagInfo", "idTokenInfo", *_nested(TOKEN_INFO), old_default=ACCEPTED,
                    new_default=ACCEPTED)
LOCAL_LIST = (token_row("idTag", "idToken", needed=True),
              Row("idTagInfo", "idTokenInfo", *_nested(TOKEN_INFO)))

# 4. Places: connector n of 1.6 is EVSE n of 2.x, of which it is connector 1 (see `evse_of_16`).
# An EVSE serves one vehicle at a time, so all its connectors are one of 1.6.


def _lift_place(t: Translator, connector: Any) -> dict | None:
    number = _whole(t, connector)
    return {"id": number} if number else None


def _lower_place(t: Translator, evse: Any) -> int | None:
    return _whole(t, evse.get("id")) if isinstance(evse, dict) else None


PLACE = Row("connectorId", "evse", _lift_place, _lower_place, old_default=0)
EVSE = whole_row("connectorId", "evseId", old_default=0, new_default=0)
SOME_EVSE = Row("connectorId", "evseId", lambda t, value: _whole(t, value) or None, _whole)

# 5. Charging profiles


def _lower_limit(t: Translator, value: Any) -> float | None:
    """A limit in tenths, as 1.6 has it, and never above what was said."""
    try:
        tenths = math.floor(_typed(value, "", float) * 10 + 1e-6)
    except WrongType:
        return None
    return tenths / 10 if tenths % 10 else tenths // 10


def _numeric(t: Translator, value: Any) -> float | None:
    return value if type(value) in (int, float) else None


UNITS = word_row("chargingRateUnit", "chargingRateUnit", _same("A", "W"), needed=True)
PERIOD = (
    whole_row("startPeriod", "startPeriod", needed=True),
    row("limit", "limit", _numeric, _lower_limit, needed=True),
    Row("numberPhases", "numberPhases", lambda t, n: n if type(n) is int and 1 <= n <= 3 else None,
        _whole),
)
SCHEDULE = (
    whole_row("duration", "duration"),
    time_row("startSchedule", "startSchedule"),
    UNITS,
    row("chargingSchedulePeriod", "chargingSchedulePeriod", *_list_of(PERIOD), needed=True),
    Row("minChargingRate", "minChargingRate", _numeric, _lower_limit),
)
PURPOSES = _same("TxDefaultProfile", "TxProfile") | {
    "ChargePointMaxProfile": "ChargingStationMaxProfile"}
PROFILE = (
    whole_row("chargingProfileId", "id", needed=True),
    whole_row("stackLevel", "stackLevel", needed=True),
    word_row("chargingProfilePurpose", "chargingProfilePurpose", PURPOSES, needed=True),
    word_row("chargingProfileKind", "chargingProfileKind",
             _same("Absolute", "Recurring", "Relative"), needed=True),
    word_row("recurrencyKind", "recurrencyKind", _same("Daily", "Weekly")),
    time_row("validFrom", "validFrom"),
    time_row("validTo", "validTo"),
)


def _lift_profile(t: Translator, profile: Any) -> dict:
    """A charging profile for a 2.x station. Raises: MissingField, WrongValue."""
    if not isinstance(profile, dict):
        raise MissingField("the charging profile is missing")
    crossed = lifted(t, profile, PROFILE)
    schedule = lifted(t, required(profile, "chargingSchedule", dict), SCHEDULE)
    crossed["chargingSchedule"] = [{"id": crossed["id"]} | schedule]
    if (number := _whole(t, profile.get("transactionId"))) is not None:
        known = t.by_upstream_id(number)
        crossed["transactionId"] = known.station_id if known else str(number)
    return crossed


def _lower_profile(t: Translator, profile: Any) -> dict:
    """A charging profile for a 1.6 station. Raises: NotSupported, MissingField."""
    if not isinstance(profile, dict):
        raise MissingField("the charging profile is missing")
    if profile.get("chargingProfilePurpose") == "ChargingStationExternalConstraints":
        raise NotSupported("1.6 has no profiles of external constraints")
    crossed = lowered(t, profile, PROFILE)
    # Of several, which only ISO 15118 lets a vehicle choose from, 1.6 takes one.
    crossed["chargingSchedule"] = lowered(t, _some(profile, "chargingSchedule")[0], SCHEDULE)
    return crossed


def _here_16(t: Translator, upstream_id: Any) -> int:
    """A 1.6 station's id of the transaction that upstream names. Raises: WrongValue."""
    known = t.by_upstream_id(upstream_id)
    # One of before a restart has our own id
    number = known.station_id if known else _whole(t, upstream_id)
    if type(number) is not int or not -1 << 63 < number < 1 << 63:
        raise WrongValue("the transaction is not known")
    return number


COMPOSITE = (EVSE, whole_row("duration", "duration", needed=True),
             word_row("chargingRateUnit", "chargingRateUnit", _same("A", "W")))


def lift_composite(t: Translator, payload: dict) -> Steps:
    """1.6 5.7 from upstream; 2.0.1 K08."""
    asked = lifted(t, payload, COMPOSITE)
    answer = yield "GetCompositeSchedule", asked
    crossed = lowered(t, answer, YES_NO)
    schedule = answer.get("schedule")
    if isinstance(schedule, dict):
        crossed |= lowered(t, schedule, (EVSE, time_row("scheduleStart", "scheduleStart")))
        crossed["chargingSchedule"] = lowered(t, schedule, SCHEDULE)
    return crossed


def lower_composite(t: Translator, payload: dict) -> Steps:
    """2.0.1 K08 from upstream; 1.6 5.7."""
    asked = lowered(t, payload, COMPOSITE)
    answer = yield "GetCompositeSchedule", asked
    crossed = lifted(t, answer, YES_NO)
    schedule = answer.get("chargingSchedule")
    if isinstance(schedule, dict) and schedule.get("chargingSchedulePeriod"):
        told = lifted(t, schedule, [field_ for field_ in SCHEDULE if field_.new not in (
            "startSchedule", "minChargingRate")])
        start = answer.get("scheduleStart") or schedule.get("startSchedule")
        crossed["schedule"] = {"duration": asked["duration"]} | told | {
            "evseId": asked["connectorId"],
            "scheduleStart": _time(t, start) or wire_time(t.clock())}
    return crossed


def _is_empty(profile: Any) -> bool:
    """Whether a profile of 1.6 has no period, without which 2.x has no schedule."""
    return isinstance(profile, dict) and not lenient(
        lenient(profile, "chargingSchedule", dict, {}), "chargingSchedulePeriod", list)


def lift_set_profile(t: Translator, payload: dict) -> Steps:
    """1.6 5.16; 2.0.1 K01."""
    asked = lifted(t, payload, (EVSE,))
    if _is_empty(payload.get("csChargingProfiles")):
        return {"status": "Rejected"}
    profile = asked["chargingProfile"] = _lift_profile(t, payload.get("csChargingProfiles"))
    # 1.6 may leave the transaction to the connector; 2.x wants it named (K01.FR.03).
    if profile["chargingProfilePurpose"] == "TxProfile" and "transactionId" not in profile and (
            mapping := t.open_at(asked["evseId"])):
        profile["transactionId"] = mapping.station_id
    answer = yield "SetChargingProfile", asked
    return lowered(t, answer, YES_NO)


def lower_set_profile(t: Translator, payload: dict) -> Steps:
    """2.0.1 K01; 1.6 5.16."""
    asked = lowered(t, payload, (EVSE,))
    profile = asked["csChargingProfiles"] = _lower_profile(t, payload.get("chargingProfile"))
    upstream_id = payload["chargingProfile"].get("transactionId")
    if upstream_id is not None:
        try:
            profile["transactionId"] = _here_16(t, upstream_id)
        except WrongValue:
            return {"status": "Rejected"}                # of a transaction that is not there
    answer = yield "SetChargingProfile", asked
    return lifted(t, answer, YES_NO)


CLEARED_ID = (whole_row("id", "chargingProfileId"),)
CRITERIA = (whole_row("connectorId", "evseId"), whole_row("stackLevel", "stackLevel"),
            word_row("chargingProfilePurpose", "chargingProfilePurpose", PURPOSES))
CLEARED = status_rows("Accepted", "Unknown", worst="Unknown")


def lift_clear_profile(t: Translator, payload: dict) -> Steps:
    """1.6 5.3; 2.0.1 K10."""
    asked = lifted(t, payload, CLEARED_ID)
    if criteria := lifted(t, payload, CRITERIA):
        asked["chargingProfileCriteria"] = criteria
    return lowered(t, (yield "ClearChargingProfile", asked), CLEARED)


def lower_clear_profile(t: Translator, payload: dict) -> Steps:
    """2.0.1 K10; 1.6 5.3."""
    criteria = lenient(payload, "chargingProfileCriteria", dict, {})
    if criteria.get("chargingProfilePurpose") not in (None, *PURPOSES.values()):
        return {"status": "Unknown"}                     # 1.6 has no such profile to clear
    asked = lowered(t, payload, CLEARED_ID)
    return lifted(t, (yield "ClearChargingProfile", asked | lowered(t, criteria, CRITERIA)),
                  CLEARED)


# 6. What a station is: its boot, its firmware, its logs

STATION_INFO = (
    text_row("chargePointVendor", "vendorName", 20, 50, old_default="", new_default=""),
    text_row("chargePointModel", "model", 20, 20, old_default="", new_default=""),
    text_row("chargePointSerialNumber", "serialNumber", 25, 25),
    text_row("firmwareVersion", "firmwareVersion", 50, 50),
)
MODEM = (text_row("iccid", "iccid", 20, 20), text_row("imsi", "imsi", 20, 20))
BOOTED = (*status_rows("Accepted", "Pending", "Rejected", worst="Rejected"),
          whole_row("interval", "interval", old_default=60, new_default=60),
          time_row("currentTime", "currentTime", needed=True))


def lift_boot(t: Translator, payload: dict) -> Steps:
    """1.6 4.2; 2.0.1 B01. What it has of meters, 2.x keeps elsewhere."""
    station = lifted(t, payload, STATION_INFO)
    if "serialNumber" not in station and "chargeBoxSerialNumber" in payload:
        station |= lifted(t, payload, (text_row("chargeBoxSerialNumber", "serialNumber", 25, 25),))
    if modem := lifted(t, payload, MODEM):
        station["modem"] = modem
    reason, t.boot_reason = t.boot_reason, "Unknown"
    answer = yield "BootNotification", {"chargingStation": station, "reason": reason}
    return lowered(t, _with_time(t, answer), BOOTED)


def lower_boot(t: Translator, payload: dict) -> Steps:
    """2.0.1 B01; 1.6 4.2."""
    station = lenient(payload, "chargingStation", dict, {})
    asked = lowered(t, station, STATION_INFO) | lowered(t, lenient(station, "modem", dict, {}),
                                                        MODEM)
    return lifted(t, _with_time(t, (yield "BootNotification", asked)), BOOTED)


def _with_time(t: Translator, answer: dict) -> dict:
    """A BootNotification's answer, with our time where it has none that can be read."""
    if _time(t, answer.get("currentTime")) is None:
        return answer | {"currentTime": wire_time(t.clock())}
    return answer


FIRMWARE_PLAIN = _same("Downloaded", "DownloadFailed", "Downloading", "Idle", "InstallationFailed",
                       "Installing", "Installed")
FIRMWARE = FIRMWARE_PLAIN | _same("DownloadScheduled", "DownloadPaused", "InstallRebooting",
                                  "InstallScheduled", "InstallVerificationFailed",
                                  "InvalidSignature", "SignatureVerified")
LOGGED = _same("BadMessage", "Idle", "NotSupportedOperation", "PermissionDenied", "Uploaded",
               "UploadFailure", "Uploading")
DIAGNOSTICS = _same("Idle", "Uploaded", "Uploading") | {"UploadFailed": "UploadFailure"}
FIRMWARE_STATUS = word_row("status", "status", FIRMWARE, old_default="Idle", new_default="Idle")
DIAGNOSTICS_STATUS = word_row(
    "status", "status", DIAGNOSTICS, dict.fromkeys((
        "BadMessage", "NotSupportedOperation", "PermissionDenied", "AcceptedCanceled"),
        "UploadFailed"), old_default="Idle", new_default="Idle")
LOG_STATUS = (word_row("status", "status", LOGGED, {"AcceptedCanceled": "UploadFailure"},
                       old_default="Idle", new_default="Idle"),
              whole_row("requestId", "requestId"))


def lift_firmware_status(t: Translator, payload: dict) -> Steps:
    """1.6 4.5 and its security extension; 2.0.1 L01. The request's id is the last update's."""
    yield "FirmwareStatusNotification", lifted(t, payload, (
        FIRMWARE_STATUS, whole_row("requestId", "requestId", new_default=t.firmware_request)))
    return {}


def lower_firmware_status(t: Translator, payload: dict) -> Steps:
    """2.0.1 L01; to 1.6 in the way that upstream took to ask for the update."""
    asked = lowered(t, payload, (FIRMWARE_STATUS, whole_row("requestId", "requestId")))
    if t.signed_firmware or asked["status"] not in FIRMWARE_PLAIN:
        yield "SignedFirmwareStatusNotification", asked
    else:
        yield "FirmwareStatusNotification", {"status": asked["status"]}
    return {}


def lift_diagnostics_status(t: Translator, payload: dict) -> Steps:
    """1.6 4.4; 2.0.1 N01."""
    asked = lifted(t, payload, (DIAGNOSTICS_STATUS,))
    if t.log_request is not None and asked["status"] != "Idle":
        asked["requestId"] = t.log_request
    yield "LogStatusNotification", asked
    return {}


def lower_log_status(t: Translator, payload: dict) -> Steps:
    """2.0.1 N01; to 1.6 in the way that upstream took to ask for the log."""
    if t.diagnostics:
        yield "DiagnosticsStatusNotification", lowered(t, payload, (DIAGNOSTICS_STATUS,))
    else:
        yield "LogStatusNotification", lowered(t, payload, LOG_STATUS)
    return {}


# 7. Statuses

CONNECTOR_STATUS = {
    "Available": "Available", "Preparing": "Occupied", "Charging": "Occupied",
    "SuspendedEV": "Occupied", "SuspendedEVSE": "Occupied", "Finishing": "Occupied",
    "Reserved": "Reserved", "Unavailable": "Unavailable", "Faulted": "Faulted"}
CHARGING_STATE = {"Preparing": "EVConnected", "Charging": "Charging", "SuspendedEV": "SuspendedEV",
                  "SuspendedEVSE": "SuspendedEVSE", "Finishing": "EVConnected"}
FAULTS_16 = frozenset("""ConnectorLockFailure EVCommunicationError GroundFailure HighTemperature
    InternalError LocalListConflict NoError OtherError OverCurrentFailure PowerMeterFailure
    PowerSwitchFailure ReaderFailure ResetFailure UnderVoltage OverVoltage WeakSignal""".split())


def lift_status(t: Translator, payload: dict) -> Steps:
    """1.6 4.9; 2.0.1 G01, E02 (a change of the charging state), and N07 for what went wrong."""
    number = max(0, required(payload, "connectorId", int))
    told = lenient(payload, "status", str, "")
    at = _when(t, payload)
    _note(t.statuses, (number, 1), told)
    status = CONNECTOR_STATUS.get(told, "Unavailable")
    if number:
        yield "StatusNotification", {"timestamp": at, "connectorStatus": status, "evseId": number,
                                     "connectorId": 1}
    else:
        yield "NotifyEvent", _event(t, at, {"name": "ChargingStation"}, "AvailabilityState", status)
    fault = lenient(payload, "errorCode", str, "NoError")
    if fault != t.faults.get(number, "NoError"):
        _note(t.faults, number, fault)
        with contextlib.suppress(CallFailed):            # the status is worth more
            yield "NotifyEvent", _problem(t, number, at, fault, payload)
    mapping = t.open_at(number) if number else None
    state = CHARGING_STATE.get(told)
    if mapping and state and state != mapping.state:
        mapping.state = state
        yield from _told_event(mapping, _transaction_event(t, mapping, "Updated", at,
                                                            "ChargingStateChanged"))
    return {}


def _note(memory: dict, place: Any, word: str) -> None:
    """Remember how a place is, of as many as a station may have."""
    if place in memory or len(memory) < CONNECTORS_KEPT:
        memory[place] = kept(word, 50)


def _event(t: Translator, at: str, component: dict, variable: str, value: str,
           **more: Any) -> dict:
    """A NotifyEvent of one event (2.0.1 N07)."""
    return {"generatedAt": at, "seqNo": 0, "eventData": [{
        "eventId": t.next_request(), "timestamp": at, "trigger": "Delta", "actualValue": value,
        "component": component, "variable": {"name": variable},
        "eventNotificationType": "HardWiredNotification", **more}]}


def _problem(t: Translator, number: int, at: str, fault: str, payload: dict) -> dict:
    """The NotifyEvent of what 1.6 has an errorCode for."""
    wrong = fault != "NoError"
    component = {"name": "ChargingStation"} if not number else {
        "name": "Connector", "evse": {"id": number, "connectorId": 1}}
    code = {"techCode": str(payload.get("vendorErrorCode") or fault)[:50]} if wrong else {}
    info = "; ".join(str(payload[key]) for key in ("info", "vendorId") if payload.get(key))
    return _event(t, at, component, "Problem", "true" if wrong else "false", cleared=not wrong,
                  techInfo=f"{fault} {info}".strip()[:500], **code)


# Of the connectors of one EVSE, the first of these tells how the EVSE is.
STATUS_ORDER = ("Occupied", "Reserved", "Available", "Faulted", "Unavailable")


def lower_status(t: Translator, payload: dict) -> Steps:
    """2.0.1 G01; 1.6 4.9."""
    evse_id = max(0, required(payload, "evseId", int))
    _note(t.statuses, (evse_id, lenient(payload, "connectorId", int, 1)),
          lenient(payload, "connectorStatus", str, ""))
    yield "StatusNotification", _status_16(t, evse_id, _time(t, payload.get("timestamp")))
    return {}


def _status_16(t: Translator, evse_id: int, at: str | None) -> dict:
    """What 1.6 says of an EVSE, from its connectors' statuses and its transaction."""
    told = [word for (evse, _), word in t.statuses.items() if evse == evse_id]
    status = next((word for word in STATUS_ORDER if word in told),
                  "Unavailable" if evse_id else "Available")         # until the station says so
    mapping = t.open_at(evse_id)
    if status == "Available":
        for past in t.mappings.values():
            past.left = past.left or (past.evse_id == evse_id and past.ended)
    if status == "Occupied" or (mapping and not told):
        status = _occupied_16(t, evse_id, mapping)
    _note(t.shown, evse_id, status)
    message = {"connectorId": evse_id, "errorCode": t.faults.get(evse_id, "NoError"),
               "status": status}
    return message | ({"timestamp": at} if at else {})


def _occupied_16(t: Translator, evse_id: int, mapping: TransactionMapping | None) -> str:
    """Which of 1.6's five words for Occupied it is."""
    if mapping is None:
        ended = any(c.evse_id == evse_id and c.ended and not c.left
                    for c in t.mappings.values())
        return "Finishing" if ended else "Preparing"
    if mapping.state in ("Charging", "SuspendedEV", "SuspendedEVSE"):
        return mapping.state
    if mapping.charged:
        return "Finishing" if mapping.state == "Idle" else "SuspendedEVSE"
    return "Preparing"


def lower_event(t: Translator, payload: dict) -> Steps:
    """2.0.1 N07: what 1.6 has a StatusNotification for; the rest the board takes."""
    known = False
    for event in _dicts(payload.get("eventData")):
        component = lenient(event, "component", dict, {})
        variable = lenient(event, "variable", dict, {}).get("name") if component else None
        evse = lenient(component, "evse", dict, {})
        evse_id = max(0, lenient(evse, "id", int, 0))
        value = lenient(event, "actualValue", str, "") if component else ""
        if variable == "AvailabilityState" and component.get("name") in (
                "ChargingStation", "EVSE", "Connector"):
            _note(t.statuses, (evse_id, lenient(evse, "connectorId", int, 1)), value)
        elif variable == "Problem":
            told = str(event.get("techInfo") or "").partition(" ")[0]
            broken = value.lower() == "true" and event.get("cleared") is not True
            _note(t.faults, evse_id, "NoError" if not broken else told if told in FAULTS_16
                  else "OtherError")
        else:
            continue
        known = True
        yield "StatusNotification", _status_16(t, evse_id, _time(t, event.get("timestamp")))
    return {} if known else None


# 8. Meter values

MEASURANDS_16 = frozenset("""
    Energy.Active.Export.Register Energy.Active.Import.Register Energy.Reactive.Export.Register
    Energy.Reactive.Import.Register Energy.Active.Export.Interval Energy.Active.Import.Interval
    Energy.Reactive.Export.Interval Energy.Reactive.Import.Interval Power.Active.Export
    Power.Active.Import Power.Offered Power.Reactive.Export Power.Reactive.Import Power.Factor
    Current.Import Current.Export Current.Offered Voltage Frequency Temperature SoC RPM""".split())
MEASURANDS_201 = (MEASURANDS_16 - {"Temperature", "RPM"}) | frozenset("""
    Energy.Active.Net Energy.Reactive.Net Energy.Apparent.Net Energy.Apparent.Import
    Energy.Apparent.Export""".split())
UNITS_16 = frozenset("Wh kWh varh kvarh W kW VA kVA var kvar A V K Celcius Celsius Fahrenheit "
                     "Percent Hertz".split())
UNITS_2X = {"Celcius": "Celsius", "Hertz": "Hz"}         # the first is 1.6's own mistake
CONTEXTS = frozenset("""Interruption.Begin Interruption.End Sample.Clock Sample.Periodic
    Transaction.Begin Transaction.End Trigger Other""".split())
PHASE_WORDS = frozenset("L1 L2 L3 N L1-N L2-N L3-N L1-L2 L2-L3 L3-L1".split())
LOCATIONS = frozenset("Cable EV Inlet Outlet Body".split())
REGISTER = "Energy.Active.Import.Register"       # the default measurand (1.6 7.31; 2.x too)
SAMPLE_WORDS = (("context", CONTEXTS), ("phase", PHASE_WORDS), ("location", LOCATIONS))
SIGNED_LENGTHS = {"signedMeterData": 32768, "signingMethod": 50, "encodingMethod": 50,
                  "publicKey": 2500}
TRIGGER_OF = {"Sample.Clock": "MeterValueClock", "Trigger": "Trigger"}
# With bounds, so that a frame full of "RV" costs no seconds.
_OCMF_READING = re.compile(
    r'"RV"\s{0,9}:\s{0,9}(-?[0-9.]{1,30}).{0,300}?"RU"\s{0,9}:\s{0,9}"(k?Wh)"', re.S)


def _decimal(value: Any) -> Decimal | None:
    """A number of a meter, exactly as it was written."""
    try:
        number = Decimal(value.strip() if isinstance(value, str) else repr(value))
    except (ArithmeticError, ValueError):
        return None
    return number if number.is_finite() and abs(number.adjusted()) < 30 else None


def _lift_meter_values(t: Translator, told: Any, known: dict | None = None) -> list[dict]:
    """Meter values as 2.0.1 has them. `known` are registers that a signed value may stand for."""
    return _meter_values(t, told, _lift_samples, known or {})


def _lower_meter_values(t: Translator, told: Any, left_out: tuple = ()) -> list[dict]:
    """Meter values as 1.6 has them; what it has no word for, and units `left_out`, is not there."""
    return _meter_values(t, told, _lower_samples, left_out)


def _meter_values(t: Translator, told: Any, cross: Callable, more: Any) -> list[dict]:
    return [{"timestamp": _when(t, meter), "sampledValue": samples} for meter in _dicts(told)
            if (samples := cross(_dicts(meter.get("sampledValue")), more))]


def _lift_samples(samples: list[dict], known: dict) -> list[dict]:
    crossed, signed = [], []
    for sample in samples:
        measurand = lenient(sample, "measurand", str, REGISTER)
        if measurand not in MEASURANDS_16:
            continue
        words = _sample_words(sample)
        if "measurand" in sample:
            words["measurand"] = measurand
        if isinstance(sample.get("unit"), str):
            unit = sample["unit"][:20]
            words["unitOfMeasure"] = {"unit": UNITS_2X.get(unit, unit)}
        if sample.get("format") == "SignedData":
            signed.append((str(sample.get("value", "")), words))
        elif (number := _decimal(sample.get("value"))) is not None:
            crossed.append({"value": _plain_number(number)} | words)
    for value, words in signed:
        _attach_signed(crossed, value, words, known)
    return [sample for sample in crossed if sample.get("measurand") not in ("Temperature", "RPM")]


def _sample_words(sample: dict) -> dict:
    """Context, phase and location of a sample, which both versions call the same."""
    return {key: sample[key] for key, allowed in SAMPLE_WORDS
            if lenient(sample, key, str) in allowed}


def _plain_number(number: Decimal) -> int | float:
    """The number as JSON writes it, without a point where it needs none."""
    return int(number) if number == number.to_integral_value() else float(number)


def _attach_signed(crossed: list, value: str, words: dict, known: dict) -> None:
    """Give a signed value to the reading that it signs; 2.x has no signature without a number.

    1.6 writes it as OCMF, or as 2.x's object in JSON (OCA: Signed Meter Values in OCPP 1.6).
    """
    try:
        told = json.loads(value)
    except ValueError:
        told = None
    if isinstance(told, dict) and isinstance(told.get("signedMeterData"), str):
        data = {key: str(told.get(key, ""))[:length] for key, length in SIGNED_LENGTHS.items()}
    else:
        data = {"signedMeterData": value, "signingMethod": "", "publicKey": "",
                "encodingMethod": "OCMF" if value.startswith("OCMF|") else ""}
    same = [sample for sample in crossed if "signedMeterValue" not in sample and all(
        sample.get(key) == words.get(key) for key in ("measurand", "context", "phase", "location"))]
    if same:
        same[0]["signedMeterValue"] = data
    elif (number := _signed_number(value, words, known)) is not None:
        crossed.append({"value": number, "signedMeterValue": data} | words)


def _signed_number(value: str, words: dict, known: dict) -> int | float | None:
    """The number in a signed value, in the sample's unit (Wh where it names none)."""
    found = _OCMF_READING.findall(value)
    if found:
        number = _decimal(found[-1][0])
        unit = words.get("unitOfMeasure", {}).get("unit", "Wh")
        if number is not None and {unit, found[-1][1]} <= {"Wh", "kWh"}:
            return _plain_number(number.scaleb((found[-1][1] == "kWh") * 3 - (unit == "kWh") * 3))
    if words.get("measurand", REGISTER) == REGISTER and "unitOfMeasure" not in words:
        return known.get(words.get("context"))
    return None


def _lower_samples(samples: list[dict], left_out: tuple) -> list[dict]:
    crossed = [one for sample in samples for one in _lower_sample(sample)]
    for sample in crossed:
        if sample.get("unit") in left_out:
            del sample["unit"]
    return crossed


def _lower_sample(sample: dict) -> list[dict]:
    number, unit = _unit_16(sample)
    measurand = lenient(sample, "measurand", str, REGISTER)
    if number is None or measurand not in MEASURANDS_16:
        return []
    words = _sample_words(sample)
    if "measurand" in sample:
        words["measurand"] = measurand
    if unit:
        words["unit"] = unit
    crossed = [{"value": f"{number:f}"} | words]
    signed = sample.get("signedMeterValue")
    if isinstance(signed, dict) and isinstance(signed.get("signedMeterData"), str):
        bare = not signed.get("publicKey") and not signed.get("signingMethod")
        plain = bare and signed["signedMeterData"].startswith("OCMF|")
        crossed.append({"value": signed["signedMeterData"] if plain else to_json(
            {key: value for key, value in signed.items() if key in SIGNED_LENGTHS}),
            "format": "SignedData"} | words)
    return crossed


def _unit_16(sample: dict) -> tuple[Decimal | None, str | None]:
    """(the number, its unit) in a unit that 1.6 has; (None, None) where there is none."""
    number = _decimal(sample.get("value"))
    told = lenient(sample, "unitOfMeasure", dict, {})
    unit, power = lenient(told, "unit", str), told.get("multiplier") or 0
    unit = "Hertz" if unit == "Hz" else unit
    if number is None or type(power) is not int or abs(power) > 12:
        return None, None
    if power == 3 and (unit or "Wh") in ("Wh", "varh", "W", "VA", "var"):
        return number, f"k{unit or 'Wh'}"
    number = number.scaleb(power) if power else number
    if unit is None or unit in UNITS_16:
        return number, unit
    if lenient(sample, "measurand", str, REGISTER).startswith("Energy"):
        return None, None                # without its unit it would be read as Wh
    return number, None


def _register(meter_values: Any, context: str = "") -> int | None:
    """The last import register in 2.x meter values, in Wh; of that context, where one is asked."""
    found = None
    for sample in [s for m in _dicts(meter_values) for s in _dicts(m.get("sampledValue"))]:
        if sample.get("phase") or context not in ("", sample.get("context")) or (
                sample.get("measurand", REGISTER) != REGISTER):
            continue
        number, unit = _unit_16(sample)
        if number is not None and unit in (None, "Wh", "kWh"):
            found = int((number.scaleb(3) if unit == "kWh" else number).to_integral_value())
    return found


def lift_meter_values(t: Translator, payload: dict) -> Steps:
    """1.6 4.7; 2.0.1 J02 (of a transaction, E02 as an event) or J01."""
    number = max(0, lenient(payload, "connectorId", int, 0))
    values = _lift_meter_values(t, payload.get("meterValue"))
    told = lenient(payload, "transactionId", int, 0)
    mapping = t.mappings.get(told) or (t.open_at(number) if number else None)
    if mapping is None and told > 0 and number:
        mapping = _resumed(t, told, number)
    if not values:
        return None                      # nothing that 2.x has a word for
    if mapping is None or (mapping.ended and not mapping.ended_by_us):
        yield "MeterValues", {"evseId": number, "meterValue": values}
        return {}
    context = values[-1]["sampledValue"][0].get("context")
    event = _transaction_event(t, mapping, "Updated", values[-1]["timestamp"],
                               TRIGGER_OF.get(context, "MeterValuePeriodic"))
    yield from _told_event(mapping, event | {"meterValue": values})
    return {}


def lower_meter_values(t: Translator, payload: dict) -> Steps:
    """2.0.1 J01; 1.6 4.7."""
    values = _lower_meter_values(t, payload.get("meterValue"))
    if not values:
        return None
    asked = {"connectorId": required(payload, "evseId", int), "meterValue": values}
    if (mapping := t.open_at(asked["connectorId"])) and type(mapping.upstream_id) is int:
        asked["transactionId"] = mapping.upstream_id
    yield "MeterValues", asked
    return {}


# 9. Transactions of a 1.6 station, for a 2.x upstream

STOPPED = {                              # 1.6's reason: (stoppedReason, triggerReason) of 2.x
    "Local": ("Local", "StopAuthorized"), "Remote": ("Remote", "RemoteStop"),
    "EVDisconnected": ("EVDisconnected", "EVCommunicationLost"),
    "DeAuthorized": ("DeAuthorized", "Deauthorized"),
    "EmergencyStop": ("EmergencyStop", "AbnormalCondition"),
    "HardReset": ("ImmediateReset", "ResetCommand"), "SoftReset": ("Reboot", "ResetCommand"),
    "Reboot": ("Reboot", "AbnormalCondition"), "PowerLoss": ("PowerLoss", "AbnormalCondition"),
    "UnlockCommand": ("Other", "UnlockCommand"), "Other": ("Other", "AbnormalCondition"),
}
STOPPED_16 = {                           # 2.x's stoppedReason: 1.6's reason
    **_same("DeAuthorized", "EmergencyStop", "EVDisconnected", "Local", "PowerLoss", "Reboot",
            "Remote"), "ImmediateReset": "HardReset", "MasterPass": "Local"}


def _resumed(t: Translator, station_id: int, evse_id: int) -> TransactionMapping:
    """A transaction that began before we did. Its id is the second it began in, as the board
    gives ids, so that its events go on counting where no former one can have been."""
    seconds = int(t.clock()) - station_id
    return t.mapping(station_id, upstream_id=str(station_id), evse_id=evse_id,
                      seq_no=seconds if 0 < seconds < 1 << 30 else 1)


def _transaction_event(t: Translator, mapping: TransactionMapping, event: str, at: str,
                       trigger: str, **info: Any) -> dict:
    """A TransactionEvent with all that is known anyway (2.0.1 E01 to E07)."""
    state = {"chargingState": mapping.state} if mapping.state else {}
    message = {"eventType": event, "timestamp": at, "triggerReason": trigger,
               "seqNo": mapping.seq_no,
               "transactionInfo": {"transactionId": mapping.upstream_id} | state | info}
    mapping.seq_no += 1
    if mapping.evse_id > 0:
        message["evse"] = {"id": mapping.evse_id, "connectorId": 1}
    return message


def _told_event(mapping: TransactionMapping, event: dict) -> Steps:
    """Tell of an event; what upstream could not take comes again, under the same number."""
    try:
        return (yield "TransactionEvent", event)
    except BoardError as error:
        if not isinstance(error, NoAnswer):              # then it may have taken it
            mapping.seq_no = event["seqNo"]
        raise


def _begin_end(at: str, register: int, context: str) -> dict:
    return {"timestamp": at, "sampledValue": [{
        "value": register, "context": context, "measurand": REGISTER,
        "unitOfMeasure": {"unit": "Wh"}}]}


def _start_key(payload: dict) -> tuple:
    return tuple(kept(payload.get(name), 64) for name in (
        "connectorId", "idTag", "timestamp", "meterStart"))


def lift_start(t: Translator, payload: dict, transaction_id: int | None = None) -> Steps:
    """1.6 4.8; 2.0.1 E01, E02. Upstream gets our id as its transactionId."""
    number, tag = required(payload, "connectorId", int), lenient(payload, "idTag", str, "")
    key, station_id = _start_key(payload), transaction_id
    if station_id is None:
        station_id = t.begun(payload)
    if station_id is None:
        station_id = t.new_id()
    at = _when(t, payload)
    state = CHARGING_STATE.get(t.statuses.get((number, 1), ""), "EVConnected")
    mapping = t.mapping(station_id, upstream_id=str(station_id), evse_id=max(number, 0),
                        state=state, start_key=key)
    mapping.ended, following, mapping.seq_no = False, mapping.seq_no, 0
    remote = _remote_start(t, number, tag)
    event = _transaction_event(t, mapping, "Started", at,
                               "Authorized" if remote is None else "RemoteStart",
                               **({} if remote is None else {"remoteStartId": remote}))
    mapping.seq_no = max(1, following)                  # if it is told once more
    id_token = _lift_token(t, tag)
    reservation = _whole(t, payload.get("reservationId"))
    mapping.register = _whole(t, payload.get("meterStart"))
    event |= {"idToken": id_token} | ({} if reservation is None else {"reservationId": reservation})
    if mapping.register is not None:
        event["meterValue"] = [_begin_end(at, mapping.register, "Transaction.Begin")]
    try:
        answer = yield "TransactionEvent", event
    except BoardError:
        mapping.ended = True            # it will be told again, or never was
        raise
    return {"transactionId": station_id} | lowered(t, answer, (ID_TOKEN_INFO,))


def _remote_start(t: Translator, number: int, tag: Any) -> int | None:
    """The remoteStartId of the command that this start obeys."""
    for known in t.remote_starts:
        if known[0] in (0, number) and known[1] == tag:
            t.remote_starts.remove(known)
            return known[2]
    return None


def lift_stop(t: Translator, payload: dict) -> Steps:
    """1.6 4.10; 2.0.1 E06 to E08."""
    station_id = required(payload, "transactionId", int)
    mapping = t.mappings.get(station_id) or _resumed(t, station_id, 0)
    at = _when(t, payload)
    stopped, trigger = STOPPED.get(lenient(payload, "reason", str, "Local"), STOPPED["Other"])
    key = tuple(payload.get(name) for name in ("timestamp", "meterStop"))
    if mapping.ended and mapping.end_key == key:
        mapping.seq_no -= 1              # the same event, told once more
    elif mapping.ended:
        mapping.ended_by_us = False      # it comes after all
    mapping.ended, mapping.end_key, mapping.state = True, key, ""
    event = _transaction_event(t, mapping, "Ended", at, trigger, stoppedReason=stopped)
    meter_stop = _whole(t, payload.get("meterStop"))
    known = {"Transaction.Begin": mapping.register, "Transaction.End": meter_stop}
    values = _lift_meter_values(t, payload.get("transactionData"), known)
    if meter_stop is not None and _register(values, "Transaction.End") != meter_stop:
        values.append(_begin_end(at, meter_stop, "Transaction.End"))
    if values:
        event["meterValue"] = values
    if payload.get("idTag") is not None and (id_token := _lift_token(t, payload["idTag"])):
        event["idToken"] = id_token
    answer = yield "TransactionEvent", event
    mapping.end_reported = True
    return lowered(t, answer, (ID_TOKEN_INFO._replace(old_default=None),))


def lower_request_start(t: Translator, payload: dict) -> Steps:
    """2.0.1 F01, F02; 1.6 5.11."""
    asked = lowered(t, payload, (token_row("idTag", "idToken", old_default=NEEDED),
                                 whole_row("connectorId", "evseId")))
    if payload.get("chargingProfile") is not None:
        asked["chargingProfile"] = _lower_profile(t, payload["chargingProfile"])
    remote = _whole(t, payload.get("remoteStartId"))
    answer = yield "RemoteStartTransaction", asked
    if remote is not None and answer.get("status") == "Accepted":
        t.remote_starts = [*t.remote_starts[-19:],
                           (asked.get("connectorId", 0), asked["idTag"], remote)]
    return lifted(t, answer, YES_NO)


def lower_request_stop(t: Translator, payload: dict) -> Steps:
    """2.0.1 F03; 1.6 5.12."""
    try:
        station_id = _here_16(t, payload.get("transactionId"))
    except WrongValue:
        return {"status": "Rejected"}
    answer = yield "RemoteStopTransaction", {"transactionId": station_id}
    return lifted(t, answer, YES_NO)


def lower_transaction_status(t: Translator, payload: dict) -> Steps:
    """2.0.1 E14, answered here. What waits for upstream was delivered before it could ask."""
    if payload.get("transactionId") is None:
        return {"messagesInQueue": False}
    mapping = t.by_upstream_id(payload["transactionId"])
    return {"ongoingIndicator": mapping is not None and not mapping.ended,
            "messagesInQueue": False}
    yield                                # never: it makes this a generator, as its like are


# 10. Transactions of a 2.x station, for a 1.6 upstream


def lower_transaction_event(t: Translator, payload: dict) -> Steps:
    """2.0.1 E01 to E12; 1.6 4.8 to 4.10 and 4.7.

    1.6 knows a transaction from when it is known who charges; before that there is just a car.
    Raises: NotSupported when it began before we did and nobody knows upstream's id of it.
    """
    # 1. which transaction it is, and what the event says of it
    info = required(payload, "transactionInfo", dict)
    kind, station_id = payload.get("eventType"), kept(required(info, "transactionId", str), 64)
    at = _when(t, payload)
    if station_id not in t.mappings and kind != "Started":
        raise NotSupported("ocpp1.6 needs upstream's id of a transaction, and its start is unknown")
    mapping = t.mapping(station_id, upstream_id=None, started=at)
    mapping.evse_id = max(0, lenient(lenient(payload, "evse", dict, {}), "id", int, 0)
                           ) or mapping.evse_id
    told = payload.get("meterValue")
    register, first = _register(told), _register(told, "Transaction.Begin")
    if mapping.register is None:
        mapping.register = register if first is None else first
        mapping.base = 0 if mapping.upstream_id is None else mapping.register or 0
    used = (register or 0) > (mapping.register or 0)
    mapping.state = kept(lenient(info, "chargingState", str, ""), 50) or mapping.state
    mapping.charged = mapping.charged or mapping.state == "Charging"
    tag, answer = _lower_token(t, payload.get("idToken")), {}
    # 2. begin it upstream, once someone is known to charge
    ends = kind == "Ended" and (not mapping.end_reported or mapping.ended_by_us)
    mapping.ended_by_us = mapping.ended_by_us and not (ends and mapping.end_reported)
    begins = mapping.upstream_id is None and not mapping.ended and (
        tag is not None or (ends and (mapping.charged or used)))
    if begins:
        reservation = _whole(t, payload.get("reservationId"))
        answer = yield "StartTransaction", {
            "connectorId": mapping.evse_id, "idTag": tag or "",
            "meterStart": mapping.register or 0, "timestamp": mapping.started,
            } | ({} if reservation is None else {"reservationId": reservation})
        mapping.upstream_id, mapping.id_token = required(answer, "transactionId", int), tag
        mapping.answer = {key: answer[key] for key in ("idTagInfo",) if key in answer}
    elif tag is not None and not ends:
        answer = mapping.answer
        if tag != mapping.id_token:
            answer = yield "Authorize", {"idTag": tag}
    mapping.register = mapping.register if register is None else register
    # 3. what was metered, and its end
    values = _lower_meter_values(t, told, ("Hertz",) if ends else ())    # not in a StopTransaction
    if ends:
        mapping.ended = True
        if mapping.upstream_id is not None:
            stop = ({"transactionId": mapping.upstream_id, "timestamp": at,
                     "meterStop": (mapping.register or 0) - mapping.base,
                     "reason": _reason_16(info, payload)}
                    | ({} if tag is None else {"idTag": tag})
                    | ({"transactionData": values} if values else {}))
            answer = (yield "StopTransaction", stop) or answer
        mapping.end_reported = True         # not before: what upstream could not take is told again
    elif values and not (begins and first is not None and sum(
            len(value["sampledValue"]) for value in values) == 1):   # meterStart says it
        place = {} if mapping.upstream_id is None else {"transactionId": mapping.upstream_id}
        yield "MeterValues", {"connectorId": mapping.evse_id, "meterValue": values} | place
    # 4. 1.6 shows the charging state in the connector's status
    shown_before = t.shown.get(mapping.evse_id)
    now = _status_16(t, mapping.evse_id, at)
    if mapping.evse_id and now["status"] not in (shown_before, "Unavailable"):
        yield "StatusNotification", now
    return {} if tag is None else lifted(t, answer, (ID_TOKEN_INFO,))


def _reason_16(info: dict, payload: dict) -> str:
    stopped, trigger = lenient(info, "stoppedReason", str, "Local"), payload.get("triggerReason")
    exact = next((reason for reason, pair in STOPPED.items() if pair == (stopped, trigger)), None)
    return exact or STOPPED_16.get(stopped, "Other")


def lift_remote_start(t: Translator, payload: dict) -> Steps:
    """1.6 5.11; 2.0.1 F01, F02."""
    asked = lifted(t, payload, (token_row("idTag", "idToken", new_default=NEEDED), SOME_EVSE))
    if asked["idToken"]["idToken"] not in t.token_types and "idTag" in payload:
        asked["idToken"]["type"] = "Central"             # "issued by the central system"
    asked["remoteStartId"] = t.next_request()
    if _is_empty(payload.get("chargingProfile")):
        return {"status": "Rejected"}
    if payload.get("chargingProfile") is not None:
        profile = _lift_profile(t, payload["chargingProfile"])
        profile.pop("transactionId", None)               # there is none yet (F01.FR.11)
        asked["chargingProfile"] = profile
    return lowered(t, (yield "RequestStartTransaction", asked), YES_NO)


def lift_remote_stop(t: Translator, payload: dict) -> Steps:
    """1.6 5.12; 2.0.1 F03."""
    known = t.by_upstream_id(required(payload, "transactionId", int))
    if known is None:
        return {"status": "Rejected"}
    return lowered(t, (yield "RequestStopTransaction", {"transactionId": known.station_id}), YES_NO)


# 11. Configuration keys of 1.6 and the variables that they became: (key, component, variable and,
# after a colon, its instance, whether it can only be read). The others go by their own name
# under LEGACY; a variable without a key is "Component.Variable" to 1.6.

KEYS_AT_ONCE = 20                   # of GetConfiguration and GetVariables; chargers choke on more
REPORTED_AT_ONCE = 25               # variables in a NotifyReport
LEGACY = "OCPP16LegacyCtrlr"        # the component of 1.6 keys that 2.x has no variable for
VARIABLES = tuple(line.split() for line in """
    AllowOfflineTxForUnknownId AuthCtrlr OfflineTxForUnknownIdEnabled
    AuthorizationCacheEnabled AuthCacheCtrlr Enabled
    AuthorizeRemoteTxRequests AuthCtrlr AuthorizeRemoteStart
    ClockAlignedDataInterval AlignedDataCtrlr Interval
    ConnectionTimeOut TxCtrlr EVConnectionTimeOut
    ConnectorPhaseRotation ChargingStation PhaseRotation
    GetConfigurationMaxKeys DeviceDataCtrlr ItemsPerMessage:GetVariables ReadOnly
    HeartbeatInterval OCPPCommCtrlr HeartbeatInterval
    LocalAuthorizeOffline AuthCtrlr LocalAuthorizeOffline
    LocalPreAuthorize AuthCtrlr LocalPreAuthorize
    MaxEnergyOnInvalidId TxCtrlr MaxEnergyOnInvalidId
    MeterValuesAlignedData AlignedDataCtrlr Measurands
    MeterValuesSampledData SampledDataCtrlr TxUpdatedMeasurands
    MeterValueSampleInterval SampledDataCtrlr TxUpdatedInterval
    ResetRetries OCPPCommCtrlr ResetRetries
    StopTransactionOnEVSideDisconnect TxCtrlr StopTxOnEVSideDisconnect
    StopTransactionOnInvalidId TxCtrlr StopTxOnInvalidId
    StopTxnAlignedData AlignedDataCtrlr TxEndedMeasurands
    StopTxnSampledData SampledDataCtrlr TxEndedMeasurands
    TransactionMessageAttempts OCPPCommCtrlr MessageAttempts:TransactionEvent
    TransactionMessageRetryInterval OCPPCommCtrlr MessageAttemptInterval:TransactionEvent
    UnlockConnectorOnEVSideDisconnect OCPPCommCtrlr UnlockOnEVSideDisconnect
    WebSocketPingInterval OCPPCommCtrlr WebSocketPingInterval
    LocalAuthListEnabled LocalAuthListCtrlr Enabled
    SendLocalListMaxLength LocalAuthListCtrlr ItemsPerMessage ReadOnly
    ReserveConnectorZeroSupported ReservationCtrlr NonEvseSpecific ReadOnly
    ChargeProfileMaxStackLevel SmartChargingCtrlr ProfileStackLevel ReadOnly
    ChargingScheduleAllowedChargingRateUnit SmartChargingCtrlr RateUnit ReadOnly
    ChargingScheduleMaxPeriods SmartChargingCtrlr PeriodsPerSchedule ReadOnly
    ConnectorSwitch3to1PhaseSupported SmartChargingCtrlr Phases3to1 ReadOnly
    AdditionalRootCertificateCheck SecurityCtrlr AdditionalRootCertificateCheck ReadOnly
    AuthorizationKey SecurityCtrlr BasicAuthPassword WriteOnly
    CertificateSignedMaxChainSize SecurityCtrlr MaxCertificateChainSize ReadOnly
    CertificateStoreMaxLength SecurityCtrlr CertificateEntries ReadOnly
    CpoName SecurityCtrlr OrganizationName
    SecurityProfile SecurityCtrlr SecurityProfile""".strip().splitlines())
VARIABLE_OF = {row[0].lower(): (row[1], *row[2].partition(":")[::2]) for row in VARIABLES}
KEY_OF = {tuple(part.lower() for part in (row[1], *row[2].partition(":")[::2])): row[0]
          for row in VARIABLES}
READ_ONLY = frozenset(row[0].lower() for row in VARIABLES if row[3:] == ["ReadOnly"])
# The rate units are "Current,Power" in 1.6 and "A,W" in 2.x.
RATE_UNITS = {"Current": "A", "Power": "W"}
RATE_UNITS_16 = {new: old for old, new in RATE_UNITS.items()}
SET_STATUSES = {                         # of ChangeConfiguration: of SetVariables
    **_same("Accepted", "Rejected", "RebootRequired", "UnknownVariable"),
    "NotSupported": "UnknownVariable"}
RATE_UNIT_KEY = "chargingscheduleallowedchargingrateunit"
FEATURES = ("Core,FirmwareManagement,LocalAuthListManagement,Reservation,SmartCharging,"
            "RemoteTrigger")


def _lift_variable(key: str) -> dict:
    """The component and variable that a key of 1.6 is."""
    component, name, instance = VARIABLE_OF.get(key.lower()) or (
        (*key.split(".", 1), "") if "." in key.strip(".") else (LEGACY, key, ""))
    return {"component": {"name": component[:50]},
            "variable": {"name": name[:50]} | ({"instance": instance} if instance else {})}


def _lower_variable(told: Any) -> str | None:
    """The key of 1.6 that a component's variable is; None where 1.6 can have none."""
    component = lenient(told, "component", dict, {}) if isinstance(told, dict) else {}
    variable = lenient(told, "variable", dict, {}) if isinstance(told, dict) else {}
    names = [str(part or "") for part in (component.get("name"), variable.get("name"),
                                          variable.get("instance"))]
    if component.get("instance") or component.get("evse") or not all(names[:2]):
        return None
    key = KEY_OF.get(tuple(name.lower() for name in names))
    if key is None and not names[2]:
        key = names[1] if names[0].lower() == LEGACY.lower() else f"{names[0]}.{names[1]}"
    return key if key and len(key) <= 50 else None


def _value_across(key: str, value: Any, units: dict) -> str:
    value = value if isinstance(value, str) else ""
    if key.lower() == RATE_UNIT_KEY:
        return ",".join(units.get(unit.strip(), unit) for unit in value.split(","))
    return value


def lift_change_configuration(t: Translator, payload: dict) -> Steps:
    """1.6 5.2; 2.0.1 B05."""
    key = required(payload, "key", str)
    value = _value_across(key, optional(payload, "value", str, ""), RATE_UNITS)[:1000]
    answer = yield "SetVariables", {"setVariableData": [
        {"attributeValue": value} | _lift_variable(key)]}
    results = _dicts(answer.get("setVariableResult"))
    word = results[0].get("attributeStatus") if results else "Rejected"
    return {"status": word if word in ("Accepted", "Rejected", "RebootRequired")
            else "NotSupported"}


def lower_set_variables(t: Translator, payload: dict) -> Steps:
    """2.0.1 B05; 1.6 5.2, one after another."""
    results = []
    for told in _some(payload, "setVariableData"):
        key, word = _lower_variable(told), "UnknownVariable"
        value = _value_across(key or "", told.get("attributeValue"), RATE_UNITS_16)
        if told.get("attributeType", "Actual") != "Actual":
            word = "NotSupportedAttributeType"
        elif key and len(value) > 500:
            word = "Rejected"
        elif key:
            answer = yield "ChangeConfiguration", {"key": key, "value": value}
            word = SET_STATUSES.get(answer.get("status"), "Rejected")
        results.append(_result(told) | {"attributeStatus": word})
    return {"setVariableResult": results}


def _result(told: dict) -> dict:
    """What the answer on a variable repeats of the question."""
    return {key: told[key] for key in ("attributeType", "component", "variable") if key in told}


def lower_get_variables(t: Translator, payload: dict) -> Steps:
    """2.0.1 B06; 1.6 5.8."""
    asked = _some(payload, "getVariableData")
    keys = list(dict.fromkeys(key for told in asked if (key := _lower_variable(told))))
    values: dict = {}
    for at in range(0, len(keys), KEYS_AT_ONCE):
        answer = yield "GetConfiguration", {"key": keys[at:at + KEYS_AT_ONCE]}
        values |= _configuration(answer)
    results = []
    for told in asked:
        key, found = _lower_variable(told), {"attributeStatus": "UnknownVariable"}
        if told.get("attributeType", "Actual") != "Actual":
            found = {"attributeStatus": "NotSupportedAttributeType"}
        elif key and key.lower() in values:
            value = _value_across(key, values[key.lower()][1], RATE_UNITS)[:2500]
            found = {"attributeStatus": "Accepted", "attributeValue": value}
        results.append(_result(told) | found)
    return {"getVariableResult": results}


def _configuration(answer: dict) -> dict:
    """{key in lower case: (key, value, whether it can only be read)} of GetConfiguration."""
    return {entry["key"].lower(): (entry["key"], str(entry.get("value") or ""),
                                   entry.get("readonly") is True)
            for entry in _dicts(answer.get("configurationKey"))
            if isinstance(entry.get("key"), str)}


def lift_get_configuration(t: Translator, payload: dict) -> Steps:
    """1.6 5.8; 2.0.1 B06. Without keys, the standard's are asked for."""
    keys = [key for key in lenient(payload, "key", list, []) if isinstance(key, str)]
    asked = keys or [row[0] for row in VARIABLES]
    here = {"numberofconnectors": str(len({e for e, _ in t.statuses if e > 0})),
            "supportedfeatureprofiles": FEATURES}        # what 2.x has no variable for
    found: list[dict] = [
        {"key": name, "readonly": True, "value": here[name.lower()]} for name in (
            keys or ("NumberOfConnectors", "SupportedFeatureProfiles")) if name.lower() in here]
    asked = [key for key in asked if key.lower() not in here]
    for at in range(0, len(asked), KEYS_AT_ONCE):
        part = asked[at:at + KEYS_AT_ONCE]
        answer = yield "GetVariables", {"getVariableData": [_lift_variable(key) for key in part]}
        values = {_lower_variable(result): result.get("attributeValue")
                  for result in _dicts(answer.get("getVariableResult"))
                  if result.get("attributeStatus") == "Accepted"}
        found += [{"key": key[:50], "readonly": key.lower() in READ_ONLY,
                   "value": _value_across(key, values[name], RATE_UNITS_16)[:500]}
                  for key in part if (name := _lower_variable(_lift_variable(key))) in values]
    names = {entry["key"].lower() for entry in found}
    unknown = [key[:50] for key in keys if key[:50].lower() not in names]
    return {"configurationKey": found} | ({"unknownKey": unknown} if unknown else {})


def lower_base_report(t: Translator, payload: dict) -> Steps:
    """2.0.1 B07, answered from GetConfiguration."""
    if payload.get("reportBase") not in ("ConfigurationInventory", "FullInventory"):
        return {"status": "NotSupported"}
    return (yield from _report(t, payload, lambda variable: True))


def lower_report(t: Translator, payload: dict) -> Steps:
    """2.0.1 B08, answered from GetConfiguration."""
    if payload.get("componentCriteria"):
        return {"status": "NotSupported"}                # 1.6 does not know its parts' states
    wanted = _dicts(payload.get("componentVariable"))

    def is_wanted(told: dict) -> bool:
        return not wanted or any(
            _name(w, "component") == _name(told, "component")
            and _name(w, "variable") in ("", _name(told, "variable")) for w in wanted)
    return (yield from _report(t, payload, is_wanted))


def _name(told: dict, part: str) -> str:
    return str(lenient(told, part, dict, {}).get("name") or "").lower()


def _report(t: Translator, payload: dict, wanted: Callable[[dict], bool]) -> Steps:
    request = required(payload, "requestId", int)
    found = _configuration((yield "GetConfiguration", {}))
    entries = []
    for key, value, read_only in found.values():
        variable = _lift_variable(key)
        if wanted(variable):
            access = "ReadOnly" if read_only else "ReadWrite"
            entries.append(variable | {
                "variableAttribute": [{"value": _value_across(key, value, RATE_UNITS)[:2500],
                                       "mutability": access}],
                "variableCharacteristics": {"dataType": _data_type(value),
                                            "supportsMonitoring": False}})
    if not entries:
        return {"status": "EmptyResultSet"}
    pages = [entries[at:at + REPORTED_AT_ONCE] for at in range(0, len(entries), REPORTED_AT_ONCE)]
    for number, page in enumerate(pages):
        t.tell("NotifyReport", {"requestId": request, "generatedAt": wire_time(t.clock()),
                                "seqNo": number, "tbc": number < len(pages) - 1,
                                "reportData": page})
    return {"status": "Accepted"}


def _data_type(value: str) -> str:
    if value.lower() in ("true", "false"):
        return "boolean"
    return "integer" if re.fullmatch(r"-?\d{1,18}", value) else "string"


# 12. Commands that differ in more than names

TRIGGERS = {                             # 1.6's requestedMessage: 2.x's
    **_same("BootNotification", "FirmwareStatusNotification", "Heartbeat", "LogStatusNotification",
            "MeterValues", "StatusNotification"),
    "DiagnosticsStatusNotification": "LogStatusNotification",
    "SignChargePointCertificate": "SignChargingStationCertificate"}
TRIGGERS_16 = {                          # 2.x's: 1.6's command and requestedMessage
    "LogStatusNotification": ("ExtendedTriggerMessage", "LogStatusNotification"),
    "SignChargingStationCertificate": ("ExtendedTriggerMessage", "SignChargePointCertificate"),
    "TransactionEvent": ("TriggerMessage", "MeterValues")}
TRIGGERED = status_rows("Accepted", "Rejected", "NotImplemented", worst="Rejected")


def lift_trigger(t: Translator, payload: dict) -> Steps:
    """1.6 5.17 and its security extension; 2.0.1 F06."""
    message = TRIGGERS.get(lenient(payload, "requestedMessage", str))
    if message is None:
        return {"status": "NotImplemented"}
    number = lenient(payload, "connectorId", int, 0)
    places = [{"id": number}] if number > 0 else [None]
    if message == "StatusNotification":                  # wants a connector (F06.FR.12)
        known = sorted(place for place in t.statuses if place[0] > 0 and number in (0, place[0]))
        places = [{"id": e, "connectorId": c} for e, c in known] or [
            {"id": max(number, 1), "connectorId": 1}]
    answers = []
    for place in places:
        asked = {"requestedMessage": message} | ({"evse": place} if place else {})
        answers.append((yield "TriggerMessage", asked))
    return lowered(t, answers[0], TRIGGERED)


def lower_trigger(t: Translator, payload: dict) -> Steps:
    """2.0.1 F06; 1.6 5.17 and its security extension."""
    message = lenient(payload, "requestedMessage", str)
    place = _lower_place(t, payload.get("evse"))
    asked = {"connectorId": place} if place else {}
    action, word = TRIGGERS_16.get(message, ("TriggerMessage", message))
    if message == "LogStatusNotification" and t.diagnostics:
        action, word = "TriggerMessage", "DiagnosticsStatusNotification"
    if word not in TRIGGERS:
        return {"status": "NotImplemented"}
    answer = yield action, {"requestedMessage": word} | asked
    if message == "BootNotification" and answer.get("status") == "Accepted":
        t.boot_reason = "Triggered"
    return lifted(t, answer, TRIGGERED)


RESET = (word_row("type", "type", {"Hard": "Immediate", "Soft": "OnIdle"}, needed=True),)
RESETTING = status_rows("Accepted", "Rejected", lower={"Scheduled": "Accepted"}, worst="Rejected")


def lower_reset(t: Translator, payload: dict) -> Steps:
    """2.0.1 B11, B12; 1.6 5.14. A Soft one ends transactions, which OnIdle must not."""
    if payload.get("evseId") is not None:
        return {"status": "Rejected", "statusInfo": {"reasonCode": "UnsupportedParam"}}
    asked = lowered(t, payload, RESET)
    if asked["type"] == "Soft" and any(not c.ended for c in t.mappings.values()):
        return {"status": "Rejected", "statusInfo": {"reasonCode": "TxInProgress"}}
    answer = yield "Reset", asked
    if answer.get("status") == "Accepted":
        t.boot_reason = "RemoteReset"
    return lifted(t, answer, RESETTING)


UPDATE_16 = (exact_row("location", "location", 2000, 512, needed=True),
             time_row("retrieveDate", "retrieveDateTime", needed=True))
UPDATE_SIGNED = (
    exact_row("location", "location", 512, 512, needed=True),
    time_row("retrieveDateTime", "retrieveDateTime", needed=True),
    time_row("installDateTime", "installDateTime"),
    exact_row("signingCertificate", "signingCertificate", 5500, 5500),
    exact_row("signature", "signature", 800, 800))
REQUEST = whole_row("requestId", "requestId", needed=True)
RETRIES = (whole_row("retries", "retries"), whole_row("retryInterval", "retryInterval"))
UPDATED = status_rows("Accepted", "Rejected", "AcceptedCanceled", "InvalidCertificate",
                      "RevokedCertificate", worst="Rejected")


def lift_update(t: Translator, payload: dict) -> Steps:
    """1.6 5.19; 2.0.1 L01, L02. 1.6 hears of a refusal by a status notification."""
    t.signed_firmware = False
    answer = yield "UpdateFirmware", lifted(t, payload, RETRIES) | {
        "requestId": t.next_request(), "firmware": lifted(t, payload, UPDATE_16)}
    if answer.get("status") not in ("Accepted", "AcceptedCanceled"):
        t.tell("FirmwareStatusNotification", {"status": "DownloadFailed"})
    return {}


def lift_signed_update(t: Translator, payload: dict) -> Steps:
    """1.6 security extension L01; 2.0.1 L01."""
    t.signed_firmware = True
    answer = yield "UpdateFirmware", lifted(t, payload, (*RETRIES, REQUEST)) | {
        "firmware": lifted(t, required(payload, "firmware", dict), UPDATE_SIGNED)}
    return lowered(t, answer, UPDATED)


def lower_update(t: Translator, payload: dict) -> Steps:
    """2.0.1 L01 as 1.6's signed update, L02 as its plain one."""
    firmware = required(payload, "firmware", dict)
    t.firmware_request = _whole(t, payload.get("requestId"))
    asked = lowered(t, payload, RETRIES)
    if firmware.get("signature") and firmware.get("signingCertificate"):
        answer = yield "SignedUpdateFirmware", asked | {
            "requestId": t.firmware_request or 0, "firmware": lowered(t, firmware, UPDATE_SIGNED)}
        return lifted(t, answer, UPDATED)
    yield "UpdateFirmware", asked | lowered(t, firmware, UPDATE_16)
    return {"status": "Accepted"}


LOG_TIMES = (time_row("startTime", "oldestTimestamp"), time_row("stopTime", "latestTimestamp"))
LOG_16 = (exact_row("remoteLocation", "remoteLocation", 512, 512, needed=True),
          time_row("oldestTimestamp", "oldestTimestamp"),
          time_row("latestTimestamp", "latestTimestamp"))
LOG_KIND = word_row("logType", "logType", _same("DiagnosticsLog", "SecurityLog"), needed=True)
LOG_SENT = (*status_rows("Accepted", "Rejected", "AcceptedCanceled", worst="Rejected"),
            text_row("filename", "filename", 255, 255))


def lift_diagnostics(t: Translator, payload: dict) -> Steps:
    """1.6 5.9; 2.0.1 N01."""
    t.diagnostics = True
    log_ = lifted(t, payload, (*LOG_TIMES, exact_row("location", "remoteLocation", 512, 512,
                                                     new_default=NEEDED)))
    answer = yield "GetLog", lifted(t, payload, RETRIES) | {
        "log": log_, "logType": "DiagnosticsLog", "requestId": t.next_request()}
    accepted = answer.get("status") in ("Accepted", "AcceptedCanceled")
    return lowered(t, answer, (text_row("fileName", "filename", 255, 255),)) if accepted else {}


def lift_log(t: Translator, payload: dict) -> Steps:
    """1.6 security extension N01; 2.0.1 N01."""
    t.diagnostics = False
    asked = lifted(t, payload, (*RETRIES, LOG_KIND, REQUEST))
    asked["log"] = lifted(t, required(payload, "log", dict), LOG_16)
    return lowered(t, (yield "GetLog", asked), LOG_SENT)


def lower_log(t: Translator, payload: dict) -> Steps:
    """2.0.1 N01: diagnostics go the way that every 1.6 station knows."""
    request, log_ = required(payload, "requestId", int), required(payload, "log", dict)
    asked = lowered(t, payload, RETRIES)
    if payload.get("logType") == "DiagnosticsLog":
        t.diagnostics, t.log_request = True, request
        answer = yield "GetDiagnostics", asked | lowered(t, log_, (
            exact_row("location", "remoteLocation", 512, 512, old_default=NEEDED), *LOG_TIMES))
        name = _text(255)(t, answer.get("fileName"))
        return {"status": "Accepted", "filename": name} if name else {"status": "Rejected"}
    t.diagnostics = False
    answer = yield "GetLog", asked | {"requestId": request, "log": lowered(t, log_, LOG_16)} | (
        lowered(t, payload, (LOG_KIND,)))
    return lifted(t, answer, LOG_SENT)


# 13. Certificates, security events, DataTransfer

CERTIFICATES = {                         # 1.6's certificateType: 2.x's
    "CentralSystemRootCertificate": "CSMSRootCertificate",
    "ManufacturerRootCertificate": "ManufacturerRootCertificate"}
INSTALL = (word_row("certificateType", "certificateType", CERTIFICATES, needed=True),
           exact_row("certificate", "certificate", 5500, 5500, needed=True))
INSTALLED = status_rows("Accepted", "Failed", "Rejected", worst="Failed")
CSR = (exact_row("csr", "csr", 5500, 5500, needed=True),)
CHAIN = (exact_row("certificateChain", "certificateChain", 10000, 10000, needed=True),)
HASH = (word_row("hashAlgorithm", "hashAlgorithm", _same("SHA256", "SHA384", "SHA512"),
                 needed=True),
        exact_row("issuerNameHash", "issuerNameHash", 128, 128, needed=True),
        exact_row("issuerKeyHash", "issuerKeyHash", 128, 128, needed=True),
        exact_row("serialNumber", "serialNumber", 40, 40, needed=True))


def lower_certificates(t: Translator, payload: dict) -> Steps:
    """2.0.1 M03; 1.6 security extension M03, a type at a time."""
    asked = lenient(payload, "certificateType", list) or list(CERTIFICATES.values())
    chain = []
    for old, new in CERTIFICATES.items():
        if new in asked:
            answer = yield "GetInstalledCertificateIds", {"certificateType": old}
            chain += [{"certificateType": new, "certificateHashData": lifted(t, data, HASH)}
                      for data in _dicts(answer.get("certificateHashData"))]
    return {"status": "Accepted", "certificateHashDataChain": chain} if chain else {
        "status": "NotFound"}


def lift_certificates(t: Translator, payload: dict) -> Steps:
    """1.6 security extension M03; 2.0.1 M03."""
    kind = CERTIFICATES.get(lenient(payload, "certificateType", str))
    if kind is None:
        raise WrongValue("certificateType is not one of 1.6")
    answer = yield "GetInstalledCertificateIds", {"certificateType": [kind]}
    found = [lowered(t, one["certificateHashData"], HASH)
             for one in _dicts(answer.get("certificateHashDataChain"))
             if isinstance(one.get("certificateHashData"), dict)]
    return {"status": "Accepted", "certificateHashData": found} if found else {
        "status": "NotFound"}


HASH_DATA = row("certificateHashData", "certificateHashData", *_nested(HASH), needed=True)
SECURITY_EVENTS = {                      # 1.6's name: 2.x's, where they differ
    "FailedToAuthenticateAtCentralSystem": "FailedToAuthenticateAtCsms",
    "CentralSystemFailedToAuthenticate": "CsmsFailedToAuthenticate",
    "InvalidCentralSystemCertificate": "InvalidCsmsCertificate",
    "InvalidChargePointCertificate": "InvalidChargingStationCertificate"}


def _security_event(names: dict) -> Callable:
    def convert(t: Translator, kind: Any) -> str:
        return names.get(str(kind), str(kind))[:50]
    return convert


SECURITY_EVENT = (
    row("type", "type", _security_event(SECURITY_EVENTS),
        _security_event({new: old for old, new in SECURITY_EVENTS.items()}), needed=True),
    time_row("timestamp", "timestamp", needed=True),
    text_row("techInfo", "techInfo", 255, 255))


def _lower_data(t: Translator, data: Any) -> str:
    """The `data` of a DataTransfer: a text in 1.6, anything in 2.x."""
    return data if isinstance(data, str) else to_json(data)


DATA = Row("data", "data", lambda t, value: value, _lower_data)
TRANSFER = (exact_row("vendorId", "vendorId", 255, 255, needed=True),
            exact_row("messageId", "messageId", 50, 50), DATA)
TRANSFERRED = (*status_rows("Accepted", "Rejected", "UnknownMessageId", "UnknownVendorId",
                            worst="Rejected"), DATA)

# 14. Who speaks what. PLAIN are the Actions that differ in names only: (1.6's Action, 2.0.1's, rows
# of the request, rows of the answer); the four tables after it say what each side may say.

PLAIN = (
    ("Authorize", "Authorize", (token_row("idTag", "idToken", needed=True),), (ID_TOKEN_INFO,)),
    ("Heartbeat", "Heartbeat", (), (time_row("currentTime", "currentTime", needed=True),)),
    ("DataTransfer", "DataTransfer", TRANSFER, TRANSFERRED),
    ("SecurityEventNotification", "SecurityEventNotification", SECURITY_EVENT, ()),
    ("LogStatusNotification", "LogStatusNotification", LOG_STATUS, ()),
    ("SignCertificate", "SignCertificate", CSR, YES_NO),
    ("CertificateSigned", "CertificateSigned", CHAIN, YES_NO),
    ("CancelReservation", "CancelReservation",
     (whole_row("reservationId", "reservationId", needed=True),), YES_NO),
    ("ChangeAvailability", "ChangeAvailability",
     (PLACE, word_row("type", "operationalStatus", _same("Inoperative", "Operative"),
                      needed=True)),
     status_rows("Accepted", "Rejected", "Scheduled", worst="Rejected")),
    ("ClearCache", "ClearCache", (), YES_NO),
    ("Reset", "Reset", RESET, RESETTING),
    ("DeleteCertificate", "DeleteCertificate", (HASH_DATA,),
     status_rows("Accepted", "Failed", "NotFound", worst="Failed")),
    ("InstallCertificate", "InstallCertificate", INSTALL, INSTALLED),
    ("GetLocalListVersion", "GetLocalListVersion", (),
     (Row("listVersion", "versionNumber", _count, _whole, 0, 0),)),
    ("SendLocalList", "SendLocalList",
     (whole_row("listVersion", "versionNumber", needed=True),
      Row("localAuthorizationList", "localAuthorizationList", *_list_of(LOCAL_LIST)),
      word_row("updateType", "updateType", _same("Differential", "Full"), needed=True)),
     status_rows("Accepted", "Failed", "VersionMismatch", worst="Failed")),
    ("ReserveNow", "ReserveNow",
     (SOME_EVSE._replace(old_default=0),
      time_row("expiryDate", "expiryDateTime", needed=True),
      token_row("idTag", "idToken", needed=True),
      token_row("parentIdTag", "groupIdToken"),
      whole_row("reservationId", "id", needed=True)),
     status_rows("Accepted", "Faulted", "Occupied", "Rejected", "Unavailable", worst="Rejected")),
    ("UnlockConnector", "UnlockConnector",
     (EVSE, Row("", "connectorId", _whole, _whole, None, 1)),
     status_rows("Unlocked", "UnlockFailed", lift={"NotSupported": "UnknownConnector"},
                 worst="UnlockFailed")),
)


def _plain(there: str, cross: Callable, back: Callable, asked: tuple, answered: tuple) -> Callable:
    def convert(t: Translator, payload: dict) -> Steps:
        answer = yield there, cross(t, payload, asked)
        if "currentTime" in [field_.old for field_ in answered]:
            answer = _with_time(t, answer)
        return back(t, answer, answered)
    return convert


_PLAIN_LIFT = {old: _plain(new, lifted, lowered, asked, answered)
               for old, new, asked, answered in PLAIN}
_PLAIN_LOWER = {new: _plain(old, lowered, lifted, asked, answered)
                for old, new, asked, answered in PLAIN}
STATIONS_OWN = "ChargingStationCertificate"      # the one type that 1.6 signs, and 2.x's default


def _of_types(action: str, known: Container[str], default: str | None = None) -> Callable:
    """A plain converter to 1.6 of what is about a certificate; 1.6 knows these types."""
    def convert(t: Translator, payload: dict) -> Steps:
        if payload.get("certificateType", default) not in known:
            raise NotSupported("1.6 has no certificates of this type")
        return _PLAIN_LOWER[action](t, payload)
    return convert


def _picked(table: dict, *names: str, **others: Callable) -> dict:
    return {name: table[name] for name in names} | others


def _answered_here(t: Translator, payload: dict) -> Steps:
    """The other side has nothing like it and need not: the board's own answer is good."""
    return None
    yield                                # never, as above


# What a 2.x station only tells, and of which a 1.6 upstream knows nothing, or not all.
NEWS = frozenset("""
    ClearedChargingLimit MeterValues NotifyChargingLimit NotifyCustomerInformation
    NotifyDisplayMessages NotifyEVChargingSchedule NotifyEvent NotifyMonitoringReport NotifyReport
    PublishFirmwareStatusNotification ReportChargingProfiles ReservationStatusUpdate""".split())
LIFT_UP = _picked(                       # a 1.6 station speaks
    _PLAIN_LIFT, "Authorize", "DataTransfer", "Heartbeat", "LogStatusNotification",
    "SecurityEventNotification", "SignCertificate",
    BootNotification=lift_boot, DiagnosticsStatusNotification=lift_diagnostics_status,
    FirmwareStatusNotification=lift_firmware_status, MeterValues=lift_meter_values,
    SignedFirmwareStatusNotification=lift_firmware_status, StartTransaction=lift_start,
    StatusNotification=lift_status, StopTransaction=lift_stop)
LOWER_DOWN = _picked(                    # a 2.0.1 upstream commands a 1.6 station
    _PLAIN_LOWER, "CancelReservation", "ChangeAvailability", "ClearCache", "DataTransfer",
    "DeleteCertificate", "GetLocalListVersion", "ReserveNow", "SendLocalList", "UnlockConnector",
    CertificateSigned=_of_types("CertificateSigned", (STATIONS_OWN,), STATIONS_OWN),
    ClearChargingProfile=lower_clear_profile, GetBaseReport=lower_base_report,
    GetCompositeSchedule=lower_composite, GetInstalledCertificateIds=lower_certificates,
    GetLog=lower_log, GetReport=lower_report, GetTransactionStatus=lower_transaction_status,
    GetVariables=lower_get_variables,
    InstallCertificate=_of_types("InstallCertificate", CERTIFICATES.values()),
    RequestStartTransaction=lower_request_start, RequestStopTransaction=lower_request_stop,
    Reset=lower_reset, SetChargingProfile=lower_set_profile, SetVariables=lower_set_variables,
    TriggerMessage=lower_trigger, UpdateFirmware=lower_update)
LOWER_UP = _picked(                      # a 2.0.1 station speaks
    _PLAIN_LOWER, "Authorize", "DataTransfer", "Heartbeat", "SecurityEventNotification",
    **dict.fromkeys(NEWS, _answered_here) | {
        "BootNotification": lower_boot, "FirmwareStatusNotification": lower_firmware_status,
        "LogStatusNotification": lower_log_status, "MeterValues": lower_meter_values,
        "NotifyEvent": lower_event, "StatusNotification": lower_status,
        "SignCertificate": _of_types("SignCertificate", (STATIONS_OWN,), STATIONS_OWN),
        "TransactionEvent": lower_transaction_event})
LIFT_DOWN = _picked(                     # a 1.6 upstream commands a 2.0.1 station
    _PLAIN_LIFT, "CancelReservation", "CertificateSigned", "ChangeAvailability", "ClearCache",
    "DataTransfer", "DeleteCertificate", "GetLocalListVersion", "InstallCertificate", "ReserveNow",
    "Reset", "SendLocalList", "UnlockConnector",
    ChangeConfiguration=lift_change_configuration, ClearChargingProfile=lift_clear_profile,
    ExtendedTriggerMessage=lift_trigger, GetCompositeSchedule=lift_composite,
    GetConfiguration=lift_get_configuration, GetDiagnostics=lift_diagnostics,
    GetInstalledCertificateIds=lift_certificates, GetLog=lift_log,
    RemoteStartTransaction=lift_remote_start, RemoteStopTransaction=lift_remote_stop,
    SetChargingProfile=lift_set_profile, SignedUpdateFirmware=lift_signed_update,
    TriggerMessage=lift_trigger, UpdateFirmware=lift_update)


def _stage(table: dict, version: str) -> Callable:
    def stage(t: Translator, action: str, payload: dict, **options: Any) -> Steps:
        if action not in table:
            raise NotSupported(f"{version} has nothing like {shown(action)}")
        return table[action](t, payload, **options)
    return stage


# 15. 2.0.1 and 2.1. All that 2.0.1 says 2.1 can say, but for numbers below zero; what 2.1 adds is
# left out, has another word that comes near, or is refused.

NEW_IN_21 = frozenset("""
    absolutePriceSchedule allowedEnergyTransfer availableEnergyTransfer basicAuthPassword
    controlMode costDetails customTrigger derChargingParameters digestValue dischargeLimit
    dischargeLimit_L2 dischargeLimit_L3 dynUpdateInterval dynUpdateTime evEnergyOffer evseSleep
    hashRootCertificate identity invalidAfterOfflineDuration isLocalGeneration limitAtSoC limit_L2
    limit_L3 maxElements maxOfflineDuration maximumContractCertificateChains messageExtra
    mobilityNeedsMode operationMode periodicEventStream powerTolerance powerToleranceAcceptance
    preconditioningRequest preconditioningStatus priceLevelSchedule priceScheduleSignature
    prioritizedEMAIDs randomizedDelay remainingContracts selectedChargingScheduleId setpoint
    setpointReactive setpointReactive_L2 setpointReactive_L3 setpoint_L2 setpoint_L3 signatureId
    tariff tariffId transactionLimit updatedPersonalMessageExtra useLocalTime v2xBaseline
    v2xChargingParameters v2xFreqWattCurve v2xSignalWattCurve""".split())
NEW_OF_21 = {                            # fields that 2.0.1 has elsewhere
    "CertificateSigned": {"requestId"}, "SignCertificate": {"requestId"},
    "FirmwareStatusNotification": {"statusInfo"}, "LogStatusNotification": {"statusInfo"},
    "PublishFirmwareStatusNotification": {"statusInfo"}, "NotifyEvent": {"severity"},
    "NotifyEVChargingNeeds": {"timestamp"}, "NotifyMonitoringReport": {"eventNotificationType"}}
WORDS_21: dict[str, dict[str, str | None]] = {      # field: {2.1's word: 2.0.1's; None: refused}
    "chargingProfilePurpose": {"LocalGeneration": None, "PriorityCharging": None},
    "chargingProfileKind": {"Dynamic": None},
    "logType": {"DataCollectorLog": None},
    "requestedMessage": {"CustomTrigger": None, "SignV2G20Certificate": "SignV2GCertificate"},
    "certificateType": {"OEMRootCertificate": None, "V2G20Certificate": "V2GCertificate"},
    "triggerReason": {"CostLimitReached": "EnergyLimitReached", "LimitSet": "ChargingRateChanged",
                      "OperationModeChanged": "ChargingStateChanged",
                      "RunningCost": "MeterValuePeriodic", "SoCLimitReached": "EnergyLimitReached",
                      "TariffChanged": "Trigger", "TariffNotAccepted": "Deauthorized",
                      "TxResumed": "ChargingStateChanged"},
    "stoppedReason": {"ReqEnergyTransferRejected": "Other"},
    "format": {"QRCODE": "URI"},
    "state": {"Discharging": "Charging", "Suspended": "Charging"},
    "reservationUpdateStatus": {"NoTransaction": "Expired"},
    "type": {"ImmediateAndResume": "Immediate", "TargetDelta": None, "TargetDeltaRelative": None},
    "ocppVersion": {"OCPP201": "OCPP20", "OCPP21": "OCPP20"},
    "ocppInterface": {"Any": "Wired0"},
    "requestedEnergyTransfer": {"AC_BPT": "AC_three_phase", "AC_BPT_DER": "AC_three_phase",
                                "AC_DER": "AC_three_phase", "DC_ACDP": "DC", "DC_ACDP_BPT": "DC",
                                "DC_BPT": "DC", "WPT": "AC_single_phase"}}
ANSWERS_21 = {"ClearDisplayMessage": {"Rejected": "Unknown"},
              "NotifyEVChargingNeeds": {"NoChargingProfile": "Rejected"},
              "SetDisplayMessage": {"LanguageNotSupported": "Rejected"}}
LIMIT_SOURCES = frozenset("EMS Other SO CSO".split())
CONNECTOR_TYPES = frozenset("""cCCS1 cCCS2 cG105 cTesla cType1 cType2 s309-1P-16A s309-1P-32A
    s309-3P-16A s309-3P-32A sBS1361 sCEE-7-7 sType2 sType3 Other1PhMax16A Other1PhOver16A Other3Ph
    Pan wInductive wResonant Undetermined Unknown""".split())
CUT_201 = {"additionalInfo": 512, "content": 512}        # texts for people; others must not be cut
LONGEST_201 = {
    "certificate": 5500, "responderURL": 512, "exiResponse": 7500, "exiRequest": 5600,
    "ocspResult": 5500, "remoteLocation": 512, "location": 512, "apn": 512, "apnUserName": 20,
    "apnPassword": 20, "ocppCsmsUrl": 512, "server": 512, "user": 20, "group": 20, "password": 20}
LONGEST_OF_201 = {"SetVariables": {"attributeValue": 1000}}
PARTED = frozenset("sampledValue meterValue certificateType certificateHashDataChain monitor "
                   "variableMonitoring".split())        # lists of which a part is worth something
SPARED = frozenset("certificateHashDataChain monitor".split())      # without which a message is
WHOLE_201 = frozenset("energyAmount evMinCurrent evMaxCurrent evMaxVoltage evMaxPower "
                      "evEnergyCapacity".split())
NOT_NEGATIVE = frozenset("""id requestId evseId connectorId reservationId seqNo stackLevel retries
    retryInterval severity cause eventId variableMonitoringId maxScheduleTuples numEPriceLevels
    securityProfile numberPhases phaseToUse numberOfPhasesUsed""".split())
PHASE_COUNTS = frozenset("numberPhases phaseToUse numberOfPhasesUsed".split())
BOTH_2X = frozenset({*COMMANDS["ocpp2.0.1"], *LOWER_UP, "Get15118EVCertificate",
                     "GetCertificateStatus", "NotifyEVChargingNeeds"})
FROM_EVSE_1 = ("RequestStartTransaction", "NotifyEVChargingNeeds", "NotifyEVChargingSchedule")


def older(t: Translator, action: str, payload: dict) -> Steps:
    """A Call of 2.1 as 2.0.1 has it. Raises: NotSupported."""
    _check_both(action)
    try:
        asked = _to_201(action, payload)
    except NotSupported:
        if action in NEWS:               # of things that 2.0.1 does not know
            return None
        raise
    return _newer(action, (yield action, asked))


def newer(t: Translator, action: str, payload: dict) -> Steps:
    """A Call of 2.0.1 as 2.1 has it."""
    _check_both(action)
    answer = yield action, _newer(action, payload)
    others = ANSWERS_21.get(action, {})
    status = lenient(answer, "status", str)
    return _to_201(action, answer | {"status": others[status]} if status in others else answer)


def _check_both(action: str) -> None:
    if action not in BOTH_2X:
        raise NotSupported(f"ocpp2.0.1 has nothing like {shown(action)}")


def _to_201(action: str, payload: dict) -> dict:
    rules = (NEW_IN_21 | NEW_OF_21.get(action, frozenset()),
             LONGEST_201 | LONGEST_OF_201.get(action, {}))
    return _older_object(payload, rules)


def _older_object(value: dict, rules: tuple) -> dict:
    """An object without what 2.0.1 does not have. Raises: NotSupported."""
    measurand = value.get("measurand", REGISTER)
    if "value" in value and isinstance(measurand, str) and measurand not in MEASURANDS_201:
        raise NotSupported(f"ocpp2.0.1 has no {shown(measurand)}")
    crossed = {}
    for key, item in value.items():
        if key in rules[0]:
            continue
        try:
            crossed[key] = item if key in ("customData", "data") else _older(key, item, rules)
        except NotSupported:
            if not (key in SPARED or (key == "meterValue" and "eventType" in value)):
                raise                    # the rest of the message is worth more
    return _older_whole(crossed)


def _older(key: str, item: Any, rules: tuple) -> Any:
    if isinstance(item, dict):
        return _older_object(item, rules)
    if isinstance(item, list):
        return _older_list(key, item, rules)
    if isinstance(item, str):
        word = WORDS_21.get(key, {}).get(item, item)
        if word is None:
            raise NotSupported(f"ocpp2.0.1 has no {key} {shown(item, 40)}")
        if len(item) > rules[1].get(key, len(item)):
            raise NotSupported(f"{key} is longer than the {rules[1][key]} of ocpp2.0.1")
        return word[:CUT_201[key]] if key in CUT_201 else word
    return math.floor(item) if key in WHOLE_201 and type(item) is float else item


def _older_list(key: str, items: list, rules: tuple) -> list:
    """A list; of some, elements that 2.0.1 has no word for are left out, unless they are all."""
    crossed = []
    for number, item in enumerate(items, 1):
        try:
            crossed.append(_older(key, item, rules))
        except NotSupported:
            if key not in PARTED or (number == len(items) and not crossed):
                raise
    return crossed


def _older_whole(crossed: dict) -> dict:
    """What 2.0.1 wants of an object beyond its fields."""
    if isinstance(crossed.get("idToken"), str) and str(crossed.get("type")) not in TOKEN_TYPES:
        crossed["type"] = "Central"
    for key in ("idToken", "additionalIdToken"):
        if isinstance(crossed.get(key), str):
            crossed[key] = shortened(crossed[key], 36)
    if str(crossed.get("connectorType", "Unknown")) not in CONNECTOR_TYPES:
        crossed["connectorType"] = "Unknown"
    source = crossed.get("chargingLimitSource")
    if isinstance(source, str) and source not in LIMIT_SOURCES:
        crossed["chargingLimitSource"] = "Other"
    if isinstance(source, list):
        crossed["chargingLimitSource"] = [s if str(s) in LIMIT_SOURCES else "Other"
                                          for s in source][:4]
    if crossed.get("location") == "Upstream":
        del crossed["location"]
    if "startPeriod" in crossed and "limit" not in crossed:
        raise NotSupported("a charging period of ocpp2.0.1 has a limit")
    if "signedMeterData" in crossed:
        crossed = {"publicKey": "", "signingMethod": ""} | crossed
    signed = crossed.get("signedMeterValue")
    if isinstance(signed, dict) and len(str(signed.get("signedMeterData"))) > 2500:
        del crossed["signedMeterValue"]                  # no part of a signature is one
    if "ocppCsmsUrl" in crossed:
        crossed.setdefault("ocppVersion", "OCPP20")
    return crossed


def _newer(action: str, value: Any, key: str = "") -> Any:
    """A payload, or the `key` of one, as 2.1 has it."""
    if isinstance(value, dict):
        crossed = {name: item if name in ("customData", "data") else _newer(action, item, name)
                   for name, item in value.items()}
        if action == "NotifyMonitoringReport" and "severity" in crossed:
            crossed.setdefault("eventNotificationType", "CustomMonitor")
        if action in FROM_EVSE_1 and crossed.get("evseId") == 0:
            crossed["evseId"] = 1
        return crossed
    if isinstance(value, list):
        return [_newer(action, item, key) for item in value]
    if key in NOT_NEGATIVE and type(value) in (int, float):
        return min(max(value, 0), 3) if key in PHASE_COUNTS else max(value, 0)
    return value



# 16. One version on both sides, while the board's transaction ids are in use (1.6 only: a 2.x
# station makes its own).


def _renamed(up: bool, *path: str) -> Callable:
    def convert(t: Translator, action: str, payload: dict) -> Steps:
        return (yield action, _with_id(t, payload, up, path))
    return convert


def _with_id(t: Translator, payload: dict, up: bool, path: tuple) -> dict:
    """The payload with the transaction's id as the other side knows it."""
    first, *rest = path
    value = payload.get(first)
    if rest:
        return payload | {first: _with_id(t, value, up, tuple(rest))} if isinstance(
            value, dict) else payload
    known = t.mappings.get(_whole(t, value)) if up else t.by_upstream_id(value)
    other = (known.upstream_id if up else known.station_id) if known else None
    return payload if other is None else payload | {first: other}


def _stopped_16(t: Translator, action: str, payload: dict) -> Steps:
    mapping = t.mappings.get(lenient(payload, "transactionId", int))
    answer = yield from _renamed(True, "transactionId")(t, action, payload)
    if mapping:
        mapping.ended = mapping.end_reported = True
    return answer


RENAMED_UP = {"ocpp1.6": {"StopTransaction": _stopped_16,
                          "MeterValues": _renamed(True, "transactionId")}}
RENAMED_DOWN = {"ocpp1.6": {
    "RemoteStopTransaction": _renamed(False, "transactionId"),
    "SetChargingProfile": _renamed(False, "csChargingProfiles", "transactionId")}}


def _same_version(table: dict) -> Callable:
    def stage(t: Translator, action: str, payload: dict) -> Steps:
        convert = table.get(t.station, {}).get(action)
        return (yield from convert(t, action, payload)) if convert else (yield action, payload)
    return stage


# Which converters stand between which versions

_LIFT_UP, _LOWER_UP = _stage(LIFT_UP, "2.x"), _stage(LOWER_UP, "ocpp1.6")
_LIFT_DOWN, _LOWER_DOWN = _stage(LIFT_DOWN, "2.x"), _stage(LOWER_DOWN, "ocpp1.6")
# What the converters tell upstream of their own is in 2.0.1.
TELLING = {"ocpp1.6": [_LOWER_UP], "ocpp2.0.1": [], "ocpp2.1": [newer]}
# (the station's version, upstream's): the converters of its Calls, and of upstream's.
STAGES = {
    ("ocpp1.6", "ocpp2.0.1"): ([_LIFT_UP, older], [_LOWER_DOWN]),
    ("ocpp1.6", "ocpp2.1"): ([_LIFT_UP, newer], [older, _LOWER_DOWN]),
    ("ocpp2.0.1", "ocpp1.6"): ([_LOWER_UP], [_LIFT_DOWN, older]),
    ("ocpp2.1", "ocpp1.6"): ([older, _LOWER_UP], [_LIFT_DOWN, newer]),
    ("ocpp2.0.1", "ocpp2.1"): ([newer], [older]),
    ("ocpp2.1", "ocpp2.0.1"): ([older], [newer]),
    **{(version, version): ([_same_version(RENAMED_UP)], [_same_version(RENAMED_DOWN)])
       for version in PROTOCOLS},
}


# --- Meter values -------------------------------------------------------------------------
# One normaliser for what meters say: the standard's defaults, one unit for each quantity, phases
# apart. Pure. It knows both shapes, 1.6's texts with `unit` and 2.x's numbers with `unitOfMeasure`.

QUANTITIES = {               # squashed measurand: (field of Reading, base unit, least, most)
    "energyactiveimportregister": ("energy_wh", "Wh", -1e12, 1e12),
    "energyactiveimportinterval": ("interval_wh", "Wh", 0, 1e12),
    "poweractiveimport": ("power_w", "W", -1e7, 1e7),
    "currentimport": ("current_a", "A", -1e5, 1e5),
    "voltage": ("voltage_v", "V", -1e4, 1e4),
    "currentoffered": ("offered_a", "A", 0, 1e5),
    "soc": ("soc", "Percent", 0, 100),
    "temperature": ("temperature_c", "Celsius", -100, 1000),
    "frequency": ("frequency_hz", "Hz", 0, 1000),
}
EXPORTS = {"currentexport": ("A", 1.0), "poweractiveexport": ("W", 100.0)}   # (unit, noise)
NEGATIVE_LEAST = {"current_a": 1.0, "power_w": 100.0}
UNIT_ALIASES = {"Celcius": "Celsius", "Hertz": "Hz", "%": "Percent"}    # Celcius: 1.6 7.45 itself
PREFIXES = {"k": 1000.0, "K": 1000.0, "m": 0.001, "M": 1e6}
PHASE_NAMES = {name: name.removesuffix("-N") for name in (
    "L1", "L2", "L3", "N", "L1-N", "L2-N", "L3-N", "L1-L2", "L2-L3", "L3-L1")}
# What counts of an instant: a sample of now at the outlet, else of now elsewhere, else of the end.
PRESENT, ELSEWHERE, ENDING, BEGINNING = 3, 2, 1, 0
RANKS = {"transactionend": ENDING, "transactionbegin": BEGINNING}
ASIDE = ("ev", "body", "cable")          # where flow and energy are not the outlet's
OF_OUTLET = ("energy_wh", "interval_wh", "power_w", "current_a", "voltage_v", "offered_a")
GRID_SIDE = ("inlet", "upstream")        # locations: what flows there is not the connector's alone


@functools.lru_cache(512)
def _squashed(word: str) -> str:
    return re.sub(r"[^a-z]", "", word.lower())


@functools.lru_cache(512)
def _measurand(text: str) -> tuple[str, str]:
    """A measurand as (squashed, phase): some write Current.Import.L1."""
    name, _, phase = text.rpartition(".")
    return (_squashed(name), phase) if phase in PHASES else (_squashed(text), "")


@functools.lru_cache(512)
def _unit(unit: str, base: str) -> tuple[float, float, bool]:
    """A unit as (factor, offset, whether it is one of this quantity).

    The measurand says what is measured; of the unit only the prefix counts, because chargers
    write Wh on a power.
    """
    unit = UNIT_ALIASES.get(unit, unit)
    if unit == base:
        return 1.0, 0.0, True
    if base == "Celsius" and unit in ("Fahrenheit", "K"):
        return (1 / 1.8, -32 / 1.8, True) if unit == "Fahrenheit" else (1.0, -273.15, True)
    if len(unit) > 1 and unit[0] in PREFIXES:
        return PREFIXES[unit[0]], 0.0, unit[1:] == base
    return 1.0, 0.0, False


@dataclass(slots=True)
class Instant:
    """The samples of one time: {field of Reading: {phase: value}}, "" where no phase was told."""

    at: float                            # as the station told it
    found: dict = field(default_factory=dict)
    inlet: dict = field(default_factory=dict)        # the same, of the grid's side
    begin_wh: float | None = None        # the register at the transaction's begin
    end_wh: float | None = None          # and at its end
    begins: bool = False                 # it tells no other register than that of the begin
    interval_wh: float | None = None
    _ranks: dict | None = None           # {(field, at_inlet): rank}, where they differ

    def add(self, name: str, phase: str, value: float, rank: int, at_inlet: bool) -> None:
        """Take a sample. One of the begin or end of a transaction gives way to one of now."""
        values = self.inlet if at_inlet else self.found
        if rank is not PRESENT or self._ranks is not None:
            if self._ranks is None:
                self._ranks = {(n, inlet): PRESENT for inlet, told in (
                    (False, self.found), (True, self.inlet)) for n in told}
            if not self._outranks(self._ranks, name, phase, value, rank, at_inlet):
                return
        if name in values:
            values[name][phase] = value
        else:
            values[name] = {phase: value}

    def _outranks(self, ranks: dict, name: str, phase: str, value: float, rank: int,
                  at_inlet: bool) -> bool:
        """Whether a sample of this rank counts beside those that came before."""
        if name == "energy_wh" and phase == "" and not at_inlet:
            if rank == BEGINNING:
                self.begin_wh = value
            elif rank == ENDING:
                self.end_wh = value
        former = ranks.get((name, at_inlet), -1)
        if rank > former:
            ranks[name, at_inlet] = rank
            (self.inlet if at_inlet else self.found).pop(name, None)
        return rank >= former

    def finish(self) -> bool:
        """Take the interval's energy out: it is no state of a meter. Whether anything is told."""
        if self._ranks:
            self.begins = self._ranks.get(("energy_wh", False)) == BEGINNING
        if "interval_wh" in self.inlet:
            del self.inlet["interval_wh"]
        if "interval_wh" in self.found:
            interval = self.found.pop("interval_wh")
            self.interval_wh = interval.get("", sum(interval.values()))
            return True
        return bool(self.found or self.inlet)

    def register_wh(self) -> float | None:
        """The register, if it was told."""
        return _total("energy_wh", self.found["energy_wh"]) if "energy_wh" in self.found else None


def read_meter_values(meter_values: Any, now: float, quirks: list[str]) -> list[Instant]:
    """The MeterValues of a message, oldest first; elements with one timestamp are one Instant.

    What is odd in them is appended to `quirks`. What says nothing of interest is left out.
    Spec: 1.6 7.33, 7.43; 2.0.1 2.33, 2.46.
    """
    instants: dict[float, Instant] = {}
    if type(meter_values) is not list:
        meter_values = [meter_values]
    if len(meter_values) > SAMPLES_READ:
        meter_values = meter_values[-SAMPLES_READ:]
        quirks.append("meter_values_too_many")
    for meter_value in meter_values:
        if type(meter_value) is not dict or type(meter_value.get("sampledValue")) is not list:
            quirks.append("meter_value_malformed")
            continue
        at = _time_of(meter_value, now, quirks)
        instant = instants.get(at)
        if instant is None:
            instant = instants[at] = Instant(at)
        for sample in meter_value["sampledValue"][-SAMPLES_READ:]:
            _read_sample(sample, instant, quirks)
    return [instant for _, instant in sorted(instants.items()) if instant.finish()]


def _time_of(meter_value: dict, now: float, quirks: list[str]) -> float:
    try:
        at, zoned = parse_time(meter_value.get("timestamp"))
    except WrongValue:
        quirks.append("time_unreadable")
        return now
    if not zoned:
        quirks.append("time_without_zone")
    return at


class Kind(NamedTuple):
    """What the words of a sample say of its value."""

    name: str                            # field of Reading; "export" for what flows out
    phase: str
    rank: int
    at_inlet: bool
    factor: float
    offset: float
    least: float
    most: float
    usual: bool                          # the unit is one of the quantity


@functools.lru_cache(1024)
def _kind(measurand: Any, unit: Any, phase: Any, context: Any, location: Any, format_: Any,
          multiplier: Any = None) -> Kind | None:
    """The kind of samples with these words; None if they say nothing of interest.

    A charger sends the same few again and again.
    """
    if format_ == "SignedData":
        return None
    squashed, own_phase = _measurand(measurand if type(measurand) is str else REGISTER if (
        measurand is None) else "")
    if squashed in EXPORTS:
        (base, most), name, least = EXPORTS[squashed], "export", -math.inf
    elif squashed in QUANTITIES:
        name, base, least, most = QUANTITIES[squashed]
    else:
        return None
    factor, offset, usual = _unit(unit, base) if type(unit) is str else (1.0, 0.0, True)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if -30 < (power := int(multiplier or 0)) < 30:
            factor *= 10.0 ** power
    location = location.lower() if type(location) is str else ""
    rank = RANKS.get(_squashed(context), PRESENT) if type(context) is str else PRESENT
    if rank is PRESENT and location in ASIDE and name in OF_OUTLET:
        rank = ELSEWHERE
    return Kind(name, PHASE_NAMES.get(phase.upper(), "") if type(phase) is str else own_phase,
                rank, location in GRID_SIDE, factor, offset, least, most, usual)


def _kind_of(sample: dict) -> Kind | None:
    unit, multiplier, get = sample.get("unit"), None, sample.get
    if unit is None and type(measure := get("unitOfMeasure")) is dict:
        unit, multiplier = measure.get("unit"), measure.get("multiplier")
    try:
        return _kind(get("measurand"), unit, get("phase"), get("context"), get("location"),
                     get("format"), multiplier)
    except TypeError:                    # a list or an object, where a word belongs
        return None


def _read_sample(sample: Any, instant: Instant, quirks: list[str]) -> None:
    if type(sample) is not dict:
        quirks.append("meter_value_malformed")
        return
    kind = _kind_of(sample)
    if kind is None:
        return
    name, phase, rank, at_inlet, factor, offset, least, most, usual = kind
    try:
        value = float(sample["value"])
    except (KeyError, TypeError, ValueError, OverflowError):
        value = _with_comma(sample.get("value"), quirks)
    if factor != 1.0 or offset:
        value = value * factor + offset
        if math.isfinite(value):
            value = round(value, 6)
    if not usual:
        quirks.append("meter_unit_mismatch")
    if not least <= value <= most or name == "export":
        quirks += _odd_value(name, value, most)
        return
    if value < 0 and name in NEGATIVE_LEAST:
        if value < -NEGATIVE_LEAST[name]:
            quirks.append("meter_value_negative")
        value = 0.0
    instant.add(name, phase, value, rank, at_inlet)


def _odd_value(name: str, value: float, most: float) -> list[str]:
    """The quirk of a value that is none, or flows out."""
    if name == "export":
        return ["export"] if value >= most else []
    if not math.isfinite(value):
        return ["meter_value_not_a_number"]
    return ["meter_value_implausible"]   # a counter's -1 or 65535, mostly


def _with_comma(told: Any, quirks: list[str]) -> float:
    """A number with a decimal comma; NaN if it is none."""
    if type(told) is not str or not DECIMAL_COMMA.fullmatch(told):
        return math.nan
    quirks.append("decimal_comma")
    return float(told.replace(",", "."))


# --- Board --------------------------------------------------------------------------------
# The one owner of state: a change of a record is a method here and ends in `publish`, but for
# counters, quirks and clock skew, which go with the next one. No I/O and no loop; time comes in
# as `clock`, so that a test can move it.

# What can be followed, and the name of its events. "error" is EventSource's own word.
TOPICS = {
    "messages": "message", "telemetry": "telemetry", "security": "security",
    "connections": "connection", "transactions": "transaction",
    "smart-charge": "smart-charge", "proxy": "proxy", "errors": "fault", "system": "system",
}
# Topics whose events repeat a record as it changes.
CHANGING = ("connections", "transactions", "smart-charge")


class Published:
    """One event on its way to listeners. Its text is made once, when the first one asks."""

    __slots__ = ("topic", "number", "record", "_text")

    def __init__(self, topic: str, number: int, record: Record):
        self.topic, self.number, self.record, self._text = topic, number, record, ""

    @property
    def text(self) -> str:
        """The event as Server-Sent Events write it, but for its id; the record as it is now."""
        if not self._text:
            self._text = f"event: {TOPICS[self.topic]}\ndata: {self.record.json()}\n\n"
        return self._text


class Subscription:
    """What one listener follows and has not read yet.

    The oldest events go beyond `limit`, and beyond QUEUE_BYTES of message payloads.
    """

    __slots__ = ("topics", "match", "limit", "wake", "waiting", "bytes", "lost", "cursor")

    def __init__(self, topics: tuple, match: Callable[[str, Record], bool] | None, limit: int,
                 wake: Callable[[], None], cursor: dict):
        self.topics, self.match, self.limit, self.wake = topics, match, limit, wake
        self.waiting: deque = deque()
        self.bytes = self.lost = 0
        self.cursor = cursor             # {topic: number of the last event read or passed over}

    def offer(self, event: Published) -> None:
        """Take an event if it matches; tell the listener when it is the first to wait."""
        if self.match is not None and not self.match(event.topic, event.record):
            return
        self.waiting.append(event)
        self.bytes += event.record.size
        while len(self.waiting) > self.limit or self.bytes > QUEUE_BYTES:
            self.bytes -= self.waiting.popleft().record.size
            self.lost += 1
        if len(self.waiting) == 1:
            self.wake()

    def take(self) -> tuple[list[Published], int]:
        """(events waiting, oldest first; how many were dropped before them)."""
        events, lost = list(self.waiting), self.lost
        self.waiting.clear()
        self.bytes = self.lost = 0
        return events, lost


class Rates:
    """Messages and latencies of the last minute, a bucket for each second."""

    __slots__ = ("_clock", "_second", "_messages", "_answers", "_latency_ms")

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._second = int(clock())
        self._messages: deque = deque([0], maxlen=LATENCY_WINDOW_S)
        self._answers: deque = deque([0], maxlen=LATENCY_WINDOW_S)
        self._latency_ms: deque = deque([0.0], maxlen=LATENCY_WINDOW_S)

    def count(self, now: float) -> None:
        """Count a message."""
        if int(now) != self._second:
            self._turn(now)
        self._messages[-1] += 1

    def answered(self, response_ms: float) -> None:
        """Count the time that the call took whose answer was counted just now."""
        self._answers[-1] += 1
        self._latency_ms[-1] += response_ms

    def per_second(self) -> float:
        """Messages per second over the last ten; of the oldest second just the part within."""
        now = self._clock()
        self._turn(now)
        oldest, *others = ([0] * RATE_WINDOW_S + list(self._messages))[-RATE_WINDOW_S - 1:]
        return round((sum(others) + oldest * (1 - now % 1)) / RATE_WINDOW_S, 2)

    def latency_ms(self) -> float:
        """Mean time to the answer over the last minute; 0 when nothing was answered."""
        self._turn(self._clock())
        answers = sum(self._answers)
        return round(sum(self._latency_ms) / answers, 3) if answers else 0.0

    def _turn(self, now: float) -> None:
        second = int(now)
        for _ in range(min(second - self._second, LATENCY_WINDOW_S)):
            self._messages.append(0)
            self._answers.append(0)
            self._latency_ms.append(0.0)
        self._second = second


class PowerController(Protocol):
    """Whoever sets the limits of charging; what cars say of themselves goes there (K15)."""

    def car_needs(self, station: Station, payload: dict) -> bool:
        """Whether a limit by these needs follows."""

    def car_schedule(self, station: Station, payload: dict) -> bool:
        """Whether the car's schedule is within its limit."""


class Board:
    """All that is known of the stations, and who follows it."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.time,
                 mono: Callable[[], float] | None = None, state: State | None = None):
        """`clock` is the wall clock, `mono` the monotonic one; a test's clock serves as both."""
        self.config, self.clock, self.state = config, clock, state or State()
        self.mono = mono or (time.monotonic if clock is time.time else clock)
        self.started_at, self._started_mono = clock(), self.mono()
        self.ahead_s = self.started_at - self._started_mono      # of wall time, to see it set
        self.epoch = secrets.token_hex(4)            # of the event ids of this run
        store = config.store
        self.stations: dict[str, Station] = {}
        self._gone: OrderedDict = OrderedDict()      # offline identities, the longest gone first
        self.messages = Store(store.max_messages, store.max_message_bytes)
        self.transactions = Store(store.max_transactions)
        self.transaction_of: dict = {}              # {(identity, transaction id): Transaction}
        self.security = Store(store.max_security_events)
        self.errors = Store(store.max_errors)
        self.system = Store(store.max_system_events)
        self.smart_charge = Store(store.max_smart_charge_sessions)
        self.proxy = Store(store.max_proxy_events, store.max_message_bytes)
        self.telemetry = Store(config.telemetry.history)
        self.knocking: OrderedDict = OrderedDict()   # {(ip, path, reason): Knock}
        self._knocks_told: OrderedDict = OrderedDict()       # {(ip, status): when}
        self.approved: OrderedDict = OrderedDict()   # identities approved on the board
        self.stores = {"messages": self.messages, "telemetry": self.telemetry,
                       "security": self.security, "smart-charge": self.smart_charge,
                       "proxy": self.proxy, "errors": self.errors, "system": self.system,
                       "transactions": self.transactions}
        self.changes = dict.fromkeys(CHANGING, 0)    # {topic: number of the last event}
        self.listeners: dict[str, list] = {topic: [] for topic in TOPICS}
        self.on_change: dict[str, Callable[[Any], None]] = {}    # {topic: who misses no change}
        self.power: PowerController | None = None
        self.rates = Rates(self.mono)
        self.total_messages = self.total_call_errors = 0
        self.total_connections = self.total_refused = self.peak_connections = self.online = 0
        self.last_transaction_id = 0
        self._links_since, self._links_logged = self._started_mono, 0

    # Following

    def subscribe(self, topics: Iterable[str], match: Callable[[str, Record], bool] | None,
                  wake: Callable[[], None], after: dict | None = None
                  ) -> tuple[Subscription, list, int]:
        """Follow topics from now on, or from `after`, {topic: number of the last event seen}.

        Returns: the subscription; the events since `after`; how many of them are gone.
        """
        topics = tuple(topics)
        cursor = {topic: self._last_number(topic) for topic in topics} | (after or {})
        subscription = Subscription(topics, match, self.config.sse.queue, wake, cursor)
        missed, lost = [], 0
        if after is not None:
            for topic in topics:
                events, gone = self._since(topic, after.get(topic, 0))
                missed += [e for e in events if match is None or match(topic, e.record)]
                lost += gone
        for topic in topics:
            self.listeners[topic].append(subscription)
        return subscription, missed, lost

    def unsubscribe(self, subscription: Subscription) -> None:
        """Stop following."""
        for topic in subscription.topics:
            self.listeners[topic].remove(subscription)

    def pass_over(self, subscription: Subscription) -> None:
        """Nothing waits: what came and did not match is as good as read."""
        if not subscription.waiting:
            subscription.cursor |= {topic: self._last_number(topic)
                                    for topic in subscription.topics}

    def publish(self, topic: str, record: Record) -> None:
        """Tell the listeners of a topic. Costs next to nothing when there are none."""
        if topic in CHANGING:
            self.changes[topic] = record.changed = self.changes[topic] + 1
            if topic in self.on_change:
                self.on_change[topic](record)
        if listeners := self.listeners[topic]:
            event = Published(topic, record.changed if topic in CHANGING else record.number, record)
            for subscription in listeners:
                subscription.offer(event)

    def first_number(self, topic: str) -> int:
        """The number after which the events of this run begin."""
        return 0 if topic in CHANGING else self.stores[topic].before

    def _last_number(self, topic: str) -> int:
        return self.changes[topic] if topic in self.changes else self.stores[topic].total

    def _since(self, topic: str, number: int) -> tuple[list[Published], int]:
        """The events of a topic after that number. Of a changing record, only as it is now."""
        if topic in CHANGING:
            kept = (self.stations.values() if topic == "connections"
                    else self.stores[topic].records)
            changed = sorted((r for r in kept if r.changed > number), key=lambda r: r.changed)
            return [Published(topic, r.changed, r) for r in changed], 0
        records, lost = self.stores[topic].since(number)
        return [Published(topic, r.number, r) for r in records], lost

    # Stations and their connections

    def connected(self, identity: str, protocol: str, address: str, link: Any,
                  security_profile: int = 0) -> Any:
        """A station's connection is open. Returns the Link that it replaces, if it had one."""
        now = self.clock()
        station = self.stations.get(identity)
        if station is None:
            station = self.stations[identity] = Station(identity, protocol, address, now)
        replaced, station.link = station.link, link
        station.protocol, station.remote_address = protocol, address
        station.connected_at, station.disconnected_at = now, None
        station.seen_since_start = True
        station.has_spoken = station.boot_unanswered = False
        station.security_profile = security_profile
        station.pongs = False, station.pongs[0]
        self._gone.pop(identity, None)
        self.total_connections += 1
        if replaced:
            station.evicted_count += 1
            self.system_event("EVICTION", identity, "A newer connection took the place of this one",
                              {"ip": address, "count": station.evicted_count})
            if station.evicted_count % 10 == 0:
                self.security_event("ANOMALY", identity, "Connections of this identity keep "
                                    "replacing each other: do two stations use it?", "medium",
                                    {"ip": address, "count": station.evicted_count})
        else:
            self.online += 1
            self.peak_connections = max(self.peak_connections, self.online)
        self.system_event("STATION_CONNECTED", identity, f"Connected over {protocol}",
                          {"ip": address, "securityProfile": security_profile})
        self._log_link("%s connected from %s over %s", shown(identity), address, protocol)
        self._forget_beyond_limit()
        self.publish("connections", station)
        return replaced

    def disconnected(self, identity: str, link: Any, reason: str) -> None:
        """A connection has ended. One that was replaced before changes nothing."""
        station = self.stations.get(identity)
        if station is None or station.link is not link:
            return
        station.link, station.disconnected_at = None, self.clock()
        for connector in station.connectors.values():
            if connector.reading is not None:
                connector.reading.stale = True
        self.online -= 1
        self._gone[identity] = None
        self.system_event("STATION_DISCONNECTED", identity, reason, {"ip": station.remote_address})
        self._log_link("%s disconnected: %s", shown(identity), shown(reason))
        self._forget_beyond_limit()
        self.publish("connections", station)

    def _log_link(self, text: str, *words: Any) -> None:
        """Log that a station came or went, LINKS_LOGGED a minute; then it is an event alone."""
        now = self.mono()
        if now - self._links_since > COALESCE_S:
            self._links_since, self._links_logged = now, 0
        self._links_logged += 1
        if self._links_logged < LINKS_LOGGED:
            log.info(text, *words)
        elif self._links_logged == LINKS_LOGGED:
            log.info("Stations come and go by dozens: for this minute they are events alone")

    def forget(self, identity: str) -> None:
        """Remove the record of an offline station; who follows it is told once more."""
        station = self.stations.pop(identity, None)
        self._gone.pop(identity, None)
        if station is None:              # beyond `max_connections` it went by itself
            return
        for evse_id, connector_id in station.connectors:     # a sign of them brings them back
            self.connector_free(station, evse_id, connector_id)
        station.forgotten = True
        self.publish("connections", station)

    def _forget_beyond_limit(self) -> None:
        while len(self.stations) > self.config.store.max_connections and self._gone:
            self.forget(next(iter(self._gone)))

    def booted(self, station: Station, info: dict, status: str) -> None:
        """A BootNotification came, and was answered with this status."""
        station.info = {key: kept(value) for key, value in info.items() if value is not None}
        station.registration, station.booted_since_start = status, True
        station.boot_unanswered = False
        for connector in station.connectors.values():
            connector.problems.clear()
            if connector.reading is not None:
                connector.reading.forget_flow()
            if connector.transaction is not None:
                connector.transaction.interrupted_mono = self.mono()
                self.publish("transactions", connector.transaction)
        self.publish("connections", station)

    def is_approved(self, identity: str) -> bool:
        """Whether the station may charge: always, but where `accept` asks the board's user."""
        return (self.config.ocpp.accept != "ask" or identity in self.approved
                or self.config.station(identity) is not None)

    def approve(self, station: Station) -> None:
        """The board's user lets the station in (`accept = "ask"`)."""
        self.approval_known(station.identity)
        self.system_event("STATION_APPROVED", station.identity, "Approved on the board", {})
        self.publish("connections", station)

    def approval_known(self, identity: str) -> None:
        """A station was approved, now or in an earlier run."""
        self.approved[identity] = None
        if len(self.approved) > self.config.store.max_connections:
            self.approved.popitem(last=False)

    def connector(self, station: Station, evse_id: int, connector_id: int) -> Connector | None:
        """The record of a connector, made when it is first heard of; None beyond all reason."""
        connector = station.connectors.get((evse_id, connector_id))
        if connector is None:
            if len(station.connectors) >= CONNECTORS_KEPT or evse_id < 0 or connector_id < 0:
                self.quirk(station, "connector_unreasonable")
                return None
            connector = Connector(evse_id, connector_id)
            station.connectors[evse_id, connector_id] = connector
        return connector

    def told(self, station: Station, **facts: str) -> None:
        """The station told something of itself beyond its BootNotification."""
        station.info |= {key: kept(value) for key, value in facts.items()}
        self.publish("connections", station)

    def connector_status(self, station: Station, evse_id: int, connector_id: int, status: str,
                         when: float | None, **cause: str | None) -> None:
        """A connector's status since `when`; `cause`: error_code, vendor_error_code, info.

        One that is older than what is known is history. `since` is when we heard of it first.
        """
        connector = self.connector(station, evse_id, connector_id)
        at_mono = self.mono_of(station, when)
        if connector is None or at_mono < connector.status_mono - SKEW_TOLERANCE_S:
            return
        if connector.status != status:
            connector.since = self.clock()
            if status in NO_FLOW and connector.reading is not None:
                connector.reading.end_flow(at_mono)
                if connector.transaction is not None:
                    self.publish("transactions", connector.transaction)
        fault = _fault(cause)
        if fault and fault != _fault(connector):
            self.error("STATION_FAULT", station, f"{_place_name(connector)} reports {fault}",
                       {"evse": evse_id, "connector": connector_id, "status": status,
                        **_shown_cause(cause)})
        connector.status, connector.status_mono = status, at_mono
        for name, text in cause.items():
            setattr(connector, name, text)
        if status in NO_TRANSACTION[station.protocol]:
            self.connector_free(station, evse_id, connector_id, at_mono)
            connector.interrupted = None
        elif status in ENDED_BY_BOOT[station.protocol]:
            self._end_interrupted(connector, at_mono)
        elif status in CHARGING and connector.transaction is None and connector.interrupted:
            self.transaction_alive(station, connector.interrupted, at_mono)
        elif status == "Occupied":
            self._follow_car(station, connector)
        self.publish("connections", station)

    def connector_alert(self, station: Station, evse_id: int, connector_id: int, name: str,
                        text: str, when: float | None) -> None:
        """A 2.x station alerts of something (2.0.1 N07)."""
        connector = self.connector(station, evse_id, connector_id)
        at_mono = self.mono_of(station, when)
        known, known_mono = connector.problems.get(name, (None, -math.inf)) if connector else (
            None, math.inf)
        if connector is None or at_mono < known_mono:
            return
        self._set_problem(connector, name, text, at_mono)
        if known != text:
            self.error("STATION_FAULT", station, f"{_place_name(connector)} reports {name}: "
                       f"{text}", {"evse": evse_id, "connector": connector_id, "name": name,
                                   "text": text})
        self.publish("connections", station)

    def alert_over(self, station: Station, evse_id: int, connector_id: int | None, name: str,
                   when: float | None) -> None:
        """What a 2.x station alerted of is over: at a connector, or wherever at an EVSE."""
        at_mono = self.mono_of(station, when)
        places = [c for c in station.connectors.values()
                  if c.evse_id == evse_id and c.problems.get(name, (None, 0))[0] is not None]
        there = [c for c in places if c.connector_id == connector_id]
        for connector in there or places:
            if connector.problems[name][1] <= at_mono + SKEW_TOLERANCE_S:
                self._set_problem(connector, name, None, at_mono)
                self.publish("connections", station)

    def _set_problem(self, connector: Connector, name: str, text: str | None,
                     at_mono: float) -> None:
        connector.problems[name] = Problem(text, at_mono)
        if len(connector.problems) > PROBLEMS_KEPT:
            del connector.problems[next(iter(connector.problems))]

    # Clocks

    def clock_told(self, station: Station, when: float) -> None:
        """The station's clock just said `when`."""
        station.clock.tell(when - self.clock(), self.mono())

    def mono_of(self, station: Station | None, when: float | None) -> float:
        """A time that a station told, by our monotonic clock; now, where it told none.

        It is never after now, nor from before any clock of a station can be right.
        """
        now = self.mono()
        if when is None:
            return now
        at_mono = when - (station.clock.shift_s if station else 0.0) - self.ahead_s
        return at_mono if now - CLOCK_LOST_S < at_mono < now else now

    def wall_of(self, station: Station | None, when: float | None) -> float:
        """A time that a station told, as it is shown: by our clock where the station's is off,
        never after now, and now where it cannot be true."""
        now = self.clock()
        if when is None or not now - CLOCK_LOST_S < when:
            return now
        ahead_s = station.clock.shift_s if station else 0.0
        return min(now, when - ahead_s if abs(ahead_s) > SKEW_TOLERANCE_S else when)

    def watch_clock(self) -> None:
        """See whether our own wall clock was set: then those of the stations are judged anew."""
        ahead_s = self.clock() - self.mono()
        jump_s = ahead_s - self.ahead_s
        if abs(jump_s) < CLOCK_JUMP_S:
            return
        self.ahead_s = ahead_s
        text = f"The board's clock was set {'on' if jump_s > 0 else 'back'} by {abs(jump_s):.1f} s"
        self.system_event("CLOCK_SET", "", text, {"seconds": round(jump_s, 3)})
        log.warning("%s", text)
        now = self.clock()

        def past(when: float | None) -> float | None:
            return when and min(when, now)
        for station in self.stations.values():
            station.clock.moved(jump_s)
            station.connected_at = min(station.connected_at, now)
            station.disconnected_at = past(station.disconnected_at)
            station.last_message_at = past(station.last_message_at)
            for connector in station.connectors.values():
                connector.since = past(connector.since)
        for transaction in self.transactions.records:
            if transaction.series is not None:
                transaction.series.start += jump_s
            if transaction.status == "active":
                transaction.started_at = transaction.started_mono + ahead_s
            transaction.started_at = min(transaction.started_at, now)
            transaction.stopped_at = past(transaction.stopped_at)
            if transaction.reading is not None:
                transaction.reading.shown_at = past(transaction.reading.shown_at)
        for session in self.smart_charge.records:
            session.started_at, session.updated_at = min(session.started_at, now), min(
                session.updated_at, now)
            session.ended_at = past(session.ended_at)

    def quirk(self, station: Station, name: str, times: int = 1, in_message: bool = True) -> int:
        """Count a thing that the station does against the standard. Returns how often it did."""
        entry = station.quirks.get(name)
        if entry is None:
            if len(station.quirks) >= QUIRKS_KEPT:
                return 0
            entry = station.quirks[name] = [0, None]
        entry[0] += times
        if in_message:                   # the message being handled is the next to be kept
            entry[1] = f"msg-{self.messages.total + 1}"
        return entry[0]

    def knocked(self, address: str, path: str, headers: dict, status: int, reason: str,
                advice: str) -> bool:
        """An upgrade was refused. Returns whether it is news.

        It is not within `COALESCE_S` of another one from that address with that status: nobody
        must be able to wash the log, or the security events, away.
        """
        now, now_mono = self.clock(), self.mono()
        self.total_refused += 1
        told_mono = self._knocks_told.pop((address, status), -math.inf)
        news = now_mono - told_mono > COALESCE_S
        self._knocks_told[address, status] = now_mono if news else told_mono
        if len(self._knocks_told) > ADDRESSES_KEPT:
            self._knocks_told.popitem(last=False)
        key = (address, path, reason)
        knock = self.knocking.pop(key, None) or Knock(address, path, headers, status, reason,
                                                      advice, now)
        knock.last, knock.count = now, knock.count + 1
        self.knocking[key] = knock
        if len(self.knocking) > KNOCKING_KEPT:
            self.knocking.popitem(last=False)
        return news

    # Messages and what happened

    def message(self, station: Station, direction: str, kind: str, method: str, id_: str,
                payload: str, response_ms: float | None = None, error_code: str | None = None,
                error_description: str | None = None) -> LoggedMessage:
        """Keep one frame. `payload` is JSON on one line; `response_ms` is known with the answer."""
        now = self.clock()
        record = LoggedMessage(station.identity, station.protocol, direction, kind, method, id_,
                               payload, now, response_ms, error_code, error_description,
                               sys.getsizeof(payload))
        self.messages.append(record)
        if direction == "IN":
            station.has_spoken = True
        self._count(station, now)
        if response_ms is not None and kind != "CALL":
            self.rates.answered(response_ms)
        if error_code is not None:
            self.total_call_errors += 1
        self.publish("messages", record)
        return record

    def _count(self, station: Station, now: float) -> None:
        self.rates.count(now - self.ahead_s)
        self.total_messages += 1
        station.message_count += 1
        station.last_message_at = now

    def count_unreadable(self, station: Station) -> None:
        """A frame came that could not be read; as an error it is on record already."""
        self._count(station, self.clock())

    def answered(self, record: LoggedMessage, response_ms: float) -> None:
        """A CALL that is on record has its answer, whose own record tells listeners the same."""
        record.response_ms = response_ms

    def error(self, category: str, station: Station, text: str, details: dict) -> Event:
        """Keep something that went wrong between a station and us."""
        station.error_count += 1
        return self.error_of(category, station.identity, text, details)

    def error_of(self, category: str, identity: str, text: str, details: dict) -> Event:
        """The same, of a station that has not come since the start."""
        event = Event(category, identity, kept(text), details, self.clock(), prefix="err")
        self._happened("errors", event)
        return event

    def security_event(self, category: str, identity: str, text: str, severity: str,
                       details: dict) -> None:
        """Keep a security event. `details` has the `ip`, never a secret."""
        self._happened("security", Event(category, identity, kept(text), details, self.clock(),
                                         severity))

    def system_event(self, kind: str, identity: str, text: str, details: dict) -> None:
        """Keep an event of the board itself."""
        self._happened("system", Event(kind, identity, kept(text), details, self.clock(),
                                       kind_name="type", prefix="sys"))

    def _happened(self, topic: str, event: Event) -> None:
        self.stores[topic].append(event)
        self.publish(topic, event)

    # Transactions

    def new_transaction_id(self) -> int:
        """A transaction id for 1.6: of 31 bits, and none that an earlier run gave out."""
        self.last_transaction_id = max(int(self.clock()), self.last_transaction_id + 1)
        return self.last_transaction_id & 0x7FFFFFFF

    def transaction_id_used(self, number: int) -> None:
        """An earlier run gave this id out, whatever the clock says now."""
        self.last_transaction_id = max(self.last_transaction_id, number)

    def transaction(self, station: Station, transaction_id: int | str) -> Transaction | None:
        """The transaction that the station calls so, if we know it."""
        return self.transaction_of.get((station.identity, transaction_id))

    def same_start(self, station: Station, start_key: tuple,
                   within_s: float = math.inf) -> Transaction | None:
        """The transaction that this very StartTransaction began before: a repeated one.

        A stop shows that the station had its answer, and that this start is another one.
        """
        since_mono = self.mono() - within_s
        found = self.transactions.newest(1, lambda t: t.identity == station.identity
                                         and t.start_key == start_key and t.status != "stopped"
                                         and t.started_mono >= since_mono)
        return found[0] if found else None

    def running(self, station: Station) -> list[Transaction]:
        """The transactions of a station that are active."""
        return [t for t in self.transactions.records
                if t.identity == station.identity and t.status == "active"]

    def transaction_started(self, station: Station, transaction_id: int | str, evse_id: int,
                            connector_id: int, id_token: str | None, started_at: float | None,
                            meter_start: float | None = None,
                            start_key: tuple | None = None) -> Transaction:
        """A transaction begins; another one still open on its connector is abandoned.

        Unless that began later: then this one is told of afterwards, and is over already.
        """
        transaction = Transaction(transaction_id, station.identity, evse_id, connector_id,
                                  id_token, self.wall_of(station, started_at), None, start_key,
                                  started_mono=self.mono_of(station, started_at))
        if meter_start is not None:
            self.started_at_register(transaction, started_at, meter_start)
        self._keep_transaction(transaction)
        self._occupy(station, transaction)
        self.publish("transactions", transaction)
        return transaction

    def started_at_register(self, transaction: Transaction, at: float | None,
                            register_wh: float) -> None:
        """The register at a transaction's start."""
        transaction.register.begin(Point(transaction.started_mono, at or self.clock(), register_wh))
        transaction.count_energy()

    def transaction_adopted(self, station: Station, transaction_id: int | str, evse_id: int,
                            connector_id: int, id_token: str | None,
                            seen_at: float | None) -> Transaction:
        """A transaction whose start did not come: from before our time, or it comes yet."""
        transaction = self.transaction_started(station, transaction_id, evse_id, connector_id,
                                               id_token, seen_at)
        transaction.began_unseen = transaction.estimated = True
        return transaction

    def transaction_orphaned(self, station: Station, transaction_id: int | str, evse_id: int,
                             connector_id: int, id_token: str | None,
                             stopped_at: float | None) -> Transaction:
        """A transaction of which only the stop came; what runs on its connector is not touched."""
        transaction = Transaction(transaction_id, station.identity, evse_id, connector_id,
                                  id_token, self.wall_of(station, stopped_at), status="orphan",
                                  started_mono=self.mono_of(station, stopped_at),
                                  began_unseen=True, estimated=True)
        self._keep_transaction(transaction)
        return transaction

    def start_seen(self, station: Station, transaction: Transaction, id_token: str | None,
                   started_at: float | None) -> None:
        """The start of a transaction comes after other messages of it."""
        if not transaction.began_unseen:
            return
        transaction.began_unseen, transaction.durable_as = False, ""
        transaction.id_token = id_token or transaction.id_token
        transaction.started_at = min(self.wall_of(station, started_at),
                                     transaction.stopped_at or math.inf)
        transaction.started_mono = min(self.mono_of(station, started_at), transaction.stopped_mono)
        if transaction.status == "orphan":
            transaction.status = "stopped"
        transaction.count_energy()

    def answered_early(self, station: Station) -> None:
        """The station was answered before the disk had what it said."""
        for transaction in self.transactions.records:
            if transaction.identity == station.identity and not transaction.not_durable and (
                    transaction.durable_as != transaction.status):
                transaction.not_durable = True
                self.publish("transactions", transaction)

    def now_durable(self, transaction: Transaction, status: str) -> None:
        """The disk has a transaction, with this status."""
        transaction.durable_as = status
        if transaction.not_durable:
            transaction.not_durable = False
            self.publish("transactions", transaction)

    def _keep_transaction(self, transaction: Transaction) -> None:
        """Keep it; for it goes the oldest that is not active, if there is one."""
        former = self.transaction_of.get((transaction.identity, transaction.id))
        if former is not None and former.status == "active" and (
                former.evse_id in (0, transaction.evse_id) or not transaction.evse_id):
            self.transaction_stopped(former, None, None, None, "abandoned")
        gone = self.transactions.make_room(lambda t: t.status != "active")
        if gone:
            self._release(gone)
            key = gone.identity, gone.id
            if self.transaction_of.get(key) is gone:
                del self.transaction_of[key]
        self.transactions.append(transaction)
        self.transaction_of[transaction.identity, transaction.id] = transaction

    def transaction_alive(self, station: Station, transaction: Transaction, at_mono: float,
                          certain: bool = True) -> None:
        """A sign of that time that an abandoned transaction goes on, or one after a reboot.

        A sign from before it was given up is none, nor is one while another runs there; one that
        is not `certain`, an id with a reading, is none either while its connector is free.
        """
        if transaction.status == "active":
            if transaction.interrupted_mono is not None and at_mono > transaction.interrupted_mono:
                transaction.interrupted_mono = None
            return
        connector = station.connectors.get((transaction.evse_id, transaction.connector_id))
        if transaction.status != "abandoned" or at_mono < transaction.stopped_mono or (
                connector is not None and not self._may_go_on(connector, transaction, at_mono,
                                                              certain)):
            return
        if connector is not None and connector.transaction is not None:
            self.transaction_stopped(connector.transaction, None, None, None, "abandoned")
        transaction.status, transaction.stopped_at = "active", None
        transaction.stopped_mono, transaction.interrupted_mono = math.inf, None
        self._occupy(station, transaction)
        for other in list(station.connectors.values()) if transaction.assumed_connector else ():
            if other.status == "Occupied":
                self._follow_car(station, other)
        self.publish("transactions", transaction)

    def _may_go_on(self, connector: Connector, transaction: Transaction, at_mono: float,
                   certain: bool) -> bool:
        """Whether an abandoned transaction can be the one that runs at its connector."""
        there = connector.transaction
        if there is not None:            # one of an unknown start gives way to one of a known start
            return there.began_unseen and not transaction.began_unseen and (
                at_mono > there.latest_mono())
        return certain or connector.status in (None, *CHARGING)

    def transaction_at(self, station: Station, transaction_id: int | str,
                       evse_id: int) -> Transaction | None:
        """The newest transaction of that id and EVSE: some stations count for each EVSE."""
        found = self.transactions.newest(1, lambda t: t.identity == station.identity and (
            t.id == transaction_id) and t.evse_id == evse_id)
        return found[0] if found else None

    def transaction_located(self, station: Station, transaction: Transaction, evse_id: int,
                            connector_id: int | None) -> None:
        """Where a transaction is may be told later than that it is: a card before the plug.

        `evse_id` 0 and `connector_id` None tell nothing. Spec: 2.0.1 E02, E03.
        """
        same = evse_id in (0, transaction.evse_id) and connector_id in (
            None, transaction.connector_id)
        if same or not evse_id or (transaction.status != "active" and transaction.evse_id):
            return
        self._move(station, transaction, evse_id,
                   min(evse_id, 1) if connector_id is None else connector_id)
        transaction.assumed_connector = connector_id is None

    def _move(self, station: Station, transaction: Transaction, evse_id: int,
              connector_id: int) -> None:
        self._release(transaction)
        transaction.evse_id, transaction.connector_id = evse_id, connector_id
        if transaction.status == "active":
            self._occupy(station, transaction)

    def _follow_car(self, station: Station, connector: Connector) -> None:
        """A car is at this connector: a transaction of which only the EVSE was told is here."""
        for other in list(station.connectors.values()):
            transaction = other.transaction
            if (transaction and transaction.assumed_connector and other is not connector
                    and other.evse_id == connector.evse_id and other.status != "Occupied"
                    and connector.transaction is None):
                self._move(station, transaction, connector.evse_id, connector.connector_id)

    def _end_interrupted(self, connector: Connector, at_mono: float) -> None:
        """The station has booted in mid-transaction, and its connector does not charge."""
        transaction = connector.transaction
        if transaction and transaction.interrupted_mono is not None and (
                at_mono >= transaction.interrupted_mono - SKEW_TOLERANCE_S):
            self.transaction_stopped(transaction, None, None, None, "abandoned")
            connector.interrupted = transaction

    def transaction_updated(self, transaction: Transaction, **told: Any) -> None:
        """Set what the station told of a transaction; None tells nothing."""
        for name, value in told.items():
            if value is not None:
                setattr(transaction, name, value)
        self.publish("transactions", transaction)

    def transaction_stopped(self, transaction: Transaction, stopped_at: float | None,
                            meter_stop: float | None, reason: str | None,
                            status: str = "stopped") -> None:
        """A transaction ends; an orphan stays one. Late readings may come; no power from here."""
        station = self.stations.get(transaction.identity)
        transaction.status = "orphan" if transaction.status == "orphan" else status
        told_mono = self.mono_of(station, stopped_at)
        shown_at = self.wall_of(station, stopped_at)
        if shown_at < transaction.started_at or told_mono < transaction.started_mono:
            shown_at, told_mono = max(self.clock(), transaction.started_at), self.mono()
        transaction.stopped_at, transaction.stopped_mono = shown_at, told_mono
        if meter_stop is not None:
            transaction.register.end(Point(told_mono, stopped_at or shown_at, meter_stop))
        transaction.count_energy()
        transaction.meter_stop, transaction.reason = meter_stop, reason
        if transaction.reading is not None:
            transaction.reading.end_flow(max(told_mono, transaction.reading.flow_mono))
        self._release(transaction)
        self.publish("transactions", transaction)

    def connector_free(self, station: Station, evse_id: int, connector_id: int,
                       at_mono: float = math.inf) -> None:
        """The connector can have no transaction then; one that is open was never stopped."""
        connector = station.connectors.get((evse_id, connector_id))
        if connector and connector.transaction and (
                at_mono >= connector.transaction.started_mono - SKEW_TOLERANCE_S):
            self.transaction_stopped(connector.transaction, None, None, None, "abandoned")

    def metered(self, station: Station, evse_id: int, connector_id: int, instant: Instant,
                transaction: Transaction | None, own: bool, not_before: float) -> None:
        """A meter was read: of a transaction, where it belongs to one, or of a connector.

        `own`: the message is the transaction's own; else it may go on under the id of one that
        ended. `not_before`: a time that the message is known not to be before.
        """
        at_mono = max(self.mono_of(station, instant.at), not_before)
        if transaction is not None and not own:
            self.transaction_alive(station, transaction, at_mono, certain=False)
            if at_mono > transaction.stopped_mono:
                connector = station.connectors.get((evse_id, connector_id))
                transaction = connector.transaction if connector else None
        if transaction is not None:
            self._transaction_metered(station, transaction, instant, at_mono)
        if transaction is None or instant.inlet:
            connector = self.connector(station, evse_id, connector_id)
            if connector is not None:
                self._connector_metered(station, connector, instant, at_mono, transaction is None)
                self.publish("connections", station)

    def _connector_metered(self, station: Station, connector: Connector, instant: Instant,
                           at_mono: float, idle: bool) -> None:
        shown_at = self.wall_of(station, instant.at)
        if instant.inlet:
            connector.inlet = connector.inlet or Reading(instant.at)
            connector.inlet.update(instant.at, instant.inlet, at_mono, shown_at)
        # A late one, of a transaction that has ended, is not the connector's
        if idle and instant.found and at_mono >= connector.released_mono - SKEW_TOLERANCE_S:
            if connector.reading is None:
                connector.reading = Reading(instant.at)
                if connector.status in NO_FLOW:
                    connector.reading.end_flow(connector.status_mono)
            connector.reading.update(instant.at, instant.found, at_mono, shown_at)

    def _transaction_metered(self, station: Station, transaction: Transaction, instant: Instant,
                             at_mono: float) -> None:
        reading = transaction.reading or self._first_reading(transaction, instant)
        start, found = transaction.register.start, instant.found
        begins = instant.begins and start is not None and instant.begin_wh == start.wh
        if begins and reading.energy_wh is not None:     # it says again where it began
            found = {name: phases for name, phases in found.items() if name != "energy_wh"}
        newest = False
        if found:
            transaction.reading = reading
            newest = reading.update(instant.at, found, at_mono,
                                    self.wall_of(station, instant.at))
        self._count_energy(transaction, instant, at_mono, begins, newest)
        if newest and "soc" in found:
            transaction.soc = reading.soc
        if found and transaction.status != "active":     # a late one
            reading.end_flow(max(at_mono, reading.flow_mono))
        elif newest:
            self._chart(transaction, at_mono, reading, transaction.energy_wh)
        elif found:                      # of the past: in its place in the chart
            past = Reading(instant.at)
            past.update(instant.at, found)
            self._chart(transaction, at_mono, past, None)
        self.publish("transactions", transaction)
        if transaction.connector is not None:
            transaction.connector.reading = transaction.reading
            self.publish("connections", station)

    def _first_reading(self, transaction: Transaction, instant: Instant) -> Reading:
        """A transaction's first reading: a state may have ended the flow before it came."""
        reading, connector = Reading(instant.at), transaction.connector
        if transaction.charging_state in NO_FLOW:
            reading.end_flow(transaction.state_mono)
        elif connector is not None and connector.status in SUSPENDED:
            reading.end_flow(connector.status_mono)
        return reading

    def _count_energy(self, transaction: Transaction, instant: Instant, at_mono: float,
                      begins: bool, newest: bool) -> None:
        """Take what an instant tells of the energy of a transaction."""
        register = transaction.register
        at_mono = min(at_mono, transaction.stopped_mono)
        if instant.interval_wh is not None:
            register.add_interval(Point(at_mono, instant.at, instant.interval_wh))
        phases = instant.found.get("energy_wh")
        if phases and (not instant.begins or (register.start and not begins)):
            if "" not in phases and newest and transaction.reading:     # others may have come
                register.add_some_phases(Point(at_mono, transaction.reading.at,
                                               transaction.reading.energy_wh or 0.0))
            else:
                register.add(Point(at_mono, instant.at, _total("energy_wh", phases)))
        if instant.begin_wh is not None:                 # told later on: it was some time before
            before_s = 0.0 if instant.begins and register.first_wh is None else BEGUN_BEFORE_S
            register.begin(Point(at_mono - before_s, instant.at - before_s, instant.begin_wh))
        transaction.count_energy()

    def _chart(self, transaction: Transaction, at_mono: float, reading: Reading,
               energy_wh: float | None) -> None:
        """Keep a reading in the series of the transaction, by our wall clock."""
        at = at_mono + self.ahead_s
        if transaction.series is None:
            transaction.series = Series(at)
        transaction.series.add(at, reading.power_w, energy_wh, reading.soc, reading.current_a)

    def charging_state(self, transaction: Transaction, state: str, at_mono: float) -> None:
        """A transaction's state changes; from the times of some on, nothing flows."""
        if state != transaction.charging_state:
            transaction.state_mono = at_mono
            if state in NO_FLOW and transaction.reading:
                transaction.reading.end_flow(at_mono)
        transaction.charging_state = state

    def _occupy(self, station: Station, transaction: Transaction) -> None:
        """Put a transaction at its connector; one that began before the one there is over."""
        if transaction.evse_id == 0:                     # nobody told where it is
            return
        connector = self.connector(station, transaction.evse_id, transaction.connector_id)
        if connector is None:
            return
        there = connector.transaction
        if there and transaction.started_mono + SKEW_TOLERANCE_S < (
                there.latest_mono() if there.began_unseen else there.started_mono):
            transaction.status, transaction.stopped_at = "abandoned", there.started_at
            transaction.stopped_mono = max(transaction.started_mono, there.started_mono)
            transaction.count_energy()
            return
        for evse_id, connector_id in list(station.connectors):       # an EVSE serves one at a time
            if evse_id == transaction.evse_id:
                self.connector_free(station, evse_id, connector_id)
        connector.transaction, transaction.connector = transaction, connector
        connector.interrupted = None

    def _release(self, transaction: Transaction) -> None:
        connector, transaction.connector = transaction.connector, None
        if connector is not None:
            connector.transaction = connector.reading = None     # what flowed flows no more
            connector.released_mono = self.mono()

    # Over a restart

    def restore_station(self, station: Station) -> None:
        """Take over a station that an earlier run knew: offline, and not seen since."""
        station.seen_since_start = False
        station.disconnected_at = (station.disconnected_at or station.last_message_at
                                   or station.connected_at)
        self.stations[station.identity] = station
        self._gone[station.identity] = None
        self.publish("connections", station)

    def restore_transaction(self, transaction: Transaction) -> None:
        """Take over a transaction of an earlier run, the oldest first; a running one goes on."""
        self.transactions.append(transaction)
        self.transaction_of[transaction.identity, transaction.id] = transaction
        transaction.durable_as = transaction.status
        station = self.stations.get(transaction.identity)
        if transaction.status == "active":
            transaction.count_energy()
            if station is not None:
                self._occupy(station, transaction)
            if transaction.reading is not None:
                transaction.reading.stale = True
        if transaction.connector is not None:
            transaction.connector.reading = transaction.reading
        self.publish("transactions", transaction)

    # Smart charging

    def charge_started(self, transaction: Transaction, circuit: str, strategy: str, priority: int,
                       phases: int) -> ChargeSession:
        """The power controller takes a transaction on."""
        now = self.clock()
        session = ChargeSession(transaction.identity, transaction.id, transaction.evse_id,
                                transaction.connector_id, circuit, strategy, priority, phases,
                                now, now)
        self.smart_charge.make_room(lambda record: record.ended_at is not None)
        self.smart_charge.append(session)
        self.publish("smart-charge", session)
        return session

    def charge_updated(self, session: ChargeSession, **facts: Any) -> None:
        """Set what changed of a session, and tell it if something did."""
        news = {name: value for name, value in facts.items() if getattr(session, name) != value}
        for name, value in news.items():
            setattr(session, name, value)
        if news:
            session.updated_at = self.clock()
            self.publish("smart-charge", session)

    def charge_ended(self, session: ChargeSession) -> None:
        """The transaction of a session has ended."""
        self.charge_updated(session, status="ended", allocated_a=0.0, allocated_kw=0.0,
                            target_a=0.0, measured_a=None, reason="The charging has ended",
                            ended_at=self.clock())

    # Relay

    def relayed(self, event: ProxyEvent) -> None:
        """Keep what the relay did."""
        event.size = len(event.payload or "") + len(event.translated or "")
        self.proxy.append(event)
        self.publish("proxy", event)

    def registered(self, station: Station, status: str, heartbeat_s: float | None) -> None:
        """Upstream's answer to a BootNotification counts, not ours."""
        station.heartbeat_s = heartbeat_s or station.heartbeat_s
        station.boot_unanswered = False
        if station.registration != status:
            station.registration = kept(status, 64)
            self.publish("connections", station)

    # Overview

    def sample(self, machine: dict) -> dict:
        """The telemetry now; `machine` is what the process and its host are at."""
        total = self.total_messages
        return {
            "messagesPerSecond": self.rates.per_second(),
            "avgLatencyMs": self.rates.latency_ms(),
            "errorRate": round(self.total_call_errors / total, 6) if total else 0.0,
            "connectionCount": self.online, "peakConnections": self.peak_connections,
            "uptimeSeconds": int(self.mono() - self._started_mono), "totalMessages": total,
            "totalConnections": self.total_connections, "errorCount": self.errors.count,
            "securityEventCount": self.security.count, "systemEventCount": self.system.count,
            "refusedConnections": self.total_refused, **self._charging(), **machine,
        }

    def _charging(self) -> dict:
        """How many transactions run, and the power that their meters tell."""
        active = [t.reading for t in self.transactions.records if t.status == "active"]
        return {"activeTransactions": len(active),
                "powerW": round(sum(r.power_w or 0 for r in active if r and not r.stale), 1)}

    def sampled(self, values: dict) -> None:
        """Keep a telemetry sample and tell it."""
        sample = Sample(self.clock(), values)
        self.telemetry.append(sample)
        self.publish("telemetry", sample)

    def overview(self) -> dict:
        """The counters of GET /api/overview, but for its messages."""
        sample = self.sample({})
        return {"connectedClients": self.online} | {key: sample[key] for key in (
            "totalConnections", "messagesPerSecond", "avgLatencyMs", "errorRate", "uptimeSeconds",
            "totalMessages", "securityEventCount", "errorCount", "systemEventCount")}


NO_ERROR = re.compile(r"(0x)?0*|no.?error|none|ok", re.I)    # what vendors write, too


def _place_name(connector: Connector) -> str:
    if connector.evse_id == 0:
        return "The station"
    return f"Connector {connector.evse_id}" if connector.connector_id <= 1 else (
        f"EVSE {connector.evse_id}, connector {connector.connector_id}")


def _fault(told: dict | Connector) -> str:
    """What is wrong, in one text: error code, the vendor's code and its words; "" if nothing is."""
    get = told.get if isinstance(told, dict) else functools.partial(getattr, told)
    codes = [c for c in (get("error_code"), get("vendor_error_code"))
             if c and not NO_ERROR.fullmatch(c)]
    return ", ".join(codes + [get("info")] * bool(codes and get("info")))


def _shown_cause(cause: dict) -> dict:
    return {"errorCode": cause.get("error_code"), "vendorErrorCode": cause.get("vendor_error_code"),
            "info": cause.get("info")}


# --- Persistence --------------------------------------------------------------------------
# What of the Board outlives a restart, in rows of the State. ROWS declares the fields of each row,
# for both directions. A Keeper puts what changes, and restores it before the first station comes.

RUNNING_AT = 1e11                   # the time of a transaction's rows until it has stopped
CURVE_S = 3600                      # so often the curve of a running one is written
IDS_END = 2**31 - 2**24             # a counter of transaction ids beyond it is none
ROWS_AT_ONCE = 50                   # made, or read, before the loop gets its turn

# {row: {attribute: kind}}. A kind is one of FIELD_KINDS or a row; "?" may be null, "[…]" is a list,
# "(…)" a tuple, "{…}" an object of such values. Those, "flag" and "mono" may be missing, as a
# class has defaults for them. "mono" is a monotonic time, which stands in the row as wall time.
ROWS: dict[str, dict[str, str]] = {
    "Transaction": {
        "id": "id", "identity": "text", "evse_id": "integer", "connector_id": "integer",
        "id_token": "text?", "started_at": "time", "stopped_at": "time?", "status": "text",
        "reason": "text?", "meter_start": "number?", "meter_stop": "number?",
        "energy_wh": "number?", "estimated": "flag", "began_unseen": "flag",
        "assumed_connector": "flag", "start_key": "(scalar)?", "stop_key": "(scalar)?"},
    "Progress": {                        # of a transaction: what it needs to go on
        "register": "Register", "reading": "Reading?", "sequence": "EventSequence?",
        "charging_state": "text?", "soc": "number?", "state_mono": "mono", "started_mono": "mono",
        "stopped_mono": "mono", "interrupted_mono": "mono"},
    "Register": {
        "start": "Point?", "stop": "Point?", "pieced": "flag", "_tracks": "[Track]",
        "_intervals": "[Point]", "_interval_wh": "number?", "_partial_at": "number?",
        "_before_partial": "[Track]", "_stop_is_none": "flag"},
    "Track": {"first": "Point", "last": "Point", "before": "number", "doubted": "integer"},
    "Point": {"mono": "mono", "at": "number", "wh": "number"},
    "Reading": {
        "at": "time", "shown_at": "time?", "energy_wh": "number?", "power_w": "number?",
        "current_a": "{number}", "voltage_v": "{number}", "offered_a": "number?", "soc": "number?",
        "temperature_c": "number?", "frequency_hz": "number?", "derived": "flag",
        "derived_current": "flag", "at_mono": "mono", "flow_mono": "mono", "current_mono": "mono",
        "power_mono": "mono", "ended_mono": "mono", "base": "Base?", "stale": "flag"},
    "Base": {"mono": "mono", "wh": "number"},
    "EventSequence": {"last": "integer?", "at_mono": "mono", "_first": "integer",
                      "_missing": "[integer]", "_beyond": "integer"},
    "Series": {"start": "time", "points": "[[number?]]", "_step": "number"},
    "Station": {
        "identity": "text", "protocol": "text", "remote_address": "text", "connected_at": "time",
        "disconnected_at": "time?", "security_profile": "integer", "message_count": "integer",
        "last_message_at": "time?", "error_count": "integer", "evicted_count": "integer",
        "registration": "text?", "info": "{text}", "connector_list": "[Connector]",
        "quirk_counts": "{integer}", "clock": "StationClock", "heartbeat_s": "number?",
        "pongs": "(flag)"},
    "StationClock": {"shift_s": "number", "_recent": "[number]", "_given": "flag"},
    "Connector": {
        "evse_id": "integer", "connector_id": "integer", "status": "text?", "error_code": "text?",
        "vendor_error_code": "text?", "info": "text?", "problems": "{Problem}", "since": "time?",
        "status_mono": "mono", "released_mono": "mono", "interrupted": "key?"},
    "Problem": {"text": "text?", "mono": "mono"},
    "LoggedMessage": {
        "identity": "text", "protocol": "text", "direction": "text", "type": "text",
        "method": "text", "message_id": "text", "payload": "text", "timestamp": "time",
        "response_ms": "number?", "error_code": "text?", "error_description": "text?"},
    "Event": {
        "kind": "text", "identity": "text", "message": "text", "details": "object",
        "timestamp": "time", "severity": "text?", "kind_name": "text", "prefix": "text"},
    "ProxyEvent": {
        "kind": "text", "identity": "text", "from_protocol": "text", "to_protocol": "text",
        "direction": "text", "method": "text", "timestamp": "time", "message_id": "text",
        "to_method": "text?", "payload": "text?", "translated": "text?", "latency_ms": "number?",
        "error": "text?"},
    "Sample": {"timestamp": "time", "values": "object"},
}


class Progress:
    """What a transaction needs to go on, as its row says: attributes of a Transaction."""


ROW_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (
    Transaction, Progress, Register, Track, Point, Reading, Base, EventSequence, Series, Station,
    StationClock, Connector, Problem, LoggedMessage, Event, ProxyEvent, Sample)}
# What changes with every message of a station: it is written when something else has changed.
COUNTS = ("message_count", "last_message_at", "error_count", "quirk_counts", "clock",
          "status_mono")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e18     # neither NaN nor infinite


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < RUNNING_AT


FIELD_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: type(value) is str, "flag": lambda value: type(value) is bool,
    "integer": lambda value: type(value) is int and abs(value) < 2**63,
    "number": _is_number, "time": _is_time, "mono": _is_time,
    "id": lambda value: type(value) in (int, str), "key": lambda value: type(value) is str,
    "scalar": lambda value: value is None or type(value) is str or _is_number(value),
    "object": lambda value: type(value) is dict,
}
BRACKETS: dict[str, Any] = {"[": list, "(": list, "{": dict}


def packed(kind: str, value: Any, ahead_s: float) -> Any:
    """A value as it stands in a row; `ahead_s` is wall time less monotonic time."""
    if value is None or value is False or value is True:
        return value
    if kind[-1] == "?":
        return packed(kind[:-1], value, ahead_s)
    if kind[0] == "{":
        return {name: packed(kind[1:-1], item, ahead_s) for name, item in value.items()}
    if kind[0] in BRACKETS:
        return [packed(kind[1:-1], item, ahead_s) for item in value]
    if kind == "mono":
        return round(value + ahead_s, 6) if math.isfinite(value) else None
    if kind == "key":
        return value.key
    if kind not in ROWS:
        return value
    fields = {name: packed(inner, getattr(value, name), ahead_s)
              for name, inner in ROWS[kind].items()}
    if isinstance(value, tuple):
        return list(fields.values())
    return {name: item for name, item in fields.items() if item is not None and item is not False
            and (item or ROWS[kind][name][0] not in BRACKETS)}


def unpacked(kind: str, value: Any, ahead_s: float) -> Any:
    """The value that stands in a row so. Raises: WrongType, MissingField."""
    if kind[-1] == "?":
        return None if value is None else unpacked(kind[:-1], value, ahead_s)
    if kind in ROWS:
        return _record_of(kind, value, ahead_s)
    if kind[0] in BRACKETS:
        if not isinstance(value, BRACKETS[kind[0]]):
            raise WrongType(f"{kind} is a {type(value).__name__}")
        if isinstance(value, dict):
            return {name: unpacked(kind[1:-1], item, ahead_s) for name, item in value.items()}
        items = [unpacked(kind[1:-1], item, ahead_s) for item in value]
        return tuple(items) if kind[0] == "(" else items
    if not FIELD_KINDS[kind](value):
        raise WrongType(f"{shown(value)} is no {kind}")
    return value - ahead_s if kind == "mono" else value


def _record_of(kind: str, row: Any, ahead_s: float) -> Any:
    """The record of a row, with the defaults of its class for what may be missing."""
    cls: Any = ROW_CLASSES[kind]
    fields = ROWS[kind]
    if kind in ("Point", "Base", "Problem"):             # tuples stand as lists
        row = dict(zip(fields, row, strict=False)) if type(row) is list else None
    if type(row) is not dict:
        raise WrongType(f"{kind} is none")
    values = {}
    for name, inner in fields.items():
        if inner[-1] == "?" or row.get(name) is not None:
            values[name] = unpacked(inner, row.get(name), ahead_s)
        elif inner not in ("flag", "mono") and inner[-1] not in "])}":
            raise MissingField(f"{kind} has no {name}")
    taken = _parameters(cls) & values.keys()
    record = cls(**{name: values.pop(name) for name in taken})
    for name, value in values.items():
        default = getattr(record, name, None)
        if isinstance(default, deque):
            default.extend(value)
        else:
            setattr(record, name, set(value) if isinstance(default, set) else value)
    return record


@functools.cache
def _parameters(cls: Any) -> frozenset[str]:
    return frozenset(inspect.signature(cls).parameters)


# Finished transactions of the file that are not in memory, `:known`. A row that is no JSON, for
# damage, matches nothing; of one that is shown, the checksum is looked at. SQLite's `lower` knows
# ASCII alone: other letters match as they are.
KEPT_MATCH = """
    kind = 'transaction' AND at < :running AND key NOT IN (SELECT value FROM json_each(:known))
    AND CASE WHEN json_valid(value) THEN
        (:identity IS NULL OR json_extract(value, '$.identity') = :identity)
        AND (:status IS NULL OR json_extract(value, '$.status') = :status)
        AND (:id IS NULL OR CAST(json_extract(value, '$.id') AS TEXT) = :id)
        AND (:text IS NULL OR instr(lower(WORDS), lower(:text)) OR instr(WORDS, :text))
    END""".replace("WORDS", """json_array(
        json_extract(value, '$.identity'), CAST(json_extract(value, '$.id') AS TEXT),
        json_extract(value, '$.id_token'), json_extract(value, '$.reason'))""")
KEPT_COUNT = "SELECT count(*) FROM kept WHERE MATCH".replace("MATCH", KEPT_MATCH)
KEPT_PAGE = """
    SELECT t.kind, t.key, t.at, t.value, t.crc, p.kind, p.key, p.at, p.value, p.crc
    FROM (SELECT * FROM kept WHERE MATCH ORDER BY key DESC LIMIT :limit OFFSET :offset) AS t
    LEFT JOIN kept AS p ON p.kind = 'progress' AND p.key = t.key
    ORDER BY t.key DESC""".replace("MATCH", KEPT_MATCH)
KEPT_AFTER = """
    SELECT t.kind, t.key, t.at, t.value, t.crc, p.kind, p.key, p.at, p.value, p.crc
    FROM (SELECT * FROM kept WHERE MATCH AND key > :after ORDER BY key LIMIT :limit) AS t
    LEFT JOIN kept AS p ON p.kind = 'progress' AND p.key = t.key
    ORDER BY t.key""".replace("MATCH", KEPT_MATCH)
KEPT_GROUPS = """
    SELECT json_group_array(json_array(name, sessions, wh, seconds)) FROM (
        SELECT CASE :by WHEN 'month' THEN strftime('%Y-%m', at, 'unixepoch')
                        WHEN 'day' THEN strftime('%Y-%m-%d', at, 'unixepoch')
                        WHEN 'station' THEN json_extract(value, '$.identity')
                        ELSE coalesce(json_extract(value, '$.id_token'), '') END AS name,
            count(*) AS sessions, total(json_extract(value, '$.energy_wh')) AS wh,
            total(at - json_extract(value, '$.started_at')) AS seconds
        FROM kept WHERE kind = 'transaction' AND at >= :start AND at < :end AND json_valid(value)
            AND key NOT IN (SELECT value FROM json_each(:known)) GROUP BY name)"""
GROUP_OF: dict[str, Callable[[Transaction], str]] = {
    "month": lambda t: (iso(t.stopped_at) or "")[:7],
    "day": lambda t: (iso(t.stopped_at) or "")[:10],
    "station": lambda t: t.identity, "token": lambda t: t.id_token or ""}


class Keeper:
    """Puts what changes on a Board into its State, and restores it at the start.

    Starts, ends and approvals are put with the next write, which comes at once; the rest every
    WRITE_BEHIND_S. A row is made when it is put, however often its record has changed.
    """

    def __init__(self, board: Board):
        self.board, self.state = board, board.state
        self.history = History(board)
        self._run = 0                                # how many runs there were before
        self._changed: dict[Any, None] = {}          # records, to be put when their time comes
        self._urgent: dict[Any, None] = {}           # and with the next write
        self._put_now: list[tuple[Transaction, str]] = []            # with the status put
        self._being_written: list[tuple[Transaction, str]] = []
        self._approved: set[str] = set()             # as it stands in the file
        self._curves: dict[Transaction, float] = {}  # monotonic time of the last put
        self._last_id = 0

    # The start

    def restore(self) -> None:
        """Take over what an earlier run knew, and follow what changes from here on."""
        if not self.state:
            return
        board, most = self.board, self.board.config.store
        self.history.restore()                       # before anything else is an event
        for row in self.state.rows("approval", most.max_connections):
            board.approval_known(row.key)
            self._approved.add(row.key)
        self._restore_counters({row.key: row.value for row in self.state.rows("counter")})
        for station in read_rows(board, "station", most.max_connections, self._station_of):
            board.restore_station(station)
        self._restore_transactions(most.max_transactions)
        board.on_change |= {"transactions": self.transaction_changed,
                            "connections": self.station_changed}
        self.state.sources.append(self.put_all)
        self.state.before_write.append(self._put_urgent)
        self.state.when_written.append(self._written)
        self.state.put("counter", "run", self._run)

    def _restore_counters(self, counters: dict[str, Any]) -> None:
        """A nonsense value must not use the ids up: they have 31 bits."""
        last_id, run = counters.get("transaction_id"), counters.get("run")
        if type(last_id) is int and 0 < last_id < IDS_END:
            self.board.transaction_id_used(last_id)
            self._last_id = last_id
        elif last_id is not None:
            report_skipped(self.board, "counter", [f"transaction_id is {shown(last_id)}"])
        self._run = run + 1 if type(run) is int and 0 <= run < 999_999 else 0

    def _station_of(self, row: StateRow) -> Station:
        station = unpacked("Station", row.value, self._ahead_s(row.at))
        if station.identity != row.key:
            raise WrongValue("it is of another station")
        station.row_crc = _crc_of_station(row.value)
        return station

    def _ahead_s(self, written_at: float) -> float:
        """Wall time less monotonic time, for a row written then.

        A clock that is behind what was written, as one of a Raspberry Pi before it has reached
        its time server, would put all of the past into the future: then the row is of just now.
        """
        return self.board.ahead_s + max(0.0, written_at - self.board.clock())

    def _restore_transactions(self, limit: int) -> None:
        board = self.board
        progress = dict(read_rows(board, "progress", limit, self._progress_of))
        transactions = read_rows(board, "transaction", limit, lambda row: _transaction_of(
            row, progress.get(row.key), board.ahead_s))
        transactions.sort(key=attrgetter("key"))
        running = {t.key: t for t in transactions if t.status == "active"}
        for key, series in read_rows(board, "curve", len(running),
                                     _series_of) if running else ():
            if key in running:
                running[key].series = series
        for transaction in transactions:
            board.restore_transaction(transaction)
        by_key = {t.key: t for t in transactions}
        for station in board.stations.values():
            for connector in station.connectors.values():        # as a key so far
                connector.interrupted = by_key.get(str(connector.interrupted))

    def _progress_of(self, row: StateRow) -> tuple[str, Progress]:
        value = row.value if type(row.value) is dict else {}
        ahead_s = self._ahead_s(unpacked("time", value.get("written_at"), 0.0))
        return row.key, unpacked("Progress", value, ahead_s)

    # What changes

    def transaction_changed(self, transaction: Transaction) -> None:
        """A transaction has changed; its start and its end are urgent."""
        self._changed[transaction] = None
        if transaction.durable_as != "active" or transaction.status != "active":
            self._announce(transaction)

    def station_changed(self, station: Station) -> None:
        """A station has changed; that it was forgotten, or approved, is urgent."""
        self._changed[station] = None
        if station.forgotten or (station.identity in self.board.approved
                                 and station.identity not in self._approved):
            self._announce(station)

    def _announce(self, record: Transaction | Station) -> None:
        if record not in self._urgent:
            self._urgent[record] = None
            self.state.announce()

    async def run(self) -> None:
        """Put what has changed, every WRITE_BEHIND_S, until cancelled."""
        while self.state:
            await asyncio.sleep(WRITE_BEHIND_S)
            await self.put_changed()

    async def put_changed(self) -> None:
        """Put all that has changed, a slice at a time."""
        while self._changed:
            for record in list(islice(self._changed, ROWS_AT_ONCE)):
                self._put(record)
            await asyncio.sleep(0)
        self.state.write_soon()

    def put_all(self) -> None:
        """Put all there is, for a file that is new."""
        board = self.board
        for record in (*board.stations.values(), *board.transactions.records):
            record.row_crc = 0
            self._curves.pop(record, None)
            self._put(record)
        for identity in board.approved:
            self.state.put("approval", identity, True)
        self.state.put("counter", "transaction_id", self._last_id)
        self.state.put("counter", "run", self._run)

    # What is asked of the file

    async def count(self, **wanted: str | None) -> int:
        """How many finished transactions that are no longer in memory match.

        `wanted`: identity, status, id, text. While the file cannot be read, there are none.
        """
        found = await self._ask(KEPT_COUNT, self._values(wanted))
        return found[0][0] if found else 0

    async def page(self, limit: int, offset: int = 0, **wanted: str | None) -> list[Transaction]:
        """Those that match, the newest first."""
        values = self._values(wanted) | {"limit": limit, "offset": offset}
        rows, found = await self._ask(KEPT_PAGE, values) if limit else [], []
        for number, row in enumerate(rows, 1):
            if (transaction := self._kept_transaction(row)) is not None:
                found.append(transaction)
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
        return found

    def slices(self, **wanted: str | None) -> AsyncIterator[list[Transaction]]:
        """All that match and are not in memory now, the oldest first, some at a time."""
        return self._slices(self._values(wanted) | {"limit": ROWS_AT_ONCE, "after": ""})

    async def _slices(self, values: dict[str, Any]) -> AsyncIterator[list[Transaction]]:
        while rows := await self._ask(KEPT_AFTER, values):
            yield [t for row in rows if (t := self._kept_transaction(row))]
            values["after"] = rows[-1][1]

    def _values(self, wanted: dict[str, str | None]) -> dict[str, Any]:
        known = [t.key for t in self.board.transactions.records if t.key]
        text = wanted.get("text")
        return {"identity": None, "status": None, "id": None} | wanted | {
            "running": RUNNING_AT, "known": to_json(known),
            "text": json.dumps(text, ensure_ascii=False)[1:-1] if text else None}

    async def _ask(self, question: str, values: dict[str, Any]) -> list[tuple]:
        return await asked(self.state, lambda db: db.execute(question, values).fetchall())

    def _kept_transaction(self, columns: tuple) -> Transaction | None:
        """The transaction of two rows that were read together, unless it is damaged."""
        row, progress = StateRow(*columns[:4]), None
        with contextlib.suppress(BoardError):
            if columns[8] is not None and State.is_good(StateRow(*columns[5:9]), columns[9]):
                progress = self._progress_of(StateRow(*columns[5:9]))[1]
        with contextlib.suppress(BoardError):
            if State.is_good(row, columns[4]):
                return _transaction_of(row, progress, self.board.ahead_s)
        return None

    async def series(self, transaction: Transaction) -> Series | None:
        """The curve of a transaction: as it is in memory, else as the file has it."""
        if transaction.series is not None:
            return transaction.series
        for *columns, crc in await self._ask(
                "SELECT kind, key, at, value, crc FROM kept WHERE kind = 'curve' AND key = :key",
                {"key": transaction.key}):
            row = StateRow(*columns)
            with contextlib.suppress(BoardError):
                return _series_of(row)[1] if State.is_good(row, crc) else None
        return None

    async def report(self, by: str, start: float, end: float) -> tuple[dict[str, list], bool]:
        """({group: [sessions, Wh, seconds]} of the transactions that ended in that time; whether
        those of the file are among them, or it could not be read)."""
        ended = [t for t in self.board.transactions.records
                 if t.status != "active" and start <= (t.stopped_at or 0) < end]
        unwritten = [t for t in ended if t.durable_as != t.status]
        found = await self._ask(KEPT_GROUPS, {
            "by": by, "start": start, "end": min(end, RUNNING_AT),
            "known": to_json([t.key for t in unwritten if t.key])})
        groups = {name: figures for name, *figures in json.loads(found[0][0])} if found else {}
        for transaction in unwritten if found else ended:
            figures = groups.setdefault(GROUP_OF[by](transaction), [0, 0.0, 0.0])
            figures[0] += 1
            figures[1] += transaction.energy_wh or 0.0
            figures[2] += (transaction.stopped_at or 0.0) - transaction.started_at
        return groups, bool(found)

    def clean(self) -> None:
        """Remove what is older than `transactions_days`."""
        before = self.board.clock() - 86400 * self.board.config.state.transactions_days
        for kind in ("transaction", "progress", "curve"):
            self.state.remove_before(kind, before)
        self.history.clean()

    # Rows

    def _put_urgent(self) -> None:
        if self.board.last_transaction_id != self._last_id:      # given out, whatever came of it
            self._last_id = self.board.last_transaction_id
            self.state.put("counter", "transaction_id", self._last_id)
        for record in self._urgent:
            self._put(record)
        self._urgent.clear()
        first = self.board.transactions.first    # while the disk fails, older ones are let go
        self._being_written = [(t, status) for t, status in self._being_written + self._put_now
                               if t.number >= first]
        self._put_now = []

    def _written(self) -> None:
        """The disk has all that was put."""
        written, self._being_written = self._being_written, []
        for transaction, status in written:
            self.board.now_durable(transaction, status)

    def _put(self, record: Transaction | Station) -> None:
        self._changed.pop(record, None)
        if isinstance(record, Transaction):
            self._put_transaction(record)
        else:
            self._put_station(record)

    def _put_station(self, station: Station) -> None:
        identity, state, now = station.identity, self.state, self.board.clock()
        if station.forgotten:
            if self.board.stations.get(identity) in (None, station):
                state.put("station", identity, None)
            return
        if identity in self.board.approved and identity not in self._approved:
            self._approved.add(identity)
            state.put("approval", identity, True)
        row = packed("Station", station, self.board.ahead_s)
        crc = _crc_of_station(row)
        if crc != station.row_crc:
            station.row_crc = crc
            state.put("station", identity, row, now)

    def _put_transaction(self, transaction: Transaction) -> None:
        if not transaction.key:
            self._name(transaction)
        ahead_s, key = self.board.ahead_s, transaction.key
        runs = transaction.status == "active"
        at = RUNNING_AT if runs else transaction.stopped_at
        row = packed("Transaction", transaction, ahead_s)
        if runs:                         # these follow from its register
            row.pop("energy_wh", None)
            row.pop("estimated", None)
        crc = _crc(row)
        if crc != transaction.row_crc:
            transaction.row_crc = crc
            self.state.put("transaction", key, row, at)
            self._put_now.append((transaction, transaction.status))
        self.state.put("progress", key, packed("Progress", transaction, ahead_s) | {
            "written_at": self.board.clock()}, at)
        self._put_curve(transaction, at)

    def _put_curve(self, transaction: Transaction, at: float | None) -> None:
        """Put the curve of a transaction at its end, and every CURVE_S: it is the largest row."""
        now_mono, ended = self.board.mono(), transaction.status != "active"
        if transaction.series and (
                ended or now_mono - self._curves.get(transaction, -math.inf) >= CURVE_S):
            self.state.put("curve", transaction.key, packed("Series", transaction.series, 0.0), at)
            self._curves[transaction] = now_mono
        if ended:
            self._curves.pop(transaction, None)

    def _name(self, transaction: Transaction) -> None:
        """Give a transaction its key, in the order in which they came over all runs.

        With it goes the station, where that is new.
        """
        transaction.key = f"{self._run:06}-{transaction.number:09}-{self.board.epoch}"
        station = self.board.stations.get(transaction.identity)
        if station is not None and not station.row_crc:
            self._put(station)


async def asked(state: State, ask: Callable[[sqlite3.Connection], list]) -> list:
    """What a function reads from the file; [] where there is none, or it cannot be read."""
    if not state:
        return []
    try:
        return await state.query(ask)
    except Unavailable:
        return []


def read_rows(board: Board, kind: str, limit: int, record_of: Callable[[StateRow], Any],
              most_bytes: float = math.inf) -> list:
    """The records of the newest rows of a kind; what cannot be read is said, and left out."""
    records, skipped = [], []
    for row in board.state.rows(kind, limit, most_bytes):
        try:
            records.append(record_of(row))
        except BoardError as error:
            skipped.append(f"{row.key}: {error}")
    if skipped:
        report_skipped(board, kind, skipped)
    return records


def report_skipped(board: Board, kind: str, reasons: list[str]) -> None:
    """Say that rows of a kind are left out."""
    text = kept(f"{len(reasons)} rows of {kind} are not understood and left out: {reasons[0]}")
    log.error("%s", shown(text, TEXT_KEPT))
    board.system_event("STATE_SKIPPED", "", text, {"kind": kind, "rows": len(reasons)})


def _crc(row: dict) -> int:
    return zlib.crc32(to_json(row).encode())


def _crc_of_station(row: dict) -> int:
    """Of what does not change with every message."""
    steady = [{name: value for name, value in part.items() if name not in COUNTS}
              for part in (row, *row.get("connector_list", ()))]
    steady[0]["connector_list"] = steady[1:]
    return _crc(steady[0] | {"quirks": sorted(row.get("quirk_counts", ()))})


def _transaction_of(row: StateRow, progress: Progress | None, ahead_s: float) -> Transaction:
    """The transaction of a row; without its progress it goes on from its start."""
    transaction = unpacked("Transaction", row.value, ahead_s)
    transaction.key, transaction.row_crc = row.key, _crc(row.value)
    if progress is not None:
        for name, value in vars(progress).items():
            setattr(transaction, name, value)
        return transaction
    transaction.started_mono = transaction.started_at - ahead_s
    if transaction.stopped_at is not None:
        transaction.stopped_mono = transaction.stopped_at - ahead_s
    if transaction.meter_start is not None:
        transaction.register.begin(Point(transaction.started_mono, transaction.started_at,
                                         transaction.meter_start))
    return transaction


def _series_of(row: StateRow) -> tuple[str, Series]:
    return row.key, unpacked("Series", row.value, 0.0)


# The records of the Board's stores, on disk for `history_days`: {topic: their class}. The topic
# is the kind of their rows, the number their key.
HISTORY: dict[str, type] = {"messages": LoggedMessage, "errors": Event, "security": Event,
                            "system": Event, "proxy": ProxyEvent, "telemetry": Sample}
HISTORY_LOOK_S = 1                  # so often it looks whether there is something to put
HISTORY_AT_ONCE, HISTORY_BYTES = 2000, STATE_WAITING_BYTES // 16     # of each store, in one write
HISTORY_PAGE, HISTORY_PAGE_BYTES = 10_000, 16 << 20      # of rows in one answer
NUMBERS_AHEAD = 1_000_000           # numbers that a run may give before it says so on disk

# Rows of a topic whose records are older than memory's, and match; see KEPT_MATCH.
HISTORY_WORDS = " || char(10) || ".join(
    f"coalesce(json_extract(value, '$.{name}'), '')" for name in (
        "identity", "method", "message_id", "error_code", "error_description", "payload"))
HISTORY_SLICE = f"AND key > :after ORDER BY key LIMIT {SLICE}"
HISTORY_TEXT = ("(instr(lower(WORDS), lower(:text)) OR instr(WORDS, :text))"
                .replace("WORDS", HISTORY_WORDS))


class History:
    """Keeps on disk what the Board's stores drop, with `history_days`.

    What waits to be put waits in the stores. So a message costs nothing as it comes, and a disk
    that fails costs no memory; what a store drops before the disk works again is lost.
    """

    def __init__(self, board: Board):
        self.board, self.state = board, board.state
        self.days = board.config.state.history_days if board.state else 0
        self._put = dict.fromkeys(HISTORY, 0)        # {topic: number of the last record put}
        self._writing = self._written = self._put    # being written, and on disk
        self._ahead: dict[str, int] = {}             # {topic: up to here numbers are used up}
        self._put_mono = board.mono()

    def restore(self) -> None:
        """Fill the stores with what earlier runs had last."""
        if not self.days:
            return
        ahead: dict[str, int] = {}
        for row in self.state.rows("numbers"):
            with contextlib.suppress(BoardError):
                ahead = unpacked("{integer}", row.value, 0.0)
        for topic in HISTORY:
            store = self.board.stores[topic]
            records = read_rows(self.board, topic, store.limit, functools.partial(
                _history_record, topic), math.inf if store.max_bytes is None else store.max_bytes)
            records.sort(key=NUMBER_OF)
            last = max(ahead.get(topic, 0), *(record.number for record in records[-1:]), 0)
            store.restore(records, last)
            self._put[topic] = last
        self._written = dict(self._put)
        self._use_up(NUMBERS_AHEAD)
        self.state.sources.append(self._put_all)
        self.state.before_write.append(self._write_begins)
        self.state.when_written.append(self._write_ends)

    async def run(self) -> None:
        """Put what came, when it is much or has waited for WRITE_BEHIND_S, until cancelled."""
        while self.days:
            await asyncio.sleep(HISTORY_LOOK_S)
            if self._is_due() and self.state.failing_since is None and self._put == self._written:
                await self.put()

    def _is_due(self) -> bool:
        if self.board.mono() - self._put_mono >= WRITE_BEHIND_S:
            return True
        for topic in HISTORY:
            store, most = self.board.stores[topic], HISTORY_AT_ONCE
            if store.max_bytes is not None and store.bytes > store.max_bytes // 2:
                most = len(store)        # so many large ones fit into it
            if store.total - self._put[topic] >= max(1, min(most, store.limit) // 4):
                return True
        return False

    async def put(self) -> None:
        """Put what came since the last time, as much as one write should have."""
        self._put_mono = self.board.mono()
        for topic in HISTORY:
            store, size = self.board.stores[topic], 0
            records, lost = store.since(self._put[topic])
            if self._put[topic] >= store.before:
                self.state.lost += lost
            for index, record in enumerate(records[:HISTORY_AT_ONCE]):
                self._put[topic], size = record.number, size + record.size
                self.state.put(topic, _history_key(record.number), packed(HISTORY[topic].__name__,
                               record, 0.0), record.timestamp)
                if size > HISTORY_BYTES:
                    break
                if index % ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        if any(self._ahead[topic] - self.board.stores[topic].total < NUMBERS_AHEAD // 2
               for topic in HISTORY):
            self._use_up(NUMBERS_AHEAD)
        self.clean()
        self.state.write_soon()

    async def put_last(self) -> None:
        """Put all that came, at the end."""
        if not self.days:
            return
        for _ in range(2):               # twice as much as there can be, but for a flood
            if self.state.failing_since is None:
                await self.put()
        self._use_up(0)

    # What is asked of the file: records of a topic with a number below `first`. `wanted` are
    # attributes that must be equal, and a `text` that a message must have.

    async def count(self, topic: str, first: int, wanted: dict[str, str]) -> int:
        """How many match."""
        found = await self._ask("SELECT count(*)", topic, first, wanted)
        return found[0][0] if found else 0

    async def page(self, topic: str, first: int, limit: int, offset: int,
                   wanted: dict[str, str]) -> list:
        """Those that match, the newest first; HISTORY_PAGE at most."""
        if limit <= 0:
            return []
        records, _ = await self._records(
            topic, first, wanted, "ORDER BY key DESC LIMIT :limit OFFSET :offset",
            limit=min(limit, HISTORY_PAGE), offset=offset)
        return records

    async def slices(self, topic: str, first: int,
                     wanted: dict[str, str]) -> AsyncIterator[list]:
        """All that match, the oldest first, some at a time."""
        records, after = await self._records(topic, first, wanted, HISTORY_SLICE, after="")
        while after:
            yield records
            records, after = await self._records(topic, first, wanted, HISTORY_SLICE, after=after)

    async def get(self, topic: str, number: int) -> Any:
        """The record of that number, or None."""
        found = await self.page(topic, number + 1, 1, 0, {})
        return found[0] if found and found[0].number == number else None

    async def _records(self, topic: str, first: int, wanted: dict[str, str], more: str,
                       **values: Any) -> tuple[list, str]:
        """(records; the key of the last row that was read, "" when there is none)."""
        found = await self._ask("SELECT kind, key, at, value, crc", topic, first, wanted, more,
                                lambda rows: [_history_records(topic, rows)], **values)
        return found[0] if found else ([], "")

    async def _ask(self, select: str, topic: str, first: int, wanted: dict[str, str],
                   more: str = "", read: Callable[[Iterable], list] = list,
                   **values: Any) -> list:
        """What `read` makes, in the thread, of the rows that match."""
        if not self.days:
            return []
        tests = [HISTORY_TEXT if name == "text" else f"json_extract(value, '$.{name}') = :{name}"
                 for name in wanted]
        question = f"{select} FROM kept WHERE kind = :topic AND key < :first"
        if tests:
            question += f" AND CASE WHEN json_valid(value) THEN {' AND '.join(tests)} END"
        values |= wanted | {"topic": topic, "first": _history_key(first)}
        return await asked(self.state, lambda db: read(db.execute(f"{question} {more}", values)))

    def clean(self) -> None:
        """Remove what is older than `history_days`."""
        before = self.board.clock() - 86400 * self.days
        for topic in HISTORY if self.state else ():
            self.state.remove_before(topic, before)

    def _use_up(self, ahead: int) -> None:
        """Let the next run number its records behind those that this one may give."""
        self._ahead = {topic: self.board.stores[topic].total + ahead for topic in HISTORY}
        self.state.put("numbers", "", self._ahead, durable=True)

    def _put_all(self) -> None:
        """The file is new: put again what is in memory."""
        for topic in HISTORY:
            self._put[topic] = self.board.stores[topic].first - 1
        self._written, self._put_mono = dict(self._put), -math.inf
        self._use_up(NUMBERS_AHEAD)

    def _write_begins(self) -> None:
        self._writing = dict(self._put)

    def _write_ends(self) -> None:
        self._written = self._writing


def _history_key(number: int) -> str:
    return f"{number:015}"               # sorts as the numbers do


def _history_records(topic: str, rows: Iterable[tuple]) -> tuple[list, str]:
    """(records of rows, without damaged ones, as many as an answer may have; the last key)."""
    records: list[Any] = []
    key, size = "", 0
    for *columns, crc in rows:
        row = StateRow(*columns)
        size += _row_bytes(row)
        if size > HISTORY_PAGE_BYTES and key:
            break
        key = row.key
        with contextlib.suppress(BoardError):
            if State.is_good(row, crc):
                records.append(_history_record(topic, row))
    return records, key


def _history_record(topic: str, row: StateRow) -> Any:
    """The record of a row, with its number. Raises: WrongType, WrongValue, MissingField."""
    record = unpacked(HISTORY[topic].__name__, row.value, 0.0)
    if not re.fullmatch("[0-9]{15}", row.key):
        raise WrongValue("its number is none")
    record.number = int(row.key)
    if isinstance(record, LoggedMessage):
        record.size = sys.getsizeof(record.payload)
    elif isinstance(record, ProxyEvent):
        record.size = len(record.payload or "") + len(record.translated or "")
    return record


# --- Incoming calls -----------------------------------------------------------------------
# What a station may send: one function per Action, and CALLS, the table of them by version.
# Each reads its payload, tells the Board and returns the answer's payload. No I/O.


def answer(board: Board, station: Station, protocol: str, call: Call,
           violation: Violation | None = None,
           transaction_id: int | None = None) -> CallResult | CallError:
    """The answer to a Call; always exactly one, whatever the Call and whatever the handler does.

    `violation` is what the schema found, where it is to be refused; `transaction_id` the one that
    the transaction of a 1.6 StartTransaction has already.

    Spec: OCPP-J 1.6 4.2; 2.0.1 part 4, 4.2.
    """
    try:
        handler = CALLS[protocol].get(call.action)
        if violation:
            if handler and call.action in END_OF_TRANSACTION:        # refused or not, it has ended
                with contextlib.suppress(BoardError):
                    handler(board, station, call.payload)
            raise violation.error(f"{violation.pointer or '/'}: {violation.text}")
        if handler is None:
            raise _unknown_action(board, station, protocol, call.action)
        if call.action in NEEDS_APPROVAL and not board.is_approved(station.identity):
            raise SecurityError("This station is not approved yet")
        telltale = TELLTALES[protocol].get(call.action)
        if telltale is not None and telltale in call.payload:
            board.quirk(station, "other_versions_body")
        if transaction_id is None:
            payload = handler(board, station, call.payload)
        else:
            payload = on_start_transaction(board, station, call.payload, transaction_id)
        return CallResult(call.id_text, payload, to_json(payload) if payload else "{}")
    except BoardError as error:
        return refusal(protocol, call.id_text, error)
    except Exception:
        log.exception("The handler of %s failed on a message of %s", call.action,
                      shown(station.identity))
        return refusal(protocol, call.id_text, BoardError("Internal error"))


def refusal(protocol: str, id_text: str, error: BoardError) -> CallError:
    """The CALLERROR that tells a station of an error."""
    return CallError(id_text, error_code(protocol, error.ocpp_code), kept(error), {}, "{}")


def _unknown_action(board: Board, station: Station, protocol: str, action: str) -> UnknownAction:
    others = [version for version, calls in CALLS.items() if action in calls]
    if others:
        board.quirk(station, "other_versions_action")
        return UnknownAction(f"{action} is of {', '.join(others)}, this connection is {protocol}")
    if action in COMMANDS[protocol]:
        return UnknownAction(f"{action} goes from the central system to the station")
    return UnknownAction(f"{protocol} has no Action {shown(action)}")


def on_boot_notification(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.2; 2.0.1 B01, B02 (Pending). Nothing of it is worth to keep a station out."""
    board.booted(station, _station_info(payload),
                 status := "Accepted" if board.is_approved(station.identity) else "Pending")
    interval = board.config.ocpp.heartbeat_interval_seconds
    station.heartbeat_s = interval if status == "Accepted" else min(interval, PENDING_RETRY_S)
    told = {"status": status, "currentTime": _time_for(board, station),
            "interval": station.heartbeat_s}
    return {name: told[name] for name in BOOT_ANSWER[station.protocol]}


PENDING_RETRY_S = 60                 # how soon a station that waits for approval asks again
INFO_FIELDS = {                      # ours: as 1.6 and 2.x call it
    "vendor": ("chargePointVendor", "vendorName"), "model": ("chargePointModel", "model"),
    "serial": ("chargePointSerialNumber", "chargeBoxSerialNumber", "serialNumber"),
    "firmware": ("firmwareVersion",), "iccid": ("iccid",), "imsi": ("imsi",),
    "meterType": ("meterType",), "meterSerial": ("meterSerialNumber",), "bootReason": ("reason",),
}


def _station_info(payload: dict) -> dict:
    """{our name: text} of either version's body."""
    body = payload
    for inner in ("chargingStation", "modem"):
        if isinstance(body.get(inner), dict):
            body = body | body[inner]
    return {name: next((body[f] for f in fields if isinstance(body.get(f), str)), None)
            for name, fields in INFO_FIELDS.items()}


def on_heartbeat(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.6; 2.0.1 G02."""
    return {"currentTime": _time_for(board, station)}


def _time_for(board: Board, station: Station) -> str:
    """Our time, by which the station is to set its clock (1.6 4.6; 2.0.1 G02.FR.04)."""
    station.clock.give()
    return wire_time(board.clock())


def meant(board: Board, station: Station, word: str, words: frozenset) -> str:
    """A word of the standard that was written in another case, as the standard writes it."""
    if word in words:
        return word
    standard = next((w for w in words if w.lower() == word.strip().lower()), None)
    if standard is None:
        return kept(word, 64)
    board.quirk(station, "word_in_other_case")
    return standard


def _told_time(board: Board, station: Station, payload: dict) -> float | None:
    """The payload's timestamp in UTC seconds; None, and a quirk, if it cannot be read."""
    text = payload.get("timestamp")
    if text is None:
        return None
    try:
        when, zoned = parse_time(text)
    except WrongValue:
        board.quirk(station, "time_unreadable")
        return None
    if not zoned:
        board.quirk(station, "time_without_zone")
    if payload.get("offline") is not True:               # 2.x: it happened when we were away
        board.clock_told(station, when)
    return when


def _token_status(board: Board, station: Station, id_token: str) -> str:
    """Whether the id token may charge. Tokens are case-insensitive (1.6 7.28 CiString)."""
    ocpp = board.config.ocpp
    listed = ocpp.authorize == "any" or any(
        fnmatch.fnmatchcase(id_token.lower(), pattern.lower()) for pattern in ocpp.id_tokens)
    if listed and board.is_approved(station.identity):
        return "Accepted"
    return UNKNOWN_ID_TOKEN[station.protocol]


def on_authorize_16(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.1."""
    return {"idTagInfo": {"status": _token_status(board, station,
                                                  _id_tag(board, station, payload))}}


def _id_tag(board: Board, station: Station, payload: dict) -> str:
    """The idTag; some chargers send null where nobody showed a card."""
    if "idTag" in payload and payload["idTag"] is None:
        board.quirk(station, "id_tag_null")
        return ""
    return kept(required(payload, "idTag", str))


def on_authorize(board: Board, station: Station, payload: dict) -> dict:
    """2.0.1 C01."""
    return {"idTokenInfo": _id_token_info(board, station, required(payload, "idToken", dict))}


def _id_token_info(board: Board, station: Station, id_token: dict) -> dict:
    """Whether an IdToken may charge. Type NoAuthorization, a start button, has none (2.0.1 C02)."""
    text = id_token.get("idToken")
    if id_token.get("type") == "NoAuthorization" and board.is_approved(station.identity):
        return {"status": "Accepted"}
    status = _token_status(board, station, text if isinstance(text, str) else "")
    if status != "Accepted" and is_key_code(id_token):
        status = "Invalid"               # C04.FR.01
    return {"status": status}


def evse_of_16(connector_id: int) -> tuple[int, int]:
    """A connector of 1.6 as (evse_id, connector_id): n is (n, 1), and 0, the station, (0, 0)."""
    return connector_id, min(connector_id, 1)


def on_status_notification_16(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.9."""
    evse_id, connector_id = evse_of_16(required(payload, "connectorId", int))
    board.connector_status(
        station, evse_id, connector_id, _status(board, station, payload),
        _told_time(board, station, payload),
        error_code=kept(payload.get("errorCode") or "NoError", 64),
        vendor_error_code=_text_or_none(payload.get("vendorErrorCode")),
        info=_text_or_none(payload.get("info")))
    return {}


def _status(board: Board, station: Station, payload: dict) -> str:
    """The status of a connector, in either version's field."""
    status = payload.get("status") or payload.get("connectorStatus") or "Unknown"
    return meant(board, station, kept(status, 64), STATUSES[station.protocol])


def _text_or_none(value: Any) -> str | None:
    """A text of the station; the texts for nothing are none."""
    return None if value in (None, "", "null", "NULL", "None") else hide_in_text(kept(value))


def on_status_notification(board: Board, station: Station, payload: dict) -> dict:
    """2.0.1 G01."""
    evse_id, connector_id = required(payload, "evseId", int), required(payload, "connectorId", int)
    board.connector_status(station, evse_id, connector_id, _status(board, station, payload),
                           _told_time(board, station, payload))
    return {}


def on_meter_values_16(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.7."""
    number = "connectorId" if "connectorId" in payload else "evseId"     # of a body of 2.x
    evse_id, connector_id = evse_of_16(lenient(payload, number, int, 0))
    transaction = _metered_transaction(board, station, evse_id, connector_id,
                                       lenient(payload, "transactionId", int, 0))
    _read_meter(board, station, evse_id, connector_id, payload, "meterValue", transaction,
                own=False)
    return {}


def _metered_transaction(board: Board, station: Station, evse_id: int, connector_id: int,
                         transaction_id: int) -> Transaction | None:
    """The transaction that a meter value belongs to.

    One that runs since before our time is adopted by its id, where its connector may be charging
    and we know of none: some chargers send a constant, or the id of one that has ended.
    """
    known = board.transaction(station, transaction_id)
    connector = station.connectors.get((evse_id, connector_id))
    running = connector.transaction if connector else None
    if known is not None and known.status != "orphan":
        if running is None or known.evse_id == evse_id:
            return known
        board.quirk(station, "other_transaction_id")
        return running
    if transaction_id <= 0 or evse_id <= 0 or known is not None:
        return running
    if (running and not running.began_unseen) or transaction_id in CONSTANT_IDS or (
            connector and not _may_be_charging(connector)):
        board.quirk(station, "other_transaction_id")
        return running
    return board.transaction_adopted(station, transaction_id, evse_id, connector_id, None, None)


def _may_be_charging(connector: Connector) -> bool:
    """Whether a transaction may run there that we have not heard of."""
    if connector.status is None:
        return connector.released_mono == -math.inf
    return connector.status in CHARGING and connector.status_mono > connector.released_mono


CONSTANT_IDS = frozenset((2**31 - 1, 2**32 - 1, 2**63 - 1))     # what nothing was ever called


def on_meter_values(board: Board, station: Station, payload: dict) -> dict:
    """2.0.1 J01. EVSE 0 is the station's own meter."""
    evse_id = required(payload, "evseId", int)
    connector_id = _likely_connector(station, evse_id)
    connector = station.connectors.get((evse_id, connector_id))
    _read_meter(board, station, evse_id, connector_id, payload, "meterValue",
                connector.transaction if connector else None)
    return {}


def _likely_connector(station: Station, evse_id: int) -> int:
    """The connector meant where only an EVSE is told: one in use, else the only one, or 1."""
    connectors = [c for (e, _), c in sorted(station.connectors.items()) if e == evse_id]
    for in_use in (lambda c: c.transaction, lambda c: c.status == "Occupied",
                   lambda c: len(connectors) == 1):
        if found := next(filter(in_use, connectors), None):
            return found.connector_id
    return min(evse_id, 1)


def _read_meter(board: Board, station: Station, evse_id: int, connector_id: int, payload: dict,
                key: str, transaction: Transaction | None, own: bool = True,
                not_before: float = -math.inf) -> list[Instant]:
    """Read the MeterValues in `key` into the Board. Returns what is in them, oldest first."""
    if payload.get(key) is None:
        return []
    quirks: list[str] = []
    instants = read_meter_values(payload[key], board.clock(), quirks)
    if instants and payload.get("offline") is not True:
        board.clock_told(station, instants[-1].at)
    for instant in instants:
        board.metered(station, evse_id, connector_id, instant, transaction, own, not_before)
    if quirks:
        if transaction is None or not EXPORT_IS_ODD[station.protocol]:
            quirks = [name for name in quirks if name != "export"]
        for name, count in Counter(quirks).items():
            board.quirk(station, name, count)
    return instants


def on_start_transaction(board: Board, station: Station, payload: dict,
                         transaction_id: int | None = None) -> dict:
    """1.6 4.8. The transaction gets an id whatever the id token is worth: it runs already.

    `transaction_id` is the one that upstream gave it, or that upstream was told of.
    """
    evse_id, connector_id = evse_of_16(required(payload, "connectorId", int))
    id_tag = _id_tag(board, station, payload)
    meter_start = _told_register(board, station, payload, "meterStart")
    started_at = _told_time(board, station, payload)
    readable = started_at is not None
    start_key = (evse_id, id_tag, started_at if readable else kept(payload.get("timestamp")),
                 meter_start)
    transaction = board.same_start(station, start_key, math.inf if readable else RESUMED_S)
    if transaction is None and transaction_id is None:
        transaction = _same_start_restamped(board, station, evse_id, start_key)
    if transaction is None:
        transaction = board.transaction_started(
            station, transaction_id or _free_transaction_id(board, station), evse_id, connector_id,
            id_tag, started_at, meter_start, start_key)
    else:
        board.transaction_alive(station, transaction, board.mono())
    # Some clients take the second value for the id: the order is the schema's.
    return {"idTagInfo": {"status": _token_status(board, station, id_tag)},
            "transactionId": transaction.id}


def _same_start_restamped(board: Board, station: Station, evse_id: int,
                          start_key: tuple) -> Transaction | None:
    """The transaction that just began there alike, but for its time: some stamp each repetition."""
    connector = station.connectors.get((evse_id, min(evse_id, 1)))
    there = connector.transaction if connector else None
    alike = there is not None and there.start_key is not None and there.reading is None and (
        (*there.start_key[:2], there.start_key[3]) == (*start_key[:2], start_key[3])) and (
        board.mono() - there.started_mono <= RESUMED_S)
    return there if alike else None


def _told_register(board: Board, station: Station, payload: dict, key: str) -> float | None:
    """meterStart or meterStop."""
    if type(payload.get(key)) is str:
        board.quirk(station, "number_as_text")
    return lenient(payload, key, float)


def _free_transaction_id(board: Board, station: Station) -> int:
    """An id that this station has not used either (it may have told us one that we adopted)."""
    while board.transaction(station, number := board.new_transaction_id()):
        pass
    return number


def on_stop_transaction(board: Board, station: Station, payload: dict) -> dict:
    """1.6 4.10. A stop of an unknown transaction is kept as an orphan, unless it is clear which
    one is meant.

    Raises: MissingField, WrongType (no transactionId that can be read, and it is not clear).
    """
    transaction_id = lenient(payload, "transactionId", int)
    meter_stop = _told_register(board, station, payload, "meterStop")
    id_tag = lenient(payload, "idTag", str)
    # "MAY only be omitted when the Reason is Local" (1.6 6.49)
    reason = kept(payload.get("reason") or "Local", 64)
    stopped_at = _told_time(board, station, payload)
    stop_key = (stopped_at, meter_stop)
    transaction = board.transaction(station, transaction_id)
    if transaction is None or (transaction.status == "orphan" and transaction.stop_key != stop_key):
        transaction = _stopped_by_unknown_id(board, station, id_tag, stopped_at, meter_stop)
        if transaction is None:
            transaction = board.transaction_orphaned(
                station, required(payload, "transactionId", int), 0, 0, id_tag and kept(id_tag),
                stopped_at)
            transaction.stop_key = stop_key
    if transaction.stopped_at is None or transaction.status == "abandoned":
        _read_meter(board, station, transaction.evse_id, transaction.connector_id, payload,
                    "transactionData", transaction)
        board.transaction_stopped(transaction, stopped_at, meter_stop, reason)
    return {"idTagInfo": {"status": "Accepted" if id_tag is None
                          else _token_status(board, station, id_tag)}}


def _stopped_by_unknown_id(board: Board, station: Station, id_tag: str | None,
                           stopped_at: float | None, meter_stop: float | None
                           ) -> Transaction | None:
    """The running transaction that a stop under an unknown id ends, if that is beyond doubt.

    Only one runs, the idTag is its own or none, and time and register are not before its last
    reading. The same stop again finds the one that it ended before.
    """
    stop_key = (stopped_at, meter_stop)
    again = stopped_at is not None and board.transactions.newest(
        1, lambda t: t.identity == station.identity and t.stop_key == stop_key
        and t.status == "stopped")
    if again:
        return again[0]
    running = board.running(station)
    if len(running) != 1:
        return None
    transaction, at_mono = running[0], board.mono_of(station, stopped_at)
    own_tag = id_tag is None or transaction.id_token is None or (
        id_tag.lower() == transaction.id_token.lower())
    if not own_tag or at_mono < transaction.latest_mono() - SKEW_TOLERANCE_S or (
            meter_stop or 0) < (transaction.register.last_wh or 0):
        return None
    board.quirk(station, "stop_of_unknown_id")
    transaction.stop_key = stop_key
    return transaction


def on_transaction_event(board: Board, station: Station, payload: dict) -> dict:
    """2.0.1 E01 to E12. Events may come late, twice, out of order, or of a transaction that began
    before us."""
    info = required(payload, "transactionInfo", dict)
    transaction_id = kept(required(info, "transactionId", str), 64)
    event_type = meant(board, station, required(payload, "eventType", str), EVENT_TYPES)
    # 1. which transaction it is, where
    when = _told_time(board, station, payload)
    at_mono = board.mono_of(station, when)
    id_token = lenient(payload, "idToken", dict)
    token = _shown_token(id_token) if id_token else None
    evse = lenient(payload, "evse", dict, {})
    evse_id, connector_id = lenient(evse, "id", int, 0), lenient(evse, "connectorId", int)
    transaction = board.transaction(station, transaction_id)
    if transaction and evse_id and transaction.evse_id not in (0, evse_id):
        transaction = board.transaction_at(station, transaction_id, evse_id)
    if not evse_id and event_type == "Updated" and (transaction is None or not transaction.evse_id):
        evse_id = _likely_evse(station)
    if event_type == "Started" and transaction and _is_another(transaction, at_mono):
        transaction = None
    if transaction is None:
        place = evse_id, (_likely_connector(station, evse_id) if connector_id is None
                          else connector_id)
        begin = TRANSACTION_BEGINS.get(event_type, Board.transaction_adopted)
        transaction = begin(board, station, transaction_id, *place, token, when)
        transaction.assumed_connector = connector_id is None
        transaction.sequence = EventSequence()
    elif event_type == "Started":
        board.start_seen(station, transaction, token, when)
    # 2. where it stands among those that came: a clock may have fallen back between two
    sequence = transaction.sequence or EventSequence()
    former_mono = sequence.at_mono
    newest = sequence.add(lenient(payload, "seqNo", int), at_mono)
    live = newest and payload.get("offline") is not True
    not_before = former_mono if live else -math.inf
    if newest:
        board.transaction_alive(station, transaction, max(at_mono, not_before))
    board.transaction_located(station, transaction, evse_id, connector_id)
    # 3. what the meter says; the first register is the start's, the last one the stop's
    instants = [] if event_type == "Ended" and transaction.status == "stopped" and (
        transaction.meter_stop is not None) else _read_meter(
        board, station, transaction.evse_id, transaction.connector_id, payload, "meterValue",
        transaction, not_before=not_before)
    registers = [wh for i in instants if (wh := i.register_wh()) is not None]
    if event_type == "Started" and registers:
        board.started_at_register(transaction, when, registers[0])
    # 4. what became of it; a stop's id token, often another one, is not who charged
    state = lenient(info, "chargingState", str)
    if state and newest and transaction.status == "active":
        board.charging_state(transaction, meant(board, station, state, CHARGING_STATES),
                             max(at_mono, not_before))
    board.transaction_updated(transaction,
                              id_token=token if transaction.id_token is None else None)
    if event_type == "Ended" and (transaction.stopped_at is None
                                  or transaction.status == "abandoned"):
        ends = [i.end_wh for i in instants if i.end_wh is not None] or registers
        board.transaction_stopped(transaction, when, ends[-1] if ends else None,
                                  kept(info.get("stoppedReason") or "Local", 64))
    return {"idTokenInfo": _id_token_info(board, station, id_token)} if id_token else {}


def _shown_token(id_token: dict) -> str | None:
    """An IdToken as records show it: "key codes should never appear in logs" (C04.FR.04)."""
    return HIDDEN if is_key_code(id_token) else _text_or_none(id_token.get("idToken"))


def _likely_evse(station: Station) -> int:
    """Where a transaction is that began before us: only its first event has to tell (2.0.1 E01).

    At the only EVSE, or the only one with a car and no transaction; 0 where that is not clear.
    """
    evses: dict[int, list] = {}
    for (evse_id, _), connector in station.connectors.items():
        if evse_id:
            evses.setdefault(evse_id, []).append(connector)
    free = [evse_id for evse_id, connectors in evses.items()
            if not any(connector.transaction for connector in connectors)]
    if len(evses) > 1:
        free = [evse_id for evse_id in free
                if any(connector.status == "Occupied" for connector in evses[evse_id])]
    return free[0] if len(free) == 1 else 0


def _is_another(transaction: Transaction, at_mono: float) -> bool:
    """Whether a Started of a known id begins another transaction: some stations use ids again."""
    if not transaction.began_unseen and at_mono > transaction.started_mono + SKEW_TOLERANCE_S:
        return True
    return transaction.stopped_at is not None and at_mono > transaction.stopped_mono


def on_notify_event(board: Board, station: Station, payload: dict) -> dict:
    """2.0.1 N07, of which G01 is a case: a connector's status may come as AvailabilityState."""
    for event in lenient(payload, "eventData", list, []):
        component = lenient(event, "component", dict, {}) if isinstance(event, dict) else {}
        variable = lenient(event, "variable", dict, {}) if component else {}
        name = (lenient(component, "name", str, ""), lenient(variable, "name", str, ""))
        evse = lenient(component, "evse", dict, {})
        evse_id = lenient(evse, "id", int, 0)
        connector_id = lenient(evse, "connectorId", int)
        place = evse_id, (_likely_connector(station, evse_id) if connector_id is None
                          else connector_id)
        told = lenient(event, "actualValue", str, "") if component else ""
        if name == ("Connector", "AvailabilityState") and told:
            board.connector_status(station, *place,
                                   meant(board, station, told, STATUSES[station.protocol]),
                                   _told_time(board, station, event))
        elif component and name not in REPORTING:
            words = (name[0], lenient(component, "instance", str), name[1],
                     lenient(variable, "instance", str))
            _read_alert(board, station, place, connector_id,
                        kept(" ".join(filter(None, words)), 100), event)
    return {}


def _read_alert(board: Board, station: Station, place: tuple[int, int], connector_id: int | None,
                name: str, event: dict) -> None:
    """An event that may say that something is wrong, or not any more."""
    told, when = lenient(event, "actualValue", str, ""), _told_time(board, station, event)
    if event.get("cleared") is True or told.lower() == "false":
        board.alert_over(station, place[0], connector_id, name, when)
    elif meant(board, station, lenient(event, "trigger", str, ""),
               EVENT_TRIGGERS) == "Alerting":
        told = HIDDEN if _SECRET_WORD.search(name) else "" if told.lower() == "true" else told
        words = (told, lenient(event, "techCode", str), lenient(event, "techInfo", str))
        board.connector_alert(station, *place, name,
                              kept(hide_in_text(", ".join(filter(None, words))) or "reported"),
                              when)


def on_security_event_notification(board: Board, station: Station, payload: dict) -> dict:
    """1.6 security extension A04; 2.0.1 A04."""
    kind = kept(required(payload, "type", str), 64)
    tech_info = _text_or_none(payload.get("techInfo"))
    _told_time(board, station, payload)
    board.security_event("ANOMALY", station.identity, f"The station reports {kind}",
                         EVENT_SEVERITY.get(kind, "medium"),
                         {"ip": station.remote_address, "type": kind, "techInfo": tech_info})
    return {}


def on_get_certificate_chain_status(board: Board, station: Station, payload: dict) -> dict:
    """2.1 A05 and M07: we ask no OCSP responder, so each status is Failed."""
    requests = [r for r in required(payload, "certificateStatusRequests", list)
                if isinstance(r, dict)][:4]
    if not requests:
        raise MissingField("certificateStatusRequests holds no request")
    return {"certificateStatus": [
        {"certificateHashData": _hash_data(required(request, "certificateHashData", dict)),
         "source": "CRL" if request.get("source") == "CRL" else "OCSP",
         "status": "Failed", "nextUpdate": wire_time(board.clock())} for request in requests]}


def _hash_data(told: dict) -> dict:
    """The same CertificateHashData, but nothing beyond what the standard gives it."""
    longest = {"hashAlgorithm": 6, "issuerNameHash": 128, "issuerKeyHash": 128, "serialNumber": 40}
    data = {name: required(told, name, str) for name in longest}
    if data["hashAlgorithm"] not in ("SHA256", "SHA384", "SHA512") or any(
            len(data[name]) > length for name, length in longest.items()):
        raise WrongValue("certificateHashData is not what the standard allows")
    return data


def on_vat_number_validation(board: Board, station: Station, payload: dict) -> dict:
    """2.1 I11: there is no register to ask."""
    return {"vatNumber": required(payload, "vatNumber", str)[:20], "status": "Rejected"}


def _progress(name: str) -> Callable:
    """A handler that keeps the `status` in the station's data under this name."""
    def on_progress(board: Board, station: Station, payload: dict) -> dict:
        board.told(station, **{name: required(payload, "status", str)})
        return {}
    return on_progress


def _constant(**answer: str) -> Callable:
    """A handler for what is on record already and has but one answer from us."""
    return lambda board, station, payload: dict(answer)


def _car_needs(without_limit: str) -> Callable:
    """A handler for what a car needs: where the limits are ours, one by it follows (K15.FR.03)."""
    def on_car_needs(board: Board, station: Station, payload: dict) -> dict:
        follows = board.power is not None and board.power.car_needs(station, payload)
        return {"status": "Processing" if follows else without_limit}
    return on_car_needs


def on_notify_ev_charging_schedule(board: Board, station: Station, payload: dict) -> dict:
    """K15.FR.10, K15.FR.11: what a car plans is within its limit, or it is sent again."""
    fits = board.power is None or board.power.car_schedule(station, payload)
    return {"status": "Accepted" if fits else "Rejected"}


TRANSACTION_BEGINS: dict[str, Callable] = {
    "Started": Board.transaction_started, "Ended": Board.transaction_orphaned}
END_OF_TRANSACTION = frozenset(("StopTransaction", "TransactionEvent"))
DURABLE = END_OF_TRANSACTION | {"StartTransaction"}          # answered when the disk has it
CALLS_16 = {
    "Authorize": on_authorize_16,
    "BootNotification": on_boot_notification,
    "DataTransfer": _constant(status="UnknownVendorId"),
    "DiagnosticsStatusNotification": _progress("diagnosticsStatus"),
    "FirmwareStatusNotification": _progress("firmwareStatus"),
    "Heartbeat": on_heartbeat,
    "LogStatusNotification": _progress("logStatus"),
    "MeterValues": on_meter_values_16,
    "SecurityEventNotification": on_security_event_notification,
    "SignCertificate": _constant(status="Rejected"),         # we are no certificate authority
    "SignedFirmwareStatusNotification": _progress("firmwareStatus"),
    "StartTransaction": on_start_transaction,
    "StatusNotification": on_status_notification_16,
    "StopTransaction": on_stop_transaction,
}
CALLS_201 = {
    "Authorize": on_authorize,
    "BootNotification": on_boot_notification,
    "ClearedChargingLimit": _constant(),
    "DataTransfer": _constant(status="UnknownVendorId"),
    "FirmwareStatusNotification": _progress("firmwareStatus"),
    "Get15118EVCertificate": _constant(status="Failed", exiResponse=""),
    "GetCertificateStatus": _constant(status="Failed"),
    "Heartbeat": on_heartbeat,
    "LogStatusNotification": _progress("logStatus"),
    "MeterValues": on_meter_values,
    "NotifyChargingLimit": _constant(),
    "NotifyCustomerInformation": _constant(),
    "NotifyDisplayMessages": _constant(),
    "NotifyEVChargingNeeds": _car_needs("Rejected"),
    "NotifyEVChargingSchedule": on_notify_ev_charging_schedule,
    "NotifyEvent": on_notify_event,
    "NotifyMonitoringReport": _constant(),
    "NotifyReport": _constant(),
    "PublishFirmwareStatusNotification": _progress("publishFirmwareStatus"),
    "ReportChargingProfiles": _constant(),
    "ReservationStatusUpdate": _constant(),
    "SecurityEventNotification": on_security_event_notification,
    "SignCertificate": _constant(status="Rejected"),
    "StatusNotification": on_status_notification,
    "TransactionEvent": on_transaction_event,
}
CALLS_21 = CALLS_201 | {
    "BatterySwap": _constant(),
    "ClosePeriodicEventStream": _constant(),
    "GetCertificateChainStatus": on_get_certificate_chain_status,
    "NotifyDERAlarm": _constant(),
    "NotifyDERStartStop": _constant(),
    "NotifyEVChargingNeeds": _car_needs("NoChargingProfile"),
    "NotifyPriorityCharging": _constant(),
    "NotifySettlement": _constant(),
    "NotifyWebPaymentStarted": _constant(),
    "OpenPeriodicEventStream": _constant(status="Accepted"),
    "PullDynamicScheduleUpdate": _constant(status="Rejected"),
    "ReportDERControl": _constant(),
    "VatNumberValidation": on_vat_number_validation,
}
CALLS = {"ocpp1.6": CALLS_16, "ocpp2.0.1": CALLS_201, "ocpp2.1": CALLS_21}
SENDS = {"ocpp1.6": (), "ocpp2.0.1": (), "ocpp2.1": ("NotifyPeriodicEventStream",)}
RECEIVED = {version: {*calls, *SENDS[version]} for version, calls in CALLS.items()}


# --- Outgoing calls -----------------------------------------------------------------------
# An Exchange has the Calls of one side of a connection, one at a time. A Link is one live
# connection of a station: it takes what the station sends, answers, and sends commands.


@dataclass(slots=True, eq=False)
class Pending:
    """A Call that is under way, or one that was given up."""

    call: Call
    sent_mono: float
    record: LoggedMessage | None = None
    message: Any = None                 # the CallResult or CallError
    frame: str = ""                     # that it came in
    future: asyncio.Future | None = None


class Exchange:
    """The Calls of one side of a connection: one at a time, answered, timed out, or late.

    "A Charge Point or Central System SHOULD NOT send a CALL message to the other party unless all
    the CALL messages it sent before have been responded to" (OCPP-J 1.6 4.1.1).
    """

    def __init__(self, write: Callable[[str], Any],
                 keep: Callable[[Call], LoggedMessage | None] = lambda call: None,
                 now: Callable[[], float] = time.monotonic):
        """`write` sends a frame; `keep` puts a Call on record when it is sent."""
        self.pending: Pending | None = None
        self._write, self._keep, self._now = write, keep, now
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._closed = ""                # why, once it is
        self._given_up: OrderedDict[str, Pending] = OrderedDict()

    async def call(self, call: Call, frame: str = "", timeout_s: float = 30) -> Pending:
        """Send a Call when those before it have ended, and wait for its answer.

        Raises: Busy (too many wait), Conflict (the connection has ended), NoAnswer.
        """
        if self._waiting >= CALLS_WAITING:
            raise Busy("Too many commands wait for this station")
        self._waiting += 1
        try:
            async with self._turn:
                pending = self.begin(call, frame or pack(call))
                pending.future = asyncio.get_running_loop().create_future()
                try:
                    async with asyncio.timeout(timeout_s):
                        await pending.future
                except TimeoutError:
                    raise NoAnswer(f"The station did not answer within {timeout_s} s") from None
                finally:
                    if self.pending is pending:
                        self.give_up()
                return pending
        finally:
            self._waiting -= 1

    def begin(self, call: Call, frame: str) -> Pending:
        """Send a Call, whose answer comes by `answered`. Raises: Conflict."""
        if self._closed:
            raise Conflict(self._closed)
        self.pending = pending = Pending(call, self._now(), self._keep(call))
        self._write(frame)
        return pending

    def answered(self, message: CallResult | CallError, frame: str) -> tuple[Pending | None, bool]:
        """Take an answer: (what it is to, or None if that was never sent; whether it is late)."""
        pending, late = self.pending, False
        if pending is not None and same_id(message.id_text, pending.call.id_text):
            self.pending = None
        else:
            pending, late = self._given_up.pop(message.id_text, None), True
        if pending is not None:
            pending.message, pending.frame = message, frame
            if pending.future is not None and not pending.future.done():
                pending.future.set_result(None)
        return pending, late

    def give_up(self, error: BoardError | None = None) -> None:
        """Wait no more for the answer to the Call under way; a late one will be known.

        Who awaits it is told the error.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            if error is not None and pending.future is not None and not pending.future.done():
                pending.future.set_exception(error)
            self._given_up[pending.call.id_text] = pending
            if len(self._given_up) > LATE_CALLS_KEPT:
                self._given_up.popitem(last=False)

    def close(self, reason: str) -> None:
        """The connection has ended: whoever waits is told, and nothing is sent any more."""
        self._closed = reason
        pending, self.pending = self.pending, None
        if pending is not None and pending.future is not None and not pending.future.done():
            pending.future.set_exception(Conflict(reason))


class Upstream(Protocol):
    """Whoever takes what a station says to a system upstream; its answers come from there."""

    def station_called(self, call: Call, frame: str, started: float,
                       record: LoggedMessage) -> None:
        """Take a Call, to be answered by `Link.pass_answer`."""

    def station_said(self, message: Send | CallResultError, frame: str) -> None:
        """Take what needs no answer."""

    def station_left(self, link: "Link") -> None:
        """The connection is over."""


class Link:
    """One live connection of a station; `write(text)` and `close(code, reason)` are its socket."""

    def __init__(self, board: Board, schemas: Schemas | None, protocol: str,
                 write: Callable[[str], Any], close: Callable[[int, str], Any]):
        self.board, self.schemas, self.protocol = board, schemas, protocol
        self.write, self.close = write, close
        self.station: Station                        # set by `start`
        self.upstream: Upstream | None = None        # of a station that goes on to one
        self.via = ""                                # the boards whose relays it came through
        self.ended = ""                              # why, once it has
        self._strict = board.config.ocpp.validate == "strict"
        self._durable = DURABLE if board.state else frozenset()
        self._budget = Budget(board.config.ocpp.max_calls_per_second, time.perf_counter())
        self.exchange = Exchange(self._write, self._keep_command)

    def start(self, identity: str, address: str, security_profile: int,
              quirks: Iterable[str]) -> None:
        """The connection is open: an older one of the same identity ends."""
        replaced = self.board.connected(identity, self.protocol, address, self, security_profile)
        self.station = self.board.stations[identity]
        if self.station.budget:              # a new connection is no new allowance
            self._budget = self.station.budget
        self.station.budget = self._budget
        for name in quirks:
            self.board.quirk(self.station, name, in_message=False)
        if replaced:
            replaced.end("replaced by a newer connection", 1000)

    def end(self, reason: str, code: int | None = None) -> None:
        """The connection is over, or is to be: with `code` the socket is closed as well."""
        if not self.ended:
            self.ended = reason
            self.board.disconnected(self.station.identity, self, reason)
            self.exchange.close(f"The connection ended: {reason}")
            if self.upstream:
                self.upstream.station_left(self)
        if code is not None:
            self.close(code, reason)

    # Frames in

    def receive(self, frame: str | bytes) -> Awaitable | None:
        """Take a frame. Where it has to wait, what it waits for is returned, to be awaited."""
        started = time.perf_counter()
        wait_s = self._budget.take(started, 1 + len(frame) // COSTLY_BYTES)
        if wait_s:
            return self._receive_later(frame, wait_s)
        return self._receive(frame, started)

    async def _receive_later(self, frame: str | bytes, wait_s: float) -> None:
        if self._budget.tell():
            limit = self.board.config.ocpp.max_calls_per_second
            self.board.security_event(
                "RATE_LIMIT", self.station.identity, f"Over {limit} messages a second: they wait",
                "medium", {"ip": self.station.remote_address})
        await asyncio.sleep(wait_s)
        later = self._receive(frame, time.perf_counter())
        if later is not None:
            await later

    def _receive(self, frame: str | bytes, started: float) -> Awaitable | None:
        if self.ended:                   # it would be kept as answered, and is not: it comes again
            return None
        try:
            message, text = self._unpack(frame)
        except BadFrame as error:
            return self._refuse(frame, error)
        if self.schemas is not None and isinstance(message, (Call, Send)) and (
                not self.schemas.ready(self.protocol, message.action)
                and message.action in RECEIVED[self.protocol]):
            return self._take_when_ready(message, text, started, self.schemas)
        if type(message) is Call:
            return self._answer(message, text, started)
        return TAKERS[type(message)](self, message, text)

    def _unpack(self, data: str | bytes) -> tuple[Message, str]:
        """(the message, its frame as text; "" where that had to be mended)."""
        if isinstance(data, bytes):
            self.board.quirk(self.station, "binary_frame")
        frame = data if isinstance(data, str) else data.decode("utf-8", "replace")
        try:
            message = unpack(frame)
        except BadFrame as error:
            try:
                message, faults = unpack_mended(frame)
            except BadFrame:
                raise error from None
            for name in faults:
                self.board.quirk(self.station, name)
            self.board.error("BAD_MESSAGE", self.station, f"{error}; mended",
                             {"raw": raw_without_secrets(frame), "faults": faults})
            frame = ""
        if message.id_text[0] != '"':
            self.board.quirk(self.station, "message_id_not_a_string")
        return message, frame

    async def _take_when_ready(self, message: Call | Send, frame: str, started: float,
                               schemas: Schemas) -> None:
        await schemas.prepare(self.protocol, message.action)
        if self.ended:
            return
        if isinstance(message, Send):
            self._sent(message, frame)
        elif flushed := self._answer(message, frame, started):
            await flushed

    def _answer(self, call: Call, frame: str, started: float) -> Awaitable | None:
        """Answer a Call, keep both frames. Returns what to await if the socket is clogged.

        Where the station goes on upstream, the answer comes from there, by `pass_answer`.
        """
        board, station, protocol = self.board, self.station, self.protocol
        violation = self._violation(call, call.action, "Request") if self.schemas else None
        if self.upstream is not None:
            record = board.message(station, "IN", "CALL", call.action, message_id(call.id_text),
                                   without_secrets(call.action, call.payload, call.text))
            if call.action == "BootNotification":
                station.boot_unanswered = True
            self.upstream.station_called(call, frame or pack(call), started, record)
            return None
        reply = answer(board, station, protocol, call, violation if self._strict else None)
        if call.action in self._durable and (waits := self._until_durable(call)) is not None:
            record = board.message(station, "IN", "CALL", call.action, message_id(call.id_text),
                                   without_secrets(call.action, call.payload, call.text))
            return self._answer_later(waits, record, reply, started)
        flushed = self._write(pack(reply))
        response_ms = (time.perf_counter() - started) * 1000
        action, id_ = call.action, message_id(call.id_text)
        known = action if action in RECEIVED[protocol] else ""   # else who knows what is in it
        board.message(station, "IN", "CALL", action, id_,
                      without_secrets(known, call.payload, call.text), response_ms)
        self._keep_answer(reply, action, id_, response_ms, "We")
        return flushed

    def _until_durable(self, call: Call) -> Awaitable[bool] | None:
        """What the answer to a start or an end of a transaction waits for, if anything."""
        if call.payload.get("eventType") == "Updated":
            return None
        state = self.board.state
        waits = state.committed()
        if waits is None and state.failing_since is not None:
            self.board.answered_early(self.station)
        return waits

    async def _answer_later(self, waits: Awaitable[bool], record: LoggedMessage,
                            reply: CallResult | CallError, started: float) -> None:
        """Answer a Call when the disk has what it said, or does not get it in time."""
        if not await waits:
            self.board.answered_early(self.station)
        self.pass_answer(record, reply, pack(reply), started, "We")

    def pass_answer(self, record: LoggedMessage, reply: CallResult | CallError, frame: str,
                    started: float, who: str) -> None:
        """Give the station the answer to a Call that went upstream."""
        if self.ended:
            return
        self._write(frame)
        response_ms = (time.perf_counter() - started) * 1000
        self.board.answered(record, response_ms)
        self._keep_answer(reply, record.method, record.message_id, response_ms, who)

    def _keep_answer(self, reply: CallResult | CallError, action: str, id_: str,
                     response_ms: float, who: str) -> None:
        """Put an answer to the station on record."""
        board, station = self.board, self.station
        if isinstance(reply, CallResult):
            board.message(station, "OUT", "CALLRESULT", action, id_,
                          without_secrets(action, reply.payload, reply.text), response_ms)
            if self.schemas and self.schemas.ready(self.protocol, action):
                self._violation(reply, action, "Response", f"{who} answered")
        else:
            board.message(station, "OUT", "CALLERROR", action, id_, reply.text, response_ms,
                          reply.code, reply.description)
            self._failed(f"{who} answered {action} with {reply.code}", action, reply)

    def _violation(self, message: Call | Send | CallResult, action: str, part: str,
                   who: str = "") -> Violation | None:
        """What the schema says against the payload; it goes on record, and among the quirks."""
        violation = None if self.schemas is None else self.schemas.check(
            self.protocol, action, part, message.payload)
        if violation:
            self.board.error("VALIDATION_FAILURE", self.station,
                             f"{who or 'The station sent'} {action} against its schema: "
                             f"{violation.pointer or '/'} {violation.text}",
                             {"action": action, "part": part, "pointer": violation.pointer,
                              "text": violation.text, "messageId": message_id(message.id_text)})
            if not who:
                self.board.quirk(self.station, f"schema:{action}{violation.pointer}"[:TEXT_KEPT])
        return violation

    def _refuse(self, frame: str | bytes, error: BadFrame) -> Awaitable | None:
        """A frame that is no message: kept as an error, and answered if it is a CALL with an id."""
        board, station = self.board, self.station
        raw = frame if isinstance(frame, str) else frame.decode("utf-8", "backslashreplace")
        if board.quirk(station, "bad_message", in_message=False) == 1:
            board.security_event("PROTOCOL_VIOLATION", station.identity, f"Bad message: {error}",
                                 "low", {"ip": station.remote_address})
        board.error("BAD_MESSAGE", station, str(error), {"raw": raw_without_secrets(raw)})
        board.count_unreadable(station)
        if not error.id_text:
            return None
        reply = refusal(self.protocol, error.id_text, error)
        board.message(station, "OUT", "CALLERROR", error.action, message_id(error.id_text), "{}",
                      None, reply.code, reply.description)
        return self._write(pack(reply))

    def _sent(self, message: Send, frame: str) -> None:
        if message.action not in SENDS[self.protocol]:
            self.board.quirk(self.station, "unknown_send")
        elif self.schemas:
            self._violation(message, message.action, "Request")
        self.board.message(self.station, "IN", "SEND", message.action, message_id(message.id_text),
                           without_secrets(message.action, message.payload, message.text))
        if self.upstream is not None:
            self.upstream.station_said(message, frame)

    def _result_refused(self, message: CallResultError, frame: str) -> None:
        self.board.message(self.station, "IN", "CALLRESULTERROR", "", message_id(message.id_text),
                           message.text, None, message.code, message.description)
        self._failed(f"The station cannot use our answer: {message.code}", "", message)
        if self.upstream is not None:
            self.upstream.station_said(message, frame)

    def _failed(self, text: str, action: str, message: CallError | CallResultError) -> None:
        """Keep a CALLERROR, theirs or ours, among the errors."""
        self.board.error("CALL_ERROR", self.station, text,
                         {"action": action, "errorCode": message.code,
                          "errorDescription": message.description,
                          "messageId": message_id(message.id_text)})

    def _answered(self, message: CallResult | CallError, frame: str) -> None:
        """An answer to a command: the one under way, one given up, or none of ours."""
        board, station, id_ = self.board, self.station, message_id(message.id_text)
        pending, late = self.exchange.answered(message, frame or pack(message))
        if pending is None:
            board.quirk(station, "unexpected_answer")
        if isinstance(message, CallError) and message.code == UNKNOWN_ERROR:
            board.quirk(station, "error_without_code")
        action = pending.call.action if pending else ""
        secrets_told = hidden_texts(action, pending.call.payload) if pending else ()
        response_ms = (time.monotonic() - pending.sent_mono) * 1000 if pending else None
        if isinstance(message, CallResult):
            if pending and self.schemas:
                self._violation(message, action, "Response")
            text = without_secrets(action, message.payload, message.text)
            board.message(station, "IN", "CALLRESULT", action, id_,
                          without_texts(text, secrets_told), response_ms)
        else:
            text = without_secrets(action, message.details, message.text)
            shown_error = message._replace(
                description=without_texts(hide_in_text(message.description), secrets_told))
            board.message(station, "IN", "CALLERROR", action, id_,
                          without_texts(text, secrets_told), response_ms, message.code,
                          shown_error.description)
            self._failed(f"The station answered {action} with {message.code}", action,
                         shown_error)
        details = {"action": action, "messageId": id_}
        if pending is None or pending.record is None or response_ms is None:
            board.error("UNEXPECTED_ANSWER", station, "An answer to no command of ours", details)
            return
        board.answered(pending.record, response_ms)
        if late:
            board.error("LATE_ANSWER", station,
                        f"{action} was answered after {response_ms / 1000:.1f} s", details)

    # Commands out

    async def call(self, action: str, payload: dict) -> tuple[dict, float]:
        """Send a command and wait for its answer: (payload of the CALLRESULT, ms it took).

        Raises: UnknownAction, FormatViolation (the payload does not fit the schema), Busy,
            Conflict (offline), CallFailed (CALLERROR), NoAnswer.
        """
        if action not in COMMANDS[self.protocol]:
            near = _nearest(action, COMMANDS[self.protocol])
            raise UnknownAction(f"{self.protocol} has no command {shown(action)}{near}")
        if self.schemas:
            await self.schemas.prepare(self.protocol, action)
            if violation := self.schemas.check(self.protocol, action, "Request", payload):
                raise FormatViolation(f"payload{violation.pointer}: {violation.text}")
        pending = await self._exchange(Call(f'"{uuid.uuid4()}"', action, payload,
                                            to_json(payload)))
        message = pending.message
        if type(message) is CallError:
            raise CallFailed(message.code, message.description, message.details)
        payload, status = message.payload, message.payload.get("status")
        if type(status) is str and status not in ANSWER_STATUSES:
            payload = payload | {"status": meant(self.board, self.station, status,
                                                 ANSWER_STATUSES)}
        return payload, (pending.record and pending.record.response_ms) or 0.0

    async def pass_command(self, call: Call, frame: str) -> tuple[CallResult | CallError, str]:
        """Send a command of the upstream system as it is: (the answer, the frame it came in).

        Raises: Busy, Conflict (offline), NoAnswer.
        """
        pending = await self._exchange(call, frame)
        return pending.message, pending.frame

    def pass_on(self, message: Send | CallResultError, frame: str) -> None:
        """Give the station what upstream says and no answer is wanted to."""
        kind = "SEND" if type(message) is Send else "CALLRESULTERROR"
        self.board.message(self.station, "OUT", kind, getattr(message, "action", ""),
                           message_id(message.id_text), message.text)
        self._write(frame)

    async def _exchange(self, call: Call, frame: str = "") -> Pending:
        try:
            return await self.exchange.call(call, frame,
                                            self.board.config.ocpp.call_timeout_seconds)
        except NoAnswer:
            self.board.error("CALL_TIMEOUT", self.station, f"No answer to {call.action}",
                             {"action": call.action, "messageId": message_id(call.id_text)})
            raise

    def _keep_command(self, call: Call) -> LoggedMessage:
        return self.board.message(self.station, "OUT", "CALL", call.action,
                                  message_id(call.id_text),
                                  without_secrets(call.action, call.payload, call.text))

    def _write(self, text: str) -> Awaitable | None:
        return None if self.ended else self.write(text)


INTRODUCE_S = 10                     # after its first message
INTRODUCED_CONNECTORS = 20           # of one station, at most


async def introduce(link: Link) -> None:
    """Ask a station that goes on without a boot what it is, and how its connectors are.

    A refusal, or no answer, is the end of it. Spec: 1.6 5.17; 2.0.1 F06.
    """
    wanted: list[dict] = [{"requestedMessage": "BootNotification"}]
    if TRIGGERED_EACH[link.protocol]:
        wanted += [{"requestedMessage": "StatusNotification",
                    "evse": {"id": c.evse_id, "connectorId": c.connector_id}}
                   for c in link.station.connectors.values() if c.evse_id][:INTRODUCED_CONNECTORS]
    else:
        wanted.append({"requestedMessage": "StatusNotification"})
    try:
        for payload in wanted:
            answer, _ = await link.call("TriggerMessage", payload)
            if answer.get("status") != "Accepted":
                return
    except BoardError as error:
        log.info("%s was not asked what it is: %s", shown(link.station.identity), error)


TAKERS: dict[type, Callable] = {
    Send: Link._sent, CallResult: Link._answered, CallError: Link._answered,
    CallResultError: Link._result_refused}   # of what is no Call


class Budget:
    """A token bucket: how long the next frame of a station has to wait. Rate 0 is no limit."""

    __slots__ = ("rate", "_left", "_at", "_told")

    def __init__(self, rate: float, now: float):
        self.rate, self._left = rate, rate * BURST_S
        self._at, self._told = now, -math.inf

    def take(self, now: float, cost: int = 1) -> float:
        """Seconds that this frame waits, 0 while the budget lasts."""
        if not self.rate:
            return 0
        self._left = min(self._left + (now - self._at) * self.rate, self.rate * BURST_S) - cost
        self._at = now
        return max(0.0, -self._left / self.rate)

    def tell(self) -> bool:
        """Whether to tell that the limit is reached: not if that was so within `COALESCE_S`."""
        news = self._at - self._told > COALESCE_S
        self._told = self._at
        return news


# --- Smart charging -----------------------------------------------------------------------
# Each second: `observe` what the stations said, `decide` (pure: circuits and sessions in, amperes
# out), then the `commands` that lead there. Every EVSE counts at the worst that it may draw, and a
# limit rises only where the sum of all worsts leaves room, in each phase of each circuit. Limits
# are A per phase; `…_mono` are seconds of the Board's clock that never jumps.

CHANGE_S = 5.0                          # between two changes of a station (IEC 61851-1)
PILOT_S = 6.0                           # a car has followed by then
EXPIRY_SLACK_S = PILOT_S + SKEW_TOLERANCE_S          # so much later than we think it may expire
VERIFY_S = 10.0                         # until we look whether a station has obeyed
REFUSAL_S = 2.0                         # the end of a transaction comes by then, if that is why
RAISE_EVERY_S = 30.0
RETRY_S = 600.0                         # until a station that obeyed nothing is tried again
FLOW_OLD_S = 900.0                      # a reading that says nothing of now
PHASES_S, SETTLED_S = 30.0, 60.0        # until it is believed which phases, how much, a car uses
SLACK_A = 3                             # what a car must leave before others get it
ASLEEP_S, ASLEEP_RETRY_S = 300.0, 1800.0             # a car that takes nothing is served last
METER_WARN_S, METER_LOST_S = 15.0, 60.0
START_EARLY_S = 60                      # a schedule begins before now, for clocks that are off
SKEW_MOST_S = 86_400                    # of a station's clock, that a limit is stretched for
SENT_KEPT, MODELS_KEPT, SESSIONS_SET = 6, 200, 1000
FALLBACK_START = "2020-01-01T00:00:00Z"
STATION_DEFAULTS = SimpleNamespace(**{s.key: s.default for s in STATION_SETTINGS})
GRID = "RST"                            # the site's phases L1, L2, L3, in the words of ROTATIONS
GRAIN_A = 1e-6                          # sums of decimal amperes are this exact
SURPLUS = "surplus"                     # what the sun leaves: the circuit that it makes


class Circuit(NamedTuple):
    """A piece of the site's wiring; the first of a list is the one that all others hang at."""

    name: str
    parent: str                         # "" of the first
    limit_a: float                      # A per phase that may be used, the margin off
    pooled: bool = False                # the limit is for the sum of the phases


class Request(NamedTuple):
    """A session that may be given power."""

    id: Any
    circuit: str
    phases: tuple = (0, 1, 2)           # of the site, that it may load
    minimum: float = 6                  # A; what it gets is 0 or at least this
    maximum: float = 32
    priority: int = 1
    arrived: float = 0.0
    turns: float = 0.0                  # that it has had, the present one included
    on_turn: bool = False               # it charges, and the turns have not changed since it began
    waiting_since: float | None = 0.0   # None: it charges
    need: float | None = None           # A that its car takes, where that is known and less
    asleep: bool = False                # it had power and took none: it is served last
    load: float = 1.0                   # A that may flow in each phase for an ampere of its limit
    reserved: float = 0.0               # A that are kept for it in any case: its fallback


class Share(NamedTuple):
    """How much a session gets, and why."""

    amps: int                           # A per phase, whole steps
    reason: str                         # one sentence without its amperes
    held_by: str = ""                   # the circuit that keeps it from more


def decide(circuits: list[Circuit], requests: list[Request], other_load: dict, strategy: str,
           now: float, step: int = 1, rotate_s: float = 900) -> dict[Any, Share]:
    """Share what the circuits can among the sessions: {id of the request: Share}.

    `other_load` is what flows besides, {(circuit, phase): A}, and counts upwards from there. No
    limit is exceeded, unless by it and what is reserved alone; a session gets 0 or from its
    minimum to its maximum; nothing is left that one could take. First as many as fit get their
    minimum: when not all do, the turns change every `rotate_s`, and who had fewest is next. Then
    who has least is raised first: amperes are max-min fair under equal_share, time_of_use and
    solar, amperes over priority under priority; under first_come, which has no turns either, who
    came first takes what it can. Under solar those with a priority come before all others.
    """
    tree = CircuitTree(circuits, other_load)
    if strategy == "first_come":
        order = sorted(requests, key=lambda r: (r.asleep, r.arrived))
    else:
        order = sorted(requests, key=lambda r: _place(r, strategy))
    # 1. who charges
    granted: dict = {}                  # {id: A}
    held_by: dict = {}                  # {id: the place that kept it from more}
    for request in order:
        tree.use(tree.path(request.circuit, request.phases), request.reserved)
    empty = list(tree.left)
    for request in order:
        least = math.ceil(request.minimum / step) * step
        most = math.floor(request.maximum / step) * step
        # What is reserved for it costs nobody anything.
        least = max(least, min(most, math.floor(request.reserved / request.load / step) * step))
        beyond = max(0.0, least * request.load - request.reserved)
        path = tree.path(request.circuit, request.phases)
        if not 0 < least <= most:
            held_by[request.id] = None
        elif (full := tree.full(path, beyond)) is not None and beyond:
            held_by[request.id] = full
        else:
            tree.use(path, beyond)
            granted[request.id] = least
    # 2. the rest: up to what the cars take, then up to what they might
    level = {"first_come": lambda amps, request: 0, "priority": lambda amps, request:
             amps / request.priority}.get(strategy, lambda amps, request: amps)
    charging = [request for request in order if request.id in granted]
    for needs in (True, False) if any(r.need is not None for r in charging) else (False,):
        tree.fill(charging, granted, held_by, step, level, needs)
    minutes = math.ceil((rotate_s - now % rotate_s) / 60)
    return {r.id: _share(r, granted.get(r.id, 0), held_by.get(r.id), tree, empty, strategy, step,
                         minutes) for r in requests}


def _place(request: Request, strategy: str) -> tuple:
    """Where a session stands in the queue for the minimum.

    Who is on turn stays until the turns change, for all at the same time: then all compete for an
    empty site, so that who had fewest turns fits, whatever it needs. Turns count by priority, if
    that is the strategy; nobody waits for ever.
    """
    turns = request.turns / (request.priority if strategy == "priority" else 1)
    since = math.inf if request.waiting_since is None else request.waiting_since
    return (strategy == "solar" and request.priority == 1, request.asleep, not request.on_turn,
            turns, since, request.arrived)


class CircuitTree:
    """What is left of each phase of each circuit. A path is all of them that a session loads."""

    def __init__(self, circuits: list[Circuit], other_load: dict):
        self.names = [circuit.name for circuit in circuits]
        self.parents = {circuit.name: circuit.parent for circuit in circuits}
        index = {name: number for number, name in enumerate(self.names)}
        self.left = [circuit.limit_a for circuit in circuits for _ in PHASES]
        self._pooled = {3 * index[c.name] for c in circuits if c.pooled}
        self._paths: dict[tuple[str, tuple], list[int]] = {}
        self._firsts: dict[str, list[int]] = {}      # {circuit: the places of L1, up to the root}
        for name in self.names:
            firsts, above = [], name
            while above:
                firsts.append(3 * index[above])
                above = self.parents[above]
            self._firsts[name] = firsts
        for (name, phase), amps in other_load.items():
            self.use(self.path(name, (phase,)), amps)

    def path(self, circuit: str, phases: tuple) -> list[int]:
        """The places in `left` that such a session loads, its own circuit first.

        A pooled circuit has one place, which stands there once for each phase.
        """
        found = self._paths.get((circuit, phases))
        if found is None:
            found = self._paths[circuit, phases] = [
                first if first in self._pooled else first + phase
                for first in self._firsts[circuit] for phase in phases]
        return found

    def full(self, path: list[int], amps: float) -> int | None:
        """The first place that has less than that left; None if all have it."""
        for place in path:
            wanted = amps * path.count(place) if place in self._pooled else amps
            if self.left[place] < wanted - GRAIN_A:
                return place
        return None

    def use(self, path: list[int], amps: float) -> None:
        """Take it from all places of a path."""
        for place in path:
            self.left[place] -= amps

    def fill(self, requests: list[Request], granted: dict, held_by: dict, step: int,
             level: Callable[[float, Request], float], needs: bool) -> None:
        """Raise whoever has the lowest level by a step, until nobody can take one more."""
        rises = []                       # (request, its path, A that it could take more)
        wanted = [0.0] * len(self.left)
        for request in requests:
            most = request.maximum
            if needs and request.need is not None:
                most = min(most, max(request.need, request.minimum))
            rise = math.floor(most / step) * step - granted[request.id]
            if rise > 0:
                path = self.path(request.circuit, request.phases)
                rises.append((request, path, rise))
                for place in path:
                    wanted[place] += rise * request.load
        # What all together cannot fill holds nobody back, and need not be looked at again.
        tight = {place for place, amps in enumerate(wanted) if amps > self.left[place] + GRAIN_A}
        heap = []
        for number, (request, path, rise) in enumerate(rises):
            amps = granted[request.id]
            bounds = [place for place in path if place in tight]
            if bounds:
                heap.append((level(amps, request), number, request, bounds, amps + rise))
            else:
                granted[request.id] += rise
        before = {request.id: granted[request.id] for _, _, request, _, _ in heap}
        heapq.heapify(heap)
        while heap:
            _, number, request, bounds, most = heap[0]
            amps = granted[request.id]
            full = self.full(bounds, step * request.load)
            if amps + step > most or full is not None:
                held_by[request.id] = full
                heapq.heappop(heap)
                continue
            self.use(bounds, step * request.load)
            granted[request.id] = amps = amps + step
            heapq.heapreplace(heap, (level(amps, request), number, request, bounds, most))
        for request, path, rise in rises:
            gained = granted[request.id] - before[request.id] if request.id in before else rise
            self.use([place for place in path if place not in tight], gained * request.load)

    def above(self, circuit: str) -> list[str]:
        """A circuit, and all that it hangs at."""
        return [self.names[first // 3] for first in self._firsts[circuit]]

    def says(self, place: int) -> str:
        """A place in words."""
        name = self.names[place // 3]
        return f"the {name}" if place in self._pooled else f"{name} on {PHASES[place % 3]}"


def _share(request: Request, amps: int, held_by: int | None, tree: CircuitTree, empty: list,
           strategy: str, step: int, minutes: int) -> Share:
    """How much a session gets and why; `empty` is what was left before all of them."""
    if held_by is None:
        return Share(amps, f"The most that it may have is {request.maximum:g} A" if amps else
                     f"It may have {request.maximum:g} A at most, which is under its minimum")
    circuit, place = tree.names[held_by // 3], tree.says(held_by)
    if not amps and empty[held_by] < request.minimum * request.load - GRAIN_A:
        text = (f"Waits: {max(0.0, empty[held_by]):.1f} A of {place} are all that can be shared "
                "now, beside what is not under control")
    elif not amps:
        waits = (f"Waits for its turn, the next change is in {minutes} min"
                 if strategy != "first_come" else "Waits until another one leaves")
        text = f"{waits}: no {request.minimum:g} A are left of {place}"
    elif amps + step > request.maximum:
        return Share(amps, f"The most that it may have is {request.maximum:g} A")
    elif request.need is not None and amps >= request.need:
        return Share(amps, "The car takes no more")
    else:
        words = {"priority": f"Its share by priority {request.priority}",
                 "first_come": "What those who came before leave"}
        text = f"{words.get(strategy, 'An equal share')} of {place}"
    return Share(amps, text, circuit)


# How a limit is told


class ProfileVariant(NamedTuple):
    """One way to tell a station a limit; what one station refuses, another one insists on."""

    purpose: str
    unit: str                           # A | W
    kind: str = "Absolute"              # a Relative one cannot expire: it counts from the plug
    highest: bool = True                # on the highest stack level that the station knows; else 0
    whole: bool = False                 # for the whole station instead of one EVSE
    phases: bool = True                 # a limit in W says of how many phases

    def text(self) -> str:
        """For the log and the API."""
        return ", ".join([self.purpose, self.unit, self.kind]
                         + ["stack level 0"] * (not self.highest)
                         + ["whole station"] * self.whole
                         + ["without numberPhases"] * (not self.phases))


STATION_MAX = "ChargingStationMaxProfile"
# From what the standard means to what some chargers want, the next when one is refused.
VARIANTS = (
    ProfileVariant("TxProfile", "A"), ProfileVariant("TxProfile", "W"),
    ProfileVariant("TxDefaultProfile", "A"), ProfileVariant("TxDefaultProfile", "W"),
    ProfileVariant("TxProfile", "A", highest=False),
    ProfileVariant("TxProfile", "W", highest=False),
    ProfileVariant("TxProfile", "W", phases=False),
    ProfileVariant(STATION_MAX, "A", whole=True), ProfileVariant(STATION_MAX, "W", whole=True),
    ProfileVariant("TxProfile", "A", "Relative"), ProfileVariant("TxProfile", "W", "Relative"),
)
FALLBACK_VARIANTS = (                   # the same for what holds without us
    ProfileVariant("TxDefaultProfile", "A"), ProfileVariant("TxDefaultProfile", "A", whole=True),
    ProfileVariant("TxDefaultProfile", "W"), ProfileVariant("TxDefaultProfile", "W", whole=True),
    ProfileVariant("TxDefaultProfile", "A", highest=False),
    ProfileVariant("TxDefaultProfile", "W", highest=False),
)
FALLBACK_ID, LIMIT_ID = 77_000_000, 77_100_000       # of our profiles, and the EVSE added


class Ladder:
    """Which variant a station is told its limits in; the next where one is refused or disobeyed.

    One refusal of what has worked before is forgiven, and one answer that does not come.
    """

    __slots__ = ("variants", "rung", "worked", "_refusals", "_unanswered")

    def __init__(self, variants: tuple[ProfileVariant, ...]):
        self.variants = variants
        self.start(0)

    def start(self, rung: int) -> None:
        """Begin anew, at a rung that works for others of the model."""
        self.rung, self.worked, self._refusals, self._unanswered = rung, False, 0, 0

    def variant(self, suits: Callable[[ProfileVariant], bool]) -> ProfileVariant | None:
        """The first that suits, from the rung on; None when the station has refused all."""
        return next(filter(suits, self.variants[self.rung:]), None)

    def accepted(self) -> None:
        """The station took it."""
        self.worked, self._refusals, self._unanswered = True, 0, 0

    def refused(self, variant: ProfileVariant) -> bool:
        """The station refused it. Returns whether the next one is to be tried."""
        self._refusals += 1
        return self._refusals > self.worked and self.leave(variant)

    def unanswered(self, variant: ProfileVariant) -> bool:
        """No answer came. Returns whether the next one is to be tried."""
        self._unanswered += 1
        return self._unanswered > 1 and self.leave(variant)

    def leave(self, variant: ProfileVariant) -> bool:
        """Go on to the next one, unless that is done already. Returns whether it went."""
        rung = self.variants.index(variant) + 1
        if rung <= self.rung:
            return False
        self.start(rung)
        return True


class Abilities(NamedTuple):
    """What a station says of its smart charging; None where it does not."""

    stack_level: int | None = None      # the highest
    units: tuple = ("A", "W")
    profiles: int | None = None         # that it can keep
    evses: int | None = None

    @property
    def one_slot(self) -> bool:
        """Whether it keeps one default: then the fallback is the second period of the limit."""
        return self.stack_level == 0 or self.profiles == 1


# What 2.x has no variable for, 1.6 has a key for; each is asked for its own.
ABILITIES: dict[bool, tuple[tuple[str, str], ...]] = {
    False: (("SmartChargingCtrlr", "ProfileStackLevel"), ("SmartChargingCtrlr", "RateUnit")),
    True: (("SmartChargingCtrlr", "ProfileStackLevel"), ("SmartChargingCtrlr", "RateUnit"),
           (LEGACY, "MaxChargingProfilesInstalled"), (LEGACY, "NumberOfConnectors"))}


def abilities_in(answer: dict) -> Abilities:
    """Of the answer to GetVariables."""
    values = {lenient(lenient(result, "variable", dict, {}), "name", str):
              result.get("attributeValue")
              for result in _dicts(lenient(answer, "getVariableResult", list, []))}
    stack_level, unit_text, profiles, evses = (values.get(name) for _, name in ABILITIES[True])
    words = re.findall("[a-z]+", unit_text.lower()) if isinstance(unit_text, str) else []
    units = tuple(unit for unit, names in (("A", ("a", "current")), ("W", ("w", "power")))
                  if set(names) & set(words)) or ("A", "W")
    return Abilities(_number(stack_level), units, _number(profiles), _number(evses))


def _number(text: Any) -> int | None:
    return int(text) if isinstance(text, str) and re.fullmatch("[0-9]{1,6}", text.strip()) else None


# Upstream's profiles


UPSTREAM_PROFILES_KEPT = 50             # of one station
RECURS_S = {"Daily": 86400, "Weekly": 7 * 86400}


@dataclass(slots=True)
class Profile:
    """A charging profile as whoever has to keep it reads it: limits from `start` on, wall time."""

    id: int
    purpose: str
    stack_level: int
    evse_id: int                        # 0: all
    start: float | None                 # None: when the transaction began (Relative)
    periods: list                       # [(seconds from start, A or W)]
    watts: bool = False
    duration: float = math.inf
    transaction_id: Any = None          # that it is for; None: any
    valid: tuple = (0.0, math.inf)
    recurs_s: float = math.inf

    @classmethod
    def read(cls, id_: int, evse_id: int, profile: dict, schedule: dict, now: float) -> "Profile":
        """Of the payload of either version. Raises: FormatViolation."""
        times = {key: parse_time(value)[0] for key, value in (
            ("validFrom", profile.get("validFrom")), ("validTo", profile.get("validTo")),
            ("start", schedule.get("startSchedule"))) if value is not None}
        periods = sorted((required(p, "startPeriod", float), required(p, "limit", float))
                         for p in required(schedule, "chargingSchedulePeriod", list)
                         if isinstance(p, dict))
        kind = profile.get("chargingProfileKind")
        recurs_s = RECURS_S.get(lenient(profile, "recurrencyKind", str, ""), math.inf)
        return cls(id_, required(profile, "chargingProfilePurpose", str),
                   required(profile, "stackLevel", int), evse_id,
                   None if kind == "Relative" else times.get("start", now), periods,
                   schedule.get("chargingRateUnit") == "W",
                   optional(schedule, "duration", float) or math.inf, profile.get("transactionId"),
                   (times.get("validFrom", 0.0), times.get("validTo", math.inf)),
                   recurs_s if kind == "Recurring" else math.inf)

    def limit(self, now: float, evse_id: int, transaction_id: Any, watts_per_a: float,
              began_at: float | None = None) -> float | None:
        """A per phase that it allows at a time; None when it says nothing then (1.6 3.13)."""
        start = self.start
        if start is None:
            start = now if began_at is None else began_at
        elapsed = now - start
        if elapsed >= 0 and self.recurs_s < math.inf:
            elapsed %= self.recurs_s
        if self.evse_id not in (0, evse_id) or not (
                0 <= elapsed < self.duration and self.valid[0] <= now < self.valid[1]):
            return None
        if self.purpose == "TxProfile" and (transaction_id is None or (
                self.transaction_id not in (None, transaction_id))):
            return None
        limit = next((value for begins, value in reversed(self.periods) if begins <= elapsed), None)
        return limit / watts_per_a if self.watts and limit is not None else limit


def allowed_a(profiles: list[Profile], now: float, evse_id: int, transaction_id: Any,
              watts_per_a: float = 1.0, sharers: int = 1, began_at: float | None = None) -> float:
    """A per phase that profiles together allow: the highest stack of each purpose; TxProfile goes
    before TxDefaultProfile, the station's maximum holds with both (1.6 3.13.4; 2.0.1 K01).

    `sharers`: how many EVSEs have the station's maximum together. Times are wall times.
    """
    best: dict = {}
    for profile in sorted(profiles, key=attrgetter("stack_level")):
        limit = profile.limit(now, evse_id, transaction_id, watts_per_a, began_at)
        if limit is not None:
            best[profile.purpose] = limit
    maxima = [a / sharers for purpose, a in best.items() if not purpose.startswith("Tx")]
    return min([best.get("TxProfile", best.get("TxDefaultProfile", math.inf)), *maxima])


def with_profile(profiles: list[Profile], new: Profile) -> list[Profile]:
    """The profiles after one more: it takes the place of one with its id, or purpose and level."""
    return [p for p in profiles if p.id != new.id and (p.purpose, p.stack_level, p.evse_id) != (
        new.purpose, new.stack_level, new.evse_id)] + [new]


# What an EVSE may draw


@dataclass(slots=True, eq=False)
class SentLimit:
    """A limit that was sent, and may hold in the station until it expires."""

    amps: float
    flow: float                         # A that it lets this car draw in one phase
    widest: float                       # A that it lets any car draw in one phase
    until_mono: float
    accepted_mono: float | None = None  # when the station said so
    outlives: bool = True               # the transaction; a TxProfile does not (1.6 3.13.1)
    assumed: bool = False               # an earlier run's, or one that nobody knows


@dataclass(slots=True, eq=False)
class Meter:
    """What flows at an EVSE as its station measures it, and what its car needs by that."""

    flow: tuple = (0.0, 0.0, 0.0)       # A in the station's phases, read the worse way
    worst_a: float | None = None        # the strongest of them; None: not known
    least_a: float = 0.0                # the same, what is ambiguous read in the car's favour
    read_mono: float = -math.inf
    taken: tuple = ()                   # the reading's own times, to know a new one
    phases: tuple | None = None         # of the station's, that the car uses, once that is known
    candidate: tuple | None = None      # (phases, since when only these)
    slack_since: float | None = None
    need: float | None = None           # A that the car takes, where it takes less than it may
    idle_since: float | None = None     # has power and takes none

    def read(self, flow: tuple[list, list], at: float) -> None:
        """What flows in each phase: read the worse way, and the better."""
        worse, better = flow
        self.flow, self.worst_a, self.least_a = tuple(worse), max(worse), max(better)
        self.read_mono = at

    def learn_phases(self, now: float) -> None:
        """Which phases the car uses, where its meter tells them apart."""
        used = tuple(p for p in range(3) if self.flow[p] >= 1.0)
        if not used:
            return
        if self.phases is not None and not set(used) <= set(self.phases):
            self.phases = None
        if self.candidate is None or self.candidate[0] != used:
            self.candidate = used, now
        elif now - self.candidate[1] >= PHASES_S:
            self.phases = used

    def judge_need(self, allowed_a: float, settled: bool, minimum: float, now: float) -> None:
        """What the car does not take for a while, others may have."""
        drawn = self.worst_a or 0.0
        if self.need is not None and drawn > self.need - 1:
            self.need = self.slack_since = None
        elif allowed_a - drawn > SLACK_A and settled:
            self.slack_since = self.slack_since or now
            if now - self.slack_since >= SETTLED_S:
                self.need = math.ceil(drawn) + SLACK_A - 1
        elif self.need is None:
            self.slack_since = None
        if drawn >= 1 or allowed_a < minimum:
            self.idle_since = None
        else:
            self.idle_since = self.idle_since or now

    def begin(self) -> None:
        """Another car is there."""
        self.read_mono, self.phases, self.candidate = -math.inf, None, None
        self.need = self.slack_since = self.idle_since = None

    def end(self) -> None:
        """It has gone."""
        self.flow, self.worst_a, self.least_a = (0.0, 0.0, 0.0), None, 0.0


@dataclass(slots=True, eq=False)
class Fallback:
    """The limit that lies in the station for when it does not hear from us."""

    known_a: float | None = None        # that is known to hold
    sent_a: float | None = None         # one that may hold as well
    asked_a: float = 0.0                # the one that was sent last
    wanted_a: float = 0.0
    tried_mono: float = -math.inf
    due: bool = False                   # to be sent again: the station was away
    unread: bool = False                # it could not be read back while a car charged
    accepted: bool = False              # the one that was sent last

    @property
    def most_a(self) -> float | None:
        """The most that it may be; None: there may be none."""
        return None if self.known_a is None else max(self.known_a, self.sent_a or 0.0)

    @property
    def least_a(self) -> float:
        """The least that it may be; 0 where none is known."""
        if self.known_a is None:
            return 0.0
        return self.known_a if self.sent_a is None else min(self.known_a, self.sent_a)

    def send(self, amps: float, now: float) -> None:
        """One is on its way."""
        self.sent_a, self.asked_a = max(amps, self.sent_a or 0.0), amps
        self.tried_mono, self.due, self.accepted = now, False, False

    def holds(self) -> None:
        """The one that was sent last is there."""
        self.known_a, self.sent_a = self.asked_a, None

    def is_due(self, now: float) -> bool:
        """Whether one is to be sent; again at once only where the one before is there."""
        return (self.due or self.known_a != self.wanted_a) and (
            now - self.tried_mono > RETRY_S / 10 or self.known_a == self.asked_a != self.wanted_a)

    def refused(self) -> None:
        """The one that was sent is not there."""
        self.sent_a, self.accepted = None, False

    def lost(self) -> None:
        """None is known to be there."""
        self.known_a = self.sent_a = None


@dataclass(slots=True, eq=False)
class Turn:
    """A session's place among those that cannot all charge at once."""

    waiting_since: float | None = None  # None: it charges
    count: float = 0.0                  # of turns, this one included
    slot: int = -1                      # in which it began; turns change from slot to slot

    def decided(self, charges: bool, slot: int, now: float) -> None:
        """It is to charge, or to wait."""
        if not charges:
            self.waiting_since = now if self.waiting_since is None else self.waiting_since
        elif self.waiting_since is not None or self.slot != slot:
            self.waiting_since, self.slot, self.count = None, slot, self.count + 1


class CarNeeds(NamedTuple):
    """What a car has told of itself (K15)."""

    maximum: float = math.inf           # A per phase
    phases: int | None = None

    @classmethod
    def read(cls, payload: dict) -> "CarNeeds":
        """Of NotifyEVChargingNeeds. What a car needs in direct current says nothing of phases."""
        needs = lenient(payload, "chargingNeeds", dict, {})
        maximum = lenient(lenient(needs, "acChargingParameters", dict, {}), "evMaxCurrent", float)
        phases = {"AC_single_phase": 1, "AC_two_phase": 2, "AC_three_phase": 3}.get(
            lenient(needs, "requestedEnergyTransfer", str, ""))
        return cls(maximum if maximum and maximum > 0 else math.inf, phases)


@dataclass(slots=True, eq=False)
class Evse:
    """What one EVSE may draw at worst, which every raise is checked against.

    A limit that was sent counts from then on; one that it replaces counts until the new one is
    confirmed, or the old one has expired. The fallback counts always: it holds when all else is
    lost. Where none is known, or the station obeys nothing, what the hardware can counts.
    """

    evse_id: int
    maximum: float                      # what the hardware can
    meter: Meter = field(default_factory=Meter)
    fallback: Fallback = field(default_factory=Fallback)
    turn: Turn = field(default_factory=Turn)
    sent: list[SentLimit] = field(default_factory=list)  # the newest last; SENT_KEPT at most
    confirmed: SentLimit | None = None  # the newest that is known to hold
    transaction: Transaction | None = None
    session: ChargeSession | None = None
    state: str | None = None            # what the station says of the charging
    needs: CarNeeds | None = None
    target: float = 0.0
    reason: str = ""
    began_mono: float = -math.inf       # when the transaction was seen
    sent_mono: float = -math.inf
    changed_mono: float = -math.inf
    raised_mono: float = -math.inf
    verified_mono: float = -math.inf    # when the newest limit was looked at last, or accepted
    triggered_mono: float = -math.inf
    unknown_mono: float = -math.inf     # when we began not to know what holds
    strikes: int = 0                    # times that the newest limit was not obeyed
    resend: bool = False
    read_back_due: bool = False
    clear_due: bool = False
    row: tuple = (0.0, None)            # (limit, fallback) as the State has them, or is to have

    @property
    def newest(self) -> SentLimit | None:
        """The limit that was sent last."""
        return self.sent[-1] if self.sent else None

    @property
    def is_unknown(self) -> bool:
        """Whether nobody knows what holds: the worst is counted, and may not be so."""
        return self.sent[-1].assumed if self.sent else self.fallback.known_a is None

    @property
    def fallback_a(self) -> float:
        """What it may draw when no limit of ours is alive."""
        known, sent = self.fallback.known_a, self.fallback.sent_a
        return self.maximum if known is None else known if sent is None else max(known, sent)

    def drawn_a(self, now: float) -> float:
        """What it has drawn just now, whole amperes of which we can be sure."""
        fresh = self.meter.read_mono > now - SETTLED_S
        return float(math.floor(self.meter.least_a)) if fresh else 0.0

    def commanded_a(self, now: float) -> float:
        """What the station was told last, else what holds without that, or flows."""
        if self.is_unknown:
            return self.drawn_a(now)
        return self.sent[-1].amps if self.sent else self.fallback.least_a

    def surely_a(self, now: float) -> float:
        """A that may flow in a phase in any case: a limit up to it raises nothing."""
        if any(limit.assumed for limit in self.sent) or self.is_unknown:
            return self.drawn_a(now)
        return min([limit.flow for limit in self.sent] or [self.fallback.least_a])

    def worst_a(self, reachable: bool) -> float:
        """What it may draw at worst, A per phase.

        A limit under the fallback frees nothing: it ends with the transaction or a reboot, and
        the next car is there before the others have made room. So whatever is lost, the sum of
        all worsts holds.
        """
        worst, drawn = self.fallback_a, self.meter.worst_a or 0.0
        for limit in self.sent:
            worst = max(worst, limit.flow)
        if not worst and not drawn:
            return 0.0
        if reachable and self.meter.read_mono > self.verified_mono:
            worst = max(worst, drawn)
        return min(worst, max(self.maximum, drawn))

    def send(self, limit: SentLimit, now: float) -> None:
        """A limit is on its way."""
        before = self.commanded_a(now)
        if limit.amps != before or not self.sent:
            self.changed_mono = now
            if limit.amps > before:
                self.raised_mono = now
        self.sent = [*self.sent, limit]
        if len(self.sent) > SENT_KEPT:   # answers do not come: one stands for two
            first, second, *rest = self.sent
            self.sent = [SentLimit(max(first.amps, second.amps), max(first.flow, second.flow),
                                   max(first.widest, second.widest),
                                   max(first.until_mono, second.until_mono),
                                   outlives=first.outlives or second.outlives,
                                   assumed=first.assumed or second.assumed), *rest]
        self.sent_mono, self.resend = now, False

    def accepted(self, limit: SentLimit, now: float) -> None:
        """The station took a limit. One that lowers nothing is confirmed by that."""
        limit.accepted_mono = now
        if limit not in self.sent:
            return
        others = [other for other in self.sent if other is not limit]
        lowers = any(other.flow > limit.flow for other in others)
        if not lowers and self.confirmed in others and self.confirmed.flow == limit.flow:
            self.confirm(limit)          # a renewal
        elif not lowers and self.fallback_a <= limit.flow:
            self.confirm(limit)
            self.verified_mono = now
        elif not any(o.flow == limit.flow and o.accepted_mono is not None for o in others):
            self.verified_mono = now

    def refused(self, limit: SentLimit) -> None:
        """The station did not take a limit: what was before stands."""
        self.sent = [other for other in self.sent if other is not limit]
        self.resend = bool(self.sent)

    def confirm(self, limit: SentLimit) -> None:
        """A limit holds for sure: all that were sent before it are gone."""
        self.sent = self.sent[self.sent.index(limit):]
        self.confirmed = limit

    def gone(self) -> None:
        """No limit of ours is there any more."""
        self.sent, self.confirmed = [], None

    def expire(self, now: float) -> None:
        """Limits whose time is over are gone: what comes after is a raise, not a renewal."""
        left = [limit for limit in self.sent if limit.until_mono > now]
        if not left:
            self.verified_mono = now     # from here the fallback has to show
        self.sent = left
        if self.confirmed not in left:
            self.confirmed = None

    def unknown(self, most: float, until_mono: float, now: float) -> None:
        """Nobody knows what holds: an earlier run's limit, until it has expired."""
        self.sent = [SentLimit(most, most, self.maximum, until_mono, assumed=True)]
        self.confirmed, self.unknown_mono, self.read_back_due = None, now, True

    def begin(self, transaction: Transaction, turns: float, now: float) -> None:
        """A transaction begins; `turns` is what the others have had."""
        self.transaction, self.began_mono, self.state = transaction, now, None
        self.turn = Turn(now, turns)
        self.meter.begin()
        self.strikes, self.target, self.needs = 0, 0.0, None
        self.changed_mono = self.raised_mono = -math.inf
        for limit in self.sent:
            if limit.assumed:            # nobody knows when it ends
                limit.until_mono, self.read_back_due = math.inf, True

    def end(self) -> None:
        """The transaction has ended."""
        self.transaction, self.clear_due, self.resend = None, bool(self.sent), False
        self.fallback.due = self.fallback.due or self.fallback.unread
        self.meter.end()
        self.sent, self.confirmed = [limit for limit in self.sent if limit.outlives], None
        for limit in self.sent:          # the next car may use other phases
            limit.flow = limit.widest

    def obeys(self, limit: SentLimit) -> None:
        """The newest limit shows."""
        self.confirm(limit)
        self.strikes = 0

    def strike(self, now: float) -> int:
        """The newest limit does not show. Returns how often that was so."""
        self.strikes, self.verified_mono, self.resend = self.strikes + 1, now, True
        return self.strikes


@dataclass(slots=True, eq=False)
class SiteStation:
    """A station as the controller knows it; also one that is named and has not come."""

    identity: str
    circuit: str
    settings: Any                       # its [stations] entry
    station: Station | None = None
    link: Any = None                    # the connection it was last seen on
    evses: dict[int, Evse] = field(default_factory=dict)         # {evse_id: …}
    connectors: dict[int, list[Connector]] = field(default_factory=dict)     # the same of the Board
    seen: tuple = ()                    # by which it is known that there are more
    busy: "Command | None" = None       # one at a time is under way to a station
    abilities: Abilities | None = None  # None: not asked yet
    model: tuple = ()                   # vendor, model, firmware: what one takes, others do
    limits: Ladder = field(default_factory=lambda: Ladder(VARIANTS))
    fallbacks: Ladder = field(default_factory=lambda: Ladder(FALLBACK_VARIANTS))
    reads_back: bool | None = None      # whether it tells its composite schedule; None: not known
    triggers: bool = True               # whether it sends its meter values when it is asked to
    unread: int = 0                     # questions in a row for its schedule, not answered
    unasked: int = 0                    # the same for its abilities
    uncontrollable: str = ""            # why, if it is
    disobeyed: bool = False             # it took limits and did not keep them: its word is no proof
    retry_mono: float = math.inf
    refusals: deque = field(default_factory=lambda: deque(maxlen=8))     # (when to judge, Command,
                                                                         # its answer)

    @property
    def online(self) -> bool:
        return bool(self.station and self.station.link)

    @property
    def ready(self) -> bool:
        """Whether it has spoken on this connection, and its boot has been answered."""
        station = self.station
        return bool(station and station.link and station.has_spoken and not station.boot_unanswered
                    and station.registration in (None, "Accepted"))

    @property
    def steerable(self) -> bool:
        return self.ready and self.settings.managed and not self.uncontrollable

    @property
    def protocol(self) -> str:
        return self.station.protocol if self.station else ""

    @property
    def all_phases(self) -> tuple:
        return tuple(range(self.settings.phases))

    def on_grid(self, phases: tuple) -> tuple:
        """The site's phases that some of the station's are; all, where nobody knows the wiring."""
        rotation = self.settings.phase_rotation
        if not rotation:
            return (0, 1, 2)
        return tuple(GRID.index(rotation[phase]) for phase in phases)

    def phases_of(self, evse: Evse) -> tuple:
        """The site's phases that its car may load."""
        known = evse.meter.phases if self.online and evse.transaction else None
        return self.on_grid(known or self.all_phases)

    def phase_count(self, evse: Evse) -> int | None:
        """How many phases its car uses; None: not known."""
        if evse.meter.phases is not None:
            return len(evse.meter.phases)
        said = evse.session.phases_set if evse.session else None
        if said is None and evse.needs:
            said = evse.needs.phases
        if said is not None:
            return min(said, self.settings.phases)
        return 1 if self.settings.phases == 1 else None

    def flow(self, evse: Evse) -> tuple:
        """What is measured in each phase of the site."""
        rotation, flow = self.settings.phase_rotation or GRID, [0.0] * 3
        for phase, amps in enumerate(evse.meter.flow):
            flow[GRID.index(rotation[phase])] += amps
        return tuple(flow)

    def worst(self, evse: Evse, now: float) -> float:
        """What an EVSE counts for, A per phase: what is not managed, as measured."""
        drawn = evse.meter.worst_a or 0.0
        if not self.settings.managed:
            charges = evse.transaction or evse.state == "Charging"
            known = self.online and (not charges or evse.meter.read_mono > now - FLOW_OLD_S)
            return drawn if known else evse.maximum
        if self.uncontrollable:
            return max(evse.maximum, drawn)
        return evse.worst_a(self.online)

    def worst_of_phases(self, evse: Evse, flow: tuple, now: float) -> tuple:
        """The same for each phase of the site. What its car does not use, the next one may."""
        worst = self.worst(evse, now)
        if not worst and flow is NO_CURRENT:            # most are so, on a large site
            return NO_CURRENT
        used, may = self.phases_of(evse), self.on_grid(self.all_phases)
        rest = min(worst, evse.fallback_a) if self.settings.managed else 0.0
        return tuple(worst if phase in used else max(rest, amps) if phase in may else amps
                     for phase, amps in enumerate(flow))

    def load(self, evse: Evse) -> float:
        """A that may flow in one phase for each ampere that the station is told.

        A limit in watts is for all phases together: who uses one, draws it all there.
        """
        variant = self.limit_variant() if self.abilities else None
        in_watts = variant is not None and variant.unit == "W"
        return float(self.settings.phases) if in_watts and self.phase_count(evse) is None else 1.0

    def limit_variant(self) -> ProfileVariant | None:
        """How it is told a limit; None when it has refused all that suits it."""
        keeps_fallback = any(evse.fallback.known_a is not None for evse in self.evses.values())

        def suits(variant: ProfileVariant) -> bool:
            abilities = self.abilities or Abilities()
            return (variant.unit in abilities.units
                    and not (abilities.stack_level == 0 and not variant.highest)
                    # A maximum of the station does not lift the fallback of a session.
                    and not (variant.whole and (len(self.evses) > 1 or keeps_fallback)))
        return self.limits.variant(suits)

    def fallback_variant(self) -> ProfileVariant | None:
        """The same for the fallback."""
        units = (self.abilities or Abilities()).units
        return self.fallbacks.variant(lambda variant: variant.unit in units)

    @property
    def one_slot(self) -> bool:
        return self.abilities is not None and self.abilities.one_slot

    def stack_level(self, highest: bool, least: int) -> int:
        """The highest, so that no leftover of others lies above; the fallback's is one less, where
        the limit may be of the same purpose."""
        top = self.abilities.stack_level if self.abilities else None
        if not highest or top == 0:
            return 0
        return least if top is None else top - 1 + least

    def learn(self, model: tuple, remembered: tuple | None) -> None:
        """It has said what it is: what others of the model take is tried first."""
        limit, fallback, self.reads_back = remembered or (None, None, None)
        self.limits.start(limit or 0)
        self.fallbacks.start(fallback or 0)
        self.model, self.abilities = model, None
        self.disobeyed, self.triggers = False, True

    def try_again(self) -> None:
        """One that obeyed nothing gets another chance; meanwhile it counts at its maximum."""
        self.uncontrollable, self.retry_mono = "", math.inf
        self.limits.start(0)
        self.fallbacks.start(0)
        self.reads_back, self.abilities, self.unasked = None, None, 0
        for evse in self.evses.values():
            evse.fallback.lost()
            evse.fallback.tried_mono = -math.inf


NO_CURRENT = (0.0, 0.0, 0.0)


class Answer(NamedTuple):
    """What became of a Command."""

    payload: dict
    accepted: bool
    unknown: bool                       # no answer came: the station may have done it


@dataclass(slots=True, eq=False)
class Command:
    """A command to send, in the words of 2.0.1; `on_answer` takes what becomes of it."""

    station: SiteStation
    action: str
    payload: dict
    on_answer: Callable[["Command", Answer], None]
    evse: Evse | None = None
    limit: SentLimit | None = None
    variant: ProfileVariant | None = None
    transaction: Transaction | None = None
    durable: bool = False               # it raises something: not before the State has it


# The site


class Window(NamedTuple):
    """A time of the day in which the site's limit is scaled; over midnight, if `until` is less."""

    since: str                          # 18:00
    until: str
    days: tuple                         # on which it begins
    factor: float

    def holds(self, when: datetime) -> bool:
        """Whether it is that time."""
        clock, today = when.strftime("%H:%M"), DAYS[when.weekday()]
        if self.since < self.until:
            return today in self.days and self.since <= clock < self.until
        before = DAYS[when.weekday() - 1]
        return (today in self.days and clock >= self.since) or (
            before in self.days and clock < self.until)


class SiteSettings:
    """The site's limits, strategy and margin: as configured, and as REST has changed them.

    What was changed is kept in the State, with the configured value that it overrides: when that
    changes, the change is dropped.
    """

    # JSON key of PATCH /api/smart-charge/config: the settings
    PATCHED: ClassVar[dict[str, tuple[str, ...]]] = {
        "strategy": ("strategy",), "limitA": ("site_limit_a", "site_limit_kw"),
        "limitKw": ("site_limit_a", "site_limit_kw"), "marginPercent": ("safety_margin_percent",)}

    def __init__(self, board: Board):
        self.board, self.now = board, board.config.smart_charge
        self.configured = SimpleNamespace(**vars(self.now))
        self.changed: set[str] = set()               # settings, since they were configured
        self.windows = [Window(w.__dict__["from"], w.to, tuple(w.days), w.factor)
                        for w in self.now.window]
        self.zone = ZoneInfo(self.now.timezone) if self.now.timezone else None
        self.parents = {SITE: ""} | {c.name: c.parent or SITE for c in self.now.circuit}

    def restore(self) -> None:
        """Take over what an earlier run changed."""
        for names in dict.fromkeys(self.PATCHED.values()):
            row = next((row for row in self.board.state.rows("smart_charge_setting")
                        if row.key == names[0]), None)
            if row is None:
                continue
            value = row.value if type(row.value) is dict else {}
            configured = [getattr(self.configured, name) for name in names]
            try:
                changes = {name: _checked(self._setting(name), one, "state", name) for name, one in
                           zip(names, lenient(value, "value", list, []), strict=True)}
                if value.get("configured") != configured or not self._is_possible(changes):
                    raise WrongValue("the configuration has changed")
            except (ConfigError, BoardError, ValueError):
                self.board.state.put("smart_charge_setting", names[0], None)
                continue
            self._set(changes)

    @staticmethod
    def _setting(name: str) -> Setting:
        return next(s for s in SETTINGS if (s.section, s.key) == ("smart_charge", name))

    def _is_possible(self, changes: dict) -> bool:
        return (changes.get("strategy") != "time_of_use" or bool(self.windows)) and (
            changes.get("strategy") != "solar" or self.now.meter) and (
            not {"site_limit_a", "site_limit_kw"} & set(changes)
            or changes["site_limit_a"] >= 1 or changes["site_limit_kw"] >= 0.1)

    def _set(self, changes: dict) -> None:
        for name, value in changes.items():
            setattr(self.now, name, value)
            self.changed.discard(name)
            if value != getattr(self.configured, name):
                self.changed.add(name)

    def change(self, body: dict) -> dict:
        """Change limit, strategy or margin. Returns the changes.

        Raises: BadRequest, and nothing is changed.
        """
        changes = read_changes(body, {key: self._setting(
            "site_limit_kw" if key == "limitKw" else names[0])
            for key, names in self.PATCHED.items()})
        if {"limitA", "limitKw"} <= set(changes):
            raise BadRequest("limitA and limitKw are two words for one limit: give one")
        if changes.get("limitA", 1) < 1 or changes.get("limitKw", 1) < 0.1:
            raise BadRequest("a limit must be at least 1 A, or 0.1 kW")
        if changes.get("strategy") == "time_of_use" and not self.windows:
            raise BadRequest("time_of_use needs a [[smart_charge.window]] in the configuration")
        if changes.get("strategy") == "solar" and not self.now.meter:
            raise BadRequest("solar needs smart_charge.meter in the configuration")
        for key, value in changes.items():
            names = self.PATCHED[key]
            values = [value] if len(names) == 1 else (
                [value, 0.0] if key == "limitA" else [0.0, value])
            self._set(dict(zip(names, values, strict=True)))
            self.board.state.put("smart_charge_setting", names[0], {
                "value": values, "configured": [getattr(self.configured, n) for n in names]})
        self.board.state.write_soon()
        return changes

    @property
    def limit_a(self) -> float:
        """The site's limit, A per phase, before margin and windows."""
        return self.now.site_limit_a or self.now.site_limit_kw * 1000 / (3 * self.now.voltage)

    def window(self) -> Window | None:
        """The window that it is the time of."""
        if self.now.strategy != "time_of_use":
            return None
        when = datetime.fromtimestamp(self.board.clock(), UTC).astimezone(self.zone)
        return next((window for window in self.windows if window.holds(when)), None)

    def limits(self) -> dict[str, float]:
        """{circuit: A per phase, before margin and windows}."""
        return {SITE: self.limit_a} | {c.name: c.limit_a for c in self.now.circuit}

    def circuits(self, factor: float | None = None) -> list[Circuit]:
        """The circuits, with what of them may be used.

        A limit in kW that was set on the board is what a grid operator's dimming asks for: it is
        taken as told, without the margin, where the minimum of one car fits only so.
        """
        if factor is None:
            window = self.window()
            factor = window.factor if window else 1.0
        share = 1 - self.now.safety_margin_percent / 100
        whole = self.limit_a * factor
        dimmed = "site_limit_kw" in self.changed and self.now.site_limit_kw
        fits_only_so = dimmed and whole * share < self.now.minimum_a <= whole + GRAIN_A
        return [Circuit(SITE, "", whole if fits_only_so else whole * share)] + [
            Circuit(c.name, c.parent or SITE, c.limit_a * share) for c in self.now.circuit]

    def least_circuits(self) -> list[Circuit]:
        """The circuits at the smallest that the windows make of them."""
        windows = self.windows if self.now.strategy == "time_of_use" else []
        return self.circuits(min([1.0, *(window.factor for window in windows)]))

    def view(self) -> dict:
        """Of GET /api/smart-charge/config."""
        now, window = self.now, self.window()
        return {
            "strategy": now.strategy, "limitA": round(self.limit_a, 3),
            "limitKw": round(self.limit_a * 3 * now.voltage / 1000, 3),
            "marginPercent": now.safety_margin_percent, "minimumA": now.minimum_a,
            "stepA": now.step_a, "fallbackA": now.fallback_a,
            "limitValidSeconds": now.limit_valid_seconds, "raiseAPer30s": now.raise_a_per_30s,
            "rotateMinutes": now.rotate_minutes, "voltage": now.voltage,
            "windowFactor": window.factor if window else 1.0,
            "setOnBoard": sorted({key for key, names in self.PATCHED.items()
                                  if set(names) & self.changed and not (
                                      key == "limitA" and now.site_limit_kw)
                                  and not (key == "limitKw" and now.site_limit_a)})}


def read_changes(body: dict, settings: dict[str, Setting]) -> dict:
    """The values of a body, checked as those of the configuration are. Raises: BadRequest."""
    if not body:
        raise BadRequest(f"nothing to change; known: {', '.join(settings)}")
    for key in body:
        if key not in settings:
            raise BadRequest(f"unknown key {shown(key)}; known: {', '.join(settings)}")
    try:
        return {key: value if value is None and settings[key].section == "session"
                else _checked(settings[key], value, "body", key)
                for key, value in body.items()}
    except ConfigError as error:
        raise BadRequest(str(error)) from None


class SiteMeter:
    """The site's own meter: what the site draws besides the cars, and what the sun leaves."""

    def __init__(self, settings: SiteSettings, now: float):
        self.settings, self.started_mono = settings, now
        self.amps: list[float] | None = None         # drawn from the grid, A per phase
        self.read_mono = -math.inf
        self.warned_s = 0.0                          # of silence
        self.other_load = [0.0] * 3                  # A per phase, besides the cars
        self._surplus: deque = deque(maxlen=1000)    # (when, A of all phases that the cars may have
                                                     # without drawing from the grid)

    def read(self, body: dict, now: float) -> bool:
        """Take a reading, {"L1": A, …}; negative is fed in. Returns whether it was lost before.

        Raises: BadRequest.
        """
        amps: list[Any] = [body.get(phase) for phase in PHASES]
        most = 10 * self.settings.limit_a
        if set(body) != set(PHASES) or not all(
                type(a) in (int, float) and abs(a) <= most for a in amps):
            raise BadRequest('the body must be {"L1": A, "L2": A, "L3": A}, none of them beyond '
                             "ten times the site's limit")
        back = self.amps is not None and self.is_lost(now)
        self.amps, self.read_mono, self.warned_s = amps, now, 0.0
        return back

    def is_lost(self, now: float) -> bool:
        """Whether it has been silent for too long."""
        return now - self.read_mono > METER_LOST_S

    def judge(self, facts: "list[Fact]", now: float) -> None:
        """What the site draws besides the cars.

        While limits and meters are on their way it counts at least what is left when all cars draw
        what they may: then nothing is freed, but a rise is seen at once.
        """
        flow, most, known, settled = [0.0] * 3, [0.0] * 3, [0.0] * 3, True
        for fact in facts:
            evse, online = fact.evse, fact.station.online
            # What an unreachable station draws is not known: it is not taken off.
            fresh = not evse.transaction or (
                online and evse.meter.read_mono > evse.changed_mono + PILOT_S)
            for phase in range(3):
                drawn = min(fact.flow[phase], fact.worst[phase]) if online else 0.0
                flow[phase] += drawn
                most[phase] += fact.worst[phase]
                known[phase] += drawn if fresh else 0.0
            settled &= fresh
        amps = self.amps or [0.0] * 3
        over = any(a > self.settings.limit_a for a in amps)
        for phase, drawn in enumerate(amps):
            if settled:
                self.other_load[phase] = max(0.0, drawn - flow[phase])
            else:
                least = drawn - (flow[phase] if over else most[phase])
                self.other_load[phase] = max(0.0, min(max(self.other_load[phase], least),
                                                      drawn - known[phase]))
        self._surplus.append((now, sum(flow) - sum(amps)))

    def surplus(self, on_s: float, off_s: float, now: float) -> tuple[float, float, float]:
        """A of all phases that the sun leaves to the cars: now, the least of the last `on_s`, and
        the most of the last `off_s`; 0 for the times that no reading covers."""
        if self.is_lost(now) or not self._surplus:
            return 0.0, 0.0, 0.0
        while len(self._surplus) > 1 and self._surplus[1][0] < now - max(on_s, off_s):
            self._surplus.popleft()
        lately = [amps for at, amps in self._surplus if at >= now - on_s]
        covered = self._surplus[0][0] <= now - on_s
        return (max(0.0, self._surplus[-1][1]),
                max(0.0, min(lately)) if covered and lately else 0.0,
                max(0.0, *(amps for at, amps in self._surplus if at >= now - off_s), 0.0))

    def silence(self, now: float) -> tuple[float, str] | None:
        """(seconds, text) of a silence that is to be told now."""
        age = now - max(self.read_mono, self.started_mono)
        lost_a = self.settings.now.meter_lost_a
        for seconds, text in ((METER_LOST_S, f"is lost: the cars share {lost_a:g} A"),
                              (METER_WARN_S, "is silent")):
            if age > seconds > self.warned_s:
                self.warned_s = seconds
                return age, text
        return None

    def view(self, now: float) -> dict:
        """Of GET /api/smart-charge/config."""
        age = now - self.read_mono
        return {"amps": dict(zip(PHASES, self.amps, strict=True)) if self.amps else None,
                "ageSeconds": round(age, 1) if self.amps else None,
                "otherLoadA": dict(zip(PHASES, (round(a, 1) for a in self.other_load),
                                       strict=True)),
                "surplusA": round(self._surplus[-1][1], 1) if self._surplus else None,
                "status": "ok" if age < METER_WARN_S else "late" if age < METER_LOST_S else "lost"}


class Fact(NamedTuple):
    """An EVSE as a tick has found it."""

    station: SiteStation
    evse: Evse
    worst: tuple                        # A that it may draw in each phase of the site
    flow: tuple                         # A that it draws
    load: float                         # A in a phase for each ampere of a limit

    @property
    def id(self) -> tuple[str, int]:
        return self.station.identity, self.evse.evse_id

    def path(self, tree: CircuitTree) -> list[int]:
        """The places that its car may load."""
        return tree.path(self.station.circuit, self.station.phases_of(self.evse))

    def whole_path(self, tree: CircuitTree) -> list[int]:
        """The places that any car there may load."""
        return tree.path(self.station.circuit, self.station.on_grid(self.station.all_phases))


class Uncontrolled(NamedTuple):
    """A station that takes power which nobody steers."""

    identity: str
    circuit: str
    amps: float                         # A per phase that it counts for
    reason: str                         # half a sentence
    advice: str                         # what to do
    phases: tuple


class Controller:
    """The site's power controller: looks at the Board, decides, and says what to send.

    `tick` is to be called each second; each Command that it returns is to be carried out, and its
    outcome told to `answered`. No I/O.
    """

    def __init__(self, board: Board):
        self.board, self.now = board, board.mono
        self.settings: Any = board.config.smart_charge
        self.site = SiteSettings(board)
        self.started_mono = self.now()
        self.meter = SiteMeter(self.site, self.started_mono)
        self.patterns = {pattern: circuit.name for circuit in self.settings.circuit
                         for pattern in circuit.stations}
        self.stations: dict[str, SiteStation] = {}
        self.elsewhere: set[str] = set()             # identities that are not at this site
        self.upstream_profiles: dict[str, list[Profile]] = {}        # by station
        self.session_settings: dict[str, dict] = {}  # {station and transaction: what was set}
        # {model: (rung for limits, for fallbacks, reads back)}; None: not known
        self.models: OrderedDict[tuple, tuple] = OrderedDict()
        self.facts: list[Fact] = []                  # of the last tick
        self.overload_mono: dict[str, float] = {}
        self.quiet_until = -math.inf
        self._absent_told = self._listed_told = False
        self._failed_mono: dict[str, float] = {}     # stations that could not be looked at
        named = (*self.patterns, *board.config.stations)
        self.named = {name for name in named if not re.search(r"[*?\[]", name)}
        for name in sorted(self.named):
            self._meet(name)
        # A station that an earlier run gave a limit, and that we know nothing of, may draw by it.
        strangers = board.config.ocpp.accept != "listed" or not self.named.issuperset(named)
        self.settled_mono = self.started_mono + (
            self.settings.limit_valid_seconds + EXPIRY_SLACK_S if strangers else 0)
        self._check_fallbacks()
        board.power = self

    # What outlives a restart

    def restore(self) -> None:
        """Take over what an earlier run has sent and learnt; before the first tick."""
        board = self.board
        self.site.restore()
        self.elsewhere = {row.key for row in board.state.rows("elsewhere")}
        for model, rungs in read_rows(board, "charging_model", MODELS_KEPT, _model_of):
            self.models[model] = rungs
        self.session_settings = dict(read_rows(board, "charging_session", SESSIONS_SET,
                                               self._session_of))
        for identity, evse_id, row in read_rows(
                board, "charging_limit", 4 * board.config.store.max_connections, _limits_of):
            if identity in self.elsewhere:
                continue
            station = self.stations.get(identity) or self._meet(identity)
            evse = station.evses.get(evse_id) or self._add_evse(station, evse_id)
            self._restore_evse(evse, *row)
        if board.state.rows("charging_run"):         # what is out there stands in the rows
            self.settled_mono = self.started_mono
        for identity in self.elsewhere & set(self.stations):
            del self.stations[identity]
        board.state.sources.append(self._put_all)
        self._put_all()

    def _restore_evse(self, evse: Evse, limit: float, fallback: float | None) -> None:
        now = self.now()
        evse.row = limit, fallback
        evse.fallback.known_a, evse.fallback.due = fallback, True
        if limit > 0:
            evse.unknown(min(limit, evse.maximum), self._latest(now), now)

    def _put_all(self) -> None:
        """Put all there is, for a file that is new."""
        self.board.state.put("charging_run", "", True)
        for identity in self.elsewhere:
            self.board.state.put("elsewhere", identity, True)
        for model, rungs in self.models.items():
            self.board.state.put("charging_model", to_json(model), rungs)
        for key, values in self.session_settings.items():
            self.board.state.put("charging_session", key, values)
        for station, evse in self._each():
            if any(evse.row):
                self._put_row(station, evse)

    def _session_of(self, row: StateRow) -> tuple[str, dict]:
        """What was set of a session. Raises: WrongValue."""
        try:
            return row.key, read_changes(unpacked("object", row.value, 0.0), self.SESSION_SETTINGS)
        except BadRequest as error:
            raise WrongValue(str(error)) from None

    def _put_row(self, station: SiteStation, evse: Evse, durable: bool = False) -> None:
        limit, fallback = evse.row
        self.board.state.put("charging_limit", f"{evse.evse_id} {station.identity}",
                             {"limit": round(limit, 3), "fallback": fallback}, durable=durable)

    def _latest(self, now: float) -> float:
        """When a limit that was sent up to now has expired."""
        return now + self.settings.limit_valid_seconds + EXPIRY_SLACK_S

    def _record_bounds(self, station: SiteStation) -> bool:
        """Have the State know an upper bound of all that may hold. Returns whether it rises."""
        any_rises = False
        for evse in station.evses.values():
            before_limit, before_fallback = evse.row
            limit, most = max([sent.flow for sent in evse.sent], default=0.0), evse.fallback.most_a
            if limit > before_limit:     # up to where the ramp goes, in one write
                limit = max(limit, evse.target * station.load(evse))
            rises = limit > before_limit or (before_fallback is not None and (
                most is None or most > before_fallback))
            if (limit, most) != evse.row:
                evse.row = limit, most
                self._put_row(station, evse, rises)
            any_rises |= rises
        return any_rises

    # What it is told

    def view(self) -> dict:
        """GET /api/smart-charge/config."""
        return {"enabled": True, **self.site.view(),
                "meter": self.meter.view(self.now()) if self.settings.meter else None,
                "dialects": [{"vendor": vendor, "model": model, "firmware": firmware,
                              "limit": None if rung is None else VARIANTS[rung].text(),
                              "fallback": None if fallback is None
                              else FALLBACK_VARIANTS[fallback].text(), "readsBack": reads_back}
                             for (vendor, model, firmware), (rung, fallback, reads_back)
                             in self.models.items()],
                "elsewhere": sorted(self.elsewhere), "warning": self._warning()}

    def _warning(self) -> str | None:
        """What is unsafe about the configuration."""
        if self.board.config.ocpp.accept != "any":
            return None
        return ("Anybody who can connect can take power away from the cars: name the stations in "
                '[stations."…"] and set ocpp.accept = "listed"')

    def configure(self, body: dict) -> None:
        """Change limit, strategy or margin. Raises: BadRequest, and nothing is changed."""
        before = self.site.view()
        changes = self.site.change(body)
        self.quiet_until = self.now() + 2 * VERIFY_S             # until the cars have followed
        self._log_event("SMART_CHARGE_CONFIG", "", "Changed on the board: " + ", ".join(
            f"{key} {value}" for key, value in changes.items()),
            {"before": {key: before[key] for key in changes}, "after": changes})

    SESSION_SETTINGS: ClassVar = {
        "priority": Setting("session", "priority", 1, (1, 100)),
        "minA": Setting("session", "minA", 6, (6, 80)),
        "maxA": Setting("session", "maxA", 32, (0, 1000)),
        "phases": Setting("session", "phases", 3, (1, 3)),
    }

    def configure_session(self, session: ChargeSession, body: dict) -> None:
        """Change priority, minA, maxA or phases of a session; null gives the usual back.

        Raises: BadRequest, Conflict (it has ended).
        """
        if session.ended_at is not None:
            raise Conflict("The session has ended")
        changes = read_changes(body, self.SESSION_SETTINGS)
        minimum = changes.get("minA", session.min_a) or self.settings.minimum_a
        if (changes.get("maxA") or math.inf) < minimum:
            raise BadRequest(f"maxA must be at least {minimum} A, or 0 to pause")
        self._set_of_session(session, changes)
        key = f"{session.transaction_id} {session.identity}"
        kept_ = {name: value for name, value in (
            self.session_settings.get(key, {}) | changes).items() if value is not None}
        self._keep_of_session(key, kept_)
        self._log_event("SMART_CHARGE_SESSION", session.identity,
                        f"sc-{session.number} changed on the board: " + ", ".join(
                            f"{key} {value}" for key, value in changes.items()),
                        {"sessionId": f"sc-{session.number}", "after": changes})

    def _set_of_session(self, session: ChargeSession, changes: dict) -> None:
        fields = {"priority": "priority", "minA": "min_a", "maxA": "max_a", "phases": "phases_set"}
        settings = self.board.config.station(session.identity) or STATION_DEFAULTS
        usual = {"priority": settings.priority}
        self.board.charge_updated(session, **{
            fields[key]: usual.get(key) if value is None else value
            for key, value in changes.items()})

    def _keep_of_session(self, key: str, values: dict) -> None:
        """What was set of a session outlives a restart, and ends with it."""
        before = self.session_settings.pop(key, None)
        if values:
            self.session_settings[key] = values
        if values or before:
            self.board.state.put("charging_session", key, values or None)
            self.board.state.write_soon()
        if len(self.session_settings) > SESSIONS_SET:
            oldest = next(iter(self.session_settings))
            self._keep_of_session(oldest, {})

    def _end_session(self, evse: Evse) -> None:
        if evse.session:
            self.board.charge_ended(evse.session)
            self._keep_of_session(f"{evse.session.transaction_id} {evse.session.identity}", {})
            evse.session = None

    def set_elsewhere(self, identity: str, elsewhere: bool) -> None:
        """A station that the configuration does not name is not at this site, or is after all.

        It counts for nothing then, and gets no limit. Raises: Conflict (it is named).
        """
        if identity in self.named:
            raise Conflict("The configuration names this station: take it out there")
        if elsewhere == (identity in self.elsewhere):
            return
        if elsewhere:
            self.elsewhere.add(identity)
            if station := self.stations.pop(identity, None):
                for evse_id, evse in station.evses.items():
                    self._end_session(evse)
                    self.board.state.put("charging_limit", f"{evse_id} {identity}", None)
        else:
            self.elsewhere.discard(identity)
        self.board.state.put("elsewhere", identity, True if elsewhere else None)
        self.board.state.write_soon()
        self._log_event("SMART_CHARGE_STATION", identity, "It is not at this site" if elsewhere
                        else "It is at this site", {"elsewhere": elsewhere})

    def take_meter(self, body: dict) -> None:
        """What the site's own meter says: {"L1": A, "L2": A, "L3": A}; negative is fed in.

        Raises: BadRequest, Conflict (no meter is configured).
        """
        if not self.settings.meter:
            raise Conflict("smart_charge.meter is false: no meter of the site is configured")
        now = self.now()
        if self.meter.read(body, now):
            self._log_event("SMART_CHARGE_METER", "", "The site's meter is back", {})
        self.meter.judge(self._look_at_all(now), now)

    def circuits(self) -> list[dict]:
        """GET /api/smart-charge/circuits."""
        facts, limits = self._look_at_all(self.now()), self.site.limits()

        def allocated(fact: Fact) -> tuple:
            amps = fact.evse.session.allocated_a if fact.evse.session else 0.0
            used = fact.station.phases_of(fact.evse) if amps else ()
            return tuple(amps if phase in used else 0.0 for phase in range(3))
        sums = {"allocatedA": self._sums(facts, allocated),
                "measuredA": self._sums(facts, attrgetter("flow")),
                "worstA": self._sums(facts, attrgetter("worst"))}
        uncontrolled, tree = self.uncontrolled(facts), CircuitTree(self.site.circuits(), {})
        return [{"name": c.name, "parent": c.parent or None, "limitA": round(limits[c.name], 3),
                 "usableA": round(c.limit_a, 3), "stations": sorted(
                     s.identity for s in self.stations.values() if s.circuit == c.name),
                 **{kind: dict(zip(PHASES, (round(a, 1) for a in of[c.name]), strict=True))
                    for kind, of in sums.items()},
                 "overLimit": max(sums["measuredA"][c.name]) > limits[c.name] + OVER_A,
                 "uncontrolled": [
                     {"identity": u.identity, "amps": round(u.amps, 1), "reason": u.reason,
                      "advice": u.advice} for u in uncontrolled
                     if c.name in tree.above(u.circuit)]} for c in self.site.circuits()]

    def _sums(self, facts: list[Fact], amps_of: Callable[[Fact], tuple]) -> dict:
        """{circuit: [A in each phase]} of all EVSEs below it."""
        parents = self.site.parents
        sums = {name: [0.0] * 3 for name in parents}
        for fact in facts:
            amps, name = amps_of(fact), fact.station.circuit
            while name and amps is not NO_CURRENT and any(amps):
                sums[name] = [a + b for a, b in zip(sums[name], amps, strict=True)]
                name = parents[name]
        return sums

    def uncontrolled(self, facts: list[Fact]) -> list[Uncontrolled]:
        """Who takes power, or may, without being under control; who takes most first."""
        found: dict[str, Uncontrolled] = {}
        for fact in facts:
            amps = 0.0 if fact.worst is NO_CURRENT else max(fact.worst)
            if amps < 1 or (fact.station.steerable and not fact.evse.is_unknown):
                continue
            reason, advice = self._why_uncontrolled(fact.station, fact.evse)
            before = found.get(fact.station.identity)
            found[fact.station.identity] = Uncontrolled(
                fact.station.identity, fact.station.circuit, amps + (before.amps if before else 0),
                reason, advice, tuple(p for p in range(3) if fact.worst[p] >= 1))
        return sorted(found.values(), key=lambda u: -u.amps)

    def _why_uncontrolled(self, station: SiteStation, evse: Evse) -> tuple[str, str]:
        named = station.identity in self.named
        if not station.settings.managed:
            return "is left alone (managed = false)", "It counts as measured"
        if station.uncontrollable:
            return station.uncontrollable, ("Look at its own load management and its firmware; "
                                            "`max_a` says what its hardware can")
        if station.station is None:
            return "has not connected since the start", (
                "Connect it, or take it out of the configuration" if named else
                "Connect it, or say that it is not at this site")
        if not station.online:
            return "is offline", ("Its connection is to be looked at" if named or evse.transaction
                                  else "Connect it, or say that it is not at this site")
        if not station.ready:
            return "is not accepted yet", "Approve it, or say that it is not at this site"
        if station.abilities and station.fallback_variant() is None:
            return "keeps no limit without the board", (
                "`max_a` says what its hardware can; a circuit of its own bounds it")
        return "has yet to take a limit", ("Wait until it has answered" if named else
                                           "Wait until it has answered, or say that it is not at "
                                           "this site")

    # Each second

    def tick(self) -> list[Command]:
        """Look, decide, and say what to send now."""
        now = self.now()
        self.observe(now)
        facts = self.facts = self._look_at_all(now)
        self._give_shares(facts, now)
        self._want_fallbacks(facts)
        commands = self.commands(facts, now)
        self._tell(facts, now)
        return commands

    # 1. observe

    def _meet(self, identity: str) -> SiteStation:
        settings = self.board.config.station(identity) or STATION_DEFAULTS
        fit = best_fit(identity, self.patterns)
        station = SiteStation(identity, self.patterns[fit] if fit else SITE, settings)
        self.stations[identity] = station
        self._add_evse(station, 1)       # until it says how many it has
        return station

    def _known(self, station: Station) -> SiteStation | None:
        """A station that takes part in the site."""
        known = self.stations.get(station.identity)
        if known is None and station.identity not in self.elsewhere and _counts(station):
            known = self._meet(station.identity)
        return known

    @staticmethod
    def _add_evse(station: SiteStation, evse_id: int) -> Evse:
        evse = station.evses[evse_id] = Evse(evse_id, float(station.settings.max_a))
        return evse

    def _each(self) -> list[tuple[SiteStation, Evse]]:
        """Every EVSE, with its station."""
        return [(station, evse) for station in self.stations.values()
                for evse in station.evses.values()]

    def _look_at_all(self, now: float) -> list[Fact]:
        """What each EVSE may draw, and draws."""
        facts = []
        for station in self.stations.values():
            for evse in station.evses.values():
                flow = station.flow(evse) if evse.meter.worst_a else NO_CURRENT
                facts.append(Fact(station, evse, station.worst_of_phases(evse, flow, now), flow,
                                  station.load(evse) if evse.transaction else 1.0))
        return facts

    def observe(self, now: float) -> None:
        """See what the stations have said since, and whether they obey."""
        stations = self.board.stations
        for identity in [i for i, s in self.stations.items() if s.station and i not in stations]:
            self._forget(identity)
        for absent in self.stations.values():
            if absent.station is None:   # an earlier run has told it a limit, perhaps
                for evse in absent.evses.values():
                    evse.expire(now)
        for station in list(stations.values()):
            known = self._known(station)
            if known is None:
                continue
            try:
                self._observe(known, station, now)
            except Exception:            # one station's trouble must not stop the others
                self._failed(known, now)
        if self.settings.meter and (silence := self.meter.silence(now)):
            self._log_event("SMART_CHARGE_METER", "", f"The site's meter {silence[1]}",
                            {"ageSeconds": round(silence[0])})

    def _failed(self, station: SiteStation, now: float) -> None:
        station.busy = None
        if now - self._failed_mono.get(station.identity, -math.inf) > RETRY_S:
            self._failed_mono[station.identity] = now
            log.exception("Smart charging failed on %s", shown(station.identity))
        self._give_up(station, "could not be looked at: the board's log says why")

    def _observe(self, known: SiteStation, station: Station, now: float) -> None:
        if known.station is not station or known.link is not station.link:
            self._reconnected(known, station, now)
        model = _model_in(station.info)
        if model != known.model and model[0]:
            if known.uncontrollable:     # another firmware
                self._try_again(known, now)
            known.learn(model, self.models.get(model))
        self._observe_evses(known, station, now)
        while known.refusals and known.refusals[0][0] <= now:
            self._judge_refusal(*known.refusals.popleft()[1:])
        if known.uncontrollable and now >= known.retry_mono and known.ready and (
                not known.disobeyed or any(e.transaction for e in known.evses.values())):
            self._try_again(known, now)
        for evse in known.evses.values():
            if evse.sent:
                evse.expire(now)
            if evse.transaction:
                self._judge_need(known, evse, now)
                self._verify(known, evse, now)

    def _forget(self, identity: str) -> None:
        """A station's record was removed: it is gone, but counts until its limits have expired."""
        station, latest = self.stations[identity], self._latest(self.now())
        for evse in station.evses.values():
            self._end_session(evse)
            for limit in evse.sent:
                limit.until_mono = min(limit.until_mono, latest)
            evse.expire(self.now())
        if not any(evse.sent for evse in station.evses.values()):
            del self.stations[identity]
            for evse_id in station.evses:
                self.board.state.put("charging_limit", f"{evse_id} {identity}", None)
            if identity in self.named:
                self._meet(identity)

    def _reconnected(self, known: SiteStation, station: Station, now: float) -> None:
        first = known.station is None
        known.station, known.link, known.busy = station, station.link, None
        known.refusals.clear()
        if station.link is None:
            return
        if known.uncontrollable:
            known.retry_mono = min(known.retry_mono, now + VERIFY_S)
        for evse in known.evses.values():
            evse.resend, evse.fallback.due = bool(evse.sent), True
            if first and not evse.sent and evse.fallback.known_a is None:
                self._forget_limits(evse, now)

    def _forget_limits(self, evse: Evse, now: float) -> None:
        evse.unknown(evse.maximum, self._latest(now), now)

    def _observe_evses(self, known: SiteStation, station: Station, now: float) -> None:
        evses = (known.abilities and known.abilities.evses) or 0
        seen = station, tuple(station.connectors), evses
        if known.seen != seen:
            known.seen, known.connectors = seen, {}
            for (evse_id, _), connector in station.connectors.items():
                if evse_id:
                    known.connectors.setdefault(evse_id, []).append(connector)
            said = known.connectors.keys()
            for evse_id in {*said, *range(1, min(evses, CONNECTORS_KEPT) + 1)} - set(known.evses):
                self._forget_limits(self._add_evse(known, evse_id), now)
            if said and 1 not in said and evses == 0:
                known.evses.pop(1, None)             # it was assumed
        for evse_id, connectors in known.connectors.items():
            self._observe_evse(known, known.evses[evse_id], connectors, now)

    def _observe_evse(self, known: SiteStation, evse: Evse, connectors: list[Connector],
                      now: float) -> None:
        if len(connectors) == 1:
            transaction = connectors[0].transaction
        else:
            transaction = max((c.transaction for c in connectors if c.transaction),
                              key=attrgetter("number"), default=None)
        if transaction is not evse.transaction:
            self._change_transaction(known, evse, transaction, now)
        state = transaction.charging_state if transaction else None
        for connector in connectors:
            if state is None and connector.status != "Available":
                state = connector.status
        if state == "Charging" and evse.state != "Charging":
            evse.resend = bool(evse.sent)            # some forget it while nothing flows
        evse.state = state
        reading = transaction.reading if transaction else max(
            filter(None, (c.reading for c in connectors)), key=attrgetter("flow_mono"),
            default=None)
        if reading and (reading.flow_mono, reading.ended_mono) != evse.meter.taken:
            self._read(known, evse, reading, now)

    def _change_transaction(self, known: SiteStation, evse: Evse,
                            transaction: Transaction | None, now: float) -> None:
        self._end_session(evse)
        if evse.transaction:
            evse.end()
        if transaction is None:
            return
        evse.begin(transaction, min((e.turn.count for _, e in self._each() if e.session),
                                    default=0.0), now)
        self._bind_profiles(known.identity, evse, transaction)
        if known.settings.managed:
            evse.session = self.board.charge_started(
                transaction, known.circuit, self.settings.strategy, known.settings.priority,
                known.settings.phases)
            self._set_of_session(evse.session, self.session_settings.get(
                f"{transaction.id} {known.identity}", {}))

    def _read(self, known: SiteStation, evse: Evse, reading: Reading, now: float) -> None:
        """A meter was read, or a state has ended the flow."""
        evse.meter.taken = reading.flow_mono, reading.ended_mono
        at = min(now, max(reading.flow_mono, reading.ended_mono))
        flow = reading.flow(known.settings.phases, self.settings.voltage)
        if flow is None or now - at > FLOW_OLD_S:
            return
        evse.meter.read(flow, at)
        if evse.transaction and all(
                phase in reading.current_a for phase in PHASES[:known.settings.phases]):
            evse.meter.learn_phases(now)

    def _judge_need(self, known: SiteStation, evse: Evse, now: float) -> None:
        """What the car does not take: by its meter, or because it is suspended and silent."""
        suspended = evse.state == "SuspendedEV"
        reading = evse.transaction.reading if evse.transaction else None
        apart = reading is not None and all(
            phase in reading.current_a for phase in PHASES[:known.settings.phases])
        fresh = evse.meter.read_mono >= now - 1
        # One phase or all? Then its need cannot be told, unless nothing flows.
        if suspended or (fresh and (apart or known.settings.phases == 1)):
            allowed = evse.confirmed.amps if evse.confirmed else 0.0
            evse.meter.judge_need(allowed, now - evse.changed_mono > SETTLED_S,
                                  self.settings.minimum_a, now)

    # Accepted is not obeyed: the meter, or the station's own schedule, has to show it

    def _verify(self, station: SiteStation, evse: Evse, now: float) -> None:
        newest = evse.newest
        if not station.steerable:
            return
        if newest is None:
            self._verify_fallback(station, evse, now)
            return
        if newest.accepted_mono is None:
            return
        seen = evse.meter.read_mono >= evse.verified_mono + PILOT_S
        if seen and evse.meter.least_a > newest.flow + tolerance(newest.flow):
            if now - evse.verified_mono >= VERIFY_S:
                self._disobeyed(station, evse, now, f"draws {evse.meter.least_a:.1f} A")
        elif evse.confirmed is not newest and (seen or self._trusted(station, evse, now)):
            evse.obeys(newest)
            station.disobeyed = station.disobeyed and not seen

    def _verify_fallback(self, station: SiteStation, evse: Evse, now: float) -> None:
        """A car that has no limit of ours must not draw more than the fallback."""
        most, drawn = evse.fallback_a, evse.meter.least_a
        since = max(evse.began_mono, evse.verified_mono, evse.fallback.tried_mono)
        if drawn > most + tolerance(most) and evse.meter.read_mono >= since + VERIFY_S:
            self._error("LIMIT_NOT_OBEYED", station,
                        f"EVSE {evse.evse_id} draws {drawn:.1f} A against a fallback of "
                        f"{most:g} A", {"evse": evse.evse_id, "limitA": most})
            evse.fallback.lost()
            evse.fallback.tried_mono = now

    @staticmethod
    def _trusted(station: SiteStation, evse: Evse, now: float) -> bool:
        """Whether a station without a meter has had its time: its word is all that there is."""
        return (evse.meter.worst_a is None and not evse.read_back_due and station.busy is None
                and now - evse.verified_mono >= 2 * VERIFY_S)

    def _disobeyed(self, station: SiteStation, evse: Evse, now: float, how: str) -> None:
        """Once more, then another variant, then none is left."""
        amps, variant = evse.sent[-1].amps, station.limit_variant()
        strikes = evse.strike(now)
        self._error("LIMIT_NOT_OBEYED", station,
                    f"EVSE {evse.evse_id} {how} against a limit of {amps:g} A",
                    {"evse": evse.evse_id, "limitA": amps, "strikes": strikes,
                     "dialect": (variant or VARIANTS[-1]).text()})
        if strikes > 1:
            station.disobeyed = True
            if variant:
                station.limits.leave(variant)
            self._check_variants(station, "obeys no kind of limit")

    def _check_variants(self, station: SiteStation, why: str) -> None:
        """Give up a station that has no variant left."""
        if station.abilities and station.limit_variant() is None:
            self._give_up(station, why)

    def _give_up(self, station: SiteStation, why: str) -> None:
        station.retry_mono = self.now() + RETRY_S
        if station.uncontrollable != why:
            station.uncontrollable = why
            self._log_event("SMART_CHARGE_UNCONTROLLABLE", station.identity,
                            f"It {why}: counted at {station.settings.max_a} A, its hardware's most",
                            {"maxA": station.settings.max_a}, logging.WARNING)

    def _try_again(self, station: SiteStation, now: float) -> None:
        station.try_again()
        for evse in station.evses.values():
            self._forget_limits(evse, now)

    # 2. decide

    def _give_shares(self, facts: list[Fact], now: float) -> None:
        """Set the target of each session."""
        requests: dict[tuple, tuple[Fact, Request]] = {}
        for fact in facts:
            evse, station = fact.evse, fact.station
            if not evse.session:
                continue
            if not station.steerable:
                evse.target = station.worst(evse, now)
                evse.reason = (f"The station {station.uncontrollable}" if station.uncontrollable
                               else "Offline: counted at what it may draw until it is back"
                               if not station.online else
                               "Waits until the station has spoken and is accepted")
                continue
            if request := self.request(fact, now):
                requests[fact.id] = fact, request
        awake = [fact.evse.turn.count for fact, request in requests.values() if not request.asleep]
        for fact, request in requests.values():
            if request.asleep:           # it has no claim on the turns that it slept through
                fact.evse.turn.count = max(fact.evse.turn.count, min(awake, default=0.0))
        circuits, chosen = self._sunny(requests, self.site.circuits(), now)
        settings = self.settings
        rotate_s = settings.rotate_minutes * 60
        shares = decide(circuits, chosen, self._other_load(facts, now, set(requests)),
                        settings.strategy, now, settings.step_a, rotate_s)
        uncontrolled = self.uncontrolled(facts) if shares else []
        tree = CircuitTree(circuits, {})
        for id_, (fact, request) in requests.items():
            share = shares.get(id_) or Share(0, "Waits for the sun: nothing is left over for "
                                             f"{settings.solar_on_seconds} s")
            fact.evse.target = share.amps
            fact.evse.reason = share.reason + self._beside(share, request, uncontrolled, tree) + (
                self._assumed(fact))
            fact.evse.turn.decided(bool(share.amps), int(now // rotate_s), now)

    @staticmethod
    def _beside(share: Share, request: Request, uncontrolled: list[Uncontrolled],
                tree: CircuitTree) -> str:
        """Who has, without being under control, what a session might get instead."""
        named = [f"{u.identity} {u.amps:g} A ({u.reason})" for u in uncontrolled
                 if share.held_by in tree.above(u.circuit) and set(u.phases) & set(request.phases)]
        return f"; not under control: {', '.join(named[:3])}" + (
            f" and {len(named) - 3} more" if len(named) > 3 else "") if named else ""

    @staticmethod
    def _assumed(fact: Fact) -> str:
        return ("" if fact.load == 1 else "; limited in watts, and its meter does not say how many "
                "phases its car uses: counted as if all ran through one, say it with `phases`")

    def request(self, fact: Fact, now: float) -> Request | None:
        """What a session may be given; None: nothing yet, and its reason says why."""
        station, evse, settings = fact.station, fact.evse, self.settings
        session = evse.session
        if session is None:
            return None
        maximum = evse.maximum if session.max_a is None else min(evse.maximum, session.max_a)
        minimum = session.min_a or settings.minimum_a
        if now < self.settled_mono:
            known = max(evse.confirmed.amps if evse.confirmed else evse.drawn_a(now),
                        evse.fallback.wanted_a)
            if known < minimum:
                evse.target = 0.0
                evse.reason = ("Waits until limits that an earlier run may have set have expired, "
                               f"{math.ceil((self.settled_mono - now) / 10) * 10} s")
                return None
            maximum = min(maximum, known)
        if evse.needs:
            maximum = min(maximum, evse.needs.maximum)
        idle_s = now - evse.meter.idle_since if evse.meter.idle_since is not None else 0.0
        asleep = idle_s > ASLEEP_S and idle_s % ASLEEP_RETRY_S >= ASLEEP_S
        slot = int(now // (settings.rotate_minutes * 60))
        return Request(
            fact.id, station.circuit, station.phases_of(evse), minimum,
            min(maximum, self._upstream_a(station, evse)), session.priority, session.started_at,
            evse.turn.count, evse.turn.waiting_since is None and evse.turn.slot == slot,
            evse.turn.waiting_since, evse.meter.need, asleep, fact.load,
            max(evse.fallback.known_a or 0.0, evse.fallback.sent_a or 0.0))

    def _sunny(self, requests: dict[tuple, tuple[Fact, Request]], circuits: list[Circuit],
               now: float) -> tuple[list[Circuit], list[Request]]:
        """Under solar: the circuits below what the sun leaves, and the requests that it can serve.

        Those with a priority get their minimum in any case. Others begin when the surplus has been
        there for a while, and end when it has not: contactors wear.
        """
        chosen = [request for _, request in requests.values()]
        if self.settings.strategy != "solar":
            return circuits, chosen
        surplus, steady, lately = self.meter.surplus(
            self.settings.solar_on_seconds, self.settings.solar_off_seconds, now)
        firm, served = 0.0, []
        for request in sorted(chosen, key=lambda r: (
                r.priority == 1, r.waiting_since is not None, r.turns, r.arrived)):
            cost = request.minimum * request.load * len(request.phases)
            if request.priority > 1 or firm + cost <= (
                    lately if request.waiting_since is None else steady) + GRAIN_A:
                firm += cost
                served.append(request)
        # What the site draws besides is off the surplus already.
        sun = Circuit(SURPLUS, "", max(surplus, firm) + sum(self._house(now)), pooled=True)
        return [sun, circuits[0]._replace(parent=SURPLUS), *circuits[1:]], served

    def _other_load(self, facts: list[Fact], now: float, without: set) -> dict:
        """What flows at worst besides the sessions that are decided upon: {(circuit, phase): A}.

        A station that is new to us lets nobody rise, but takes nothing away from others before it
        had the time to tell what holds there: it has drawn that before, too.
        """
        load: dict = {}
        for fact in facts:
            if fact.worst is NO_CURRENT or (without and fact.evse.unknown_mono > now - VERIFY_S):
                continue
            decided_on = fact.station.phases_of(fact.evse) if fact.id in without else ()
            for phase, amps in enumerate(fact.worst):
                if amps and phase not in decided_on:
                    key = fact.station.circuit, phase
                    load[key] = load.get(key, 0.0) + amps
        for phase, amps in enumerate(self._house(now)):
            load[SITE, phase] = load.get((SITE, phase), 0.0) + amps
        return load

    def _house(self, now: float) -> list[float]:
        """What the site draws besides the cars, in each phase."""
        if not self.settings.meter or not self.meter.is_lost(now):
            return self.meter.other_load
        return [max(0.0, self.site.circuits()[0].limit_a - self.settings.meter_lost_a)] * 3

    # Upstream's profiles, and what cars say of themselves

    def _upstream_a(self, station: SiteStation, evse: Evse) -> float:
        """What the profiles of the upstream system allow: one more limit, below ours."""
        profiles, transaction = self.upstream_profiles.get(station.identity), evse.transaction
        if not profiles or transaction is None:
            return math.inf
        board = self.board
        began_at = board.clock() - (board.mono() - max(transaction.started_mono, evse.began_mono
                                                       - FLOW_OLD_S))
        phases = station.phase_count(evse) or station.settings.phases
        sharers = sum(1 for other in station.evses.values() if other.transaction)
        return allowed_a(profiles, board.clock(), evse.evse_id, transaction.id,
                         self.settings.voltage * phases, sharers, began_at)

    def manages(self, identity: str) -> bool:
        """Whether the limits of this station are ours to set."""
        station = self.stations.get(identity)
        return station is not None and station.settings.managed

    def keep_profile(self, identity: str, profile: Profile) -> None:
        """Upstream has set a profile: it counts, and is not sent to the station."""
        station = self.stations.get(identity)
        if profile.purpose == "TxProfile" and profile.transaction_id is None and station:
            running = [e.transaction.id for e in station.evses.values()
                       if e.transaction and profile.evse_id in (0, e.evse_id)]
            if len(running) == 1:        # else it came with the command that starts one
                profile.transaction_id = running[0]
        profiles = with_profile(self.upstream_profiles.get(identity, []), profile)
        self.upstream_profiles[identity] = profiles[-UPSTREAM_PROFILES_KEPT:]
        if len(self.upstream_profiles) > self.board.config.store.max_connections:
            del self.upstream_profiles[next(iter(self.upstream_profiles))]

    def _bind_profiles(self, identity: str, evse: Evse, transaction: Transaction) -> None:
        """A TxProfile that came with the command to start a transaction is for this one."""
        for profile in self.upstream_profiles.get(identity, ()):
            if profile.purpose == "TxProfile" and profile.transaction_id is None and (
                    profile.evse_id in (0, evse.evse_id)):
                profile.transaction_id = transaction.id

    def clear_profiles(self, identity: str, wanted: dict) -> bool:
        """Upstream clears the profiles whose attributes are all as wanted; False: there is none."""
        profiles = self.upstream_profiles.get(identity, [])
        left = [p for p in profiles
                if any(getattr(p, name) != value for name, value in wanted.items())]
        if profiles:
            self.upstream_profiles[identity] = left
        return len(left) < len(profiles)

    def car_needs(self, station: Station, payload: dict) -> bool:
        """A car says what it needs; a TxProfile follows. False: its limits are not ours (K15)."""
        evse = self._steered(station, payload)
        if evse is None:
            return False
        evse.needs, evse.resend = CarNeeds.read(payload), True
        return True

    def car_schedule(self, station: Station, payload: dict) -> bool:
        """Whether a car's own schedule stays within its limit; if not, that is sent again (K15)."""
        evse = self._steered(station, payload)
        if evse is None:
            return True
        schedule = lenient(payload, "chargingSchedule", dict, {})
        per_a = 1.0
        if schedule.get("chargingRateUnit") == "W":
            known = self.stations[station.identity]
            per_a = self.settings.voltage * (known.phase_count(evse) or known.settings.phases)
        limits = [lenient(period, "limit", float, math.inf) / per_a for period in _dicts(
            lenient(schedule, "chargingSchedulePeriod", list, []))]
        allowed = evse.commanded_a(self.now())
        if all(amps <= allowed + ROUNDED_A for amps in limits):
            return True
        evse.resend = True
        return False

    def _steered(self, station: Station, payload: dict) -> Evse | None:
        """The EVSE that a car speaks of, where it charges and its limits are ours."""
        known = self._known(station)
        if known is None:
            return None
        self._observe(known, station, self.now())    # its transaction may be of just now
        evse = known.evses.get(lenient(payload, "evseId", int, 0))
        return evse if known.steerable and evse and evse.transaction else None

    def hand_sent(self, identity: str, action: str, payload: dict) -> str | None:
        """What is to be said of a charging profile that somebody sends by hand; None: nothing.

        Raises: Conflict: it would take the place of one of ours (K01.FR.06, K01.FR.39).
        """
        station = self.stations.get(identity)
        profile = payload.get("csChargingProfiles", payload.get("chargingProfile"))
        if action != "SetChargingProfile" or not isinstance(profile, dict) or (
                station is None or not station.settings.managed):
            return None
        purpose, level = profile.get("chargingProfilePurpose"), profile.get("stackLevel")
        place = payload.get("connectorId", payload.get("evseId", 0))
        ours = [(variant.purpose, station.stack_level(variant.highest, least))
                for variant, least in ((station.limit_variant(), 1),
                                       (station.fallback_variant(), 0))
                if variant]
        instead = "the power controller sets this station's limits"
        session = next((evse.session for evse in station.evses.values() if evse.session
                        and place in (0, evse.evse_id)), None)
        if session:
            instead += (f'; PATCH /api/smart-charge/sc-{session.number} with {{"maxA": …}} '
                        "limits this session")
        if (purpose, level) in ours:
            raise Conflict(f"A {kept(purpose, 40)} of stack level {level} would take the place of "
                           f"the board's own: {instead}")
        if purpose in ("TxProfile", "TxDefaultProfile"):
            return f"It lies below the board's own limits and has no effect: {instead}"
        return None

    # The fallbacks

    def _check_fallbacks(self) -> None:
        """Raises: ConfigError when the fallbacks of the stations named exceed a circuit."""
        circuits, fallback_a = self.site.least_circuits(), self.settings.fallback_a
        counts: Counter = Counter()
        for station in self.stations.values():
            name = station.circuit if station.settings.managed else ""
            while name:
                counts[name] += 1
                name = self.site.parents[name]
        for circuit in circuits:
            total = counts[circuit.name] * fallback_a
            if total > circuit.limit_a + GRAIN_A:
                raise ConfigError(
                    f"{self.board.config.source or 'configuration'}: smart_charge: "
                    f"{counts[circuit.name]} stations of circuit \"{circuit.name}\" with a "
                    f"fallback_a of {fallback_a} A make {total} A, and only "
                    f"{circuit.limit_a:.1f} A of it may be used")

    def _want_fallbacks(self, facts: list[Fact]) -> None:
        """Who may keep the fallback: all, until a circuit is full; then others pause without us."""
        fallback_a = float(self.settings.fallback_a)
        if not fallback_a:
            return
        tree, waiting = CircuitTree(self.site.least_circuits(), {}), []
        for fact in facts:
            station, fallback = fact.station, fact.evse.fallback
            if not station.settings.managed:
                continue
            path = fact.whole_path(tree)
            holding = max(fallback.known_a or 0.0, fallback.sent_a or 0.0)
            if station.uncontrollable or station.station is None:
                tree.use(path, fact.evse.maximum if station.station else fallback_a)
            elif holding:
                fits = tree.full(path, fallback_a) is None
                tree.use(path, max(holding, fallback_a if fits else 0.0))
                fallback.wanted_a = fallback_a if fits else 0.0
            else:
                waiting.append((fallback, path))
        for fallback, path in waiting:
            fits = tree.full(path, fallback_a) is None
            fallback.wanted_a = fallback_a if fits else 0.0
            if fits:
                tree.use(path, fallback_a)
        for station in self.stations.values():
            self._want_one_for_all(station)

    @staticmethod
    def _want_one_for_all(station: SiteStation) -> None:
        variant = station.fallback_variant() if station.abilities else None
        if variant and variant.whole:
            wanted = min(evse.fallback.wanted_a for evse in station.evses.values())
            for evse in station.evses.values():
                evse.fallback.wanted_a = wanted

    # 3. commands

    def commands(self, facts: list[Fact], now: float) -> list[Command]:
        """What to send: to each station one command at most, reductions before raises."""
        tree = CircuitTree(self.site.circuits(), self._other_load(facts, now, set()))
        free = [fact for fact in facts if (
            fact.evse.transaction or fact.evse.read_back_due or fact.evse.clear_due
            or fact.station.abilities is None or fact.evse.fallback.is_due(now))
            and not fact.station.busy and fact.station.steerable]
        commands = []
        for choose in (self._urgent, self._raise, self._upkeep):
            for fact in free:
                if fact.station.busy:
                    continue
                try:
                    command = choose(fact, now, tree)
                except Exception:        # one station's trouble must not stop the others
                    self._failed(fact.station, now)
                    continue
                if command:
                    fact.station.busy = command
                    command.durable = self._record_bounds(fact.station)
                    commands.append(command)
        return commands

    @staticmethod
    def _admitted(fact: Fact, path: list[int], flow: float, now: float, tree: CircuitTree) -> bool:
        """Whether a limit may be sent that lets so much flow in a phase; if so, it is taken.

        It may where it surely raises nothing, or where there is room for it beside the worst of
        all others: what an EVSE counts for is no measure of what it has, while that is not known.
        """
        if flow > fact.evse.surely_a(now) + GRAIN_A and any(
                tree.left[place] + fact.worst[place % 3] < flow - GRAIN_A for place in path):
            return False
        for place in path:
            tree.left[place] -= max(0.0, flow - fact.worst[place % 3])
        return True

    def _urgent(self, fact: Fact, now: float, tree: CircuitTree) -> Command | None:
        """What makes the site safer."""
        station, evse = fact.station, fact.evse
        if station.abilities is None:
            asked = ABILITIES[station.protocol == "ocpp1.6"]
            return Command(station, "GetVariables", {"getVariableData": [
                {"component": {"name": component}, "variable": {"name": name}}
                for component, name in asked]}, self._abilities_answered)
        newest = evse.newest
        read_back = evse.read_back_due and station.reads_back is not False and (
            now - evse.verified_mono >= PILOT_S)     # not before the car can have followed
        if evse.transaction and read_back and newest and newest.assumed:
            return self._read_back(fact)             # before an earlier run's limit is replaced
        if evse.transaction and now - evse.changed_mono >= CHANGE_S and (
                command := self._reduction(fact, now, tree)):
            return command
        fallback = evse.fallback
        if fallback.is_due(now):
            if self._admitted(fact, fact.whole_path(tree), fallback.wanted_a, now, tree):
                return self._fallback(fact, fallback.wanted_a, now)
            if fallback.known_a is None:             # first something that is known
                return self._fallback(fact, 0.0, now)
        return self._read_back(fact) if read_back else None

    def _reduction(self, fact: Fact, now: float, tree: CircuitTree) -> Command | None:
        """Less, or something that is known where nothing was."""
        evse, load, path = fact.evse, fact.load, fact.path(tree)
        commanded, newest = evse.commanded_a(now), evse.newest
        amps = min(evse.target, commanded)
        if evse.is_unknown:
            least = max(evse.target and self.settings.minimum_a, amps)
            if least > evse.target or not self._admitted(fact, path, least * load, now, tree):
                least = 0.0
            return self._limit(fact, least, now)
        # While it is not known which phases a car uses, watts may let it draw more in one than it
        # does: then what it has is less.
        is_less = load == 1 or not evse.meter.worst_a or amps * load <= evse.meter.worst_a or (
            now - evse.began_mono > 2 * PHASES_S)
        if is_less and (amps < commanded or (newest and newest.flow > amps * load + GRAIN_A)) and (
                self._admitted(fact, path, amps * load, now, tree)):
            return self._limit(fact, amps, now)
        return None

    def _raise(self, fact: Fact, now: float, tree: CircuitTree) -> Command | None:
        """More, as far as the worst of all together leaves room, and the ramp allows."""
        evse, settings = fact.evse, self.settings
        before = evse.commanded_a(now)
        if not evse.transaction or not evse.session or evse.target <= before or (
                now - evse.changed_mono < CHANGE_S):
            return None
        minimum, step = evse.session.min_a or settings.minimum_a, settings.step_a
        if before < minimum:
            amps = float(min(evse.target, math.ceil(minimum / step) * step))
        elif now - evse.raised_mono >= RAISE_EVERY_S:
            ramp = max(step, settings.raise_a_per_30s // step * step)
            amps = min(evse.target, before + ramp)
        else:
            return None
        path, least = fact.path(tree), max(minimum, before + step)
        while amps >= least:
            if self._admitted(fact, path, amps * fact.load, now, tree):
                return self._limit(fact, amps, now)
            amps -= step
        return None

    def _upkeep(self, fact: Fact, now: float, tree: CircuitTree) -> Command | None:
        """Renewals, and what has time."""
        station, evse, newest = fact.station, fact.evse, fact.evse.newest
        if evse.transaction:
            due_s = CHANGE_S if evse.resend else self.settings.limit_valid_seconds / 3
            amps = newest.amps if newest else evse.commanded_a(now)
            if (newest or evse.resend) and now - evse.sent_mono >= due_s and self._admitted(
                    fact, fact.path(tree), amps * fact.load, now, tree):
                return self._limit(fact, amps, now)
            return self._trigger(fact, now) if station.triggers and newest else None
        if evse.clear_due:
            evse.clear_due = False
            if not station.one_slot:
                return Command(station, "ClearChargingProfile", {
                    "chargingProfileId": LIMIT_ID + evse.evse_id}, self._clear_answered, evse)
            evse.fallback.due, evse.fallback.tried_mono = True, -math.inf    # it takes its place
        return None

    def _trigger(self, fact: Fact, now: float) -> Command | None:
        """Ask for meter values, where none has shown the newest limit."""
        evse, newest = fact.evse, fact.evse.sent[-1]
        if newest.accepted_mono is None or evse.confirmed is newest or (
                evse.meter.read_mono >= evse.verified_mono + PILOT_S
                or now - max(evse.verified_mono, evse.triggered_mono) < VERIFY_S):
            return None
        evse.triggered_mono = now
        return Command(fact.station, "TriggerMessage", {
            "requestedMessage": "MeterValues", "evse": {"id": evse.evse_id}},
            self._trigger_answered, evse)

    def _read_back(self, fact: Fact) -> Command:
        fact.evse.read_back_due = False
        return Command(fact.station, "GetCompositeSchedule", {
            "evseId": fact.evse.evse_id, "duration": 60}, self._read_back_answered, fact.evse,
            fact.evse.newest)

    def _limit(self, fact: Fact, amps: float, now: float) -> Command | None:
        """SetChargingProfile with the limit of a session."""
        station, evse = fact.station, fact.evse
        variant = station.limit_variant()
        if variant is None or evse.transaction is None:  # its model's rung does not suit this one
            self._check_variants(station, "takes no kind of limit")
            return None
        profile = {"id": LIMIT_ID + evse.evse_id,
                   "stackLevel": station.stack_level(variant.highest, 1),
                   "chargingProfilePurpose": variant.purpose, "chargingProfileKind": variant.kind}
        if variant.purpose == "TxProfile":
            profile["transactionId"] = evse.transaction.id
        schedule, until_mono = self._schedule(station, evse, variant, amps), math.inf
        if variant.kind == "Absolute":   # its start lies behind, for clocks that are a little off
            starts_at, lasts_s, until_mono = self._time(station, now)
            schedule = {"startSchedule": wire_time(starts_at), "duration": lasts_s} | schedule
            if variant.purpose == "TxDefaultProfile" and station.one_slot:
                profile["id"] = FALLBACK_ID + evse.evse_id
                del schedule["duration"]
                period, = schedule["chargingSchedulePeriod"]
                factor = self.settings.voltage if variant.unit == "W" else 1
                schedule["chargingSchedulePeriod"] = [period, period | {
                    "startPeriod": lasts_s, "limit": round(factor * min(
                        evse.fallback.wanted_a, evse.fallback.known_a or 0.0), 1)}]
        widest = amps * (1 if variant.unit == "A" else station.settings.phases)
        limit = SentLimit(amps, amps * fact.load, widest, until_mono,
                          outlives=variant.purpose != "TxProfile")
        evse.send(limit, now)
        return Command(station, "SetChargingProfile", {
            "evseId": 0 if variant.whole else evse.evse_id,
            "chargingProfile": profile | {"chargingSchedule": [{"id": 1} | schedule]}},
            self._limit_answered, evse, limit, variant, evse.transaction)

    def _time(self, station: SiteStation, now: float) -> tuple[float, int, float]:
        """(start of a limit, its seconds, when it has expired) for a station's clock.

        A clock that is off may be set at any time: the start is never later than now, by either
        clock, and the end never earlier.
        """
        skew_s = (station.station.clock_skew_s if station.station else None) or 0.0
        off_s = math.ceil(abs(skew_s))
        starts_at = self.board.clock() + min(0.0, skew_s) - START_EARLY_S
        if off_s > SKEW_MOST_S:          # then by its clock alone
            starts_at, off_s = self.board.clock() + skew_s - START_EARLY_S, 0
        valid_s = self.settings.limit_valid_seconds + off_s
        return starts_at, int(valid_s + START_EARLY_S), now + valid_s + EXPIRY_SLACK_S

    def _fallback(self, fact: Fact, amps: float, now: float) -> Command | None:
        """SetChargingProfile with what holds without us."""
        station, evse = fact.station, fact.evse
        variant = station.fallback_variant()
        if variant is None:              # it counts at its maximum until it takes one
            if now - evse.fallback.tried_mono > RETRY_S:
                station.fallbacks.start(0)
            return None
        for other in station.evses.values() if variant.whole else ():
            other.fallback.sent_a = max(amps, other.fallback.sent_a or 0.0)
        evse.fallback.send(amps, now)
        if variant.unit == "W":          # all of it may flow in one phase
            schedule: dict = {"chargingRateUnit": "W", "chargingSchedulePeriod": [
                {"startPeriod": 0, "limit": round(amps * self.settings.voltage, 1)}]}
        else:
            schedule = self._schedule(station, evse, variant, amps)
        place = 0 if variant.whole else evse.evse_id
        return Command(station, "SetChargingProfile", {"evseId": place, "chargingProfile": {
            "id": FALLBACK_ID + place, "stackLevel": station.stack_level(variant.highest, 0),
            "chargingProfilePurpose": variant.purpose, "chargingProfileKind": "Absolute",
            "chargingSchedule": [{"id": 1, "startSchedule": FALLBACK_START} | schedule]}},
            self._fallback_answered, evse, variant=variant)

    def _schedule(self, station: SiteStation, evse: Evse, variant: ProfileVariant,
                  amps: float) -> dict:
        period: dict = {"startPeriod": 0, "limit": float(amps)}
        if variant.unit == "W":
            phases = (evse.transaction and station.phase_count(evse)) or station.settings.phases
            period["limit"] = round(amps * self.settings.voltage * phases, 1)
            if variant.phases:
                period["numberPhases"] = phases
        return {"chargingRateUnit": variant.unit, "chargingSchedulePeriod": [period]}

    def steps(self, command: Command) -> Steps:
        """A command as the station's version has it: what to ask it, and what that comes to."""
        translator = Translator(command.station.protocol, "ocpp2.0.1", int, self.board.clock)
        return translator.down(command.action, command.payload)

    async def carry_out(self, command: Command) -> None:
        """Send a command and take its outcome; a raise waits until the State has it."""
        link, state = command.station.link, self.board.state
        waits = state.committed() if command.durable else None
        if waits is not None:
            await waits                  # with a disk that fails, the cars charge all the same

        async def ask(action: str, payload: dict) -> dict:
            return (await link.call(action, payload))[0]
        try:
            payload = await carry(self.steps(command), ask)
        except BoardError as error:
            self.answered(command, {}, error)
        else:
            self.answered(command, payload or {})

    # What becomes of a command

    def answered(self, command: Command, payload: dict, error: BoardError | None = None) -> None:
        """An answer to a command, or the error that came instead."""
        if command.station.busy is command:
            command.station.busy = None
        answer = Answer(payload, error is None and payload.get("status") == "Accepted",
                        isinstance(error, (NoAnswer, Conflict, Busy)))
        command.on_answer(command, answer)
        self._record_bounds(command.station)

    def _abilities_answered(self, command: Command, answer: Answer) -> None:
        station = command.station
        station.unasked += 1
        if not answer.unknown or station.unasked > 1:    # what it does not say, it may have
            station.abilities, station.unasked = abilities_in(answer.payload), 0
            if station.limit_variant() is None:          # its model's rung is none for it
                station.limits.start(0)

    def _limit_answered(self, command: Command, answer: Answer) -> None:
        station, evse, limit, variant = (command.station, command.evse, command.limit,
                                         command.variant)
        if evse is None or limit is None or variant is None:
            return
        if answer.accepted:
            evse.accepted(limit, self.now())
            station.limits.accepted()
            if evse.sent and evse.confirmed is not limit:
                evse.read_back_due = station.reads_back is not False
            self._remember(station)
        elif answer.unknown:
            evse.resend = True
            if station.limits.unanswered(variant):
                self._check_variants(station, "does not answer to any kind of limit")
        else:
            evse.refused(limit)
            station.refusals.append((self.now() + REFUSAL_S, command, answer))

    def _judge_refusal(self, command: Command, answer: Answer) -> None:
        """A limit was refused, and not because its transaction has ended."""
        station, evse, variant = command.station, command.evse, command.variant
        if evse is None or variant is None or evse.transaction is not command.transaction:
            return
        self._tell_refusal(station, "limit", variant, answer)
        if station.limits.refused(variant):
            self._check_variants(station, "refuses every kind of limit")

    def _tell_refusal(self, station: SiteStation, what: str, variant: ProfileVariant,
                      answer: Answer) -> None:
        self._error("PROFILE_REFUSED", station, f"It refused a {what} ({variant.text()})",
                    {"dialect": variant.text(),
                     "status": kept(answer.payload.get("status", "CALLERROR"))})

    def _fallback_answered(self, command: Command, answer: Answer) -> None:
        station, evse, variant = command.station, command.evse, command.variant
        if evse is None or variant is None:
            return
        if answer.accepted:
            station.fallbacks.accepted()
            evse.fallback.unread, evse.fallback.accepted = bool(evse.transaction), True
            if station.one_slot and not evse.transaction:        # it took the limit's place
                evse.gone()
            if station.reads_back is False or evse.transaction:
                self._fallback_holds(station, evse)
            else:
                evse.read_back_due = True
        elif answer.unknown:
            evse.fallback.due = True
        else:
            self._tell_refusal(station, "fallback", variant, answer)
            self._next_fallback(station, evse, variant)

    def _next_fallback(self, station: SiteStation, evse: Evse,
                       variant: ProfileVariant | None) -> None:
        if variant:
            station.fallbacks.leave(variant)
        evse.fallback.refused()
        if station.reads_back is False:
            evse.fallback.lost()
        evse.read_back_due = evse.fallback.known_a is not None   # is the one before still there?
        if station.abilities and station.fallback_variant():
            evse.fallback.tried_mono = -math.inf
        else:
            evse.fallback.tried_mono = self.now()
            self._log_event("SMART_CHARGE_NO_FALLBACK", station.identity,
                            "It keeps no limit that holds without the board: without a transaction "
                            f"it counts at {evse.maximum:g} A", {}, logging.WARNING)

    def _fallback_holds(self, station: SiteStation, evse: Evse) -> None:
        evse.fallback.holds()
        self._remember(station)

    def _read_back_answered(self, command: Command, answer: Answer) -> None:
        """What the station says that holds now, against what we told it."""
        station, evse, now = command.station, command.evse, self.now()
        if evse is None:
            return
        if answer.unknown:
            station.unread += 1
            evse.read_back_due = station.unread < 2
            evse.fallback.due = not evse.read_back_due
            if station.unread >= 2:
                station.reads_back, station.unread = False, 0
            return
        station.unread = 0
        amps, flow = self._read_schedule(station, evse, answer.payload.get("schedule"))
        station.reads_back = answer.accepted and amps is not None
        if amps is None or not answer.accepted:
            if evse.fallback.accepted and evse.fallback.sent_a is not None:
                self._fallback_holds(station, evse)
            return
        newest = evse.newest
        if newest is None or (newest.assumed and newest is command.limit):
            self._read_first(station, evse, amps, flow)
        elif newest is command.limit and newest.accepted_mono is not None and evse.transaction:
            if flow > newest.flow + tolerance(newest.flow):
                if evse.meter.worst_a is None:       # else the meter has the last word
                    self._disobeyed(station, evse, now, f"says that {amps:g} A hold")
            elif evse.meter.worst_a is None and now - newest.accepted_mono >= PILOT_S:
                evse.confirm(newest)

    def _read_first(self, station: SiteStation, evse: Evse, amps: float, flow: float) -> None:
        """What holds in a station that has no limit of ours, as far as we know."""
        fallback = evse.fallback
        known = [a for a in (fallback.known_a, fallback.sent_a) if a is not None]
        if evse.transaction:             # one of an earlier run; nobody knows when it ends
            evse.sent = [SentLimit(amps, flow, flow, math.inf, self.now())]
            evse.confirmed = evse.sent[0]
        elif known and flow <= max(known) + tolerance(max(known)):
            evse.gone()
            if fallback.sent_a is not None and (
                    flow <= fallback.asked_a + tolerance(fallback.asked_a)):
                self._fallback_holds(station, evse)
        elif evse.sent:
            fallback.due = True          # an earlier run's, above it: look again later
        else:
            sent, fallback.known_a = fallback.sent_a, None
            if sent is not None:
                self._next_fallback(station, evse, station.fallback_variant())

    def _read_schedule(self, station: SiteStation, evse: Evse,
                       schedule: Any) -> tuple[float | None, float]:
        """(A that a composite schedule allows now, A that it lets flow in one phase); None, 0 if it
        does not tell."""
        periods = schedule.get("chargingSchedulePeriod") if isinstance(schedule, dict) else None
        period = periods[0] if isinstance(periods, list) and periods else None
        limit = lenient(period, "limit", float) if isinstance(period, dict) else None
        if limit is None or limit < 0:
            return None, 0.0
        flow = limit
        if schedule.get("chargingRateUnit") == "W":
            known = station.phase_count(evse)
            phases = known or station.settings.phases
            limit /= self.settings.voltage * phases
            flow = limit if known else limit * phases
        return min(limit, evse.maximum), min(flow, evse.maximum)         # many tell of 1000 A

    def _clear_answered(self, command: Command, answer: Answer) -> None:
        evse = command.evse
        if evse is None or evse.transaction is not None:
            return
        if answer.unknown:
            evse.clear_due = True
        elif answer.payload.get("status") in ("Accepted", "Unknown"):
            evse.gone()

    def _trigger_answered(self, command: Command, answer: Answer) -> None:
        """Its meter values are looked at when they come."""
        command.station.triggers = answer.accepted or answer.unknown

    def _remember(self, station: SiteStation) -> None:
        """What works with one station of a model is tried first with the others."""
        if not station.model:
            return
        before = self.models.get(station.model, (None, None, None))
        rungs = (*(min((rung for rung in (known, ladder.rung if ladder.worked else None)
                        if rung is not None), default=None)      # of the most willing of them
                   for known, ladder in zip(before, (station.limits, station.fallbacks),
                                            strict=False)), station.reads_back)
        self.models[station.model] = rungs
        self.models.move_to_end(station.model)
        if rungs != before:
            self.board.state.put("charging_model", to_json(station.model), rungs)
        if len(self.models) > MODELS_KEPT:
            oldest, _ = self.models.popitem(last=False)
            self.board.state.put("charging_model", to_json(oldest), None)

    # 4. tell

    def _log_event(self, kind: str, identity: str, text: str, details: dict,
                   level: int = logging.INFO) -> None:
        self.board.system_event(kind, identity, text, details)
        log.log(level, "%s%s", f"{shown(identity)}: " if identity else "", text)

    def _error(self, kind: str, station: SiteStation, text: str, details: dict) -> None:
        if station.station:
            self.board.error(kind, station.station, text, details)

    def _tell(self, facts: list[Fact], now: float) -> None:
        """Bring the records of the sessions up to date, and warn of circuits that draw too much."""
        for fact in facts:
            station, evse, session = fact.station, fact.evse, fact.evse.session
            if not session:
                continue
            phases = station.phase_count(evse) or station.settings.phases
            allocated = next((limit.amps for limit in reversed(evse.sent)
                              if limit.accepted_mono is not None or limit.assumed), evse.fallback_a)
            if station.uncontrollable:
                allocated = evse.maximum
            drawn = evse.meter.worst_a
            rising = evse.target > allocated and station.steerable and evse.target >= 1
            self.board.charge_updated(
                session, status=self._status(station, evse, session, now), allocated_a=allocated,
                target_a=float(evse.target), measured_a=None if drawn is None else round(drawn, 1),
                reason=evse.reason + (f"; on its way to {evse.target:g} A" if rising else ""),
                phases=phases, strategy=self.settings.strategy,
                allocated_kw=round(allocated * phases * self.settings.voltage / 1000, 3))
        self._warn_of_overloads(facts, now)
        self._warn_of_absent(now)

    def _status(self, station: SiteStation, evse: Evse, session: ChargeSession,
                now: float) -> str:
        if not station.online:
            return "offline"
        if station.uncontrollable:
            return "uncontrollable"
        if not evse.target:
            return "waiting"
        allowed = evse.confirmed.amps if evse.confirmed else 0.0
        settled = now - evse.changed_mono > SETTLED_S and allowed >= (
            session.min_a or self.settings.minimum_a)
        if settled and evse.meter.worst_a is not None and evse.meter.worst_a < 1:
            return "limited-by-station" if evse.state == "SuspendedEVSE" else "paused"
        reading = evse.transaction.reading if evse.transaction else None
        if settled and reading and reading.offered_a is not None and (
                reading.offered_a < allowed - 1):
            return "limited-by-station"
        return "active"

    def _warn_of_absent(self, now: float) -> None:
        """Stations that have not come take power from the others: that must be known."""
        absent = [(station, amps) for station in self.stations.values() if station.station is None
                  and (amps := sum(evse.worst_a(False) for evse in station.evses.values())) >= 1]
        if not self._listed_told:
            self._listed_told = True
            if warning := self._warning():
                log.warning("%s", warning)
            if absent:
                log.warning("Counted, though not under control until they connect: %s", ", ".join(
                    f"{shown(station.identity)} {amps:g} A" for station, amps in absent[:20]))
        if self._absent_told or now < self.started_mono + RETRY_S:
            return
        self._absent_told = True
        for station, amps in absent:
            where = "is named in the configuration" if station.identity in self.named else (
                "was here before the start")
            self._log_event("SMART_CHARGE_ABSENT", station.identity,
                            f"It {where} and has not connected: it counts at {amps:g} A",
                            {"maxA": amps}, logging.WARNING)

    def _warn_of_overloads(self, facts: list[Fact], now: float) -> None:
        if now < self.quiet_until:
            return
        limits = self.site.limits()
        for name, amps in self._sums(facts, attrgetter("flow")).items():
            most, told_mono = max(amps), self.overload_mono.get(name, -math.inf)
            if most > limits[name] + OVER_A and now - told_mono > COALESCE_S:
                self.overload_mono[name] = now
                self._log_event("SMART_CHARGE_OVERLOAD", "", f"The cars draw {most:.1f} A on "
                                f"circuit {name}, which can {limits[name]:g} A",
                                {"circuit": name,
                                 "measuredA": dict(zip(PHASES, amps, strict=True))},
                                logging.WARNING)


OVER_A = 0.5                            # that meters may be wrong by
ROUNDED_A = 0.05                        # that a limit in watts may be off


def tolerance(amps: float) -> float:
    """How far a car that obeys, or its meter, may be off a limit."""
    return max(1.0, amps * 0.06)


def _counts(station: Station) -> bool:
    """Whether a station that nobody has named takes part in the site.

    Not before it has said a word; while it is not accepted only if it charges.
    """
    if not station.has_spoken:
        return False
    return station.registration in (None, "Accepted") or any(
        connector.transaction or connector.status == "Charging" or (
            connector.reading and any(connector.reading.current_a.values()))
        for connector in station.connectors.values())


def _model_in(info: dict) -> tuple[str, str, str]:
    return info.get("vendor") or "", info.get("model") or "", info.get("firmware") or ""


def _model_of(row: StateRow) -> tuple[tuple, tuple]:
    """Of a row of `charging_model`. Raises: WrongType, WrongValue."""
    try:
        model = tuple(json.loads(row.key))
    except ValueError:
        raise WrongValue("its key is no model") from None
    value = row.value if type(row.value) is list and len(row.value) == 3 else [None] * 3
    if len(model) != 3 or not all(type(part) is str for part in model) or not (
            _is_rung(value[0], VARIANTS) and _is_rung(value[1], FALLBACK_VARIANTS)
            and (value[2] is None or type(value[2]) is bool)):
        raise WrongValue(f"{shown(row.text)} are no rungs")
    return model, tuple(value)


def _is_rung(value: Any, variants: tuple) -> bool:
    return value is None or (type(value) is int and 0 <= value < len(variants))


def _limits_of(row: StateRow) -> tuple[str, int, tuple[float, float | None]]:
    """Of a row of `charging_limit`. Raises: WrongType, WrongValue."""
    evse_id, _, identity = row.key.partition(" ")
    value = row.value if type(row.value) is dict else {}
    limit = unpacked("number", value.get("limit"), 0.0)
    fallback = unpacked("number?", value.get("fallback"), 0.0)
    if not evse_id.isdecimal() or not identity or limit < 0 or (fallback or 0) < 0:
        raise WrongValue("it is no limit")
    return identity, int(evse_id), (limit, fallback)


# --- Relay --------------------------------------------------------------------------------
# Stations that go on to an upstream central system, whose answers count. An UpstreamSession is one
# station's way there: a MessageQueue has its QueuedCalls, and one of them at a time is sent. A
# start or stop is in the State before it is sent, and so is whatever the station has our answer to.

TICK_S = 0.25                       # how often sessions look at the clock
SESSION_COUNTS = ("passed", "translated", "refused", "buffered", "delivered", "lost", "errors",
                  "answeredHere")
CLEARED_BY = {                           # what a ClearChargingProfile names, in either version
    "id": "id", "chargingProfileId": "id", "connectorId": "evse_id", "evseId": "evse_id",
    "chargingProfilePurpose": "purpose", "stackLevel": "stack_level"}
STARTING = {"RemoteStartTransaction": "connectorId", "RequestStartTransaction": "evseId"}
KNOWN_S = 400 * 86400               # so long what a restart needs of a station is kept unused
RELAY_BYTES = 64 << 20              # of frames that wait for upstream, of all stations
SESSION_BYTES = 2 << 20             # and of one


class Relay:
    """All sessions, and what they share: the clock, the state, what passes between them and us."""

    def __init__(self, board: Board, schemas: Schemas | None,
                 spawn: Callable[[str, Any], asyncio.Task], controller: Controller | None = None,
                 now: Callable[[], float] = time.monotonic):
        self.board, self.schemas, self.spawn, self.controller = board, schemas, spawn, controller
        self.now, self.state = now, board.state
        self.sessions: dict[str, UpstreamSession] = {}
        self.asking: dict[str, tuple] = {}       # {identity: (link, …)} of who waits for approval
        self._last_key = 0                       # of a QueuedCall in the state
        self.state.sources.append(self.keep_all)

    def start(self) -> None:
        """Take up what an earlier run knew, and had to deliver."""
        self.board.transaction_id_used(import_journal(
            self.board.config.proxy.journal, self.state, self.board.clock()))
        for kind, restore in RESTORED.items():
            for row in self.state.rows(kind):
                try:
                    identity = row.value["identity"]
                    settings = self.board.config.upstream(identity)
                    if settings is not None:
                        restore(self._session(identity, settings), row)
                    elif kind == "queued":
                        log.warning("What waits for %s stays in the state: no upstream is there "
                                    "for it", shown(identity))
                except (BadFrame, AttributeError, KeyError, TypeError, ValueError) as error:
                    log.error("A row of the state, %s %s, cannot be used: %s", kind,
                              shown(row.key), shown(error))
        for kind in RESTORED:
            if kind != "queued":
                self.state.remove_before(kind, self.board.clock() - KNOWN_S)
        self._drop_beyond_bound()

    def attach(self, link: Link, authorization: str) -> None:
        """A station has connected: it goes on upstream if an upstream is there for it."""
        identity = link.station.identity
        settings = self.board.config.upstream(identity)
        if settings is None or link.ended:
            return
        if not self.board.is_approved(identity):
            self.asking[identity] = (link, authorization)
            return
        most = self.board.config.store.max_connections
        if identity not in self.sessions and len(self.sessions) >= most and not self._make_room():
            log.warning("%s does not go on: %d stations do, or have messages that wait",
                        shown(identity), most)
            return
        self._session(identity, settings).attach(link, authorization)

    def _make_room(self) -> bool:
        """Forget a session that nobody uses; False where there is none."""
        idle = next((s for s in self.sessions.values() if not s.is_needed()
                     and s.status == IDLE), None)
        if idle is None:
            return False
        del self.sessions[idle.identity]
        idle.forget()
        return True

    def _session(self, identity: str, settings: SimpleNamespace) -> "UpstreamSession":
        if identity not in self.sessions:
            self.sessions[identity] = session = UpstreamSession(self, identity, settings)
            session.task = self.spawn("relay", session.run())
        return self.sessions[identity]

    def tick(self) -> None:
        """Let each session look at the clock."""
        now, ping_s = self.now(), self.board.config.ocpp.ping_interval_seconds
        for identity, (link, authorization) in list(self.asking.items()):
            if link.ended or self.board.is_approved(identity):
                del self.asking[identity]
                self.attach(link, authorization)
        for session in list(self.sessions.values()):
            session.tick(now)
            if session.websocket is not None and ping_s:
                self._keep_alive(session, session.websocket, time.monotonic(), ping_s)
        self._drop_beyond_bound()

    @staticmethod
    def _keep_alive(session: "UpstreamSession", websocket: WebSocket, now: float,
                    ping_s: float) -> None:
        """Ping an upstream; one without any sign for two intervals is gone."""
        if now - websocket.last_sign > 2 * ping_s:
            session.hang_up("upstream does not answer pings")
        else:
            websocket.ping_if_due(now, ping_s)

    def _drop_beyond_bound(self) -> None:
        """Many stations together must not take all memory: the longest queue gives way."""
        over = sum(s.queue.bytes for s in self.sessions.values()) - RELAY_BYTES
        while over > 0:
            session = max(self.sessions.values(), key=lambda s: s.queue.bytes)
            before = session.queue.bytes
            session.drop_least(f"too much waits for upstream ({RELAY_BYTES >> 20} MiB in all)")
            over -= before - session.queue.bytes

    def next_key(self, after: str = "0") -> str:
        """A key for a row of the state that sorts behind all before it, and behind `after`."""
        self._last_key = max(self._last_key + 1, int(after), int(self.board.clock() * 1000))
        return f"{self._last_key:015d}"

    def keep_all(self) -> None:
        """Put all that a restart needs into the state: its file is a new one."""
        for session in self.sessions.values():
            session.keep_all()

    def is_there(self, settings: SimpleNamespace) -> None:
        """One session has got through: the others of this upstream need not wait as long."""
        now = self.now()
        for session in self.sessions.values():
            if session.settings is settings and session.status == BACKOFF:
                session.connect_after = min(session.connect_after, now + random.uniform(0, SOON_S))

    def stop(self) -> None:
        """Let go of everything; what was not delivered is in the log."""
        for session in self.sessions.values():
            if waiting := session.waiting:
                log.warning("%s: %d messages for %s %s", shown(session.identity), waiting,
                            session.settings.url,
                            "wait in the state" if self.state else "are lost")
            session.stop()

    def view(self) -> list[dict]:
        """Each upstream with its sessions, as REST shows them."""
        views = []
        for settings in self.board.config.proxy.upstream:
            sessions = [s for s in self.sessions.values() if s.settings is settings]
            online = [s for s in sessions if s.status == ONLINE]
            lags = [s.lag_ms for s in online if s.lag_ms is not None]
            views.append({
                "url": settings.url, "protocol": settings.protocol, "patterns": settings.stations,
                "whenDown": settings.when_down, "queue": settings.queue,
                "stations": len(sessions), "up": len(online),
                "upSince": iso(min((s.up_since for s in online if s.up_since), default=None)),
                "lagMs": round(sum(lags) / len(lags), 3) if lags else None,
                "waiting": sum(s.waiting for s in sessions),
                **{name: sum(s.counts[name] for s in sessions) for name in SESSION_COUNTS},
                "sessions": [s.view() for s in sorted(sessions, key=attrgetter("identity"))]})
        return views

    # Upstream's charging profiles, of stations that we steer

    def limit(self, session: "UpstreamSession", call: Call) -> CallResult | None:
        """Take upstream's charging profiles for the limits of a station that we steer.

        Returns the answer to upstream; None where the Call is for the station.
        """
        payload, controller = call.payload, self._steering(session)
        if controller is None:
            return None
        if call.action == "SetChargingProfile":
            body, place = (("csChargingProfiles", "connectorId") if "csChargingProfiles" in payload
                           else ("chargingProfile", "evseId"))
            self._limit(controller, session, required(payload, body, dict),
                        optional(payload, place, int, 0))
            return _result_of(call, ACCEPTED)
        if call.action == "ClearChargingProfile":
            wanted = payload | lenient(payload, "chargingProfileCriteria", dict, {})
            cleared = controller.clear_profiles(session.identity, {
                name: wanted[key] for key, name in CLEARED_BY.items() if key in wanted})
            return _result_of(call, {"status": "Accepted" if cleared else "Unknown"})
        return None

    def _steering(self, session: "UpstreamSession") -> Controller | None:
        """The power controller, where it steers the station."""
        steers = self.controller is not None and self.controller.manages(session.identity)
        return self.controller if steers else None

    def _limit(self, controller: Controller, session: "UpstreamSession", profile: dict,
               evse_id: int) -> None:
        """Keep a profile of upstream, in either version. Raises: FormatViolation."""
        schedule = profile.get("chargingSchedule")
        schedule = schedule[0] if isinstance(schedule, list) and schedule else schedule
        if not isinstance(schedule, dict):
            raise WrongType("chargingSchedule is no schedule")
        id_ = optional(profile, "id", int) or optional(profile, "chargingProfileId", int, 0)
        read = Profile.read(id_, evse_id, profile, schedule, self.board.clock())
        if known := session.known_upstream(read.transaction_id):
            read.transaction_id = known.station_id
        controller.keep_profile(session.identity, read)
        self.board.system_event("PROXY_LIMIT", session.identity, "A charging profile of the "
                                "upstream system counts as one more limit", {
                                    "id": read.id, "purpose": kept(read.purpose, 64),
                                    "evse": evse_id})

    def without_profile(self, session: "UpstreamSession", call: Call) -> Call:
        """A command to start a transaction, its profile taken for ours where we steer."""
        profile, controller = call.payload.get("chargingProfile"), self._steering(session)
        if call.action not in STARTING or not isinstance(profile, dict) or controller is None:
            return call
        place = call.payload.get(STARTING[call.action])
        self._limit(controller, session, profile | {"transactionId": None},
                    place if type(place) is int else 0)
        payload = {key: value for key, value in call.payload.items() if key != "chargingProfile"}
        return call._replace(payload=payload, text=to_json(payload))


# What waits

TRANSACTION, EVENT, TELEMETRY = 3, 2, 1      # priorities; with 0 nothing waits for an upstream away
PRIORITY = {"StartTransaction": TRANSACTION, "StopTransaction": TRANSACTION,
            "SecurityEventNotification": EVENT, "MeterValues": TELEMETRY}
EVENT_PRIORITY = {"Started": TRANSACTION, "Ended": TRANSACTION}      # others: EVENT
METERED = ("MeterValuePeriodic", "MeterValueClock")
CALL_BYTES = 500                    # of memory, that a QueuedCall takes beside its frame


def priority_of(call: Call) -> int:
    """How much it matters that upstream hears of a Call, though it be away now."""
    if call.action == "TransactionEvent":
        event = lenient(call.payload, "eventType", str, "")
        if "idToken" in call.payload:    # to a 1.6 upstream it is the start
            return TRANSACTION
        return EVENT_PRIORITY.get(event, TELEMETRY if lenient(
            call.payload, "triggerReason", str) in METERED else EVENT)
    if call.action == "MeterValues" and lenient(call.payload, "transactionId", int, 0) <= 0:
        return 0                         # of no transaction
    return PRIORITY.get(call.action, 0)


def digest_of(call: Call) -> str:
    """By what the same Call is known that a station says again, under whatever message id."""
    return hashlib.blake2b(f"{call.action}\n{call.text}".encode(errors="replace"),
                           digest_size=16).hexdigest()


def read_call(frame: str) -> Call:
    """A frame that was kept. Raises: BadFrame."""
    call = unpack(frame)
    if not isinstance(call, Call):
        raise BadFrame("this is no Call")
    return call


@dataclass(slots=True, eq=False)
class QueuedCall:
    """A Call of the station, or one in its name, on its way upstream."""

    action: str
    frame: str                          # as the station wrote it
    id_text: str                        # of the Call to answer: the station may say it again
    protocol: str                       # the station's
    priority: int
    came_mono: float                    # by the relay's clock
    status: str = "queued"              # queued | sent | delivered | lost
    digest: str = ""                    # of what has a priority
    call: Call | None = None            # the frame, read; not while it waits
    started: float = 0.0                # when it came, by `perf_counter`
    record: LoggedMessage | None = None      # while the station waits for the answer
    answered: bool = False              # the station has our answer, and counts on us
    missed: bool = False                # the station left before it had an answer
    reply: CallResult | CallError | None = None      # ours, where upstream has none
    transaction_id: int | None = None   # that the board gave
    steps: Steps | None = None          # of its translation
    asked: Call | None = None           # what upstream is asked, until it has answered
    sent: Call | None = None            # what it was asked last
    answer_frame: str = ""              # its last answer, and the payload of that
    reply_payload: dict | None = None
    attempts: int = 0                   # that upstream answered with an error
    disconnects: int = 0                # connections that ended while it was sent
    introduces: bool = False            # our repetition of the last BootNotification
    ends: int | str | None = None       # the transaction that it ends in the station's name
    key: str = ""                       # of its row in the state; "": there is none

    def read(self) -> Call:
        """The Call."""
        if self.call is None:
            self.call = read_call(self.frame)
        return self.call

    def row(self, identity: str) -> dict:
        """What the state keeps of it."""
        asked = self.asked and [self.asked.id_text, self.asked.action, self.asked.text]
        return {"identity": identity, "protocol": self.protocol, "frame": self.frame,
                "transactionId": self.transaction_id, "asked": asked,
                "answered": self.answered, "ends": self.ends}


class MessageQueue:
    """The Calls that wait for upstream, in order; no I/O.

    Bounded by count and bytes; the least priority gives way, of that the oldest.
    """

    def __init__(self, most: int, most_bytes: int = SESSION_BYTES):
        self.most, self.most_bytes = most, most_bytes
        self.bytes = 0
        self._calls: deque[QueuedCall] = deque()
        self._by_digest: dict[str, QueuedCall] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[QueuedCall]:
        return iter(self._calls)

    @property
    def first(self) -> QueuedCall | None:
        """What is to be sent next."""
        return self._calls[0] if self._calls else None

    @property
    def is_over(self) -> bool:
        """Whether something has to give way."""
        return len(self._calls) > self.most or self.bytes > self.most_bytes

    def add(self, queued: QueuedCall, first: bool = False) -> None:
        """Put it at the end, or before all others."""
        queued.status = "queued"
        if first:
            self._calls.appendleft(queued)
        else:
            self._calls.append(queued)
        self.bytes += sys.getsizeof(queued.frame) + CALL_BYTES
        if queued.digest:
            self._by_digest[queued.digest] = queued

    def remove(self, queued: QueuedCall) -> None:
        """Take it out, wherever it stands."""
        self._calls.remove(queued)
        self.bytes -= sys.getsizeof(queued.frame) + CALL_BYTES
        if self._by_digest.get(queued.digest) is queued:
            del self._by_digest[queued.digest]

    def least(self) -> QueuedCall:
        """What gives way first: no start or stop while there is something else."""
        return min(self._calls, key=attrgetter("priority"))

    def find(self, digest: str) -> QueuedCall | None:
        """The same Call, if it waits already."""
        return self._by_digest.get(digest)


# A session

IDLE, BACKOFF, CONNECTING, BOOTING, ONLINE = "idle", "backoff", "connecting", "booting", "online"
BILLED = ("transactionId", "connectorId", "idTag", "meterStart", "meterStop", "reason", "timestamp",
          "eventType", "seqNo", "transactionInfo", "evse", "idToken")      # what an invoice needs
SOON_S = 5                          # until the others try, when one station has got through
RECONNECT_S = (1, 60)               # the shortest and longest pause between two attempts
PAUSE_S = (2, 300)                  # the same, when upstream could not take a message
GRACE_S = 10                       # so long a station may be gone until upstream is told
SILENT_CALLS = 3                    # unanswered Calls in a row: upstream is not there
ATTEMPTS = {TELEMETRY: 3, EVENT: 3, TRANSACTION: 10}     # while upstream answers with its own error
DISCONNECTS = {TELEMETRY: 5, EVENT: 5, TRANSACTION: 30}  # connections that may end over one message
ANYTIME = {"timestamp": None}
ANSWERS_KEPT = 50                   # of upstream, that a station may have missed: it asks again
ANSWER_BYTES = 4096                 # of such an answer; a larger one is not kept
ABANDONED_S = 600                   # until an abandoned transaction is ended upstream
TRANSIENT = ("InternalError", "GenericError")        # such an answer may be another one later
# Of a mapping: a change of one of the first is written at once, the others with it.
MAPPING_FACTS = ("upstream_id", "evse_id", "id_token", "started", "base", "start_key", "ended",
                 "end_key", "ended_by_us")
MAPPING_READINGS = ("seq_no", "charged", "register")
SEQUENCE_RESERVED = 50              # seqNo that may be used before the state is written again
ABANDONED = {                       # the end that we tell upstream of, by the station's version
    "ocpp1.6": ("StopTransaction", lambda id_, at, wh: {
        "transactionId": id_, "meterStop": int(wh), "timestamp": at, "reason": "Other"}),
    "2.x": ("TransactionEvent", lambda id_, at, wh: {
        "eventType": "Ended", "timestamp": at, "triggerReason": "AbnormalCondition", "seqNo": 0,
        "transactionInfo": {"transactionId": id_, "stoppedReason": "Other"}})}


class Disconnected(Exception):
    """The connection upstream is over, or none came about; `at_once`: another may be tried now."""

    def __init__(self, reason: str, at_once: bool = False):
        super().__init__(reason)
        self.at_once = at_once


class Reported(NamedTuple):
    """The last BootNotification of a station, or StatusNotification of a connector."""

    call: Call
    protocol: str


class UpstreamSession:
    """One station's way to its upstream system: connect, introduce it, deliver, and again."""

    def __init__(self, relay: Relay, identity: str, settings: SimpleNamespace):
        self.relay, self.board, self.identity = relay, relay.board, identity
        self.settings, self.state = settings, relay.state
        self.task: asyncio.Task                      # of `run`
        # the station
        self.link: Link | None = None
        self.station_protocol = self.authorization = ""
        self.has_password: bool | None = None        # None: unknown, since before a restart
        self.left_mono = -math.inf
        self.last_reported: dict[str, Reported] = {}     # {place: …}; "" is the BootNotification
        self.has_answered = False            # this connection of the station has had an answer
        self.is_restored = False             # what it reported to an earlier run is repeated
        # the connection upstream
        self.status = IDLE
        self.protocol = ""
        self.websocket: WebSocket | None = None
        self.exchange: Exchange                      # of that, or of the last one
        self.first_attempt = True            # none has failed since the station came: it can wait
        self.answered_once = False           # upstream has, on this connection
        self.failures = self.silent = 0      # attempts to connect, Calls without answer, in a row
        self.connect_after = self.boot_after = self.send_after = 0.0
        self.opened_mono = self._looked_mono = 0.0
        self._end: Disconnected | None = None
        self._wake = asyncio.Event()
        # what goes through it
        self.queue = MessageQueue(settings.queue)
        self.in_flight: QueuedCall | None = None
        self._unanswered: list[QueuedCall] = []      # in the queue, while their stations wait
        self.translators: dict[str, Translator] = {}
        self.stored_mappings: dict[str, list] = {}       # {protocol: rows}, of an earlier run
        self.answers: OrderedDict[str, CallResult] = OrderedDict()       # {digest: upstream's}
        self.stored_answers: set[str] = set()        # of these, what the state has
        self.undelivered_starts: OrderedDict[int, None] = OrderedDict()  # transaction ids of ours
        self.commands = 0                    # of upstream, under way
        # for people
        self.counts: Counter = Counter()
        self.up_since: float | None = None
        self.lag_ms: float | None = None
        self.last_error = ""
        self._losses: tuple[ProxyEvent, Event] | None = None     # of this outage

    # Its life

    async def run(self) -> None:
        """Connect when it is needed, and deliver, until it is not; then again."""
        while True:
            try:
                sent_away = self.failures and self.settings.when_down == "close"
                await self._until(self.is_needed, BACKOFF if sent_away else IDLE)
                await self._until(self._may_connect, BACKOFF)
                if not self.is_needed():
                    continue
                await self._connect()
                self._introduce()
                await self._deliver()
                self._close("the station has left")
                self.failures, self.connect_after = 0, 0.0
            except Disconnected as end:
                self._disconnected(end)
            except Exception:            # of one station; the others go on
                log.exception("The relay failed on %s", shown(self.identity))
                self._disconnected(Disconnected("an error of ours"))

    async def _until(self, condition: Callable[[], bool], status: str) -> None:
        while not condition():
            self.status = status
            await self._woken()

    async def _woken(self) -> None:
        """Wait until something happens. Raises: Disconnected, when that did."""
        self._wake.clear()
        await self._wake.wait()
        if self._end is not None:
            raise self._end

    def is_needed(self) -> bool:
        """Whether a connection upstream is of use: also for a while after the station has left.

        Where the station's own password is passed on, nobody else knows it.
        """
        if self.link is not None:
            return True
        knows_password = bool(self.settings.password or self.authorization) or (
            self.has_password is False)
        lingers = self.websocket is not None and (
            self.relay.now() < self.left_mono + GRACE_S)
        return lingers or self.in_flight is not None or (len(self.queue) > 0 and knows_password)

    def _may_connect(self) -> bool:
        return self.relay.now() >= self.connect_after or not self.is_needed()

    async def _connect(self) -> None:
        """Open a connection upstream. Raises: Disconnected."""
        self.status, self._end = CONNECTING, None
        protocol = self.protocol
        websocket = await open_upstream(self)
        if protocol != self.protocol:        # the station came back in another version meanwhile
            websocket.drop()
            raise Disconnected("the station speaks another version now", at_once=True)
        self.websocket, self.up_since, self.silent = websocket, self.board.clock(), 0
        self.exchange = Exchange(websocket.write, now=self.relay.now)
        self.answered_once, self.opened_mono = False, self.relay.now()
        self._record("connected", "UP", None)
        self.relay.is_there(self.settings)
        log.info("%s is connected to %s over %s", shown(self.identity), self.settings.url,
                 self.protocol)
        websocket.start(functools.partial(self.upstream_said, websocket),
                        lambda code, reason: self.closed(websocket, _why_closed(websocket, code,
                                                                               reason)))

    def _introduce(self) -> None:
        """See that upstream hears first who the station is and how, if that was before."""
        self.status = ONLINE
        repeats, self.is_restored = self.has_answered or self.is_restored, False
        boot = self.last_reported.get("")
        if boot and (repeats or self.link is None) and not any(
                queued.action == "BootNotification" for queued in self.queue):
            self.status = BOOTING
            self.queue.add(self._repeated(boot), first=True)
        if repeats:
            for place, reported in self.last_reported.items():
                if place:
                    self.queue.add(self._repeated(reported))

    def _repeated(self, reported: Reported) -> QueuedCall:
        """A Call of the station told once more, under an id of its own."""
        call = reported.call._replace(id_text=f'"{uuid.uuid4()}"')
        return QueuedCall(call.action, pack(call), call.id_text, reported.protocol, 0,
                          self.relay.now(), call=call,
                          introduces=call.action == "BootNotification")

    async def _deliver(self) -> None:
        """Send what waits, in order, while the session is needed. Raises: Disconnected."""
        while self.is_needed():
            queued = self._due()
            if queued is None:
                await self._woken()
                continue
            if queued.ends is not None and self._status_of(queued.ends) == "active":
                self.queue.remove(queued)                # it goes on after all
                self._forget_row(queued)
            elif ends := self._ends_before(queued):
                for ended in ends:
                    self._put_row(ended)
                    self.queue.add(ended, first=True)
            else:
                await self._send(queued)

    def _due(self) -> QueuedCall | None:
        """What upstream is to be told now: until it has accepted the station, only who that is."""
        now, first = self.relay.now(), self.queue.first
        if self._end is not None:
            raise self._end
        if self.in_flight is not None or (first is None and self.status == ONLINE):
            return None
        if self.status == ONLINE or (first and first.action == "BootNotification"):
            return first if now >= self.send_after else None
        boot = self.last_reported.get("")
        if boot is None or now < self.boot_after:
            return None
        self.boot_after = now + RECONNECT_S[1]
        return self._repeated(boot)

    def _disconnected(self, end: Disconnected) -> None:
        """The connection is over: what was under way is first, next time, as it was."""
        was_open = self.websocket is not None or self._end is not None
        reason = kept(end)
        if was_open:
            self._close(reason)
            if self.answered_once and self.relay.now() - self.opened_mono > RECONNECT_S[1]:
                self.failures = 0
        elif reason != self.last_error:
            self._note(reason)
        self._end, self.last_error = None, reason
        if self.in_flight is not None:
            self._requeue(self.in_flight)
        if end.at_once:
            self.connect_after = self.opened_mono + RECONNECT_S[0]
            self._drop_own()
            return
        self._back_off()
        self.first_attempt = False
        if self.settings.when_down == "close" and self.link is not None:
            self._send_away(self.link)
        for queued in [q for q in self.queue if q.record is not None]:
            self._answer_waiting(queued)
        self._drop_own()

    def _drop_own(self) -> None:
        """What we repeat or report ourselves is made anew for the next connection."""
        for queued in [q for q in self.queue if not q.priority and q.record is None]:
            self.queue.remove(queued)

    def _close(self, reason: str) -> None:
        websocket, self.websocket, self.up_since = self.websocket, None, None
        if websocket is not None:
            websocket.close()
        self._record("disconnected", "UP", None, error=reason)
        if self.link is not None:
            log.info("%s is no longer connected to %s: %s", shown(self.identity),
                     self.settings.url, shown(reason))

    def _back_off(self) -> None:
        """When to connect again: later each time, and not with all others."""
        shortest, longest = RECONNECT_S
        wait_s = min(longest, shortest * 2 ** min(self.failures, 10))
        self.failures += 1
        self.connect_after = self.relay.now() + wait_s * random.uniform(0.5, 1.0)

    def _requeue(self, queued: QueuedCall) -> None:
        """The connection ended over a Call: it is first again, or lost."""
        self.in_flight = None
        queued.disconnects += self.answered_once
        if queued.priority and queued.record is None and (
                queued.disconnects >= DISCONNECTS[queued.priority]):
            self._lost(queued, "not delivered: upstream went away over it "
                       f"{queued.disconnects} times")
        elif (queued.priority or queued.record is not None) and not queued.introduces:
            self._enqueue(queued, first=True)

    def hang_up(self, reason: str, at_once: bool = False) -> None:
        """End the connection upstream; the session goes on."""
        websocket = self.websocket
        if websocket is None or self._end is not None:
            return
        self.websocket, self._end = None, Disconnected(reason, at_once)
        websocket.close()
        self.exchange.close(reason)
        self._wake.set()

    def closed(self, websocket: WebSocket, reason: str) -> None:
        """A connection upstream has ended."""
        if websocket is self.websocket:
            self.hang_up(reason)

    def stop(self) -> None:
        """The process ends: what is known exactly is kept so."""
        self._keep_mappings(exact=True)
        if self.websocket is not None:
            self.websocket.close()

    def tick(self, now: float) -> None:
        """Look at the clock: answers that are due, silence, another attempt."""
        timeout_s = self.board.config.ocpp.call_timeout_seconds
        due = now - max(timeout_s - 2 * TICK_S - COMMIT_S * bool(self.state), timeout_s / 2)
        self._unanswered = [q for q in self._unanswered
                            if q.record is not None and q.status == "queued"]
        for queued in [q for q in self._unanswered if q.came_mono < due]:
            self._answer_waiting(queued)
        flying = self.in_flight
        if flying is not None and flying.record is not None and flying.came_mono < due:
            self._answer_here(flying)
            self._record("error", "UP", flying.read(), error="upstream did not answer in time")
            self.counts["errors"] += 1
        if flying is not None and self.websocket is not None and self.exchange.pending is not None:
            self._look_for_silence(flying, now - self.exchange.pending.sent_mono, timeout_s)
        if now - self._looked_mono > SOON_S:
            self._looked_mono = now
            self._end_abandoned()
        if self._has_to_act(now):
            self._wake.set()

    def _has_to_act(self, now: float) -> bool:
        """Whether the time has come for `run` to go on."""
        if self.status == BACKOFF:
            return now >= self.connect_after
        if self.websocket is None:
            return False
        sends = self.in_flight is None and len(self.queue) > 0 and now >= self.send_after
        return sends or (self.status == BOOTING and now >= self.boot_after) or not self.is_needed()

    def _look_for_silence(self, queued: QueuedCall, silent_s: float, timeout_s: float) -> None:
        """What has to be delivered keeps its place; what has not is given up."""
        if queued.priority and silent_s >= 2 * timeout_s:
            self.hang_up(f"upstream does not answer {queued.action}")
        elif not queued.priority and silent_s >= timeout_s:
            self.silent += 1
            if self.silent >= SILENT_CALLS or queued.introduces:
                self.hang_up("upstream does not answer")
            else:
                self.exchange.give_up(NoAnswer("upstream did not answer"))
                self.in_flight = None
                self._wake.set()

    # The station's side

    def attach(self, link: Link, authorization: str) -> None:
        """A connection of the station is open."""
        protocol = self.settings.protocol or link.protocol
        is_other = protocol != self.protocol or (
            not self.settings.password and authorization != self.authorization)
        if is_other:
            self.hang_up("the station came back with another version or password", at_once=True)
        if protocol != self.protocol:
            for queued in self.queue:                    # its words are of the version before
                queued.steps = queued.asked = None
        if self.has_password != bool(authorization):
            self.has_password = bool(authorization)
            self._put_session()
        link.upstream = self
        self.link, self.authorization = link, authorization
        self.protocol, self.station_protocol = protocol, link.protocol
        self.has_answered = False
        self.first_attempt = self.relay.now() >= self.connect_after
        if self.websocket is None and not self.first_attempt and (
                self.settings.when_down == "close"):
            self._send_away(link)
        self._wake.set()

    @staticmethod
    def _send_away(link: Link) -> None:
        link.end("upstream is away", 1013)               # try again later

    def station_left(self, link: Link) -> None:
        """The station's connection is over. What it has no answer to, it will tell again."""
        if link is not self.link:
            return
        self.link, self.left_mono = None, self.relay.now()
        for queued in [q for q in self.queue if q.record is not None]:
            queued.record = None
            self.queue.remove(queued)
            self._forget_row(queued)
        flying = self.in_flight
        if flying is not None and flying.record is not None:
            flying.record, flying.missed = None, True
        self._wake.set()

    def station_called(self, call: Call, frame: str, started: float,
                       record: LoggedMessage) -> None:
        """Take a Call of the station; it has its answer within `call_timeout_seconds`."""
        link, priority = self.link, priority_of(call)
        if link is None:
            return
        queued = QueuedCall(call.action, frame, call.id_text, link.protocol, priority,
                            self.relay.now(), digest=digest_of(call) if priority else "",
                            call=call, started=started, record=record)
        if call.action != "StartTransaction":            # of that, the answer makes the record
            queued.reply = answer(self.board, link.station, link.protocol, call)
        if call.action in ("BootNotification", "StatusNotification"):
            self._keep_reported(queued, call)
        if priority and self._is_repeated(queued):
            return
        boots = call.action == "BootNotification"
        is_away = self.websocket is None and not self.first_attempt
        is_paused = self.send_after - self.relay.now() > PAUSE_S[0]
        if is_away or ((self.status == BOOTING or is_paused) and not boots) or (
                len(self.queue) >= CALLS_WAITING and not priority):
            self._answer_here(queued)
            if priority:
                self._enqueue(queued)
        elif self._can_pass(queued):
            self._pass(queued, call)
        else:
            self._enqueue(queued, first=boots)           # nothing goes before a boot

    def _can_pass(self, queued: QueuedCall) -> bool:
        """Whether it goes upstream at once, as it is, and nothing is to be written before."""
        return (self.status == ONLINE and self.in_flight is None and not self.queue
                and self.websocket is not None and self.relay.now() >= self.send_after
                and not (queued.priority == TRANSACTION and self.state)
                and self._translator(queued.protocol).passes(queued.action, True)
                and not self._is_of_undelivered(queued.read()))

    def _pass(self, queued: QueuedCall, call: Call) -> None:
        self.in_flight, queued.status = queued, "sent"
        queued.asked = queued.sent = call
        self.exchange.begin(call, queued.frame)

    def _keep_reported(self, queued: QueuedCall, call: Call) -> None:
        """Keep what a new connection upstream is to be told: how the station is now."""
        place = "" if call.action == "BootNotification" else to_json(
            [call.payload.get("evseId"), call.payload.get("connectorId")])
        former = self.last_reported.get(place)
        if len(queued.frame) > COSTLY_BYTES or (
                place and former is None and len(self.last_reported) > CONNECTORS_KEPT):
            return
        self.last_reported[place] = reported = Reported(call, queued.protocol)
        # Many repeat what has not changed, each minute: that is no reason to write to a disk.
        if former is None or former.call.payload | ANYTIME != call.payload | ANYTIME:
            self._put_reported(place, reported)

    def _is_repeated(self, queued: QueuedCall) -> bool:
        """Whether the station says again what it missed the answer to; then it gets that."""
        if (answered := self.answers.get(queued.digest)) is not None:
            self._give(queued, answered)
            return True
        other, flying = self.queue.find(queued.digest), self.in_flight
        if other is None and flying is not None and flying.digest == queued.digest:
            other = flying
        if other is None:
            return False
        if other.record is None and not other.missed:    # it had ours, or should have
            queued.reply, queued.transaction_id = other.reply or queued.reply, other.transaction_id
            self._answer_here(queued, holds=False)
            other.reply = queued.reply
        else:
            other.id_text, other.record, other.missed = queued.id_text, queued.record, False
            other.reply = other.reply or queued.reply
            other.started = queued.started
            if other.status == "queued":
                self._unanswered.append(other)
        return True

    def station_said(self, message: Send | CallResultError, frame: str) -> None:
        """What needs no answer goes on at once, if upstream can read it."""
        if self.websocket is not None and self.station_protocol == self.protocol and frame:
            self.websocket.write(frame)
        elif type(message) is Send:
            self._refused_up(message, f"{self.protocol} has nothing like it" if self.websocket
                             else "upstream is away")

    def _answer_here(self, queued: QueuedCall, holds: bool = True) -> None:
        """Answer the station ourselves; `holds`: it counts on us then to deliver what matters."""
        link = self.link
        if queued.record is None or link is None:
            return
        if queued.reply is None:                         # a start, of which upstream hears later
            queued.reply = answer(self.board, link.station, link.protocol, queued.read(),
                                  transaction_id=queued.transaction_id)
        if queued.action == "StartTransaction" and type(queued.reply) is CallResult:
            queued.transaction_id = queued.reply.payload["transactionId"]
        self.counts["answeredHere"] += 1
        if holds and queued.priority:
            queued.answered = True
            self.counts["buffered"] += 1
            self._put_row(queued)
            self._record("buffered", "UP", queued.read())
        self._give(queued, queued.reply)
        if queued.status == "queued":
            queued.call = None               # it is read again when it is sent

    def _answer_waiting(self, queued: QueuedCall) -> None:
        """The same for one that waits: it waits on where that matters."""
        self._answer_here(queued)
        if not queued.priority:
            self.queue.remove(queued)

    def _give(self, queued: QueuedCall, reply: CallResult | CallError, frame: str = "") -> None:
        """Give the station its answer, `frame` where it is upstream's; first, what it counts on
        is on the disk."""
        record, queued.record, link = queued.record, None, self.link
        if record is None or link is None:
            return
        self.has_answered = True
        if not same_id(reply.id_text, queued.id_text):       # it was asked for again meanwhile
            reply, frame = reply._replace(id_text=queued.id_text), ""
        by = "Upstream" if frame else "We"
        give = functools.partial(link.pass_answer, record, reply, frame or pack(reply),
                                 queued.started, by)
        counts_on_disk = bool(queued.key) or queued.priority == TRANSACTION
        if counts_on_disk and (waits := self.state.committed()) is not None:
            self.relay.spawn("relay", self._give_when_kept(link, waits, give))
            return
        if counts_on_disk and self.state.failing_since is not None:
            self.board.answered_early(link.station)
        give()

    async def _give_when_kept(self, link: Link, waits: Awaitable,
                              give: Callable[[], None]) -> None:
        if not await waits:
            self.board.answered_early(link.station)
        give()

    # What waits

    @property
    def waiting(self) -> int:
        """How many messages wait whose station has its answer already."""
        flying = [self.in_flight] if self.in_flight is not None else []
        return sum(1 for q in (*self.queue, *flying) if q.answered)

    def _enqueue(self, queued: QueuedCall, first: bool = False) -> None:
        self.queue.add(queued, first)
        if queued.record is not None:
            self._unanswered.append(queued)
        while self.queue.is_over:
            self.drop_least(f"too much waits for upstream ({self.settings.queue} messages, "
                            f"{SESSION_BYTES >> 20} MiB)")
        self._wake.set()

    def drop_least(self, why: str) -> None:
        """Make room: what matters least goes, and that is on record."""
        least = self.queue.least()
        if least.record is not None:
            self._answer_here(least)
        self.queue.remove(least)
        self._forget_row(least)
        if least.priority:
            self._lost(least, f"lost: {why}")

    def _lost(self, queued: QueuedCall, error: str) -> None:
        """Upstream will not hear of it: a start or stop is told by itself, others are counted."""
        queued.status = "lost"
        self._forget_row(queued)
        self.counts["lost"] += 1
        if queued.transaction_id is not None:
            self.undelivered_starts[queued.transaction_id] = None
            if len(self.undelivered_starts) > MAPPINGS_KEPT:
                self.undelivered_starts.popitem(last=False)
        if queued.priority == TRANSACTION:
            self._record("error", "UP", queued.read(), to=queued.asked, error=error)
            self._record_undelivered(queued, error)
        elif self._losses is None:
            self._losses = (self._record("error", "UP", queued.read(), error=f"{error}; 1 message"),
                            self._record_undelivered(queued, error))
        else:
            self._count_loss(error, *self._losses)

    @staticmethod
    def _count_loss(error: str, proxied: ProxyEvent, event: Event) -> None:
        """One event an outage and station: thousands would wash away all other errors."""
        count = event.details["count"] = event.details["count"] + 1
        proxied.error = kept(f"{error}; {count} messages")
        event.message = kept(f"{count} messages for upstream: {error}")

    def _record_undelivered(self, queued: QueuedCall, error: str) -> Event:
        """Put what is not delivered where it stays longer than among all that is relayed."""
        call = queued.read()
        facts = {key: kept(to_json(call.payload[key])) for key in BILLED if key in call.payload}
        if queued.priority == TRANSACTION:
            log.warning("%s: %s did not get to %s: %s", shown(self.identity), queued.action,
                        self.settings.url, shown(error, 200))
        station = self.board.stations.get(self.identity)
        if station is not None:
            station.error_count += 1
        return self.board.error_of("NOT_DELIVERED", self.identity,
                                   f"{queued.action} for upstream: {error}",
                                   {"messageId": message_id(call.id_text), "count": 1} | facts)

    # Sending

    async def _send(self, queued: QueuedCall) -> None:
        """Tell upstream of a Call, and the station of the answer. Raises: Disconnected."""
        self.in_flight, queued.status = queued, "sent"
        if self.queue.first is queued:
            self.queue.remove(queued)
        try:
            answered = await self._ask_for(queued)
        except CallFailed as error:
            self._translated_error(queued, error)
        except NoAnswer:
            self._land(queued)
        except BoardError as error:
            self._refused(queued, error)
        else:
            if answered is None:
                self._refused_up(queued.read(), f"{self.protocol} has nothing like it: "
                                 "answered here")
                self._end_here(queued)
            else:
                reply, frame = answered
                self._finish(queued, reply, frame)
            self._report(self._translator(queued.protocol).told())

    async def _ask_for(self, queued: QueuedCall) -> tuple[CallResult | CallError, str] | None:
        """(upstream's answer in the station's words, its frame where that is as it came).

        None: upstream has nothing to say to it. Raises: CallFailed (a CALLERROR, untranslated),
            NotSupported, FormatViolation, NoAnswer, Disconnected.
        """
        call, translator = queued.read(), self._translator(queued.protocol)
        self._follow_board(translator, queued)
        if self._is_of_undelivered(call):
            raise NotSupported("the start of its transaction was not delivered")
        if queued.steps is None and translator.passes(queued.action, True):
            return await self._ask(queued, call, queued.frame)
        resumed = None
        if queued.steps is not None:
            resumed = queued.asked and (queued.asked.action, queued.asked.payload)
        else:
            if queued.action == "StartTransaction" and queued.transaction_id is None:
                queued.transaction_id = (translator.begun(call.payload)  # upstream gets it from us
                                         or self.board.new_transaction_id())
            queued.steps = translator.up(queued.action, call.payload, queued.transaction_id
                                         if queued.action == "StartTransaction" else None)
        try:
            payload = await carry(queued.steps, functools.partial(self._ask_translated, queued),
                                  resumed)
        except (BoardError, Disconnected):
            raise
        except Exception:
            log.exception("The translation of %s of %s failed", queued.action,
                          shown(self.identity))
            raise BoardError("Internal error") from None
        if payload is None:
            return None
        reply = _result_of(call, payload)
        is_same = queued.sent is call and payload is queued.reply_payload
        return reply, queued.answer_frame if is_same else ""

    async def _ask(self, queued: QueuedCall, asked: Call,
                   frame: str) -> tuple[CallResult | CallError, str]:
        """Send one Call upstream, and wait for the answer. Raises: NoAnswer, Disconnected."""
        queued.asked = queued.sent = asked
        if queued.priority == TRANSACTION or (queued.key and asked is not queued.call):
            self._put_row(queued)
        if (self._keep_mappings() or queued.key) and (waits := self.state.committed()):
            await waits
        if self._end is not None:
            raise self._end
        pending = self.exchange.begin(asked, frame)
        pending.future = asyncio.get_running_loop().create_future()
        try:
            await pending.future
        except Conflict as error:
            raise self._end or Disconnected(str(error)) from None
        return pending.message, pending.frame

    async def _ask_translated(self, queued: QueuedCall, action: str, payload: dict) -> dict:
        """Send a Call of a translation; its answer's payload. Raises: CallFailed, NoAnswer."""
        asked, schemas = self._translated(queued, action, payload), self.relay.schemas
        is_same = asked is queued.call
        if schemas and not is_same:
            await schemas.prepare(self.protocol, action)
            if violation := schemas.check(self.protocol, action, "Request", asked.payload):
                queued.asked = None
                raise violation.error(f"{violation.pointer or '/'}: {violation.text}")
        sent_mono = self.relay.now()
        message, frame = await self._ask(queued, asked, queued.frame if is_same else pack(asked))
        queued.asked, queued.answer_frame = None, frame
        if not is_same:
            self.counts["translated"] += 1
            self._record("translation", "UP", queued.call, to=asked,
                         latency_ms=(self.relay.now() - sent_mono) * 1000,
                         error=f"{message.code}: {message.description}" if isinstance(
                             message, CallError) else None)
        if isinstance(message, CallError):
            if action == "StatusNotification" != queued.action:
                return {}        # it goes along with an event, which upstream has: no second time
            raise CallFailed(message.code, message.description, message.details)
        queued.reply_payload = message.payload
        return message.payload

    def _translated(self, queued: QueuedCall, action: str, payload: dict) -> Call:
        """The Call that upstream is asked; what it was asked before is the same, to the id."""
        call, asked = queued.read(), queued.asked
        if asked is not None and asked.action == action:
            return asked
        if payload is call.payload and action == call.action:
            return call
        # The id follows from what is asked: after a restart, too, it is the same message.
        text = to_json(payload)
        name = f"{self.identity} {call.id_text} {action} {text}".encode(errors="replace").hex()
        return Call(f'"{uuid.uuid5(uuid.NAMESPACE_OID, name)}"', action, payload, text)

    def _translated_error(self, queued: QueuedCall, error: CallFailed) -> None:
        """Upstream has refused a translated Call."""
        code = error_code_across(self.protocol, queued.protocol, error.code)
        self._finish(queued, CallError(queued.id_text, code, kept(error.description),
                                       error.details, to_json(error.details)), "", error.code)

    def _refused(self, queued: QueuedCall, error: BoardError) -> None:
        """There is no translation. A fact stays one: the station is answered by us."""
        self._refused_up(queued.read(), str(error))
        if queued.priority:
            self.counts["lost"] += 1
            self._record_undelivered(queued, str(error))
            self._end_here(queued)
        else:
            self._finish(queued, refusal(queued.protocol, queued.id_text, error), "")

    def _end_here(self, queued: QueuedCall) -> None:
        self._answer_here(queued, holds=False)
        self._forget_row(queued)
        self._land(queued)

    def _land(self, queued: QueuedCall) -> None:
        """It is not under way any more; another one may go."""
        if self.in_flight is queued:
            self.in_flight = None
        self._wake.set()

    def _finish(self, queued: QueuedCall, reply: CallResult | CallError, frame: str,
                code: str = "") -> None:
        """Upstream has answered: the station hears it, unless it has had our answer."""
        if isinstance(reply, CallError):
            if queued.answered and self._is_retried(queued, code or reply.code):
                return
        else:
            self.counts["passed"] += queued.steps is None
            reply, frame = self._with_station_id(queued, reply, frame)
            queued.status = "delivered"
            if not queued.answered:
                self._make_record(queued, reply)
            self._keep_answer(queued, reply)
        self._keep_mappings()
        self._land(queued)
        if queued.answered and isinstance(reply, CallError):
            self._lost(queued, f"not delivered: {reply.code} {reply.description}")
        else:
            self._forget_row(queued)
            if queued.answered:
                self.counts["delivered"] += 1
                self._record("delivered", "UP", queued.read(), to=queued.sent,
                             error=_disowned(reply))
        self._give(queued, reply, frame)
        if queued.action == "BootNotification":
            self._booted(queued, reply)

    def _is_retried(self, queued: QueuedCall, code: str) -> bool:
        """Whether what upstream could not take now, and the station counts on, is sent again."""
        queued.attempts += 1
        if code not in TRANSIENT or queued.attempts >= ATTEMPTS[queued.priority]:
            return False
        queued.steps = queued.asked = None
        self._land(queued)
        self.queue.add(queued, first=True)
        first_s, longest_s = PAUSE_S
        self.send_after = self.relay.now() + min(first_s * 2 ** (queued.attempts - 1), longest_s)
        return True

    def _with_station_id(self, queued: QueuedCall, reply: CallResult,
                         frame: str) -> tuple[CallResult, str]:
        """The answer to a 1.6 start under the id that the station has, or can have."""
        upstream_id = lenient(reply.payload, "transactionId", int)
        mappings = self._translator(queued.protocol).mappings
        if queued.action != "StartTransaction" or queued.steps is not None or (
                upstream_id is None) or (
                queued.transaction_id is None and upstream_id not in mappings):
            return reply, frame
        if queued.transaction_id is None:                # another transaction has it here
            queued.transaction_id = self.board.new_transaction_id()
        mappings.pop(queued.transaction_id, None)        # of one that ended
        self._translator(queued.protocol).mapping(queued.transaction_id, upstream_id=upstream_id)
        return _result_of(reply, reply.payload | {"transactionId": queued.transaction_id}), ""

    def _make_record(self, queued: QueuedCall, reply: CallResult) -> None:
        """What upstream's answer says of the station counts on the board."""
        station = self.board.stations.get(self.identity)
        if station is None:
            return
        if queued.action == "StartTransaction":
            answer(self.board, station, queued.protocol, queued.read(),
                   transaction_id=lenient(reply.payload, "transactionId", int))
        elif queued.action == "BootNotification":
            self.board.registered(station, lenient(reply.payload, "status", str, ""),
                                  lenient(reply.payload, "interval", float))

    def _keep_answer(self, queued: QueuedCall, reply: CallResult) -> None:
        """Keep the answer, for the station may not have read it: then it asks again."""
        if not queued.digest:
            return
        if queued.answered and type(queued.reply) is CallResult:
            reply = queued.reply
        if len(reply.text) > ANSWER_BYTES:
            return
        self.answers[queued.digest] = reply
        if queued.priority == TRANSACTION:
            self.stored_answers.add(queued.digest)
            self._put_answer(queued.digest, reply)
        if len(self.answers) > ANSWERS_KEPT:
            oldest, _ = self.answers.popitem(last=False)
            if oldest in self.stored_answers:
                self.stored_answers.remove(oldest)
                self.state.put("answer", to_json([self.identity, oldest]), None)

    def _booted(self, queued: QueuedCall, reply: CallResult | CallError) -> None:
        """Upstream's answer to a BootNotification: until it accepts, nothing else is told."""
        payload = reply.payload if type(reply) is CallResult else {}
        status = lenient(payload, "status", str, "")
        final = type(reply) is CallError and reply.code not in TRANSIENT     # it says no to more
        accepted = status == "Accepted" or (not status and (not queued.introduces or final))
        self.status = ONLINE if accepted else BOOTING
        if not accepted:
            wait_s = min(max(lenient(payload, "interval", float, 0.0), RECONNECT_S[1]), 86400)
            self.boot_after = self.relay.now() + wait_s
            self._note("upstream answered the BootNotification with "
                       f"{kept(status, 40) or 'an error'}")

    def _is_of_undelivered(self, call: Call) -> bool:
        return bool(self.undelivered_starts) and (
            lenient(call.payload, "transactionId", int) in self.undelivered_starts)

    def _translator(self, protocol: str) -> Translator:
        found = self.translators.get(protocol)
        if found is None or found.upstream != self.protocol:
            found = self.translators[protocol] = Translator(
                protocol, self.protocol, self.board.new_transaction_id, self.board.clock)
            for facts in self.stored_mappings.pop(protocol, ()):
                found.mapping(facts.pop("station_id"), **facts)
        return found

    def known_upstream(self, upstream_id: Any) -> TransactionMapping | None:
        """The transaction that upstream calls so, where the station has another name for it."""
        return self._translator(self.station_protocol).by_upstream_id(upstream_id)

    def _report(self, reports: list[Steps]) -> None:
        """Tell upstream what is ours to tell, such as a report that a 1.6 station has not."""
        for steps in reports:
            call = Call(f'"{uuid.uuid4()}"', "", {}, "{}")
            self._enqueue(QueuedCall("", "", call.id_text, self.station_protocol, 0,
                                     self.relay.now(), call=call, steps=steps))

    # Transactions that the station will not end

    def _follow_board(self, translator: Translator, queued: QueuedCall) -> None:
        """A transaction that we have ended upstream goes on, if it does so at the board, or now
        that a 2.x station ends it itself: upstream is told that until it has taken it."""
        ended_id = None
        if queued.action == "TransactionEvent" and queued.ends is None and (
                queued.read().payload.get("eventType") == "Ended"):
            ended_id = lenient(queued.read().payload, "transactionInfo", dict, {}).get(
                "transactionId")
        for mapping in translator.mappings.values():
            if mapping.ended_by_us and (mapping.station_id == ended_id or self._status_of(
                    mapping.station_id) == "active"):
                mapping.ended = mapping.ended_by_us = mapping.end_reported = False

    def _status_of(self, transaction_id: int | str) -> str:
        transaction = self.board.transaction_of.get((self.identity, transaction_id))
        return transaction.status if transaction else ""

    def _ends_before(self, queued: QueuedCall) -> list[QueuedCall]:
        """Ends to tell of before a start: it shows that the station has nothing older to tell."""
        translator = self._translator(queued.protocol)
        is_start = queued.action == "StartTransaction" or (
            queued.action == "TransactionEvent" and queued.priority == TRANSACTION
            and lenient(queued.read().payload, "eventType", str, "") == "Started")
        if not is_start or not translator.ends_for_station:
            return []
        payload = queued.read().payload
        return [self._end_of(mapping, queued.protocol) for mapping in translator.open_mappings()
                if self._is_followed_by(translator, mapping, payload)
                or self._is_over_by(mapping, payload)]

    def _is_followed_by(self, translator: Translator, mapping: TransactionMapping,
                        payload: dict) -> bool:
        """Whether a start is of the next transaction at the same EVSE, by the station's words.

        The board may take it for an older one that is told of afterwards, where a clock was set
        in between; a 2.x station's own times tell. Then the board gives up the former here.
        """
        if mapping.start_key:            # a 1.6 station
            return mapping.evse_id == lenient(payload, "connectorId", int, 0) and (
                not translator.began_by(mapping, payload))
        evse_id = lenient(lenient(payload, "evse", dict, {}), "id", int, 0)
        info = lenient(payload, "transactionInfo", dict, {})
        try:
            is_later = parse_time(mapping.started)[0] <= parse_time(payload.get("timestamp"))[0]
        except WrongValue:
            return False
        if evse_id != mapping.evse_id or not is_later or (
                info.get("transactionId") == mapping.station_id):
            return False
        transaction = self.board.transaction_of.get((self.identity, mapping.station_id))
        if transaction is not None and transaction.status == "active":
            self.board.transaction_stopped(transaction, None, None, None, "abandoned")
        return True

    def _is_over_by(self, mapping: TransactionMapping, payload: dict) -> bool:
        """Whether the board gave a transaction up before the time of a start."""
        transaction = self.board.transaction_of.get((self.identity, mapping.station_id))
        try:
            at, _ = parse_time(payload.get("timestamp"))
        except WrongValue:
            at = self.board.clock()
        return transaction is not None and transaction.status == "abandoned" and (
            self.board.mono_of(self.board.stations.get(self.identity), at)
            >= transaction.stopped_mono)

    def _end_abandoned(self) -> None:
        """End upstream what was given up at the board, and has not come back in ABANDONED_S."""
        for protocol, translator in self.translators.items():
            for mapping in translator.open_mappings() if translator.ends_for_station else ():
                transaction = self.board.transaction_of.get((self.identity, mapping.station_id))
                if transaction is not None and transaction.status == "abandoned" and (
                        self.board.mono() - transaction.stopped_mono > ABANDONED_S):
                    ended = self._end_of(mapping, protocol)
                    if self.queue.find(ended.digest) is None:
                        self._put_row(ended)
                        self._enqueue(ended)

    def _end_of(self, mapping: TransactionMapping, protocol: str) -> QueuedCall:
        """The end of a transaction, said in the station's name."""
        transaction = self.board.transaction_of.get((self.identity, mapping.station_id))
        at = transaction and (transaction.stopped_at if transaction.status == "abandoned" else
                              transaction.reading and transaction.reading.shown_at)
        register = transaction and (transaction.register.last_wh or transaction.meter_start)
        action, payload_of = ABANDONED.get(protocol) or ABANDONED["2.x"]
        payload = payload_of(mapping.station_id, wire_time(at or self.board.clock()),
                             register or mapping.register or 0)
        call = Call(f'"{uuid.uuid4()}"', action, payload, to_json(payload))
        mapping.ended_by_us = True
        self._keep_mappings()                    # after a restart, too, the station may go on
        self.board.system_event("PROXY_ENDED", self.identity, "A transaction that the station "
                                "never ended is ended upstream", {
                                    "transactionId": mapping.station_id})
        return QueuedCall(action, pack(call), call.id_text, protocol, TRANSACTION,
                          self.relay.now(), digest=digest_of(call), call=call, answered=True,
                          ends=mapping.station_id)

    # Upstream's side

    def upstream_said(self, websocket: WebSocket, frame: str | bytes) -> None:
        """Take a frame of upstream."""
        if websocket is not self.websocket:              # of a connection that is over
            return
        text = frame if isinstance(frame, str) else frame.decode("utf-8", "replace")
        try:
            message = unpack(text)
        except BadFrame as error:
            self._nonsense(websocket, text, error)
            return
        if isinstance(message, Call):
            self._commanded(websocket, message, text)
        elif isinstance(message, (Send, CallResultError)):
            if self.link is not None and self.station_protocol == self.protocol:
                self.link.pass_on(message, text)
            else:
                self._record("refused", "DOWN", message if isinstance(message, Send) else None,
                             error="the station has nothing like it")
        else:
            self._answered(message, text)

    def _answered(self, message: CallResult | CallError, text: str) -> None:
        pending, late = self.exchange.answered(message, text)
        queued = self.in_flight
        if pending is None or late or queued is None:
            self.counts["errors"] += 1
            self._record("error", "DOWN", None, message_id_=message_id(message.id_text),
                         error="an answer to nothing that was asked, or late")
            return
        self.silent, self.answered_once, self.last_error, self._losses = 0, True, "", None
        self.lag_ms = (self.relay.now() - pending.sent_mono) * 1000
        if pending.future is None:
            self._finish(queued, message, text)

    def _nonsense(self, websocket: WebSocket, text: str, error: BadFrame) -> None:
        """A frame that is no message; where it is about what is under way, that is over."""
        self.counts["errors"] += 1
        self._record("error", "DOWN", None, error=f"upstream sent nonsense: {error}")
        if error.id_text:
            websocket.write(pack(refusal(self.protocol, error.id_text, error)))
        pending = self.exchange.pending
        if pending is not None and pending.call.id_text in text[:RAW_KEPT]:
            self._answered(CallError(pending.call.id_text, "InternalError",
                                     "upstream's answer cannot be read", {}, "{}"), "")

    def _commanded(self, websocket: WebSocket, call: Call, frame: str) -> None:
        """A Call of upstream, for the station."""
        if self.commands >= CALLS_WAITING:
            websocket.write(pack(refusal(self.protocol, call.id_text,
                                         Busy("Too many commands wait for this station"))))
            self.counts["errors"] += 1
            return
        self.commands += 1
        self.relay.spawn("relay", self._carry_down(call, frame, websocket))

    async def _carry_down(self, call: Call, frame: str, websocket: WebSocket) -> None:
        started = self.relay.now()
        try:
            if self.link is None:
                raise Conflict("The station is offline")
            reply = self.relay.limit(self, call)
            text = pack(reply) if reply else await self._command(self.link, call, frame)
        except BoardError as error:
            text = self._command_failed(call, error, (self.relay.now() - started) * 1000)
        except Exception:
            log.exception("A command of upstream, %s, failed", shown(call.action))
            text = pack(CallError(call.id_text, "InternalError", "Internal error", {}, "{}"))
        finally:
            self.commands -= 1
        if websocket is self.websocket:
            websocket.write(text)
            self._report(self._translator(self.station_protocol).told())

    def _command_failed(self, call: Call, error: BoardError, latency_ms: float) -> str:
        """The frame of the CALLERROR to a command, which goes on record."""
        code, description, details = error.ocpp_code, str(error), {}
        if isinstance(error, CallFailed):
            code = error_code_across(self.station_protocol, self.protocol, error.code)
            description, details = error.description, error.details
        kind = "refused" if isinstance(error, (NotSupported, FormatViolation)) else "error"
        self.counts["refused" if kind == "refused" else "errors"] += 1
        self._record(kind, "DOWN", call, error=kept(f"{code}: {description}"),
                     latency_ms=latency_ms)
        return pack(CallError(call.id_text, error_code(self.protocol, code), kept(description),
                              details, to_json(details)))

    async def _command(self, link: Link, call: Call, frame: str) -> str:
        """Have the station do what upstream asks; the frame of the answer."""
        translator = self._translator(self.station_protocol)
        without = self.relay.without_profile(self, call)
        if without is not call:
            call, frame = without, pack(without)
        if call.action not in COMMANDS[self.protocol] and self.protocol != self.station_protocol:
            raise NotSupported(f"{shown(call.action)} is no command of {self.protocol}")
        if translator.passes(call.action, False):
            self.counts["passed"] += 1
            return (await link.pass_command(call, frame))[1]

        async def ask(action: str, payload: dict) -> dict:
            asked_mono, failed = self.relay.now(), None
            try:
                return (await link.call(action, payload))[0]
            except BoardError as error:
                failed = kept(error)
                raise
            finally:
                self.counts["translated"] += 1
                self._record("translation", "DOWN", call, error=failed,
                             to=Call("", action, payload, to_json(payload)),
                             latency_ms=(self.relay.now() - asked_mono) * 1000)

        payload = await carry(translator.down(call.action, call.payload), ask) or {}
        self._check_answer(call.action, payload)
        return pack(_result_of(call, payload))

    def _check_answer(self, action: str, payload: dict) -> None:
        """A translated answer must fit its schema, where that is at hand."""
        schemas = self.relay.schemas
        if schemas and schemas.ready(self.protocol, action) and (
                violation := schemas.check(self.protocol, action, "Response", payload)):
            raise FormatViolation(f"{violation.pointer or '/'}: {violation.text}")

    # In the state

    def _put_row(self, queued: QueuedCall) -> None:
        if self.state:
            queued.key = queued.key or self.relay.next_key()
            self.state.put("queued", queued.key, queued.row(self.identity),
                           at=int(queued.key) / 1000, durable=True)      # so they come in order

    def _forget_row(self, queued: QueuedCall) -> None:
        if queued.key:
            self.state.put("queued", queued.key, None, durable=True)
            queued.key = ""

    def _put_answer(self, digest: str, reply: CallResult) -> None:
        self.state.put("answer", to_json([self.identity, digest]), {
            "identity": self.identity, "digest": digest, "payload": reply.payload}, durable=True)

    def _put_reported(self, place: str, reported: Reported) -> None:
        self.state.put("reported", to_json([self.identity, place]), {
            "identity": self.identity, "place": place, "protocol": reported.protocol,
            "frame": pack(reported.call)})

    def _put_session(self) -> None:
        self.state.put("session", self.identity, {
            "identity": self.identity, "hasPassword": self.has_password})

    def _keep_mappings(self, exact: bool = False) -> bool:
        """Put what changed of the ids of both sides. Returns whether something did.

        The seqNo is written ahead, so that none is used twice; `exact`: as it is, at the end.
        """
        changed = False
        for translator in self.translators.values() if self.state else ():
            for mapping in translator.mappings.values():
                facts = tuple(getattr(mapping, name) for name in MAPPING_FACTS)
                if mapping.end_reported and not mapping.ended_by_us:
                    if mapping.stored:
                        mapping.stored, changed = (), True
                        self.state.put("mapping", self._mapping_key(translator, mapping), None,
                                       durable=True)
                elif exact or facts != mapping.stored or mapping.seq_no > mapping.seq_reserved:
                    mapping.stored, changed = facts, True
                    mapping.seq_reserved = mapping.seq_no + (0 if exact else SEQUENCE_RESERVED)
                    self._put_mapping(translator, mapping)
        return changed

    def _mapping_key(self, translator: Translator, mapping: TransactionMapping) -> str:
        return to_json([self.identity, translator.station, mapping.station_id])

    def _put_mapping(self, translator: Translator, mapping: TransactionMapping) -> None:
        known = {name: getattr(mapping, name) for name in (*MAPPING_FACTS, *MAPPING_READINGS)}
        self.state.put("mapping", self._mapping_key(translator, mapping), known | {
            "identity": self.identity, "protocol": translator.station,
            "station_id": mapping.station_id, "seq_reserved": mapping.seq_reserved}, durable=True)

    def keep_all(self) -> None:
        """Put everything anew."""
        self._put_session()
        for place, reported in self.last_reported.items():
            self._put_reported(place, reported)
        for digest in self.stored_answers:
            self._put_answer(digest, self.answers[digest])
        for queued in (*self.queue, *filter(None, [self.in_flight])):
            if queued.key:
                self._put_row(queued)
        for translator in self.translators.values():
            for mapping in translator.mappings.values():
                if mapping.stored:
                    self._put_mapping(translator, mapping)

    def forget(self) -> None:
        """End for good: nobody needs to know of the station any more."""
        self.task.cancel()
        self.state.put("session", self.identity, None)
        for place in self.last_reported:
            self.state.put("reported", to_json([self.identity, place]), None)
        for digest in self.stored_answers:
            self.state.put("answer", to_json([self.identity, digest]), None)

    def restore_session(self, row: StateRow) -> None:
        """Whether the station had a password."""
        self.has_password = bool(row.value["hasPassword"])

    def restore_reported(self, row: StateRow) -> None:
        """What an earlier run was told last; upstream may not have heard it."""
        value, self.is_restored = row.value, True
        call = read_call(value["frame"])
        self.last_reported[value["place"]] = Reported(call, value["protocol"])
        self.station_protocol = self.station_protocol or value["protocol"]

    def restore_mapping(self, row: StateRow) -> None:
        """The ids of a transaction; what was told since is not known, but for its bounds."""
        facts = dict(row.value)
        del facts["identity"]
        protocol = facts.pop("protocol")
        facts |= {name: tuple(facts[name]) for name in ("start_key", "end_key")}
        if not facts["ended"]:
            facts["seq_no"] = facts["seq_reserved"]
        facts["stored"] = tuple(facts[name] for name in MAPPING_FACTS)
        TransactionMapping(**facts)              # TypeError, of another version's row
        self.stored_mappings.setdefault(protocol, []).append(facts)

    def restore_answer(self, row: StateRow) -> None:
        """An answer that the station may have missed."""
        payload = row.value["payload"]
        self.answers[row.value["digest"]] = CallResult('""', payload, to_json(payload))
        self.stored_answers.add(row.value["digest"])

    def restore_queued(self, row: StateRow) -> None:
        """What an earlier run had not delivered waits again."""
        value, frame = row.value, row.value["frame"]
        call = read_call(frame)
        asked = value["asked"]
        queued = QueuedCall(
            call.action, frame, call.id_text, value["protocol"], priority_of(call),
            self.relay.now(), digest=digest_of(call), transaction_id=value["transactionId"],
            answered=value["answered"], missed=not value["answered"], key=row.key,
            ends=value["ends"],
            asked=asked and Call(asked[0], asked[1], json.loads(asked[2]), asked[2]))
        self.relay.next_key(after=row.key)
        if queued.transaction_id is not None:
            self.board.transaction_id_used(queued.transaction_id)
        self.station_protocol = self.station_protocol or queued.protocol
        self.protocol = self.protocol or self.settings.protocol or queued.protocol
        self._enqueue(queued)

    # On record

    def _note(self, error: str) -> None:
        """What went wrong with upstream; the same again is not told again."""
        if error != self.last_error:
            self._record("error", "UP", None, error=error)
            log.warning("%s has no way to %s: %s", shown(self.identity), self.settings.url,
                        shown(error, 200))
        self.last_error = kept(error)

    def _refused_up(self, message: Call | Send, error: str) -> None:
        self.counts["refused"] += 1
        self._record("refused", "UP", message, error=error)

    def _record(self, kind: str, direction: str, message: Call | Send | None,
                to: Call | None = None, error: str | None = None, message_id_: str = "",
                latency_ms: float | None = None) -> ProxyEvent:
        """Put on record what became of a message, or of the connection: see ProxyEvent.kind."""
        ends = (self.station_protocol, self.protocol)
        source, target = ends if direction == "UP" else ends[::-1]
        action = message.action if message else ""
        event = ProxyEvent(
            kind, self.identity, source, target, direction, action, self.board.clock(),
            message_id(message.id_text) if message and message.id_text else message_id_,
            to.action if to and to is not message else None,
            without_secrets(action, message.payload, message.text) if message and action else None,
            self._shown_translation(message, to) if to and to is not message else None,
            latency_ms, None if error is None else kept(error))
        self.board.relayed(event)
        return event

    @staticmethod
    def _shown_translation(message: Any, to: Call) -> str:
        """A translated Call for the record; a KeyCode has lost its type on the way to 1.6."""
        text = without_secrets(to.action, to.payload, to.text)
        if "idTag" in to.payload and message and is_key_code(
                lenient(message.payload, "idToken", dict, {})):
            return to_json(to.payload | {"idTag": HIDDEN})
        return text

    def view(self) -> dict:
        """The session as REST shows it."""
        after = {BACKOFF: self.connect_after, BOOTING: self.boot_after}.get(self.status)
        waits_s = None if after is None else max(0.0, round(after - self.relay.now(), 1))
        return {
            "identity": self.identity, "status": self.status,
            "stationOnline": self.link is not None,
            "protocol": self.protocol, "stationProtocol": self.station_protocol,
            "upSince": iso(self.up_since),
            "lagMs": None if self.lag_ms is None else round(self.lag_ms, 3),
            "waiting": self.waiting, "waitingSeconds": self._behind_s(),
            "nextAttemptSeconds": waits_s, "lastError": self.last_error or None,
            **{name: self.counts[name] for name in SESSION_COUNTS}}

    def _behind_s(self) -> int | None:
        """How long ago that came which waits longest."""
        first = self.in_flight or self.queue.first
        return int(self.relay.now() - first.came_mono) if first and first.priority else None


RESTORED = {"session": UpstreamSession.restore_session,      # {kind of a row: who takes it}
            "reported": UpstreamSession.restore_reported,
            "mapping": UpstreamSession.restore_mapping, "answer": UpstreamSession.restore_answer,
            "queued": UpstreamSession.restore_queued}


def _disowned(reply: CallResult | CallError) -> str | None:
    """What is to be said of an answer that comes when the station has had ours."""
    payload = reply.payload if type(reply) is CallResult else {}
    info = payload.get("idTagInfo") or payload.get("idTokenInfo")
    status = lenient(info, "status", str, "") if isinstance(info, dict) else ""
    return f"upstream has the id token for {kept(status, 40)}" if status not in (
        "", "Accepted") else None


def _result_of(call: Call | CallResult, payload: dict) -> CallResult:
    return CallResult(call.id_text, payload, to_json(payload))


JOURNAL_FACTS = ("upstream_id", "evse_id", "id_token", "seq_no", "state", "charged", "started",
                 "register", "base")


def import_journal(path: str, state: State, now: float) -> int:
    """Take over what a former version kept in `proxy.journal`, once.

    Returns the highest transaction id that was given out.
    """
    if not path or not state or not os.path.exists(path) or any(
            row.key == path for row in state.rows("imported")):
        return 0
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as db:
            last_id, = db.execute("PRAGMA user_version").fetchone()
            waiting = db.execute("SELECT number, identity, protocol, given, frame FROM waiting "
                                 "ORDER BY number").fetchall()
            reported = db.execute("SELECT identity, place, protocol, frame FROM told").fetchall()
            mappings = db.execute("SELECT identity, protocol, here, at, facts FROM crossings"
                                  ).fetchall()
    except sqlite3.Error as error:
        log.error("proxy.journal: %s cannot be taken over: %s", path, error)
        return 0
    for number, identity, protocol, given, frame in waiting:
        state.put("queued", f"{number:015d}", {
            "identity": identity, "protocol": protocol, "frame": frame, "transactionId": given,
            "asked": None, "answered": True, "ends": None}, at=number)
        if not number % 1000:
            state.write_at_start()
    for identity, place, protocol, frame in reported:
        state.put("reported", to_json([identity, place]), {
            "identity": identity, "place": place, "protocol": protocol, "frame": frame})
    for identity, protocol, station_id, at, facts in mappings:
        try:
            known = dict(zip(JOURNAL_FACTS, json.loads(facts), strict=True))
            # What was told since is not known; there were less events than seconds.
            known |= {"identity": identity, "protocol": protocol,
                      "station_id": json.loads(station_id), "start_key": [], "end_key": [],
                      "ended": False, "ended_by_us": False,
                      "seq_reserved": known["seq_no"] + max(0, int(now - at))}
        except (TypeError, ValueError) as error:
            log.error("proxy.journal: a transaction of %s cannot be taken over: %s",
                      shown(identity), error)
        else:
            state.put("mapping", to_json([identity, protocol, known["station_id"]]), known)
    state.put("imported", path, True)
    state.write_at_start()
    if state.failing_since is None:
        log.warning("proxy.journal: %s is taken over into the state; remove it, and the key", path)
    return last_id


RELAY_HEADER = "X-Ocppboard-Run"     # by which we know a connection of ours that comes back to us


@functools.lru_cache(8)              # reading the system's authorities takes some 10 ms
def _tls_context(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca or None)


async def open_upstream(session: UpstreamSession) -> WebSocket:
    """Connect upstream as the station would. Raises: Disconnected."""
    settings, board, identity = session.settings, session.board, session.identity
    authorization = session.authorization
    if settings.password:
        pair = f"{identity}:{settings.password}".encode()
        authorization = f"Basic {base64.b64encode(pair).decode()}"
    via = ",".join(filter(None, [session.link.via if session.link else "", board.epoch]))
    try:
        return await open_websocket(
            f"{settings.url.rstrip('/')}/{quote(identity, safe='')}", [session.protocol],
            board.config.ocpp.max_frame_bytes, {
                "User-Agent": f"ocppboard/{VERSION}", RELAY_HEADER: via,
                "Authorization": authorization},
            ssl_options=_tls_context(settings.ca) if settings.url.startswith("wss:") else None)
    except OSError as error:             # also of TLS, and of the PEM file
        raise Disconnected(f"no connection: {error.strerror or error}") from None


def _why_closed(websocket: WebSocket, code: int, reason: str) -> str:
    if code == NO_CLOSE:
        return "the connection is lost"
    if websocket.closed_by_us:
        return f"upstream {reason if code == 1008 else f'sent {reason}'}"
    return f"upstream closed the connection ({code})"


# --- Access -------------------------------------------------------------------------------
# Who may see the board, and which station is whom it says it is. Secrets are compared in constant
# time and never kept; hashes are worked out in one thread of their own, so that guessing cannot
# stop the loop.


@dataclass(slots=True)
class Session:
    """A login to the board."""

    user: str
    expires_at: float | None            # None: a token or no authentication, which do not expire
    id: str = ""                        # "" of one from an earlier run: its digest alone is known
    digest: str = ""
    ends_mono: float = math.inf         # its end by the monotonic clock, which counts

    def view(self) -> dict:
        return {"user": {"name": self.user}, "expiresAt": iso(self.expires_at)}


class Failures:
    """Failed attempts by key, within `LOGIN_WINDOW_S`. The longest quiet keys are forgotten."""

    def __init__(self, clock: Callable[[], float], most: int = LOGIN_FAILURES):
        self._clock, self._most = clock, most
        self._times: OrderedDict[Any, deque] = OrderedDict()

    def count(self, key: Any) -> int:
        """The failures that still count."""
        times = self._times.get(key, ())
        while times and times[0] <= self._clock() - LOGIN_WINDOW_S:
            times.popleft()
        return len(times)

    def add(self, key: Any) -> int:
        """One more failure. Returns how many count."""
        self._times.setdefault(key, deque(maxlen=self._most)).append(self._clock())
        self._times.move_to_end(key)
        if len(self._times) > ADDRESSES_KEPT:
            self._times.popitem(last=False)
        return self.count(key)

    def clear(self, key: Any) -> None:
        """A success: what failed before counts no more."""
        self._times.pop(key, None)


class Access:
    """Sessions, tokens and passwords."""

    def __init__(self, board: Board):
        self.board, self.config = board, board.config
        auth = self.config.auth
        self.made_token = "" if auth.token or auth.mode != "token" else secrets.token_urlsafe(24)
        self._token = (auth.token or self.made_token).encode("utf-8", "surrogateescape")
        self._sessions: OrderedDict[str, Session] = OrderedDict()    # {digest of its id: …}
        self._credentials = "\0".join((auth.mode, auth.username, auth.password, auth.token))
        self._fingerprint = ""                           # a hash of them
        self._failures = Failures(time.monotonic)
        self._stale: OrderedDict = OrderedDict()         # {(network, digest of a wrong bearer)}
        self._entry_failures = Failures(time.monotonic, ENTRY_FAILURES)
        self._hashing, self._station_hashing = Hashing(), Hashing()

    # Over a restart

    def restore(self) -> None:
        """Take over the logins of an earlier run, unless what one logs in with has changed."""
        state = self.board.state
        if not state:
            return
        self._fingerprint = next((row.value for row in state.rows("credentials")
                                  if type(row.value) is str), "")
        if password_matches(self._credentials.encode(), self._fingerprint):
            self._restore_sessions()
        else:
            self._fingerprint = hash_password(self._credentials)
            state.put("credentials", "fingerprint", self._fingerprint)
            state.remove_before("login", math.inf)
        state.sources.append(self.put_all)

    def _restore_sessions(self) -> None:
        now, longest_s = self.board.clock(), self.config.auth.session_ttl_seconds
        for row in self.board.state.rows("login", SESSIONS_KEPT):
            if row.at > now:
                self._sessions[row.key] = Session(
                    self.config.auth.username, row.at, "", row.key,
                    self.board.mono() + min(row.at - now, longest_s))

    def put_all(self) -> None:
        """Put all logins into the State, for a file that is new."""
        self.board.state.put("credentials", "fingerprint", self._fingerprint)
        for session in self._sessions.values():
            self._put(session)

    def _put(self, session: Session) -> None:
        self.board.state.put("login", session.digest, True, session.expires_at, durable=True)

    # The board's users

    def session(self, session_id: str | None, bearer: str | None, address: str) -> Session:
        """The session of a request: of its cookie, or of its bearer token.

        Raises: Unauthorized, Forbidden (past its time), TooMany (wrong tokens from this address).
        """
        if self.config.auth.mode == "none":
            return Session("anonymous", None)
        found = self._sessions.get(_digest(bearer or session_id or ""))
        if found is None and bearer and self.config.auth.mode == "token":
            return self._bearer_session(bearer.encode("utf-8", "replace"), address)
        if found is None:
            raise Unauthorized()
        if found.ends_mono <= self.board.mono():
            raise Forbidden("Session expired")
        return found

    def _bearer_session(self, bearer: bytes, address: str) -> Session:
        """The session of a request that carries the token itself.

        The same wrong token again is no new guess: a client left running with the token of an
        earlier start must not lock its address out.
        """
        stale = (_network(address), hashlib.sha256(bearer).digest())
        if stale in self._stale:
            raise Unauthorized()
        self._admit(address)
        if hmac.compare_digest(bearer, self._token):
            return Session(self.config.auth.username, None)
        self._stale[stale] = None
        if len(self._stale) > ADDRESSES_KEPT:
            self._stale.popitem(last=False)
        self._failed(address, self._failures.add(_network(address)), "Invalid token provided")
        raise Unauthorized()

    async def login(self, body: dict, address: str) -> Session:
        """A new session for the right token, or the right name and password.

        Raises: BadRequest, Unauthorized, TooMany.
        """
        mode = self.config.auth.mode
        names = {"token": ("token",), "credentials": ("username", "password")}.get(mode, ())
        given = [text for name in names if isinstance(text := body.get(name), str)]
        if len(given) < len(names):
            raise BadRequest(f"{' and '.join(names)} must be given as text")
        self._admit(address)
        self._hashing.admit()
        attempt = self._failures.add(_network(address))      # before the wait: many try at once
        if mode == "token":
            right = hmac.compare_digest(given[0].encode("utf-8", "replace"), self._token)
        else:
            right = mode == "none" or await self._right_credentials(*given)
        if not right:
            self._failed(address, attempt, "Invalid token provided" if mode == "token"
                         else "Invalid username or password")
            await asyncio.sleep(min(2.0, 0.25 * attempt))    # slows whoever tries many
            raise Unauthorized("Invalid credentials")
        self._failures.clear(_network(address))
        return self._new_session(address)

    def logout(self, session: Session) -> None:
        """Forget a session."""
        self._sessions.pop(session.digest, None)
        self.board.state.put("login", session.digest, None, durable=True)

    async def _right_credentials(self, username: str, password: str) -> bool:
        auth = self.config.auth
        right = await self._hashing.matches([password.encode("utf-8", "replace")], auth.password)
        return hmac.compare_digest(username.encode("utf-8", "replace"),
                                   auth.username.encode()) and right

    def _new_session(self, address: str) -> Session:
        lasts_s = self.config.auth.session_ttl_seconds
        now, id_, state = self.board.clock(), secrets.token_urlsafe(32), self.board.state
        session = Session(self.config.auth.username, now + lasts_s, id_, _digest(id_),
                          self.board.mono() + lasts_s)
        self._sessions[session.digest] = session
        self._put(session)
        state.remove_before("login", now)
        if len(self._sessions) > SESSIONS_KEPT:
            oldest, _ = self._sessions.popitem(last=False)
            state.put("login", oldest, None)
        self.board.system_event("LOGIN", "", f"{session.user} logged in", {"ip": address})
        return session

    def _admit(self, address: str) -> None:
        if self._failures.count(_network(address)) >= LOGIN_FAILURES:
            raise TooMany("Too many failed logins", LOGIN_WINDOW_S)

    def _failed(self, address: str, attempt: int, text: str) -> None:
        self.board.security_event("AUTH_FAILED", "UNKNOWN", text, "medium",
                                  {"ip": address, "attempt": attempt})
        if attempt == LOGIN_FAILURES:
            self.board.security_event(
                "RATE_LIMIT", "UNKNOWN", f"{attempt} failed logins: no more for a while", "high",
                {"ip": address})

    # Stations

    async def station_profile(self, identity: str, authorization: str, address: str) -> int:
        """The security profile of a station that wants in: 0, or 1 with its HTTP Basic password.

        Raises: Refused with 401 or 429.
        Spec: OCPP 1.6 security extension 3.3; 2.0.1 A00.FR.201 to 207.
        """
        settings = self.config.station(identity)
        if settings is None or not settings.password:
            return 0
        # One bad charger must not lock out a site; but an entry for many has one password.
        key, entry = (_network(address), identity), (_network(address), id(settings))
        if self._failures.count(key) >= LOGIN_FAILURES or (
                self._entry_failures.count(entry) >= ENTRY_FAILURES):
            raise Refused(429, "too many wrong passwords", "")
        given = _basic_password(identity, authorization)
        if given is None:
            raise Refused(401, "a password is needed (HTTP Basic)", "AUTH_FAILED")
        self._station_hashing.admit()
        attempt, _ = self._failures.add(key), self._entry_failures.add(entry)
        if await self._station_hashing.matches(_readings(given), settings.password):
            self._failures.clear(key)
            self._entry_failures.clear(entry)
            return 1
        self.board.security_event("AUTH_FAILED", identity, "Wrong password of a station",
                                  "high" if attempt == LOGIN_FAILURES else "medium",
                                  {"ip": address, "attempt": attempt})
        raise Refused(401, "wrong password", "")


class Hashing:
    """Passwords checked in a thread of their own, a bounded number of them waiting."""

    def __init__(self):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "passwords")
        self._waiting = 0

    def admit(self) -> None:
        """Raises: TooMany, when too many wait; that is nobody's failed attempt."""
        if self._waiting >= CALLS_WAITING:
            raise TooMany("Too many logins at a time", 10)

    async def matches(self, readings: list[bytes], configured: str) -> bool:
        """Whether one of the readings is the configured password."""
        if not configured.startswith(HASH_PREFIX):
            # All of them, so that the time does not tell which one was right.
            return sum(password_matches(given, configured) for given in readings) > 0
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, lambda: any(password_matches(g, configured) for g in readings))
        finally:
            self._waiting -= 1


def _digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode("utf-8", "replace")).hexdigest()


def hash_password(password: str) -> str:
    """What stands in the configuration instead of a plain password."""
    salt = secrets.token_bytes(16)
    key = _scrypt(password.encode(), salt, 16384, 8, 1)
    return f"{HASH_PREFIX}16384$8$1${salt.hex()}${key.hex()}"


def password_matches(given: bytes, configured: str) -> bool:
    """Whether `given` is the configured password, plain or hashed. Takes some 50 ms if hashed."""
    if hashed := PASSWORD_HASH.fullmatch(configured):
        n, r, p = (int(number) for number in hashed.group(1, 2, 3))
        key = _scrypt(given, bytes.fromhex(hashed[4]), n, r, p)
        return hmac.compare_digest(key, bytes.fromhex(hashed[5]))
    return hmac.compare_digest(given, configured.encode())


def _scrypt(password: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=256 * n * r * p, dklen=32)


def _network(address: str) -> str:
    """What counts as one address: of IPv6 the /64, since a whole one is anybody's."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address                                   # a Unix socket, or a proxy's odd word
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return str(ip_network((ip, 64), strict=False)) if ip.version == 6 else str(ip)


def _basic_password(identity: str, authorization: str) -> bytes | None:
    """The password of an HTTP Basic header. A colon may be in the identity and in the password."""
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user_and_password = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    user = identity.encode() + b":"
    if user_and_password.startswith(user):
        return user_and_password[len(user):]
    _, colon, password = user_and_password.partition(b":")
    return password if colon else None


def _readings(password: bytes) -> list[bytes]:
    """What a station may mean by a password: AuthorizationKey is set in hexadecimal (1.6 security
    extension 3.3), and some send its digits, some the bytes that they stand for."""
    readings = [password, password.hex().encode(), password.hex().upper().encode()]
    with contextlib.suppress(ValueError):
        readings.append(bytes.fromhex(password.decode("ascii")))
    return readings


# --- OCPP endpoint ------------------------------------------------------------------------
# The stations' WebSocket: which upgrades are let in, and the socket of a Link.

SHOWN_HEADERS = ("Host", "Upgrade", "Connection", "Origin", "User-Agent", "Sec-WebSocket-Version",
                 "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions")      # none holds a secret


class Admission(NamedTuple):
    """A station's upgrade that may go on."""

    identity: str
    protocol: str
    offered: str | None                 # the subprotocol to confirm, in the station's spelling
    quirks: tuple


def admit(config: Config, path: str, headers: HTTPHeaders) -> Admission:
    """Read a WebSocket upgrade as a station's; passwords are checked after.

    Raises: Refused with the HTTP status and why.
    Spec: OCPP-J 1.6 3.1 to 3.4; 2.0.1 part 4, 3.1 and 3.2.
    """
    quirks = []
    if path.startswith("/api/"):
        raise Refused(404, "this is the path of the board, not of stations")
    identity = identity_of(path, config.ocpp.path)
    if not identity:
        raise Refused(404, "the URL must end in the station's identity")
    if len(identity) > IDENTITY_LENGTH or not identity.isprintable():
        raise Refused(400, f"the identity must be {IDENTITY_LENGTH} printable characters at most")
    settings = config.station(identity)
    if config.ocpp.accept == "listed" and settings is None:
        raise Refused(404, "this identity is not listed")
    if headers.get("Upgrade", "").lower() != "websocket":
        raise Refused(426, "charging stations connect here, by WebSocket")
    if headers.get("Sec-WebSocket-Version") != "13":     # RFC 6455 4.4
        raise Refused(426, "version 13 of WebSocket is spoken here")
    if not headers.get("Sec-WebSocket-Key"):
        raise Refused(400, "a WebSocket handshake with a key is needed")
    if "upgrade" not in headers.get("Connection", "").lower():
        quirks.append("connection_header_missing")
    offered = [p.strip() for p in headers.get("Sec-WebSocket-Protocol", "").split(",") if p.strip()]
    known = {p.lower(): p for p in reversed(offered)}
    wanted = [settings.protocol] if settings and settings.protocol else config.ocpp.protocols
    if not offered:
        quirks.append("subprotocol_missing")
        protocol = ASSUMED_PROTOCOL if ASSUMED_PROTOCOL in wanted else wanted[0]
        return Admission(identity, protocol, None, tuple(quirks))
    protocol = next((p for p in wanted if p in known), None)
    if protocol is None:
        raise Refused(400, f"no common subprotocol: offered {', '.join(map(kept, offered[:10]))}; "
                           f"supported {', '.join(wanted)}")
    if known[protocol] != protocol:
        quirks.append("subprotocol_spelling")
    return Admission(identity, protocol, known[protocol], tuple(quirks))


def identity_of(path: str, prefix: str) -> str:
    """The identity that a URL's path ends in; "" if there is none.

    Odd shapes work: //id, id/, the prefix twice or not at all, a whole URL as the path. An encoded
    slash is part of the identity.
    """
    if "://" in (whole := unquote(path, errors="backslashreplace")):
        segments = whole.rpartition("://")[2].split("/")[1:]             # the first is its host
    else:
        segments = [unquote(segment, errors="backslashreplace") for segment in path.split("/")]
    segments = [segment.strip() for segment in segments if segment.strip()]
    if not segments or "/" + "/".join(segments) == prefix.rstrip("/"):
        return ""
    if len(segments) == 1 and segments[0] == prefix.strip("/").rpartition("/")[2]:
        return ""
    return segments[-1]


@stream_request_body
class StationUpgrade(RequestHandler):
    """The OCPP endpoint: lets a station in, whose socket goes to a Link then."""

    def initialize(self, daemon: "Daemon", here: bool = True) -> None:
        self.daemon, self.here = daemon, here            # here: stations connect to this port
        self.gone = False

    def on_connection_close(self) -> None:
        self.gone = True

    def prepare(self) -> None:
        # A handshake has no body: one is let go unread.
        if self.request.headers.get("Content-Length", "0") != "0":
            self._refuse(Refused(413, "a WebSocket handshake has no body"))

    def data_received(self, chunk: bytes) -> None:
        pass

    async def get(self, *args: Any) -> None:
        daemon, headers = self.daemon, self.request.headers
        config, address = daemon.config, self.request.remote_ip or ""
        try:
            if not self.here:
                raise Refused(404, f"stations connect to port {daemon.ocpp_port}")
            if daemon.board.epoch in headers.get(RELAY_HEADER, "").split(","):
                raise Refused(508, "this is our own relay: the url of proxy.upstream leads back")
            admission = admit(config, self.request.path, headers)
            authorization = headers.get("Authorization", "")
            profile = await daemon.access.station_profile(admission.identity, authorization,
                                                          address)
            daemon.make_room(admission.identity)
        except (Refused, TooMany) as error:
            self._refuse(error)
            return
        if self.gone:                    # it did not wait for its password's check
            return
        websocket = accept_websocket(self, config.ocpp.max_frame_bytes, admission.offered)
        link = Link(daemon.board, daemon.schemas, admission.protocol, websocket.write,
                    websocket.close)
        daemon.sockets[link] = websocket
        link.start(admission.identity, address, profile, admission.quirks)
        link.via = kept(headers.get(RELAY_HEADER, ""))
        if daemon.relay:
            daemon.relay.attach(link, authorization)
        websocket.start(link.receive, functools.partial(daemon.socket_closed, link))

    def _refuse(self, error: BoardError) -> None:
        config = self.daemon.config
        identity = identity_of(self.request.path, config.ocpp.path)
        host = kept(self.request.host, 100)
        if not self.here:
            host = f"{host.rpartition(':')[0] or host}:{self.daemon.ocpp_port}"
        advice = (f"ws://{host}{config.ocpp.path.rstrip('/')}/"
                  f"{quote(kept(identity, IDENTITY_LENGTH), safe='') or '<identity>'}")
        self.daemon.knocked(self.request.remote_ip or "", self.request.path, {
            name: kept(value) for name in SHOWN_HEADERS
            if (value := self.request.headers.get(name))}, error, advice, identity)
        if error.http_status == 413:
            self.set_header("Connection", "close")
        self.set_status(error.http_status)
        if error.http_status == 401:
            self.set_header("WWW-Authenticate", 'Basic realm="ocppboard"')
        if error.http_status == 426:
            self.set_header("Upgrade", "websocket")
            self.set_header("Sec-WebSocket-Version", "13")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{error}\nThe URL of a station is {advice}\n")

    def log_exception(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        log_unexpected(self, error)


def log_unexpected(handler: RequestHandler, error: BaseException | None) -> None:
    """Log what we did not raise on purpose; without the query, which may hold a token."""
    if not isinstance(error, (BoardError, HTTPError)):
        log.error("A request to %s failed", shown(handler.request.path), exc_info=error)


class IsUpgrade(Matcher):
    """Routes every WebSocket upgrade to the stations' endpoint.

    A wrong path is the first thing that goes wrong with a new charger, so any will do.
    """

    def match(self, request: HTTPServerRequest) -> dict | None:
        return {} if request.headers.get("Upgrade", "").lower() == "websocket" else None


# --- REST and streams ---------------------------------------------------------------------
# The thin edge: an endpoint is a function that reads `api` and returns what is to be written.
# ROUTES is the table of them; OpenAPI comes from it.

# What endpoints take


DAY = re.compile(r"\d{4}-\d\d-\d\d")


class Parameter(NamedTuple):
    """A query parameter: how its text is read, and its JSON schema."""

    name: str
    schema: dict
    text: str

    def read(self, text: str) -> Any:
        """The value. Raises: BadRequest."""
        schema = self.schema
        if schema.get("type") == "integer":
            least = schema["minimum"]
            if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) < least:
                raise BadRequest(f"{self.name} must be a whole number, {least} or more")
            return int(text)
        if schema.get("format") == "date-time":
            with contextlib.suppress(WrongValue):
                return parse_time(f"{text}T00:00:00Z" if DAY.fullmatch(text) else text)[0]
            raise BadRequest(f"{self.name} must be a time or a day, as 2026-09-21")
        if "enum" in schema and text not in schema["enum"]:
            raise BadRequest(f"{self.name} must be one of {', '.join(schema['enum'])}")
        return text


def _choice(name: str, words: Iterable[str], text: str, **more: Any) -> Parameter:
    return Parameter(name, {"type": "string", "enum": list(words)} | more, text)


FROM = Parameter("from", {"type": "string", "format": "date-time"},
                 "From this time or day on, in UTC")
TO = Parameter("to", {"type": "string", "format": "date-time"}, "Before this time or day")
LIMIT = Parameter("limit", {"type": "integer", "minimum": 1, "default": 100}, "How many at most")
LIMIT_OR_ALL = Parameter("limit", {"type": "integer", "minimum": 1}, "How many at most, or all")
OFFSET = Parameter("offset", {"type": "integer", "minimum": 0, "default": 0}, "Pass over so many")
IDENTITY = Parameter("identity", {"type": "string"}, "Of this station only")
CATEGORY = Parameter("category", {"type": "string"}, "Of this category only")
EVENT_TYPE = Parameter("type", {"type": "string"}, "Of this type only")
SEVERITY = _choice("severity", ("low", "medium", "high", "critical"), "Of this severity only")
METHOD = Parameter("method", {"type": "string"}, "Of this OCPP Action only")
DIRECTION = _choice("direction", ("IN", "OUT"), "IN is from the station")
MESSAGE_ID = Parameter("messageId", {"type": "string"}, "Of this message id: a CALL, its answer")
TEXT = Parameter("text", {"type": "string"}, "With this text in it, in any case")
MESSAGE_TYPE = _choice("type", ("CALL", "CALLRESULT", "CALLERROR", "SEND", "CALLRESULTERROR"),
                       "Of this message type only")
CONNECTION_STATUS = _choice("status", ("online", "offline", "all"), "Of this status only",
                            default="all")
PROTOCOL = _choice("protocol", PROTOCOLS, "Of this OCPP version only")
TRANSACTION_STATUS = _choice("status", ("active", "stopped", "orphan", "abandoned"),
                             "Of this status only")
CHARGE_STATUS = _choice("status", ("active", "waiting", "paused", "limited-by-station",
                                   "uncontrollable", "offline", "ended"), "Of this status only")
PROXY_TYPE = _choice("type", ("translation", "error", "refused", "connected", "disconnected",
                              "buffered", "delivered"), "Of this type only")
EXPORT_FORMAT = _choice("format", ("ndjson", "csv"), "Of the file", default="ndjson")
REPORT_BY = _choice("by", GROUP_OF, "A line for each", default="month")
REPORT_FORMAT = _choice("format", ("json", "csv"), "Of the answer", default="json")
TOPIC_LIST = Parameter("topics", {"type": "string"}, f"Some of {', '.join(TOPICS)}, with commas")
LAST_EVENT_ID = Parameter("lastEventId", {"type": "string"}, "As the header Last-Event-ID")
MESSAGE_FILTERS = (IDENTITY, METHOD, DIRECTION, MESSAGE_TYPE, MESSAGE_ID, TEXT)
PAGING = (LIMIT, OFFSET)


class Page(NamedTuple):
    """A list answer: its items as JSON texts or data, and how many match in all."""

    items: list
    total: int


# Attribute of a record that a query parameter of that name must equal.
FILTERED_BY = {"identity": "identity", "method": "method", "direction": "direction", "type": "type",
               "messageId": "message_id", "status": "status", "category": "kind",
               "severity": "severity"}


def matcher(query: dict, attributes: dict = FILTERED_BY) -> Callable[[Any], bool] | None:
    """A function that tells whether a record matches all the filters; None without any."""
    wanted = [(attributes[name], value) for name, value in query.items()
              if name in attributes and value is not None]
    text = (query.get("text") or "").lower()
    if not wanted:
        return (lambda record: record.mentions(text)) if text else None
    names, values = zip(*wanted, strict=True)
    value = values if len(values) > 1 else values[0]     # as attrgetter gives them
    read = attrgetter(*names)
    if text:
        return lambda record: read(record) == value and record.mentions(text)
    return lambda record: read(record) == value


async def _page(topic: str, api: "Api", attributes: dict = FILTERED_BY) -> Page:
    """The records of a topic that match: from memory, and behind them from the state file."""
    store = api.board.stores[topic]
    found = store.page(api.query["limit"], api.query["offset"], matcher(api.query, attributes))
    return await _with_older(topic, api, store.first, Page(*found), attributes)


async def _with_older(topic: str, api: "Api", first: int, recent: Page,
                      attributes: dict = FILTERED_BY) -> Page:
    """A page of records from `first` on, and what the state file has of those before it."""
    history, wanted = api.daemon.keeper.history, _wanted(api.query, attributes)
    older = await history.page(topic, first, api.query["limit"] - len(recent.items),
                               max(0, api.query["offset"] - recent.total), wanted)
    return Page(recent.items + older, recent.total + await history.count(topic, first, wanted))


def _wanted(query: dict, attributes: dict = FILTERED_BY) -> dict[str, str]:
    """The filters of a query by the names of attributes, and its text."""
    return {attributes.get(name, name): value for name, value in query.items()
            if (value is not None if name in attributes else name == "text" and value)}


# The endpoints


async def post_login(api: "Api") -> dict:
    """Create a session."""
    session = await api.daemon.access.login(api.body, api.address)
    api.set_session_cookie(session)
    await api.until_durable()
    return {"sessionId": session.id} | session.view()


def get_session(api: "Api") -> dict:
    """The session of this request."""
    mode = api.config.auth.mode
    try:
        session = api.authenticate()
    except (Unauthorized, Forbidden):
        return {"authenticated": False, "user": None, "expiresAt": None, "authMode": mode}
    return {"authenticated": True} | session.view() | {"authMode": mode}


async def post_logout(api: "Api") -> dict:
    """Destroy the session."""
    api.daemon.access.logout(api.authenticate())
    await api.until_durable()
    api.clear_cookie(COOKIE, path="/")
    return {"success": True}


def get_about(api: "Api") -> dict:
    """What runs here, where stations connect, and what they can be told."""
    ocpp = api.config.ocpp
    return {
        "version": VERSION, "startedAt": iso(api.board.started_at),
        "stationUrls": api.daemon.station_urls(), "protocols": ocpp.protocols,
        "accept": ocpp.accept, "validated": api.daemon.schemas is not None,
        "actions": {protocol: sorted(RECEIVED[protocol]) for protocol in ocpp.protocols},
        "commands": {protocol: sorted(COMMANDS[protocol]) for protocol in ocpp.protocols},
        "smartCharging": {"limitKw": api.daemon.controller.view()["limitKw"]}
        if api.daemon.controller else None, "relay": api.daemon.relay is not None,
        "state": api.daemon.state.view(),
    }


def get_overview(api: "Api") -> str:
    """What the dashboard shows first."""
    recent, _ = api.board.messages.page(RECENT_IN_OVERVIEW)
    return _with_recent_messages(api.board.overview(), recent)


def _with_recent_messages(fields: dict, recent: list[LoggedMessage]) -> str:
    """JSON of the fields and the messages, whose payloads are not taken apart for it."""
    return f'{to_json(fields)[:-1]},"recentMessages":[{",".join([r.json() for r in recent])}]}}'


def get_connections(api: "Api") -> Page:
    """Stations, by identity."""
    status, protocol = api.query["status"], api.query["protocol"]
    found = [station for identity, station in sorted(api.board.stations.items())
             if (status == "all" or (status == "online") == bool(station.link))
             and protocol in (None, station.protocol)]
    start = api.query["offset"]
    return Page(found[start:start + (api.query["limit"] or len(found))], len(found))


def _station(api: "Api", identity: str) -> Station:
    station = api.board.stations.get(identity)
    if station is None:
        raise NotFound("Connection not found")
    return station


def get_connection(api: "Api", identity: str) -> str:
    """One station."""
    station = _station(api, identity)
    recent = api.board.messages.newest(RECENT_IN_DETAIL, lambda record: record.identity == identity)
    return _with_recent_messages(station.view(), recent)


def delete_connection(api: "Api", identity: str) -> dict:
    """Forget a station; an online one is disconnected first."""
    station = _station(api, identity)
    if station.link:
        station.link.end("removed on the board", 1000)
    api.board.forget(identity)
    return {"success": True}


def _online(api: "Api", identity: str) -> Link:
    link = _station(api, identity).link
    if link is None:
        raise Conflict("The station is offline")
    return link


def post_disconnect(api: "Api", identity: str) -> dict:
    """Close a station's connection."""
    _online(api, identity).end("disconnected on the board", 1000)
    return {"success": True, "message": "Connection terminated"}


async def post_call(api: "Api", identity: str) -> dict:
    """Send a command and wait for its answer."""
    action, payload = api.body.get("action"), api.body.get("payload", {})
    if not isinstance(action, str) or not isinstance(payload, dict):
        raise BadRequest("action must be a text, payload an object")
    link, controller = _online(api, identity), api.daemon.controller
    warning = controller.hand_sent(identity, action, payload) if controller else None
    result, response_ms = await link.call(action, payload)
    return {"success": True, "result": result, "responseTime": round(response_ms, 3),
            **({"warning": warning} if warning else {})}


async def post_approve(api: "Api", identity: str) -> dict:
    """Let a station in where ocpp.accept is "ask"."""
    station = _station(api, identity)
    api.board.approve(station)
    if station.link and station.registration == "Pending":   # else it asks again within a minute
        api.daemon.spawn("boot after approval", _ask_to_boot(station.link))
    await api.until_durable()
    return {"success": True}


async def _ask_to_boot(link: Link) -> None:
    try:
        await link.call("TriggerMessage", {"requestedMessage": "BootNotification"})
    except BoardError as error:
        log.info("%s was not triggered to boot: %s", shown(link.station.identity), error)


async def get_messages(api: "Api") -> Page:
    """Messages, newest first."""
    if matcher(api.query) is None:
        return await _page("messages", api)
    first, offset = api.board.messages.first, api.query["offset"]
    found = await _found_messages(api)
    return await _with_older("messages", api, first, Page(
        found[offset:offset + api.query["limit"]], len(found)))


async def _found_messages(api: "Api") -> list[LoggedMessage]:
    """All that match, newest first; the loop has its turn while their payloads are read."""
    match, found, size = matcher(api.query), [], 0
    for record in reversed(list(api.board.messages.records)):
        if match is None or match(record):
            found.append(record)
        size += record.size
        if size > 1 << 20:
            await asyncio.sleep(0)
            size = 0
    return found


async def get_message(api: "Api", number: str) -> str:
    """One message, by its id."""
    digits = re.fullmatch(r"(?:msg-)?([0-9]{1,15})", number)
    record = digits and (api.board.messages.get(int(digits[1])) or
                         await api.daemon.keeper.history.get("messages", int(digits[1])))
    if not record:
        raise NotFound("Message not found: it was dropped for newer ones, or never was")
    return record.json()


async def get_transactions(api: "Api") -> Page:
    """Transactions, newest first; those that are no longer in memory come from the state file."""
    limit, offset = api.query["limit"], api.query["offset"]
    recent, total = api.board.transactions.page(limit, offset, matcher(api.query))
    keeper, filters = api.daemon.keeper, _kept_filters(api)
    older = await keeper.page(limit - len(recent), max(0, offset - total), **filters)
    return Page(recent + older, total + await keeper.count(**filters))


def _kept_filters(api: "Api") -> dict:
    return {name: api.query[name] for name in ("identity", "status", "text")}


async def get_transaction(api: "Api", identity: str, transaction: str) -> dict:
    """One transaction, with what its meter said over time."""
    known, keeper = api.board.transaction_of, api.daemon.keeper
    found = known.get((identity, transaction)) or known.get(
        (identity, int(transaction) if re.fullmatch("[0-9]{1,15}", transaction) else None))
    if found is None:
        found = next(iter(await keeper.page(1, identity=identity, id=transaction)), None)
    if found is None:
        raise NotFound("Transaction not found")
    series = await keeper.series(found)
    return found.view() | {"series": series.view() if series else []}


async def get_report(api: "Api") -> dict | None:
    """Sessions, energy and time of the transactions that ended from one time to another."""
    by, start, end = (api.query[name] for name in ("by", "from", "to"))
    groups, from_file = await api.daemon.keeper.report(
        by, start or 0.0, RUNNING_AT if end is None else end)
    lines = [{by: group, "sessions": sessions, "energyWh": round(wh, 3), "seconds": round(seconds)}
             for group, (sessions, wh, seconds) in sorted(groups.items())]
    if api.query["format"] == "json":
        return {"by": by, "from": iso(start), "to": iso(end), "fromFile": from_file,
                "sessions": sum(line["sessions"] for line in lines),
                "energyWh": round(sum(line["energyWh"] for line in lines), 3), "lines": lines}
    api.set_header("Content-Type", "text/csv; charset=utf-8")
    api.set_header("Content-Disposition", 'attachment; filename="report.csv"')
    columns = (by, "sessions", "energyWh", "seconds")
    api.finish("".join(_csv_line(cells) for cells in (
        columns, *(map(line.get, columns) for line in lines))))
    return None


def get_security(api: "Api") -> Awaitable[Page]:
    """Security events, newest first."""
    return _page("security", api)


def get_errors(api: "Api") -> Awaitable[Page]:
    """What went wrong, newest first."""
    return _page("errors", api)


def get_system_events(api: "Api") -> Awaitable[Page]:
    """Events of the board, newest first."""
    return _page("system", api, FILTERED_BY | {"type": "kind"})


def get_smart_charge(api: "Api") -> Page:
    """Smart charging sessions."""
    return Page(*api.board.smart_charge.page(api.query["limit"], api.query["offset"],
                                             matcher(api.query)))


def _controller(api: "Api") -> Controller:
    if api.daemon.controller is None:
        raise Conflict("Smart charging is off: set smart_charge.enabled")
    return api.daemon.controller


def get_smart_charge_config(api: "Api") -> dict:
    """What the power controller goes by."""
    return api.daemon.controller.view() if api.daemon.controller else {"enabled": False}


def patch_smart_charge_config(api: "Api") -> dict:
    """Change strategy, limit or margin, until the next start."""
    controller = _controller(api)
    controller.configure(api.body)
    api.daemon.steer()
    return controller.view()


def patch_smart_charge_session(api: "Api", session: str) -> dict:
    """Change priority, minA or maxA of a session."""
    controller = _controller(api)
    digits = re.fullmatch(r"sc-([0-9]{1,15})", session)
    found = digits and api.board.smart_charge.newest(
        1, lambda record: record.number == int(digits[1]))
    if not found:
        raise NotFound("Session not found")
    controller.configure_session(found[0], api.body)
    api.daemon.steer()
    return found[0].view()


def patch_smart_charge_station(api: "Api", identity: str) -> dict:
    """Say whether a station that the configuration does not name is at this site."""
    elsewhere = api.body.get("elsewhere")
    if set(api.body) != {"elsewhere"} or not isinstance(elsewhere, bool):
        raise BadRequest('the body must be {"elsewhere": true} or {"elsewhere": false}')
    _controller(api).set_elsewhere(identity, elsewhere)
    api.daemon.steer()
    return {"success": True}


def get_smart_charge_circuits(api: "Api") -> Page:
    """The circuits, the site first."""
    circuits = api.daemon.controller.circuits() if api.daemon.controller else []
    return Page(circuits, len(circuits))


def post_smart_charge_meter(api: "Api") -> dict:
    """Tell what the site's own meter reads."""
    _controller(api).take_meter(api.body)
    return {"success": True}


def get_proxy(api: "Api") -> Awaitable[Page]:
    """Protocol proxy events."""
    return _page("proxy", api, FILTERED_BY | {"type": "kind"})


def get_upstreams(api: "Api") -> list:
    """The upstream systems of the relay, each with the stations that go on to it."""
    return api.daemon.relay.view() if api.daemon.relay else []


def get_knocking(api: "Api") -> Page:
    """Refused upgrades, newest first."""
    knocks = list(reversed(api.board.knocking.values()))
    return Page(knocks, len(knocks))


def get_telemetry(api: "Api") -> dict:
    """The telemetry now."""
    return api.daemon.sample()


async def get_telemetry_history(api: "Api") -> Page:
    """The newest samples, oldest first."""
    kept = api.board.telemetry
    api.query |= {"limit": api.query["limit"] or len(kept) or 1, "offset": 0}
    samples, total = await _page("telemetry", api)
    return Page(samples[::-1], total)


def get_healthz(api: "Api") -> dict:
    """200 while the daemon works; `degraded` while the state file cannot be written."""
    if not api.daemon.board_port:
        raise Busy("Not listening")
    return {"status": "ok" if api.daemon.state.failing_since is None else "degraded"}


MESSAGE_COLUMNS = ("id", "timestamp", "identity", "protocol", "direction", "type", "method",
                   "messageId", "responseTime", "errorCode", "errorDescription", "payload")
TRANSACTION_COLUMNS = ("id", "identity", "evse", "connector", "idToken", "startedAt", "stoppedAt",
                       "meterStart", "meterStop", "energyWh", "soc", "reason", "status",
                       "estimated")


async def get_messages_export(api: "Api") -> None:
    """All messages that match, oldest first, as a file."""
    history, wanted, first = api.daemon.keeper.history, _wanted(api.query), api.board.messages.first
    found = await _found_messages(api)
    total = len(found) + await history.count("messages", first, wanted)
    write = _begin_export(api, "messages", total, MESSAGE_COLUMNS,
                          lambda record: record.head() | {"payload": record.payload})
    async for messages in history.slices("messages", first, wanted):
        await write(messages)
        if api.closed:
            return
    await write(found[::-1])


async def get_transactions_export(api: "Api") -> None:
    """All transactions that match, oldest first, as a file."""
    match, keeper, filters = matcher(api.query), api.daemon.keeper, _kept_filters(api)
    recent = [r for r in api.board.transactions.records if match is None or match(r)]
    older = keeper.slices(**filters)
    write = _begin_export(api, "transactions", await keeper.count(**filters) + len(recent),
                          TRANSACTION_COLUMNS, Transaction.view)
    async for transactions in older:
        await write(transactions)
        if api.closed:
            return
    await write(recent)


def _begin_export(api: "Api", name: str, total: int, columns: tuple,
                  row: Callable[[Any], dict]) -> Callable[[list], Awaitable]:
    """Begin a file of JSON lines, or of CSV with these columns of `row(record)`.

    Returns: what writes records into it.
    """
    kind = api.query["format"]
    api.set_header("Content-Type", "text/csv; charset=utf-8" if kind == "csv"
                   else "application/x-ndjson")
    api.set_header("Content-Disposition", f'attachment; filename="{name}.{kind}"')
    api.set_header("X-Total-Count", total)
    if kind == "csv":
        api.write(_csv_line(columns))

    def line(record: Any) -> str:
        return (_csv_line(map(row(record).get, columns)) if kind == "csv"
                else record.json() + "\n")
    return lambda records: api.write_slices(records, line)


def _csv_line(cells: Iterable[Any]) -> str:
    """One line of CSV (RFC 4180). A cell that a spreadsheet would take for a formula gets a '."""
    line = io.StringIO()
    csv.writer(line).writerow(
        ["'" + cell if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r")
         else cell for cell in cells])
    return line.getvalue().encode("utf-8", "backslashreplace").decode()      # lone surrogates


# What /metrics shows: (name, type, help, key of a telemetry sample).
METRICS = (
    ("ocppboard_stations_online", "gauge", "Stations connected now.", "connectionCount"),
    ("ocppboard_stations_online_peak", "gauge", "Most stations at a time.", "peakConnections"),
    ("ocppboard_messages_total", "counter", "OCPP messages, both directions.", "totalMessages"),
    ("ocppboard_messages_per_second", "gauge", "Mean over 10 s.", "messagesPerSecond"),
    ("ocppboard_answer_milliseconds", "gauge", "Mean time to answer over 60 s.", "avgLatencyMs"),
    ("ocppboard_error_ratio", "gauge", "CALLERRORs over messages.", "errorRate"),
    ("ocppboard_uptime_seconds", "gauge", "Since the start.", "uptimeSeconds"),
    ("ocppboard_cpu_percent", "gauge", "Of one core, by this process.", "cpuPercent"),
    ("ocppboard_loop_lag_milliseconds", "gauge", "How late the loop woke up.", "loopLagMs"),
    ("ocppboard_streams", "gauge", "Open SSE streams.", "streams"),
)


# The same of the state file: (name, type, help, key of its view).
STATE_METRICS = (
    ("size_bytes", "gauge", "Of the state file.", "sizeBytes"),
    ("writes_total", "counter", "Writes of the state file.", "writes"),
    ("written_bytes_total", "counter", "Of the values written.", "bytesWritten"),
    ("waiting", "gauge", "Values that wait to be written.", "waiting"),
    ("lost_total", "counter", "Values dropped while the file could not be written.", "lost"),
)


def get_metrics(api: "Api") -> None:
    """Prometheus text format."""
    sample, board = api.daemon.sample(), api.board
    lines: list[str] = []

    def metric(name: str, kind: str, text: str, values: Iterable[tuple[str, Any]]) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{labels} {value}" for labels, value in values)

    for name, kind, text, key in METRICS:
        metric(name, kind, text, [("", sample[key])])
    metric("ocppboard_resident_bytes", "gauge", "Resident memory.",
           [("", sample["memoryUsage"]["rss"])])
    for name, kind, text, key in STATE_METRICS:
        metric(f"ocppboard_state_{name}", kind, text, [("", value or 0)
               for value in [api.daemon.state.view()[key]]])
    metric("ocppboard_state_failing", "gauge", "1 while the state file cannot be written.",
           [("", int(api.daemon.state.failing_since is not None))])
    metric("ocppboard_records", "gauge", "Records kept.",
           [(f'{{store="{name}"}}', len(store)) for name, store in board.stores.items()])
    metric("ocppboard_records_total", "counter", "Records ever.",
           [(f'{{store="{name}"}}', store.count) for name, store in board.stores.items()])
    metric("ocppboard_transactions_active", "gauge", "Transactions under way.",
           [("", sum(t.status == "active" for t in board.transactions.records))])
    stations = [(f'{{identity="{_label(s.identity)}"}}', s) for s in board.stations.values()]
    metric("ocppboard_station_online", "gauge", "1 while connected.",
           [(label, int(bool(s.link))) for label, s in stations])
    metric("ocppboard_station_messages_total", "counter", "Messages of a station.",
           [(label, s.message_count) for label, s in stations])
    readings = [(f'{label[:-1]},evse="{c.evse_id}",connector="{c.connector_id}"}}', c.reading)
                for label, s in stations for c in s.connectors.values()
                if c.reading and not c.reading.stale]
    metric("ocppboard_connector_power_watts", "gauge", "Power as last told.",
           [(label, r.power_w) for label, r in readings if r.power_w is not None])
    metric("ocppboard_connector_energy_watt_hours", "gauge", "Import register as last told.",
           [(label, r.energy_wh) for label, r in readings if r.energy_wh is not None])
    sessions = [(f'{{identity="{_label(session.identity)}"}}', session)
                for session in (api.daemon.relay.sessions.values() if api.daemon.relay else ())]
    metric("ocppboard_relay_up", "gauge", "1 while upstream is connected and takes messages.",
           [(label, int(session.status == ONLINE)) for label, session in sessions])
    metric("ocppboard_relay_waiting", "gauge", "Messages that wait for upstream.",
           [(label, session.waiting) for label, session in sessions])
    for name in SESSION_COUNTS:
        metric(f"ocppboard_relay_{_snake(name)}_total", "counter", f"Messages {_snake(name)}.",
               [(label, session.counts[name]) for label, session in sessions])
    api.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
    api.finish("\n".join(lines) + "\n")


def _snake(name: str) -> str:
    return re.sub(r"(?=[A-Z])", "_", name).lower()


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def get_openapi(api: "Api") -> dict:
    """This description."""
    return openapi()


# Streams


def get_messages_stream(api: "Api") -> Awaitable:
    """Messages, live."""
    return _stream(api, "messages", ("messages",))


def get_telemetry_stream(api: "Api") -> Awaitable:
    """The telemetry, live."""
    return _stream(api, "telemetry", ("telemetry",))


def get_security_stream(api: "Api") -> Awaitable:
    """Security events, live."""
    return _stream(api, "security", ("security",))


def get_proxy_stream(api: "Api") -> Awaitable:
    """What the relay does, live."""
    return _stream(api, "proxy", ("proxy",))


def get_stream(api: "Api") -> Awaitable:
    """Several topics in one stream."""
    asked = api.query["topics"]
    topics = tuple(dict.fromkeys(asked.split(","))) if asked else tuple(TOPICS)
    for topic in topics:
        if topic not in TOPICS:
            raise BadRequest(f"topics must be some of {', '.join(TOPICS)}")
    return _stream(api, "stream", topics)


async def _stream(api: "Api", name: str, topics: tuple) -> None:
    """Server-Sent Events until the client goes or its session ends (HTML, 9.2)."""
    if len(api.daemon.streams) >= STREAMS_OPEN:
        raise Busy("Too many streams")
    board, heartbeat_s = api.board, api.config.sse.heartbeat_ms / 1000
    after, restarted = _resume_from(api, board, topics)
    subscription, events, lost = board.subscribe(
        topics, _stream_filter(api.query), api.woken.set, after)
    api.set_header("Content-Type", "text/event-stream; charset=utf-8")
    api.set_header("X-Accel-Buffering", "no")
    api.daemon.streams.add(api)

    def tell(event: str, **data: Any) -> None:
        api.write(f"id: {_event_id(subscription, board)}\nevent: {event}\n"
                  f"data: {to_json(data | {'time': iso(board.clock())})}\n\n")
    try:
        api.write("retry: 3000\n")
        tell("connected", stream=name, topics=topics,
             heartbeatMs=api.config.sse.heartbeat_ms)
        heartbeat_at = time.monotonic() + heartbeat_s
        while True:
            if lost or restarted:
                tell("gap", lost=lost, restarted=restarted)
            await api.write_slices(events, lambda event: _sse(event, subscription, board))
            if not await api.flushed():
                break
            # What comes meanwhile goes out together; streams that woke together drift apart.
            await asyncio.sleep(STREAM_PAUSE_S * random.uniform(0.7, 1.3))
            if not await _news(api.woken, heartbeat_at - time.monotonic()):
                if not api.still_allowed():
                    break
                board.pass_over(subscription)
                tell("heartbeat")
                heartbeat_at = time.monotonic() + heartbeat_s
            if api.closed:
                break
            (events, lost), restarted = subscription.take(), False
    finally:
        api.daemon.streams.discard(api)
        board.unsubscribe(subscription)


async def _news(woken: asyncio.Event, patience_s: float) -> bool:
    """Wait for an event, or for the client to go; False when the time is over."""
    if patience_s <= 0:
        return False
    try:
        async with asyncio.timeout(patience_s):
            await woken.wait()
    except TimeoutError:
        return False
    woken.clear()
    return True


def _sse(event: Published, subscription: Subscription, board: Board) -> str:
    """An event as text, with its id."""
    subscription.cursor[event.topic] = event.number
    if event.topic in CHANGING and event.record.changed > event.number:
        return ""                        # the same record comes again, as it is now
    return f"id: {_event_id(subscription, board)}\n{event.text}"


def _event_id(subscription: Subscription, board: Board) -> str:
    """Where each topic of the stream stands: 9f86d081.120.7"""
    return f"{board.epoch}.{'.'.join(map(str, subscription.cursor.values()))}"


def _resume_from(api: "Api", board: Board, topics: tuple) -> tuple[dict | None, bool]:
    """({topic: number of the last event seen}, whether by an earlier run) of a client that comes
    back; (None, False) of a new one."""
    text = api.request.headers.get("Last-Event-ID") or api.query["lastEventId"]
    if not text:
        return None, False
    epoch, *numbers = text.split(".")
    if epoch != board.epoch or len(numbers) != len(topics) or not all(
            re.fullmatch("[0-9]{1,15}", number) for number in numbers):
        return {topic: board.first_number(topic) for topic in topics}, True
    return dict(zip(topics, map(int, numbers), strict=True)), False


def _stream_filter(query: dict) -> Callable[[str, Record], bool] | None:
    """Identity narrows every topic that has one; the others are about messages."""
    identity = matcher({"identity": query["identity"]})
    message = matcher(query)
    if message is None:
        return None
    return lambda topic, record: (
        message(record) if topic == "messages"
        else identity is None or topic == "telemetry" or identity(record))


# The table


class Route(NamedTuple):
    """An endpoint: `:name` in its path is handed on, its docstring is what the API tells of it."""

    method: str
    path: str
    act: Callable
    answer: str = ""                     # a key of SHAPES, "[…]" a list of it; or a media type
    query: tuple = ()
    body: str = ""                       # a key of SHAPES
    public: bool = False                 # needs no session
    errors: tuple = ()                   # beyond 400, 401, 403, 404, 405, 413, 500

    @property
    def text(self) -> str:
        """What it does, in a line."""
        return (self.act.__doc__ or self.path).removesuffix(".")     # none under -OO


SSE = "text/event-stream"
STREAM_FILTERS = (*MESSAGE_FILTERS, LAST_EVENT_ID)
ROUTES = (
    Route("POST", "/api/auth/login", post_login, "Login", body="Credentials", public=True,
          errors=(429,)),
    Route("GET", "/api/auth/session", get_session, "SessionInfo", public=True),
    Route("POST", "/api/auth/logout", post_logout, "Success"),
    Route("GET", "/api/about", get_about, "About"),
    Route("GET", "/api/overview", get_overview, "Overview"),
    Route("GET", "/api/connections", get_connections, "[Connection]",
          (CONNECTION_STATUS, PROTOCOL, LIMIT_OR_ALL, OFFSET)),
    Route("GET", "/api/connections/:identity", get_connection, "ConnectionDetail"),
    Route("DELETE", "/api/connections/:identity", delete_connection, "Success"),
    Route("POST", "/api/connections/:identity/disconnect", post_disconnect, "Success",
          errors=(409,)),
    Route("POST", "/api/connections/:identity/call", post_call, "CallAnswer", body="Command",
          errors=(409, 502, 503, 504)),
    Route("POST", "/api/connections/:identity/approve", post_approve, "Success"),
    Route("GET", "/api/connections/:identity/transactions/:transaction", get_transaction,
          "TransactionDetail"),
    Route("GET", "/api/messages", get_messages, "[Message]", (*PAGING, *MESSAGE_FILTERS)),
    Route("GET", "/api/messages/stream", get_messages_stream, SSE, STREAM_FILTERS, errors=(503,)),
    Route("GET", "/api/messages/export", get_messages_export, "application/x-ndjson",
          (EXPORT_FORMAT, *MESSAGE_FILTERS)),
    Route("GET", "/api/messages/:number", get_message, "Message"),
    Route("GET", "/api/telemetry", get_telemetry, "Telemetry"),
    Route("GET", "/api/telemetry/history", get_telemetry_history, "[Telemetry]", (LIMIT_OR_ALL,)),
    Route("GET", "/api/telemetry/stream", get_telemetry_stream, SSE, STREAM_FILTERS,
          errors=(503,)),
    Route("GET", "/api/security", get_security, "[SecurityEvent]",
          (*PAGING, IDENTITY, CATEGORY, SEVERITY)),
    Route("GET", "/api/security/stream", get_security_stream, SSE, STREAM_FILTERS, errors=(503,)),
    Route("GET", "/api/smart-charge", get_smart_charge, "[SmartCharge]",
          (*PAGING, IDENTITY, CHARGE_STATUS)),
    Route("GET", "/api/smart-charge/config", get_smart_charge_config, "SmartChargeConfig"),
    Route("PATCH", "/api/smart-charge/config", patch_smart_charge_config, "SmartChargeConfig",
          body="SmartChargePatch", errors=(409,)),
    Route("GET", "/api/smart-charge/circuits", get_smart_charge_circuits, "[Circuit]"),
    Route("POST", "/api/smart-charge/meter", post_smart_charge_meter, "Success", body="SiteMeter",
          errors=(409,)),
    Route("PATCH", "/api/smart-charge/stations/:identity", patch_smart_charge_station, "Success",
          body="SmartChargeStation", errors=(409,)),
    Route("PATCH", "/api/smart-charge/:session", patch_smart_charge_session, "SmartCharge",
          body="SmartChargeSessionPatch", errors=(409,)),
    Route("GET", "/api/proxy", get_proxy, "[ProxyEvent]",
          (*PAGING, IDENTITY, PROXY_TYPE, METHOD)),
    Route("GET", "/api/proxy/stream", get_proxy_stream, SSE, STREAM_FILTERS, errors=(503,)),
    Route("GET", "/api/proxy/upstreams", get_upstreams, "[Upstream]"),
    Route("GET", "/api/transactions", get_transactions, "[Transaction]",
          (*PAGING, IDENTITY, TRANSACTION_STATUS, TEXT)),
    Route("GET", "/api/transactions/export", get_transactions_export, "application/x-ndjson",
          (EXPORT_FORMAT, IDENTITY, TRANSACTION_STATUS, TEXT)),
    Route("GET", "/api/report", get_report, "Report", (FROM, TO, REPORT_BY, REPORT_FORMAT)),
    Route("GET", "/api/errors", get_errors, "[Error]", (*PAGING, IDENTITY, CATEGORY)),
    Route("GET", "/api/system-events", get_system_events, "[SystemEvent]",
          (*PAGING, IDENTITY, EVENT_TYPE)),
    Route("GET", "/api/knocking", get_knocking, "[Knocking]"),
    Route("GET", "/api/stream", get_stream, SSE, (TOPIC_LIST, *STREAM_FILTERS), errors=(503,)),
    Route("GET", "/api/openapi.json", get_openapi, "OpenAPI"),
    Route("GET", "/metrics", get_metrics, "text/plain"),
    Route("GET", "/healthz", get_healthz, "Health", public=True, errors=(503,)),
)

# The JSON of answers and bodies: {name: {field: type}}. A type is a JSON schema's or a name of
# SHAPES; "?" may be null, "[…]" is a list. "Base+": and the fields of Base.
_EVENT = {"id": "string", "identity": "string", "message": "string", "details": "object",
          "timestamp": "time"}
SHAPES = {
    "ErrorAnswer": {"error": "string"},
    "Success": {"success": "boolean"},
    "Health": {"status": "string"},
    "OpenAPI": {"openapi": "string", "paths": "object"},
    "Credentials": {},
    "Login": {"sessionId": "string", "user": "User", "expiresAt": "time"},
    "User": {"name": "string"},
    "SessionInfo": {"authenticated": "boolean", "user": "User?", "expiresAt": "time?",
                    "authMode": "string"},
    "Command": {"action": "string"},
    "CallAnswer": {"success": "boolean", "result": "object", "responseTime": "number"},
    "Overview": {
        "connectedClients": "integer", "totalConnections": "integer", "messagesPerSecond": "number",
        "avgLatencyMs": "number", "errorRate": "number", "uptimeSeconds": "integer",
        "totalMessages": "integer", "recentMessages": "[Message]", "securityEventCount": "integer",
        "errorCount": "integer", "systemEventCount": "integer"},
    "Connection": {
        "identity": "string", "remoteAddress": "string", "protocol": "string",
        "connectedAt": "time", "disconnectedAt": "time?", "status": "string",
        "messageCount": "integer",
        "lastMessageAt": "time?", "securityProfile": "integer", "errorCount": "integer",
        "evictedCount": "integer", "registration": "string?", "seenSinceStart": "boolean",
        "station": "object",
        "connectors": "[Connector]", "clockSkewSeconds": "number?", "quirks": "[Quirk]"},
    "ConnectionDetail": {"Connection+": "", "recentMessages": "[Message]"},
    "Connector": {
        "evse": "integer", "connector": "integer", "status": "string?", "errorCode": "string?",
        "vendorErrorCode": "string?", "info": "string?", "since": "time?", "transactionId": "id?",
        "meter": "Meter?", "inlet": "Meter?"},
    "Quirk": {"name": "string", "count": "integer", "lastMessageId": "string?"},
    "Meter": {
        "timestamp": "time", "energyWh": "number?", "powerW": "number?", "currentA": "object",
        "voltageV": "object", "offeredA": "number?", "soc": "number?", "temperatureC": "number?",
        "frequencyHz": "number?", "quality": "string", "derived": "[string]"},
    "Message": {
        "id": "string", "identity": "string", "method": "string", "direction": "string",
        "type": "string", "timestamp": "time", "payload": "object", "responseTime": "number?",
        "messageId": "string", "protocol": "string"},
    "Transaction": {
        "id": "id", "identity": "string", "evse": "integer", "connector": "integer",
        "idToken": "string?", "startedAt": "time", "stoppedAt": "time?", "meterStart": "number?",
        "meterStop": "number?", "energyWh": "number?", "powerW": "number?", "soc": "number?",
        "reason": "string?", "status": "string", "chargingState": "string?", "estimated": "boolean",
        "missingEvents": "integer", "notDurable": "boolean", "meter": "Meter?"},
    "TransactionDetail": {"Transaction+": "", "series": "[MeterSample]"},
    "MeterSample": {"timestamp": "time", "powerW": "number?", "energyWh": "number?",
                    "soc": "number?", "currentA": "object"},
    "About": {"version": "string", "startedAt": "time", "stationUrls": "[string]",
              "protocols": "[string]", "accept": "string", "validated": "boolean",
              "actions": "object", "commands": "object", "smartCharging": "SiteLimit?",
              "relay": "boolean", "state": "StateFile"},
    "StateFile": {"path": "string?", "sizeBytes": "integer?", "writes": "integer",
                  "bytesWritten": "integer", "waiting": "integer", "lost": "integer",
                  "failingSince": "time?", "error": "string?"},
    "Report": {"by": "string", "from": "time?", "to": "time?", "fromFile": "boolean",
               "sessions": "integer", "energyWh": "number", "lines": "[ReportLine]"},
    "ReportLine": {"sessions": "integer", "energyWh": "number", "seconds": "integer"},
    "SiteLimit": {"limitKw": "number"},
    "Telemetry": {
        "messagesPerSecond": "number", "avgLatencyMs": "number", "errorRate": "number",
        "connectionCount": "integer", "peakConnections": "integer", "uptimeSeconds": "integer",
        "totalMessages": "integer", "totalConnections": "integer", "errorCount": "integer",
        "securityEventCount": "integer", "systemEventCount": "integer",
        "refusedConnections": "integer", "activeTransactions": "integer", "powerW": "number",
        "memoryUsage": "Memory", "cpuPercent": "number",
        "loopLagMs": "number", "stateFailingSince": "time?", "streams": "integer",
        "timestamp": "time"},
    "Memory": {"rss": "integer", "heapUsed": "integer", "heapTotal": "integer"},
    "SecurityEvent": {"category": "string", "severity": "string", **_EVENT},
    "Error": {"category": "string", **_EVENT},
    "SystemEvent": {"type": "string", **_EVENT},
    "Knocking": {
        "path": "string", "ip": "string", "headers": "object", "status": "integer",
        "reason": "string", "url": "string", "count": "integer", "firstAt": "time",
        "lastAt": "time"},
    "SmartCharge": {
        "sessionId": "string", "identity": "string", "strategy": "string",
        "allocatedKw": "number", "status": "string", "startedAt": "time", "updatedAt": "time",
        "transactionId": "id", "evse": "integer", "connector": "integer", "circuit": "string",
        "phases": "integer", "allocatedA": "number", "targetA": "number", "measuredA": "number?",
        "priority": "integer", "minA": "integer?", "maxA": "integer?", "phasesSet": "integer?",
        "reason": "string", "endedAt": "time?"},
    "SmartChargeConfig": {"enabled": "boolean"},
    "SmartChargePatch": {},
    "SmartChargeSessionPatch": {},
    "SmartChargeStation": {"elsewhere": "boolean"},
    "SiteMeter": dict.fromkeys(PHASES, "number"),
    "Circuit": {
        "name": "string", "parent": "string?", "limitA": "number", "usableA": "number",
        "stations": "[string]", "allocatedA": "object", "worstA": "object",
        "measuredA": "object", "overLimit": "boolean", "uncontrolled": "[Uncontrolled]"},
    "Uncontrolled": {
        "identity": "string", "amps": "number", "reason": "string", "advice": "string"},
    "ProxyEvent": {
        "id": "string", "type": "string", "identity": "string", "fromProtocol": "string",
        "toProtocol": "string", "direction": "string", "method": "string", "toMethod": "string?",
        "messageId": "string", "payload": "object?", "translated": "object?",
        "latencyMs": "number?", "error": "string?", "timestamp": "time"},
    "Upstream": {
        "url": "string", "protocol": "string", "patterns": "[string]", "whenDown": "string",
        "queue": "integer", "stations": "integer", "up": "integer", "upSince": "time?",
        "lagMs": "number?", "waiting": "integer",
        **dict.fromkeys(SESSION_COUNTS, "integer"), "sessions": "[UpstreamSession]"},
    "UpstreamSession": {
        "identity": "string", "status": "string", "stationOnline": "boolean",
        "protocol": "string", "stationProtocol": "string", "upSince": "time?",
        "lagMs": "number?", "waiting": "integer", "waitingSeconds": "integer?",
        "nextAttemptSeconds": "number?",
        "lastError": "string?", **dict.fromkeys(SESSION_COUNTS, "integer")},
}
_TYPES: dict[str, dict] = {"time": {"type": "string", "format": "date-time"},
                           "id": {"type": ["string", "integer"]}}


def openapi() -> dict:
    """The OpenAPI 3.1 description of ROUTES."""
    paths: dict = {}
    for route in ROUTES:
        path = re.sub(r":(\w+)", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ocppboard", "version": VERSION, "license": {"name": "MIT"}},
        "security": [{"cookie": []}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": {name: _object_schema(fields) for name, fields in SHAPES.items()},
            "securitySchemes": {"cookie": {"type": "apiKey", "in": "cookie", "name": COOKIE},
                                "bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route) -> dict:
    parameters = [{"name": p.name, "in": "query", "schema": p.schema, "description": p.text}
                  for p in route.query]
    parameters += [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                   for name in re.findall(r":(\w+)", route.path)]
    media, schema = "application/json", _schema(route.answer)
    if "/" in route.answer:
        media, schema = route.answer, {"type": "string"}
    answers = {"200": {"description": route.text, "content": {media: {"schema": schema}}}}
    codes = {400, 405, 413, 500, *route.errors} | (set() if route.public else {401, 403})
    codes |= {404} if ":" in route.path else set()
    for code in sorted(codes):
        answers[str(code)] = {"description": HTTP_WORDS[code], "content": {
            "application/json": {"schema": _schema("ErrorAnswer")}}}
    body = {"required": True, "content": {"application/json": {"schema": _schema(route.body)}}}
    return ({"summary": route.text, "operationId": route.act.__name__, "responses": answers}
            | ({"parameters": parameters} if parameters else {})
            | ({"requestBody": body} if route.body else {})
            | ({"security": []} if route.public else {}))


HTTP_WORDS = {
    400: "Bad request", 401: "Unauthorized", 403: "Session expired, or of another site",
    404: "Not found", 405: "Method not allowed", 409: "The station is offline",
    413: "Body too large", 429: "Too many failed logins", 500: "Internal server error",
    502: "The station answered CALLERROR", 503: "Too many at a time", 504: "No answer in time"}


def _object_schema(fields: dict) -> dict:
    bases = [name[:-1] for name in fields if name.endswith("+")]
    own = {name: kind for name, kind in fields.items() if not name.endswith("+")}
    schema = {"type": "object", "required": list(own),
              "properties": {name: _schema(kind) for name, kind in own.items()}}
    return {"allOf": [_schema(base) for base in bases] + [schema]} if bases else schema


def _schema(kind: str) -> dict:
    if kind.startswith("["):
        return {"type": "array", "items": _schema(kind[1:-1])}
    if kind.endswith("?"):
        return {"anyOf": [_schema(kind[:-1]), {"type": "null"}]}
    if kind in SHAPES:
        return {"$ref": f"#/components/schemas/{kind}"}
    return _TYPES.get(kind, {"type": kind})


COOKIE = "board-session"
SESSION_COOKIE = re.compile(rf"(?:^|;)\s*{COOKIE}=([\w-]{{20,100}})(?:;|$)")
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


@stream_request_body
class Api(RequestHandler):
    """A request of the board: checks it, hands it to its endpoint, writes what that returns."""

    def initialize(self, daemon: "Daemon", routes: dict) -> None:
        self.daemon, self.routes = daemon, routes        # routes: {method: Route}
        self.board, self.config = daemon.board, daemon.config
        self.woken, self.closed = asyncio.Event(), False
        self.refusal: BoardError | None = None           # found before the body was read
        self.raw_body = bytearray()
        self.body: dict = {}
        self.query: dict = {}

    @property
    def address(self) -> str:
        """The client's address."""
        return self.request.remote_ip or ""

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in SAFE_HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """See, before its body is kept, whether the request is to be answered.

        A refusal waits for the body: an answer in the middle of it would be lost with a reset.
        """
        try:
            self.check()
        except TooLarge:
            raise
        except BoardError as error:
            self.refusal = error

    def check(self) -> None:
        """Raises: BoardError, of what the head of the request says."""
        length = self.request.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > BODY_BYTES:
            raise TooLarge("The body is too large")
        if not self.routes:
            raise NotFound("Not found")
        method = self.request.method
        route = self.routes.get("GET" if method == "HEAD" else method)
        if route is None or (method == "HEAD" and route.answer == SSE):
            raise MethodNotAllowed(", ".join(self.routes))
        self.route = route
        if method not in ("GET", "HEAD") and not self.same_origin():
            self.board.security_event("POLICY_REJECTION", "UNKNOWN", "Request of a foreign page",
                                      "medium", {"ip": self.address})
            raise Forbidden("Cross-origin request")
        if not route.public:
            self.authenticate()
        self.query = self.read_query()

    def same_origin(self) -> bool:
        """Whether the request's Origin, if it has one, is the host that it is sent to."""
        origin = self.request.headers.get("Origin")
        return origin is None or origin.lower().partition("://")[2] == self.request.host.lower()

    def authenticate(self) -> Session:
        """The session of the request. Raises: Unauthorized, Forbidden, TooMany."""
        scheme, _, bearer = self.request.headers.get("Authorization", "").partition(" ")
        return self.daemon.access.session(
            self.read_session_cookie(), bearer.strip() if scheme.lower() == "bearer" else None,
            self.address)

    def read_session_cookie(self) -> str | None:
        """The session id; Tornado 6.2 takes quadratic time to take a hostile header apart."""
        found = SESSION_COOKIE.search(self.request.headers.get("Cookie", ""))
        return found and found[1]

    async def until_durable(self) -> None:
        """Wait until what the request has changed is on disk, as long as an answer may."""
        if (waits := self.daemon.state.committed()) is not None:
            await waits

    def still_allowed(self) -> bool:
        """Whether the session of a request that goes on is still there."""
        try:
            return bool(self.authenticate())
        except BoardError:
            return False

    def read_query(self) -> dict:
        """{name: value} of all that the route knows; its default, or None, where not given."""
        given = dict(parse_qsl(self.request.query, keep_blank_values=True))
        return {p.name: p.read(given[p.name]) if p.name in given else p.schema.get("default")
                for p in self.route.query}

    def data_received(self, chunk: bytes) -> None:
        if self.refusal is None and len(self.raw_body) <= BODY_BYTES:
            self.raw_body += chunk       # beyond it the rest is let go

    async def answer(self, *args: str, **kwargs: str) -> None:
        """Hand the request to its endpoint and write what it returns."""
        if self.refusal is not None:
            raise self.refusal
        if len(self.raw_body) > BODY_BYTES:
            raise TooLarge("The body is too large")
        if self.route.body:
            self.body = self.read_body()
        result = self.route.act(self, *args, **kwargs)
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, Page):
            await self.write_page(result)
        elif result is not None:
            self.set_header("Content-Type", "application/json")
            self.finish(result if isinstance(result, str) else to_json(result))

    get = head = post = put = patch = delete = options = answer

    def read_body(self) -> dict:
        """The body's JSON object. Raises: BadRequest."""
        try:
            body = json.loads(self.raw_body, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError):
            raise BadRequest("The body is not JSON") from None
        if deeper(body, NESTING):
            raise BadRequest("The body is nested too deeply")
        if not isinstance(body, dict):
            raise BadRequest("The body is not a JSON object")
        return body

    async def write_page(self, page: Page) -> None:
        """Write a list, in slices: the loop has its turn between them."""
        self.set_header("Content-Type", "application/json")
        self.set_header("X-Total-Count", page.total)
        self.write("[")
        first = True

        def item(record: Any) -> str:
            nonlocal first
            comma, first = "" if first else ",", False
            return comma + (record.json() if isinstance(record, Record) else to_json(record))

        await self.write_slices(page.items, item)
        self.finish("]")

    async def write_slices(self, records: list, text_of: Callable[[Any], str]) -> None:
        """Write all records; a client that reads slowly is waited for, until it goes."""
        texts: list[str] = []
        size = 0
        for record in records:
            if len(texts) >= SLICE or size >= SLICE_BYTES:
                self.write("".join(texts))
                if not await self.flushed():
                    return
                await asyncio.sleep(0)
                texts, size = [], 0
            texts.append(text_of(record))
            size += len(texts[-1])
        self.write("".join(texts))

    async def flushed(self) -> bool:
        """Send what is written; False when the client has gone."""
        try:
            await self.flush()
        except StreamClosedError:
            self.closed = True
        return not self.closed

    def set_session_cookie(self, session: Session) -> None:
        """Give the browser its session."""
        self.set_cookie(COOKIE, session.id, path="/", httponly=True, samesite="Lax",
                        secure=self.request.protocol == "https",
                        max_age=2 * self.config.auth.session_ttl_seconds)    # to be told of its end

    def on_connection_close(self) -> None:
        self.closed = True
        self.woken.set()

    def compute_etag(self) -> None:
        return None                                      # what is live is never the same twice

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Every error as JSON: ours with its own words, others without details."""
        error = kwargs.get("exc_info", (None, None))[1]
        if not isinstance(error, BoardError):
            body = {"error": HTTP_WORDS.get(status_code, self._reason)}
        else:
            body = error.body()
            self.set_status(error.http_status)
            for name, value in error.headers.items():
                self.set_header(name, value)
        self.set_header("Content-Type", "application/json")
        self.finish(to_json(body))

    def log_exception(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        log_unexpected(self, error)


# --- Dashboard ----------------------------------------------------------------------------
# What `/` shows: constants in three languages, nothing from another host. All data comes by REST
# and by one stream; the page may talk to no one else, and run and wear no more than this.

STYLE = r"""
:root { color-scheme: light;
  --paper: #f4f6f8; --card: #fff; --ink: #17202b; --dim: #556274; --line: #dbe1e8; --well: #eef1f5;
  --accent: #0a6e69; --on-accent: #fff; --good: #1a7339; --warn: #8a5300; --bad: #b3261e;
  --info: #1a5fb4; --good-bg: #e0f3e6; --warn-bg: #fdf0d5; --bad-bg: #fde7e5; --info-bg: #e3eefb;
  --c0: #0a7d77; --c1: #b45309; --c2: #5b5bd6; --c3: #be185d; --c4: #4d7c0f; --c5: #0369a1;
  --c6: #7c3aed; --c7: #a16207;
  --shadow: 0 1px 2px rgb(20 30 45 / .06); --row: 34px; --gap: 1rem }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark;
  --paper: #0f141a; --card: #171e26; --ink: #e7ecf2; --dim: #9aa8b8; --line: #2a343f;
  --well: #1f2831;
  --accent: #3fc1b6; --on-accent: #06231f; --good: #5fd38a; --warn: #f0b354; --bad: #ff8a80;
  --info: #7db7ff; --good-bg: #12301f; --warn-bg: #362810; --bad-bg: #3b1a19; --info-bg: #14283f;
  --c0: #3fc1b6; --c1: #f0a04b; --c2: #9d9dff; --c3: #f472b6; --c4: #a3d65c; --c5: #5cc0f5;
  --c6: #c39bff; --c7: #e6c35c;
  --shadow: none } }
* { box-sizing: border-box }
html { scrollbar-gutter: stable }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums }
h1, h2, h3, p, dl, dd, ul, figure { margin: 0; padding: 0 }
h1 { font-size: 1.35rem; line-height: 1.25 } h2 { font-size: 1rem } h3 { font-size: .9rem }
ul { list-style: none }
a { color: var(--accent); text-decoration: none } a:hover, p a { text-decoration: underline }
button, input, select, textarea { font: inherit; color: inherit }
code, pre, .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .86em }
code { overflow-wrap: anywhere }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 4px }
.dim { color: var(--dim) } .small { font-size: .85rem } .num { text-align: right }
.good { color: var(--good) } .warn { color: var(--warn) } .bad { color: var(--bad) }
.info { color: var(--info) } .nowrap { white-space: nowrap }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.grow { flex: 1 1 auto; min-width: 0 } h1.grow, h2.grow { min-width: min-content }
.short { width: 10.5rem } .tight { gap: .35rem } .one-line { flex-wrap: nowrap }
.grow.cut { flex: 1 1 0; min-width: 0 }
h2.grow.whole { min-width: 12rem; overflow-wrap: anywhere }
.start { max-width: 26rem; margin: 14vh auto 2rem; padding: 0 1.25rem; display: grid; gap: 1rem }

/* Frame */
.app { display: grid; grid-template: "head head" auto "nav main" 1fr / 12.5rem minmax(0, 1fr);
  min-height: 100vh }
.head { grid-area: head; position: sticky; top: 0; z-index: 5; display: flex; align-items: center;
  gap: .75rem; height: 3.25rem; padding: 0 1.25rem; background: var(--card);
  border-bottom: 1px solid var(--line) }
.brand { display: flex; align-items: center; gap: .5rem; font-weight: 650; color: var(--ink) }
.brand:hover { text-decoration: none }
.brand svg { width: 1.4rem; height: 1.4rem }
.live { display: flex; align-items: center; gap: .4rem; font-size: .85rem; color: var(--dim) }
.live::before { content: ""; width: .6rem; height: .6rem; border-radius: 50%;
  background: var(--warn) }
.live.on::before { background: var(--good) } .live.off { color: var(--bad) }
.live.off::before { background: var(--bad) }
.nav { grid-area: nav; position: sticky; top: 3.25rem; align-self: start; padding: .75rem;
  height: calc(100vh - 3.25rem); overflow-y: auto }
.nav a { display: flex; align-items: center; gap: .6rem; padding: .42rem .7rem; border-radius: 8px;
  color: var(--ink) }
.nav a:hover { background: var(--well); text-decoration: none }
.nav a[aria-current] { background: var(--accent); color: var(--on-accent) }
.nav svg { width: 1.1rem; height: 1.1rem; flex: none }
.nav .count { margin-left: auto; font-size: .8rem; opacity: .85 }
.main { grid-area: main; padding: 1.1rem 1.25rem 2.5rem; display: grid; gap: var(--gap);
  align-content: start; min-width: 0; max-width: 200rem; outline: none }
.away { filter: saturate(.25) }
.title { display: flex; align-items: center; gap: .75rem; flex-wrap: wrap; min-height: 2.2rem }
.notices { position: fixed; right: 1rem; bottom: 1rem; z-index: 9; display: grid; gap: .5rem;
  max-width: min(26rem, calc(100vw - 2rem)) }
.notice { display: flex; gap: .75rem; align-items: start; padding: .6rem .5rem .6rem .9rem;
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--info);
  border-radius: 8px; box-shadow: 0 4px 18px rgb(0 0 0 / .18); overflow-wrap: anywhere }
.notice.bad { border-left-color: var(--bad); color: var(--ink) }
.notice.warn { border-left-color: var(--warn); color: var(--ink) }

/* Cards, tiles, words */
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; min-width: 0;
  box-shadow: var(--shadow) }
.card > header { display: flex; align-items: center; gap: .6rem; flex-wrap: wrap;
  padding: .7rem 1rem .55rem; min-height: 2.9rem }
.card > .in { padding: 0 1rem 1rem } .card > .in.top { padding-top: 1rem }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr));
  gap: .7rem 1rem }
.facts dt { font-size: .8rem; color: var(--dim) } .facts dd { overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: .75rem }
.tile { padding: .7rem .9rem .5rem; display: grid; gap: .1rem; align-content: start;
  min-height: 7.9rem; position: relative; overflow: hidden }
.tile dt { font-size: .82rem; color: var(--dim) }
.tile dt a::after { content: ""; position: absolute; inset: 0 }
.tile dd { font-size: 1.4rem; font-weight: 620; line-height: 1.25; white-space: nowrap }
.tile dd + dd { font-size: .8rem; font-weight: 400 }
.tile .spark { position: absolute; left: 0; right: 0; bottom: 0; height: 2rem; width: 100% }
.cols { display: grid; gap: var(--gap);
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)) }
.cols.wide-left { grid-template-columns: minmax(0, 3fr) minmax(18rem, 2fr) }
.stack { display: grid; gap: var(--gap); align-content: start; min-width: 0 }
.pill { display: inline-flex; align-items: center; gap: .35em; padding: .05em .55em;
  border-radius: 99px;
  font-size: .8rem; line-height: 1.5; white-space: nowrap; background: var(--well);
  color: var(--dim) }
.pill.good { background: var(--good-bg); color: var(--good) }
.pill.warn { background: var(--warn-bg); color: var(--warn) }
.pill.bad { background: var(--bad-bg); color: var(--bad) }
.pill.info { background: var(--info-bg); color: var(--info) }
.cut .pill + .pill { margin-left: .3rem }
.empty { padding: 1.2rem 1rem 1.6rem; color: var(--dim); display: grid; gap: .6rem;
  justify-items: start }
.url { display: flex; align-items: center; gap: .5rem; flex-wrap: wrap }
.url code { background: var(--well); padding: .2rem .5rem; border-radius: 6px; color: var(--ink) }
.list > li { padding: .5rem 1rem; border-top: 1px solid var(--line); display: flex; gap: .6rem;
  align-items: baseline; min-width: 0; overflow-wrap: anywhere }
.list > li:first-child { border-top: 0 } .scrolls { max-height: 22rem; overflow: auto }
.why { padding: .65rem 1rem; border-top: 1px solid var(--line); display: grid; gap: .15rem }
.why p { overflow-wrap: anywhere }

/* What is clicked and typed in */
.btn, select, input, textarea { border: 1px solid var(--line); border-radius: 8px;
  background: var(--card);
  padding: .28rem .65rem; min-height: 2.1rem; max-width: 100% }
.btn { cursor: pointer; display: inline-flex; align-items: center; gap: .4rem; white-space: nowrap;
  color: var(--ink) }
.btn:hover { background: var(--well); text-decoration: none }
.btn.main-act { background: var(--accent); border-color: var(--accent); color: var(--on-accent) }
.btn.main-act:hover { filter: brightness(1.08) }
.btn.danger { color: var(--bad); border-color: currentColor }
.btn.plain { border-color: transparent; background: none; padding: .28rem .45rem }
.btn.plain:hover { background: var(--well) }
.filters { flex: 1 1 36rem }
.btn[aria-pressed=true], .btn[aria-current] { background: var(--info-bg); color: var(--info);
  border-color: var(--info) }
.btn:disabled { opacity: .55; cursor: default }
input[type=checkbox] { min-height: 0; accent-color: var(--accent) }
textarea { width: 100%; min-height: 6.5rem; padding: .5rem .65rem }
label { display: grid; grid-template-columns: minmax(0, 1fr); gap: .15rem; font-size: .82rem;
  color: var(--dim); min-width: 0 }
label > * { color: var(--ink); font-size: .95rem }
label.inline { display: inline-flex; align-items: center; gap: .4rem; font-size: .9rem;
  color: var(--ink) }
.bar { display: flex; gap: .5rem; flex-wrap: wrap; align-items: center }
.bar input[type=search] { flex: 1 1 12rem; min-width: 8rem } .bar select { flex: 0 1 auto }
.form { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  align-items: end }
.form .whole { grid-column: 1 / -1 } .form label > * { width: 100%; min-width: 0 }
.tabs { display: flex; gap: .35rem; flex-wrap: wrap }
dialog { border: 1px solid var(--line); border-radius: 12px; background: var(--card);
  color: var(--ink);
  padding: 1.2rem; max-width: min(30rem, calc(100vw - 2rem));
  box-shadow: 0 12px 40px rgb(0 0 0 / .35) }
dialog::backdrop { background: rgb(0 0 0 / .45) }
dialog .bar { margin-top: 1rem; justify-content: flex-end }
kbd { border: 1px solid var(--line); border-bottom-width: 2px; border-radius: 5px; padding: 0 .4em;
  background: var(--well); font: .85em ui-monospace, monospace }

/* Tables */
.grid { overflow: auto; overflow-anchor: none; overscroll-behavior: contain; max-height: 70vh;
  border-top: 1px solid var(--line);
  border-radius: 0 0 12px 12px }
.grid.tall { max-height: none; height: calc(100vh - 16.5rem); min-height: 18rem }
table { border-collapse: separate; border-spacing: 0; width: 100%; table-layout: fixed }
th { position: sticky; top: 0; z-index: 1; background: var(--card); text-align: left;
  font-weight: 500;
  font-size: .8rem; color: var(--dim); height: 2rem; padding: 0 .6rem; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th button { border: 0; background: none; padding: 0; font: inherit; color: inherit;
  cursor: pointer }
td { height: var(--row); padding: 0 .6rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { padding-left: 1rem }
th:last-child, td:last-child { padding-right: 1rem }
td.num, th.num { text-align: right }
tr.spacer td { padding: 0; border: 0 }
tr.failed td { background: var(--bad-bg) } tr.found td { background: var(--warn-bg) }
tr.partner td { box-shadow: inset 0 0 0 99px rgb(10 125 119 / .09) }
tr.picked td { background: var(--info-bg) }
tr.lost td { background: var(--warn-bg); color: var(--warn); text-align: center }
tr.open { cursor: pointer } tr.open:hover td { background: var(--well) }
table.plain { table-layout: auto } .plain td.nowrap { white-space: nowrap }
table.plain td:not(.nowrap) { white-space: normal; overflow-wrap: anywhere;
  padding: .35rem .6rem; height: auto }
.meter { height: .5rem; border-radius: 99px; background: var(--well); overflow: hidden;
  display: flex;
  min-width: 4rem }
.meter i { display: block; height: 100% } .thick { height: 1.1rem }
.circuit { display: grid; gap: .3rem }
.phase { display: grid; grid-template-columns: 1.6rem minmax(5rem, 1fr) minmax(9rem, 19rem);
  gap: .6rem; align-items: center }
@media (max-width: 44rem) {
  .phase { grid-template-columns: 1.6rem minmax(0, 1fr) } .phase .small { grid-column: 2 }
}
.load { height: .8rem } .load .drawn { background: var(--c0) }
.load .drawn.warn { background: var(--warn) } .load .drawn.bad { background: var(--bad) }
.load .told { background: var(--c0); opacity: .4 } .load .held { background: var(--dim);
  opacity: .35 }

/* One message beside the list */
.split { display: grid; gap: var(--gap); grid-template-columns: minmax(0, 1fr) }
.split.both { grid-template-columns: minmax(0, 1fr) minmax(20rem, 36%) }
.aside { align-self: start; position: sticky; top: 4.25rem; max-height: calc(100vh - 5.5rem);
  overflow: auto }
.json { margin: 0; padding: .7rem .9rem; background: var(--well); border-radius: 8px;
  overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26rem; line-height: 1.45 }
.json .k { color: var(--info) } .json .s { color: var(--good) } .json .n { color: var(--warn) }
.pair { display: grid; gap: .7rem }
.sides { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)) }

/* Charts */
.chart { position: relative } .chart svg { display: block; width: 100%; overflow: visible }
.chart text { font-size: 11px; fill: var(--dim) }
.chart .gridline { stroke: var(--line); stroke-width: 1 }
.chart .line { fill: none; stroke-width: 1.8; stroke-linejoin: round;
  vector-effect: non-scaling-stroke }
.chart .limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4 }
.chart .at { stroke: var(--dim); stroke-width: 1 }
.legend { display: flex; gap: .2rem .9rem; flex-wrap: wrap; font-size: .82rem; color: var(--dim);
  min-height: 1.35rem }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 3px;
  margin-right: .35rem;
  vertical-align: -1px }
.legend b { font-weight: 600; color: var(--ink) }
.spark path { fill: none; stroke: var(--accent); stroke-width: 1.5;
  vector-effect: non-scaling-stroke }
.spark .area { stroke: none; fill: var(--accent); opacity: .1 }

@media (max-width: 80rem) { .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
@media (max-width: 62rem) { .cols.wide-left { grid-template-columns: minmax(0, 1fr) }
  .split.both { grid-template-columns: minmax(0, 1fr) }
  .split.both > .aside { order: -1; position: static; max-height: none } }
@media (max-width: 44rem) { :root { --row: 44px; --gap: .75rem }
  .app { grid-template: "head" auto "nav" auto "main" 1fr / minmax(0, 1fr) }
  .head { padding: 0 .75rem; gap: .4rem } .main { padding: .75rem .75rem 2rem }
  .nav { position: sticky; height: auto; display: flex; overflow-x: auto; padding: .35rem .5rem;
    gap: .15rem; background: var(--card); border-bottom: 1px solid var(--line); z-index: 4 }
  .nav a { flex: none; padding: .35rem .65rem } .nav svg { display: none }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .tile dd { font-size: 1.25rem }
  .filters { display: grid; grid-template-columns: 1fr 1fr; flex: 1 1 100% }
  .filters > * { width: 100% } .filters input[type=search] { grid-column: 1 / -1 }
  .grid.tall { height: calc(100vh - 12rem) }
  table.plain, .plain tbody, .plain tr, .plain td { display: block } .plain thead { display: none }
  table.plain td, table.plain td:first-child { padding: .1rem 1rem; border: 0; text-align: left }
  .plain tr { padding: .5rem 0; border-bottom: 1px solid var(--line) }
  .plain td:empty { display: none }
  .btn, select, input { min-height: 2.5rem } .wide { display: none } }
@media (min-width: 44.01rem) { .slim { display: none } }
@media (prefers-reduced-motion: reduce) { * { transition: none; animation: none;
  scroll-behavior: auto } }
@media (prefers-contrast: more) { :root { --line: currentColor; --dim: var(--ink) } }
"""

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>ocppboard</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%230b7a75'/%3E
 %3Cpath d='M9 2 4 9h3l-1 5 6-8H8.5z' fill='%23fff'/%3E%3C/svg%3E">
<style></style>
</head>
<body>
<div id="board"><div class="app"><header class="head"><b>ocppboard</b></header>
<nav class="nav"></nav><main class="main"></main></div></div>
<noscript><p class="start">This page needs JavaScript. The same is to be had by REST:
<code>/api/openapi.json</code> describes it.</p></noscript>
<script></script>
</body>
</html>
"""

SCRIPT = r"""
'use strict';
// --- Elements -------------------------------------------------------------------------------
// `h` describes an element, `patch` makes the page so: what stays the same is not touched. All
// text becomes text nodes, and what could turn a line around is shown as what it is.

// h('p.dim', {title: 'x'}, 'text', h('b', 'bold')): tag and classes, properties if any, children.
function h(name, ...children) {
  const [tag, ...classes] = name.split('.');
  const given = children[0]?.constructor === Object && !children[0].tag ? children.shift() : null;
  const all = [...classes, given?.class].filter(Boolean).join(' ');
  const props = all ? {...given, class: all} : given || {};
  return {tag, props, children: children.flat(9).filter(one => one != null && one !== false)};
}

const SVG = 'http://www.w3.org/2000/svg';
const HIDDEN = /[^\P{Cc}\t\n]|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/gu;
const plain = text => String(text).replace(HIDDEN,
  sign => '\\u' + sign.charCodeAt(0).toString(16).padStart(4, '0'));

// Make the children of a node those of the list; ones with a `key` keep their node when they move.
function patch(parent, list) {
  const keys = new Map(), spare = [];
  for (const one of list) if (one.props?.key != null) keys.set(one.props.key, null);
  for (const node of [...parent.childNodes]) {
    const key = node.is?.props?.key;
    if (key == null) continue;
    if (keys.has(key) && keys.get(key) === null) keys.set(key, node);
    else {
      node.remove();
      if (!node.is.props.made) spare.push(node);
    }
  }
  // Rows that came take the nodes of those that went: thousands a minute are not made anew.
  const taken = one => one.props?.key != null && !one.props.made && spare.at(-1)?.is.tag === one.tag
    ? spare.pop() : make(one, parent);
  let next = parent.firstChild;
  for (const one of list) {
    const key = one.props?.key;
    let node = key != null ? keys.get(key) : next?.is && next.is.props?.key == null ? next : null;
    if (node && (node.is.tag !== one.tag || one.props?.made && !node.is.props.made)) node = null;
    if (node === next && next) next = next.nextSibling;
    else {
      node ||= taken(one);
      parent.insertBefore(node, next);
    }
    update(node, one);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

function make(one, parent) {
  if (one.tag === undefined) return Object.assign(document.createTextNode(''), {is: {}});
  const drawn = one.tag === 'svg' || parent.namespaceURI === SVG;
  const node = drawn ? document.createElementNS(SVG, one.tag) : document.createElement(one.tag);
  node.is = h(one.tag);
  one.props.made?.(node);
  return node;
}

function update(node, one) {
  if (node.is === one) return;
  if (one.tag === undefined) {
    if (node.is.text !== one) node.data = plain(one);
    node.is = {text: one};
    return;
  }
  patch(node, one.children);
  for (const name in node.is.props) if (!(name in one.props)) set(node, name, null);
  for (const name in one.props)
    if (one.props[name] !== node.is.props[name] || name === 'value' || name === 'checked')
      set(node, name, one.props[name]);
  node.is = one;
}

function set(node, name, value) {
  if (name === 'key' || name === 'made') return;
  if (name.startsWith('on')) node[name] = value;
  else if (name === 'style') for (const key in value) node.style.setProperty(key, value[key]);
  else if (name === 'value' || name === 'checked' || name === 'disabled') {
    const typed = name === 'value' && node === document.activeElement && node.tagName !== 'SELECT';
    if (!typed && node[name] !== (value ?? '')) node[name] = value ?? '';
  } else if (value == null || value === false) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? '' : value);
}

// --- Formats --------------------------------------------------------------------------------
// Numbers with their units; times in the viewer's zone, with the exact UTC on hover. A dash is
// what is not known.

const DASH = '–';
// A formatter takes its time, and memory, to be made: each is made once.
const NUMBERS = [0, 1, 2].map(most =>
  new Intl.NumberFormat(undefined, {maximumFractionDigits: most}));
const digits = (value, most = 0) => value == null ? DASH : NUMBERS[most].format(value);
const scaled = (value, units) => {
  if (value == null) return DASH;
  let n = 0;
  while (Math.abs(value) >= 1000 && n < units.length - 1) { value /= 1000; n++; }
  const size = Math.abs(value), most = !n || size >= 100 ? 0 : size < 10 ? 2 : 1;
  return `${digits(value, most)} ${units[n]}`;
};
const power = w => scaled(w, ['W', 'kW', 'MW']);
const energy = wh => scaled(wh, ['Wh', 'kWh', 'MWh']);
const bytes = n => scaled(n, ['B', 'kB', 'MB', 'GB']);
const amperes = a => a == null ? DASH : digits(a, 1) + ' A';
const percent = (part, most = 0) => part == null ? DASH : digits(part, most) + ' %';
const millis = ms => ms == null ? DASH : ms >= 1000 ? digits(ms / 1000, 1) + ' s'
  : digits(ms, ms < 1 ? 2 : ms < 10 ? 1 : 0) + ' ms';
const plural = (n, word) => `${digits(n)} ${word}${n === 1 ? '' : 's'}`;

function duration(s) {
  if (s == null || !Number.isFinite(s)) return DASH;
  s = Math.max(0, Math.round(s));
  /** @type {[string, number][]} */
  const units = [['d', 86400], ['h', 3600], ['min', 60], ['s', 1]];
  const first = Math.max(0, units.findIndex(([, size]) => s >= size));
  if (s < 60) return `${s} s`;
  const [[big, size], [small, less]] = units.slice(first);
  const rest = Math.floor(s % size / less);
  return `${Math.floor(s / size)} ${big}` + (rest ? ` ${rest} ${small}` : '');
}
const ms = iso => iso ? Date.parse(iso) : null;
const since = iso => iso ? (now() - ms(iso)) / 1000 : null;

const timeFormat = more => new Intl.DateTimeFormat(undefined,
  {hour: '2-digit', minute: '2-digit', hourCycle: 'h23', ...more});
const dayFormat = more =>
  new Intl.DateTimeFormat(undefined, {day: '2-digit', month: 'short', ...more});
const MINUTES = timeFormat(), SECONDS = timeFormat({second: '2-digit'});
const FINE = timeFormat({second: '2-digit', fractionalSecondDigits: 3});
const DAY_OF_YEAR = dayFormat(), DAY_OF_ANY = dayFormat({year: 'numeric'});

function clock(iso, fine) {
  if (!iso) return DASH;
  const at = new Date(iso), today = new Date(now());
  const day = at.toDateString() === today.toDateString() ? ''
    : (at.getFullYear() === today.getFullYear() ? DAY_OF_YEAR : DAY_OF_ANY).format(at) + ', ';
  return h('time', {datetime: iso, title: `${iso.replace('T', ' ').replace('Z', '')} UTC`},
    day + (fine ? FINE : SECONDS).format(at));
}
const ago = iso => !iso ? DASH
  : h('time', {datetime: iso, title: `${iso} (UTC)`}, `${duration(since(iso))} ago`);

const rawText = text => h('pre.json.mono', {tabindex: 0, 'aria-label': 'Raw text'},
  text.slice(0, JSON_SHOWN), text.length > JSON_SHOWN && ` … of ${bytes(text.length)}: copy it`);

// JSON as it was written, on lines of its own and coloured; never parsed, so no digit is lost.
const JSON_SHOWN = 60000;
function pretty(raw) {
  const out = [], whole = raw.length <= JSON_SHOWN;
  const tokens = (whole ? raw : raw.slice(0, JSON_SHOWN))
    .match(/"(?:\\.|[^"\\])*"?|[{}[\],:]|[^\s{}[\],:"]+/g) || [];
  let depth = 0, text = '';
  const line = () => '\n' + '  '.repeat(depth);
  const flush = () => { if (text) out.push(text); text = ''; };
  tokens.forEach((token, n) => {
    const next = tokens[n + 1];
    if (token === '{' || token === '[') {
      depth++;
      text += token + (next === '}' || next === ']' ? '' : line());
    } else if (token === '}' || token === ']') {
      depth--;
      text += (tokens[n - 1] === '{' || tokens[n - 1] === '[' ? '' : line()) + token;
    } else if (token === ',') text += token + line();
    else if (token === ':') text += ': ';
    else {
      flush();
      out.push(h('span', {class: token[0] !== '"' ? 'n' : next === ':' ? 'k' : 's'}, token));
    }
  });
  flush();
  if (!whole) out.push(`\n… ${bytes(raw.length - JSON_SHOWN)} more: copy it`);
  return h('pre.json.mono', {tabindex: 0, 'aria-label': 'JSON'}, out);
}

// --- State ----------------------------------------------------------------------------------
// All that the page shows. Events change it, `draw` shows it, nothing is read back from the page.

const ROWS_KEPT = 10000, ROW_BYTES_KEPT = 24 << 20;
const EVENTS_KEPT = 2000, SAMPLES_KEPT = 1800, ANSWERS_KEPT = 20, RECENT = 12;
const state = {
  session: null, mode: '', problem: '',            // who looks; why the login did not work
  live: {status: 'connecting', since: Date.now()}, loaded: false, clockOff: 0,
  about: null, samples: [], stations: new Map(), transactions: new Map(), series: new Map(),
  recent: [], security: [], errors: [], system: [], knocking: [], charges: new Map(), proxied: [],
  upstreams: [],                                   // the relay's, each with its stations
  power: null, circuits: [],                       // what smart charging goes by, and holds
  findings: new Map(),                             // {identity + message id: [error]}
  list: null,                                      // the messages on screen
  answers: new Map(), reports: new Map(),          // {identity: […]}: what stations answered
  route: {screen: 'overview', id: '', query: {}}, ui: {}, hover: null, notices: [], confirm: null,
};
// The board's clock: its times are compared with it, whatever the viewer's says.
const now = () => Date.now() + state.clockOff;
const tellTime = () => { state.clockOff = (ms(sample().timestamp) ?? Date.now()) - Date.now(); };
const asks = row => row.type === 'CALL' || row.type === 'SEND';
const number = record => +/\d+$/.exec(record.id)[0];
const pairOf = (identity, messageId) => identity + '\n' + messageId;
const keyOf = transaction => pairOf(transaction.identity, transaction.id);
const running = () => [...state.transactions.values()].filter(one => one.status === 'active');
const sample = () => state.samples.at(-1) || {};

// Drop the oldest of a Map beyond so many.
const bound = (map, most) => { if (map.size > most) map.delete(map.keys().next().value); };

// Put a record on top of a list, unless it is there already.
function onTop(list, record, most = EVENTS_KEPT) {
  if (list.length && number(record) <= number(list[0])) return false;
  list.unshift(record);
  list.length = Math.min(list.length, most);
  return true;
}

// --- The board: what is asked of it ---------------------------------------------------------

class Failure extends Error {
  constructor(text, status, data) {
    super(text);
    this.status = status;
    this.data = data;
  }
}

async function ask(method, path, body) {
  let answer, data = null, text = '';
  try {
    answer = await fetch(path, {method, body: body && JSON.stringify(body)});
    text = await answer.text();
  } catch {
    throw new Failure('The board does not answer: is it running, and is the network there?', 0);
  }
  try { data = JSON.parse(text); } catch { /* an error page of something in between */ }
  if (answer.ok && data !== null)
    return {data, text, total: +(answer.headers.get('X-Total-Count') || 0)};
  const said = data?.message || data?.error || `HTTP ${answer.status}`;
  const ended = answer.status === 401 && path !== '/api/auth/login' || said === 'Session expired';
  if (ended) signedOut();
  throw new Failure(said, answer.status, data);
}
const get = async path => (await ask('GET', path)).data;
const query = fields =>
  new URLSearchParams(Object.entries(fields).filter(([, value]) => value)).toString();
function encoded(text) {
  try {
    return encodeURIComponent(text);
  } catch {                                        // half of a pair of surrogates
    return encodeURIComponent(text.replace(/[\ud800-\udfff]/g, '\ufffd'));
  }
}
const path = (...parts) => '/api/' + parts.map(encoded).join('/');

// Do what was clicked; what goes wrong is told.
async function attempt(work) {
  try { return await work(); } catch (error) {
    if (!(error instanceof Failure)) throw error;
    notice(error.message, 'bad');
  }
}

const NOTICE_MS = {info: 3000, warn: 12000, bad: 12000};
function notice(text, kind = 'info') {
  const one = {text, kind, key: Math.random()};
  state.notices = [...state.notices.filter(other => other.text !== text).slice(-2), one];
  setTimeout(() => dismiss(one), NOTICE_MS[kind]);
  touch('notice');
}
function dismiss(one) {
  state.notices = state.notices.filter(other => other !== one);
  touch('notice');
}

// Everything anew: at the start, and when events were missed. What the stream brings meanwhile
// waits, so that no older answer overwrites it.
const SOURCES = {about: 'about', stations: 'connections', transactions: 'transactions?limit=1000',
  samples: 'telemetry/history', security: 'security?limit=500', errors: 'errors?limit=500',
  system: 'system-events?limit=500', knocking: 'knocking', charges: 'smart-charge?limit=500',
  power: 'smart-charge/config', circuits: 'smart-charge/circuits',
  upstreams: 'proxy/upstreams', proxied: 'proxy?limit=500', recent: 'messages?limit=12'};
const AGAIN_MS = 3000;
let waiting = null, loading = 0;
async function load(lists = true) {
  const turn = ++loading;
  waiting ??= [];
  try {
    const got = await Promise.all(Object.values(SOURCES).map(one => ask('GET', '/api/' + one)));
    if (turn !== loading) return;
    const all = Object.fromEntries(Object.keys(SOURCES).map((name, n) => [name, got[n].data]));
    Object.assign(state, all, {loaded: true, series: new Map(), findings: new Map(),
      recent: rowsIn(got.at(-1).text),
      stations: new Map(all.stations.map(one => [one.identity, one])),
      transactions: new Map(all.transactions.reverse().map(one => [keyOf(one), one])),
      charges: new Map(all.charges.reverse().map(one => [one.sessionId, one]))});
    state.errors.forEach(find);
    tellTime();
    if (lists && state.list) openList(state.list.filter);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (turn !== loading) return;
    setTimeout(() => { if (turn === loading && state.session) load(lists); }, AGAIN_MS);
  }
  const events = waiting;
  waiting = null;
  for (const [name, data, raw] of events) on[name](data, raw);
  touch('all');
}

// --- Messages: a list that follows the stream -----------------------------------------------
// Rows stand oldest first, so that a new one costs nothing; the screen shows them from the end.
// Their payloads stay the text that passed: a number that is parsed may lose digits.

const payloadText = raw => raw.slice(raw.indexOf('"payload":') + 10, -1);   // it is the last field

// A part of a text keeps the whole alive; a copy does not.
const ownText = text => JSON.parse(JSON.stringify(text));

function rowOf(record, raw) {
  delete record.payload;
  return Object.assign(record, {number: number(record), raw: ownText(payloadText(raw))});
}

// The messages of a list that the board answered with, newest first.
const TOKENS = /"[^"\\]*(?:\\.[^"\\]*)*"|[{}]/g;
function rowsIn(text) {
  const rows = [];
  let depth = 0, from = 0;
  for (const {0: token, index} of text.matchAll(TOKENS)) {
    if (token === '{' && depth++ === 0) from = index;
    if (token !== '}' || --depth > 0) continue;
    const raw = text.slice(from, index + 1);
    rows.push(rowOf(JSON.parse(raw), raw));
  }
  return rows;
}

const FILTERS = ['identity', 'method', 'direction', 'type', 'text'];
function matches(filter, row) {
  for (const name of ['identity', 'method', 'direction', 'type'])
    if (filter[name] && row[name] !== filter[name]) return false;
  if (!filter.text) return true;
  const text = filter.text.toLowerCase(), words = [row.identity, row.method, row.messageId,
    row.errorCode || '', row.errorDescription || ''];
  return contains(words, text) || row.raw.toLowerCase().includes(text);
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
function openList(filter) {
  const paused = !!state.list?.paused && same(filter, state.list.filter);
  state.list = {filter, paused, rows: [], size: 0, held: {rows: [], size: 0}, skipped: 0,
    calls: new Map(), newest: 0, total: 0, asked: 0, older: true, loading: false};
  loadOlder(state.list);
}

const FIRST_PAGE = 500, PAGE = 1000;
async function loadOlder(list) {
  if (list.loading || !list.older) return;
  list.loading = true;
  const limit = list.asked ? PAGE : FIRST_PAGE;
  const offset = Math.max(list.asked, list.rows.length + list.held.rows.length);
  await attempt(async () => {
    const {text, total} = await ask('GET', '/api/messages?'
      + query({...list.filter, limit, offset}));
    const first = [...list.rows, ...list.held.rows].find(row => row.number)?.number ?? Infinity;
    const found = rowsIn(text), older = found.reverse().filter(row => row.number < first);
    list.rows = [...older, ...list.rows];
    list.size += sum(older.map(row => row.raw.length));
    list.calls.clear();
    for (const row of list.rows) pair(list, row);
    Object.assign(list, {asked: offset + found.length, total: Math.max(total, list.rows.length),
      newest: Math.max(list.newest, older.at(-1)?.number || 0),
      older: found.length === limit && list.rows.length < ROWS_KEPT && list.size < ROW_BYTES_KEPT});
  });
  list.loading = false;
  touch('messages');
}

// Tell a CALL and its answer of each other. Stations use ids again: it is the last CALL before.
function pair(list, row) {
  if (!row.number) return;
  const caller = asks(row) === (row.direction === 'IN') ? 'station' : 'board';
  const key = [caller, row.identity, row.messageId].join('\n'), call = list.calls.get(key);
  if (asks(row)) {
    list.calls.set(key, row);
    bound(list.calls, EVENTS_KEPT);
  } else if (call) {
    list.calls.delete(key);
    row.call = call;
    call.answer = row;
    call.responseTime ??= row.responseTime;
  }
}
const partners = row => asks(row) ? {call: row, answer: row.answer} : {call: row.call, answer: row};

// Put a row on a pile, and drop the oldest beyond what is kept. Returns how many went.
function keep(pile, row) {
  pile.rows.push(row);
  pile.size += row.raw?.length || 0;
  if (pile.rows.length <= ROWS_KEPT && pile.size <= ROW_BYTES_KEPT) return 0;
  const gone = pile.rows.splice(0, Math.ceil(pile.rows.length / 20));
  pile.size -= sum(gone.map(one => one.raw?.length));
  return gone.length;
}

function follow(list, row) {
  if (row.number) {
    if (row.number <= list.newest || !matches(list.filter, row)) return;
    list.newest = row.number;
    list.total++;
  }
  if (list.paused) list.skipped += keep(list.held, row); else append(list, row);
}

function append(list, row) {
  if (keep(list, row)) list.older = false;
  pair(list, row);
}

const gapRow = (text, at) => ({text, id: `gap ${Math.random()}`, identity: '', timestamp: at});
const SLOW = 'lost here: the connection was slow or gone';

function pause(list) {
  list.paused = !list.paused;
  if (!list.paused) {
    const {held, skipped} = list;
    Object.assign(list, {held: {rows: [], size: 0}, skipped: 0});
    if (skipped) append(list, gapRow(`${plural(skipped, 'message')} went by while this was paused`,
      held.rows[0].timestamp));
    for (const row of held.rows) append(list, row);
  }
  touch('messages');
}

// A finding of the schemas belongs to a message: the one of that id at that time. So does the
// time-out of a command, whose id is our own.
const FINDING_MS = 2000;
function find(error) {
  const {category, identity, details: {messageId}} = error;
  if (!messageId || category !== 'VALIDATION_FAILURE' && category !== 'CALL_TIMEOUT') return;
  const key = pairOf(identity, messageId), known = state.findings.get(key) || [];
  if (known.some(other => other.id === error.id)) return;
  state.findings.set(key, [...known.slice(-ANSWERS_KEPT), error]);
  bound(state.findings, EVENTS_KEPT);
}
const foundAt = row => state.findings.get(pairOf(row.identity, row.messageId)) || [];
const findings = row => foundAt(row).filter(({category, details, timestamp}) =>
  category === 'VALIDATION_FAILURE' && (details.part === 'Request') === asks(row)
    && Math.abs(ms(timestamp) - ms(row.timestamp)) < FINDING_MS);
const unanswered = row => row.direction === 'OUT' && row.responseTime == null
  && foundAt(row).some(one => one.category === 'CALL_TIMEOUT');

// --- Events ---------------------------------------------------------------------------------
// One key for each event of the stream.

const on = {
  connected({heartbeatMs}) {
    patience = heartbeatMs * 2.5 + 2000;
    state.live = {status: 'on', since: Date.now()};
    for (const [key, series] of state.series) if (!series.length) state.series.delete(key);
    if (!state.loaded) load();
    touch('live');
  },
  heartbeat() {},
  gap({lost: count, restarted, time}) {
    const {list} = state, what = plural(count, 'event');
    if (restarted) {
      notice('The board was restarted: what it shows begins anew.', 'warn');
      if (list) list.paused = false;
      load();
      return;
    }
    notice(`${what} went by unseen: the connection was slow or gone.`, 'warn');
    if (list) follow(list, gapRow(`${what} ${SLOW}`, time));
    load(false);                                   // the list keeps its rows, and shows the gap
  },
  message(record, raw) {
    const row = rowOf(record, raw);
    if (onTop(state.recent, row, RECENT)) touch('recent');
    if (state.list) { follow(state.list, row); touch('messages'); }
    if (row.method === 'NotifyReport') reported(row);
  },
  telemetry(one) {
    const last = state.samples.at(-1);
    if (last && last.timestamp >= one.timestamp) return;
    if (one.refusedConnections !== last?.refusedConnections) refreshKnocking();
    state.samples.push(one);
    if (state.samples.length > SAMPLES_KEPT) state.samples.shift();
    tellTime();
    touch('telemetry');
  },
  security(event) { if (onTop(state.security, event)) touch('security'); },
  fault(event) {
    if (!onTop(state.errors, event)) return;
    find(event);
    touch('errors');
  },
  system(event) {
    if (onTop(state.system, event)) touch('system');
    if (event.type === 'SMART_CHARGE_CONFIG') askPower();
  },
  connection(station) {
    if (station.status === 'forgotten') state.stations.delete(station.identity);
    else state.stations.set(station.identity, station);
    touch('connections');
  },
  transaction(one) {
    const key = keyOf(one), {meter} = one;
    state.transactions.set(key, one);
    bound(state.transactions, EVENTS_KEPT);
    if (meter && one.status === 'active')
      extend(state.series.get(key), [{...meter, energyWh: one.energyWh}]);
    touch('transactions');
  },
  'smart-charge'(record) {
    state.charges.set(record.sessionId, record);
    bound(state.charges, EVENTS_KEPT);
    touch('smart-charge');
  },
  proxy(record) { if (onTop(state.proxied, record)) touch('proxy'); },
};

// Add to a series what is later than its last point. Beyond what is kept the second goes: the
// first says when it began.
function extend(series, points) {
  if (!series) return;
  const last = ms(series.at(-1)?.timestamp) || 0;
  series.push(...points.filter(one => ms(one.timestamp) > last));
  if (series.length > EVENTS_KEPT) series.splice(1, series.length - EVENTS_KEPT);
}

const refreshKnocking = () => attempt(async () => {
  state.knocking = await get('/api/knocking');
  touch('knocking');
});

// The stream of Server-Sent Events, read by fetch: unlike EventSource it comes back after every
// trouble, and when it wants to.
let reading = null, heard = 0, patience = 45000, lastId = '', retry = 0;
async function connect() {
  disconnect();
  const mine = new AbortController();
  reading = mine;
  heard = Date.now();
  try {
    const {signal} = mine, at = query({lastEventId: lastId});
    const answer = await fetch(`/api/stream?${at}`, {signal});
    if (answer.ok) await readEvents(answer.body.getReader());
  } catch (error) {                                // the network went, or we did
    if (!(error instanceof TypeError || error instanceof DOMException)) throw error;
  }
  if (reading === mine) lost();
}

function disconnect() {
  reading?.abort();
  reading = null;
  clearTimeout(retry);
}

async function readEvents(reader) {
  const decoder = new TextDecoder();
  let rest = '';
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    heard = Date.now();
    const blocks = (rest + decoder.decode(value, {stream: true})).split('\n\n');
    rest = blocks.pop();
    blocks.forEach(take);
  }
}

// One event: "id: …", "event: …", "data: …", a line each.
function take(block) {
  const fields = Object.fromEntries(block.split('\n').map(line => line.split(/: (.*)/, 2)));
  lastId = fields.id || lastId;
  const {event: name, data: raw} = fields;
  if (!Object.hasOwn(on, name)) return;
  const data = JSON.parse(raw), atOnce = ['connected', 'heartbeat', 'gap'].includes(name);
  if (waiting && !atOnce) waiting.push([name, data, raw]); else on[name](data, raw);
}

async function lost() {
  if (state.live.status !== 'off') state.live = {status: 'off', since: Date.now()};
  touch('live');
  clearTimeout(retry);
  retry = setTimeout(connect, AGAIN_MS);
  await signIn();                                  // it may be the session that has ended
}

// A tab that nobody looks at gives its connection back, and goes on from where it was.
const HIDDEN_MS = 60000;
let hiding = 0;
function look() {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(disconnect, HIDDEN_MS);
  else {
    if (state.session && !reading) connect();
    touch('all');
  }
}

function watch() {
  if (!state.session || document.hidden) return;
  if (reading && Date.now() - heard > patience) { disconnect(); lost(); }
  if (state.route.screen === 'power' && state.power?.enabled && Date.now() - powerAsked > POWER_MS)
    askPower();
  if (['relay', 'overview'].includes(state.route.screen) && state.about?.relay
    && Date.now() - relayAsked > RELAY_MS) askRelay();
  touch('tick');
}

// --- Parts of the page ----------------------------------------------------------------------

const to = (screen, id, fields) => [screen, ...id == null ? [] : [encoded(id)]].join('/')
  + (fields && query(fields) ? '?' + query(fields) : '');
const link = (place, ...text) => h('a', {href: '#/' + place}, text);
const pill = (text, tone = '') => h('span', {class: 'pill ' + tone}, text);
const button = (text, onclick, props = {}) =>
  h('button', {type: 'button', onclick, ...props, class: 'btn ' + (props.class || '')}, text);
const card = (title, props, ...content) => h('section.card', props,
  title && h('header', typeof title === 'string' ? h('h2', title) : title), content);
const facts = pairs => h('dl.facts', pairs.filter(Boolean).map(([name, value]) =>
  h('div', {key: name}, h('dt', name), h('dd', value ?? DASH))));
const empty = (...content) => h('div.empty', state.loaded ? content : 'Loading …');
const scrolls = (label, ...content) =>
  h('div.grid', {tabindex: 0, role: 'region', 'aria-label': label}, content);
const typing = (where, name) => event => { where[name] = event.target.value; touch('ui'); };
const remembered = (name, initial) => {
  state.ui[name] ??= initial;
  return state.ui[name];
};
const narrow = () => matchMedia('(max-width: 44rem)').matches;
const rowHeight = () =>
  parseInt(getComputedStyle(document.documentElement).getPropertyValue('--row'), 10);

// Tell of an element's size, now and when it changes.
const resized = new WeakMap();
const sizes = new ResizeObserver(entries => {
  for (const {target, contentRect} of entries) resized.get(target)(contentRect);
});
const watchSize = (node, tell) => { resized.set(node, tell); sizes.observe(node); };

// A list and, when one of it is open, that one beside it.
const split = (list, detail) => h('div.split' + (detail ? '.both' : ''), list, detail);
const aside = (title, close, ...content) => h('section.card.aside', {key: 'aside',
    'aria-label': title},
  h('header', h('h2.grow.cut', title), button('✕', close, {class: 'plain', 'aria-label': 'Close',
    title: 'Esc'})), h('div.in.stack', content));

const stationLink = identity => identity && identity !== 'UNKNOWN'
  ? h('a', {href: '#/' + to('stations', identity), title: plain(identity)}, h('bdi', identity))
  : h('span.dim', DASH);

function copy(text) {
  const done = () => notice('Copied');
  const otherwise = () => copyOld(text, done);     // over plain http there is no clipboard
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, otherwise);
  else otherwise();
}
function copyOld(text, done) {
  const area = Object.assign(document.createElement('textarea'), {value: text, readOnly: true});
  document.body.append(area);
  area.select();
  if (document.execCommand('copy')) done();
  else notice('Copying is not possible here: mark the text', 'warn');
  area.remove();
}
const copyButton = (text, name = 'Copy') => button(name, () => copy(text()));

// The address that goes into a charger: by the name under which the viewer reaches the board, else
// by its own in the network.
function stationUrl() {
  const [first] = state.about?.stationUrls || [];
  if (!first) return '';
  const local = ['localhost', '127.0.0.1', '[::1]'].includes(location.hostname);
  return local ? first : first.replace(/^ws:\/\/(\[.*?\]|[^:/]+)/, 'ws://' + location.hostname);
}
const addressLine = () => h('div.url', h('code', (stationUrl() || '…') + '‹identity›'),
  copyButton(stationUrl, 'Copy'));
const howToConnect = () => [
  h('p', 'Type this address into the charger, with its identity at the end (many add it '
    + 'themselves):'),
  addressLine(),
  h('p.small', 'Or try it out: ',
    h('code', `python3 ocppboard.py simulate --url ${stationUrl().slice(0, -1)}`)),
];

// --- Tables ---------------------------------------------------------------------------------
// Windowed: only rows in sight are on the page. `columns` have a name, a width (`short` on a
// phone), a `cell(row)`, a `sort(row)` where they can be sorted by (`down`: the largest first),
// `leads` where the cell is the link to what its row opens; `wide` ones are not on a phone, `slim`
// ones only there, `spare` ones give way to what is open `beside` the table.

function sorted(id, columns, rows) {
  const sort = state.ui[id + '.sort'], column = sort && columns.find(one => one.name === sort.by);
  if (!column) return rows;
  const value = one => column.sort(one) ?? '', sign = sort.down ? -1 : 1;
  return rows.map(one => [value(one), one])
    .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0) * sign).map(([, one]) => one);
}

function headCell(id, column) {
  const props = {key: column.name, scope: 'col', class: column.num && 'num'};
  if (!column.sort) return h('th', props, column.name);
  const sort = state.ui[id + '.sort'], mine = sort?.by === column.name, down = !!column.down;
  const turn = () => {                             // as it suits the column, the other way, not
    state.ui[id + '.sort'] = !mine ? {by: column.name, down}
      : sort.down === down ? {by: column.name, down: !down} : null;
    touch('ui');
  };
  const way = !mine ? 'none' : sort.down ? 'descending' : 'ascending';
  return h('th', {...props, 'aria-sort': way}, h('button',
    {type: 'button', onclick: turn}, column.name, {descending: ' ▾', ascending: ' ▴'}[way]));
}

// `key(row)` names a row, `row(row)` gives its properties and what it opens, `end()` is called near
// the last one. Rows that came on top since it was drawn do not move what is looked at.
/**
 * @param {string} id
 * @param {{columns: any[], rows: any[], key: (one: any) => any, row?: (one: any) => any,
 *   blank?: any, tall?: boolean, label: string, end?: () => any, beside?: boolean}} look
 */
function grid(id, {columns, rows, key, row = () => ({}), blank, tall, label, end, beside}) {
  if (!rows.length) return blank;
  const slim = narrow();
  const shown = columns.filter(one => !(slim ? one.wide : one.slim) && !(beside && one.spare));
  const height = rowHeight(), view = remembered(id + '.view', {top: 0, height: 900});
  const fresh = view.top > 0 ? rows.findIndex(one => key(one) === view.newest) : 0;
  if (fresh > 0 && !state.ui[id + '.sort']) {
    view.top += fresh * height;
    after.push(() => { view.node.scrollTop = view.top; });
  }
  Object.assign(view, {drawn: view.top, newest: key(rows[0])});
  const first = Math.max(0, Math.min(Math.floor(view.top / height) - 10, rows.length - 1));
  const last = Math.min(rows.length, first + Math.ceil(view.height / height) + 20);
  const onscroll = ({target}) => {
    Object.assign(view, {top: target.scrollTop, height: target.clientHeight});
    if (Math.abs(view.top - view.drawn) > height * 4) touch('scroll');
    if (end && view.top + view.height > target.scrollHeight - 600) end();
  };
  const made = node => {
    Object.assign(view, {node, top: 0});
    watchSize(node, ({height: tall}) => { view.height = tall; touch('scroll'); });
  };
  const spacer = (name, count) => h('tr.spacer', {key: name, 'aria-hidden': 'true'},
    h('td', {colspan: shown.length, style: {height: count * height + 'px'}}));
  const line = one => {
    const {open, ...props} = row(one), cells = shown.map(column => {
      const content = column.cell(one);
      return h('td', {class: column.num && 'num'},
        column.leads && open ? link(open, content) : content);
    });
    return h('tr' + (open ? '.open' : ''), {key: key(one), ...props,
      onpointerdown: open && (event => press(event, open))}, cells);
  };
  return h('div.grid' + (tall ? '.tall' : ''),
    {key: id, onscroll, made, tabindex: 0, role: 'region', 'aria-label': label},
    h('table', {'aria-rowcount': rows.length + 1},
      h('colgroup', shown.map(one => h('col',
        {key: one.name, style: {width: slim && one.short || one.width || 'auto'}}))),
      h('thead', h('tr', shown.map(one => headCell(id, one)))),
      h('tbody', first > 0 && spacer('above', first), rows.slice(first, last).map(line),
        last < rows.length && spacer('below', rows.length - last))));
}

// A row opens when it is pressed and released. It is no click: while messages pass, the row has
// moved on before the button is up.
const STILL_PX = 5;
let pressedRow = null;
function press({button: which, ctrlKey, metaKey, shiftKey, target, clientX, clientY}, open) {
  const link = target.closest('a'), plainly = which === 0 && !ctrlKey && !metaKey && !shiftKey;
  pressedRow = plainly ? {to: link ? link.hash : '#/' + open, clientX, clientY} : null;
}
function release({clientX, clientY}) {
  const pressed = pressedRow;
  pressedRow = null;
  if (pressed && Math.hypot(clientX - pressed.clientX, clientY - pressed.clientY) < STILL_PX)
    location.hash = pressed.to;
}

const plainTable = (label, names, rows) => scrolls(label, h('table.plain',
  names.length > 0 && h('thead', h('tr', names.map(one => h('th', {key: one, scope: 'col'}, one)))),
  h('tbody', rows)));

// --- Charts ---------------------------------------------------------------------------------
// Lines over time, or areas on top of each other. A value that is null is a break in the line.

const COLOURS = [0, 1, 2, 3, 4, 5, 6, 7].map(n => `var(--c${n})`);
const TICKS = [1, 2, 2.5, 5, 10];
const LEGEND = 16;
const highest = values => values.reduce(
  (best, value) => Math.max(best, value ?? -Infinity), -Infinity);

function spark(values) {
  if (values.length < 2) return null;
  const top = Math.max(highest(values), 1e-9) * 1.15;
  const points = values.map((value, n) => `${(n / (values.length - 1) * 100).toFixed(1)} `
    + (30 - (value || 0) / top * 28).toFixed(1)).join('L');
  return h('svg.spark', {viewBox: '0 0 100 30', preserveAspectRatio: 'none', 'aria-hidden': 'true'},
    h('path.area', {d: `M0 30L${points}L100 30Z`}), h('path', {d: 'M' + points}));
}

// The last point at or before a time, or undefined.
function pointAt(points, at) {
  let low = 0, high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= at) low = middle + 1; else high = middle;
  }
  return points[low - 1];
}

// Of each of so many buckets the highest point: peaks must show.
function thinned(points, most) {
  if (points.length <= most) return points;
  const step = points.length / most, value = one => one[1] ?? -Infinity;
  return Array.from({length: Math.floor(most)}, (_, n) =>
    points.slice(Math.floor(n * step), Math.floor((n + 1) * step))
      .reduce((best, one) => value(one) > value(best) ? one : best));
}

// The values of all lines at the same times, each on top of those before it.
function stacked(lines, from, till) {
  const times = Array.from({length: 121}, (_, n) => from + (till - from) * n / 120);
  const sums = times.map(() => 0);
  return lines.map(line => ({...line, band: times.map((at, n) => {
    const low = sums[n];
    sums[n] += pointAt(line.points, at)?.[1] || 0;
    return [at, low, sums[n]];
  })}));
}

// Round marks from 0 to at least `top`.
function marksTo(top) {
  const rough = top / 3, unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * TICKS.find(one => one * unit >= rough * .999);
  return Array.from({length: Math.ceil(top / step * .999) + 1}, (_, n) => n * step);
}

// `lines` are {name, points: [[ms, value], …]}; `least` is what the scale reaches at least.
function chart(id, {lines, label, format = digits, height = 170, least = 1, areas, limit, from,
    till}) {
  const name = `chart ${id}`, width = state.ui[name] || 600;
  till ??= highest(lines.map(line => line.points.at(-1)?.[0] ?? 0));
  from ??= Math.min(...lines.map(line => line.points[0][0]));
  from = Math.min(from, till - 60000);
  lines = lines.map((line, n) => ({colour: COLOURS[n % COLOURS.length], ...line}));
  if (areas) lines = stacked(lines, from, till);
  const values = areas ? lines.at(-1).band.map(one => one[2])
    : lines.flatMap(line => line.points.map(one => one[1] ?? 0));
  const marks = marksTo(Math.max(least, limit ?? 0, highest(values)));
  const left = 58, right = width - 8, bottom = height - 20;
  const x = at => left + (at - from) / (till - from) * (right - left);
  const y = value => bottom - value / marks.at(-1) * (bottom - 8);
  const hover = state.hover?.id === id ? Math.max(from, Math.min(till, state.hover.at)) : null;
  const said = lines.map(line => {
    const value = pointAt(line.points, hover ?? till)?.[1];
    return value == null ? DASH : format(value);
  });
  const point = event => {
    const at = event.clientX - event.currentTarget.getBoundingClientRect().left - left;
    state.hover = {id, at: from + at / (right - left) * (till - from)};
    touch('hover');
  };
  const leave = () => { state.hover = null; touch('hover'); };
  const made = node => watchSize(node, box => {
    state.ui[name] = Math.round(box.width);
    touch('ui');
  });
  return h('figure.chart', {key: id, made},
    h('figcaption.legend', legend(lines, said),
      hover && h('span', {key: ' at'}, clock(new Date(hover).toISOString()))),
    h('svg', {height, viewBox: `0 0 ${width} ${height}`, role: 'img', onpointermove: point,
      onpointerdown: point, onpointerleave: leave,
      'aria-label': `${label}. ${lines.map((line, n) => `${line.name} ${said[n]}`).join(', ')}`},
    marks.map(value => h('g', {key: 'y' + value},
      h('line.gridline', {x1: left, x2: right, y1: y(value), y2: y(value)}),
      h('text', {x: left - 6, y: y(value) + 4, 'text-anchor': 'end'}, format(value)))),
    timeMarks(from, till, Math.max(2, Math.floor(width / 130))).map(([at, text], n) =>
      h('text', {key: 'x' + n, x: x(at), y: height - 4, 'text-anchor': 'middle'}, text)),
    lines.map(line => areas ? areaPath(line, x, y)
      : linePath(line, x, y, right - left, at => at >= from && at <= till)),
    limit != null
      && h('line.limit', {key: 'limit', x1: left, x2: right, y1: y(limit), y2: y(limit)}),
    hover && h('line.at', {key: 'at', x1: x(hover), x2: x(hover), y1: 4, y2: bottom})));
}

const legend = (lines, said) => [lines.slice(0, LEGEND).map((line, n) => h('span', {key: line.name},
  h('i', {style: {background: line.colour}}), line.name, ' ', h('b', said[n]))),
lines.length > LEGEND && h('span', {key: ' more'}, `and ${lines.length - LEGEND} more`)];

function timeMarks(from, till, count) {
  const span = till - from, format = span < 600000 ? SECONDS : MINUTES;
  return Array.from({length: count}, (_, n) => from + span * (n + .5) / count)
    .map(at => [at, format.format(at)]);
}

function linePath({name, colour, points}, x, y, most, shown) {
  let path = '', pen = 'M';
  for (const [at, value] of thinned(points.filter(([at]) => shown(at)), most)) {
    if (value != null) path += `${pen}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = value == null ? 'M' : 'L';
  }
  return h('path.line', {key: 'line ' + name, style: {stroke: colour}, d: path});
}

function areaPath({name, colour, band}, x, y) {
  const edge = side => band.map(one => `${x(one[0]).toFixed(1)} ${y(one[side]).toFixed(1)}`);
  return h('path', {key: 'area ' + name, style: {fill: colour}, opacity: .78,
    d: `M${edge(2).join('L')}L${edge(1).reverse().join('L')}Z`});
}

// The meter of a transaction over time: asked for once, then the stream adds to it.
const SERIES_KEPT = 60;
function seriesOf(transaction) {
  const key = keyOf(transaction);
  if (state.series.has(key)) return state.series.get(key);
  state.series.set(key, []);
  attempt(async () => {
    const {identity, id} = transaction, later = state.series.get(key);
    const {series} = await get(path('connections', identity, 'transactions', id));
    extend(series, later);
    state.series.set(key, series);
    bound(state.series, SERIES_KEPT);
    touch('transactions');
  });
  return [];
}
const pointsOf = (series, value) => series.map(one => [ms(one.timestamp), value(one)]);
const PHASES = ['L1', 'L2', 'L3', ''];

function meterCharts(transaction) {
  const series = seriesOf(transaction);
  if (series.length < 2) return empty('The charts begin with the second meter value.');
  const part = (title, props, lines) => lines.length > 0 && h('div', {key: title}, h('h3', title),
    chart(`${title} ${keyOf(transaction)}`, {label: title, ...props, lines}));
  const line = (name, value) => ({name, points: pointsOf(series, value)});
  const of = (field, name) => series.some(one => one[field] != null)
    ? [line(name, one => one[field])] : [];
  const phases = PHASES.filter(phase => series.some(one => one.currentA[phase] != null));
  return h('div.stack', {key: 'charts'},
    part('Power', {format: power, least: 1000}, of('powerW', 'Power')),
    part('Current', {format: amperes, least: 6, height: 130},
      phases.map(phase => line(phase || 'Current', one => one.currentA[phase]))),
    part('Energy', {format: energy, least: 10, height: 110}, of('energyWh', 'Energy')),
    part('State of charge', {format: percent, least: 100, height: 110}, of('soc', 'SoC')));
}

// --- What a station is doing ----------------------------------------------------------------

const TONES = {
  Available: 'good', Charging: 'info', Preparing: 'warn', Occupied: 'info', EVConnected: 'warn',
  SuspendedEV: 'warn', SuspendedEVSE: 'warn', Finishing: 'warn', Reserved: 'warn', Faulted: 'bad',
  Unavailable: 'bad',
};
const is16 = station => station?.protocol === 'ocpp1.6';
const online = station => station.status === 'online';
const sum = values => values.reduce((total, value) => total + (value || 0), 0);
// The power that flows for a transaction: of a station that has gone, nobody knows.
const isOnline = ({identity}) => online(state.stations.get(identity) || {});
const flow = one => isOnline(one) ? one.powerW || 0 : 0;
const transactionAt = (station, connector) => connector.transactionId == null ? null
  : state.transactions.get(pairOf(station.identity, connector.transactionId));
const chargeAt = (station, connector) => [...state.charges.values()].find(one =>
  one.identity === station.identity && one.evse === connector.evse && one.status !== 'ended');

function nameOf(station, {evse, connector}) {
  if (evse === 0) return 'Station';
  return is16(station) || connector <= 1 ? `Connector ${evse}`
    : `EVSE ${evse}, connector ${connector}`;
}

function statusOf(station, connector) {
  const transaction = transactionAt(station, connector);
  return transaction?.chargingState
    || (transaction && connector.status === 'Occupied' ? 'Charging' : connector.status);
}

// What a charger adds to its status: an error code, a text.
const codesOf = ({errorCode, vendorErrorCode}) => [errorCode, vendorErrorCode].filter(code =>
  code && !/^((0x)?0*|no.?error|none|ok)$/i.test(code));
const hasError = connector => codesOf(connector).length > 0;
const toldWith = connector =>
  [codesOf(connector).join(', '), connector.info].filter(Boolean).join(': ');

// Why it is, or is not, charging: a sentence for the one who stands before it.
function why(station, connector) {
  const {status} = connector, transaction = transactionAt(station, connector);
  const told = toldWith(connector), added = told ? ` (${told})` : '';
  if (!online(station)) return 'Not known: the station has been offline for '
    + `${duration(since(station.disconnectedAt))}${transaction ? ', and a car was charging' : ''}.`;
  if (station.registration === 'Pending' || station.registration === 'Rejected')
    return 'May not charge yet: the station waits to be approved on this board.';
  const drawn = transaction?.powerW ?? connector.meter?.powerW;
  if (status === 'Faulted') return (drawn > 0
    ? `Its meter says ${power(drawn)}, but` : 'Cannot charge,')
    + ` the charger reports a fault${added || ' and no code'}.`;
  if (status === 'Unavailable')
    return `Out of service: set to inoperative, or taken out by the charger itself${added}.`;
  const adds = told ? ` The charger ${hasError(connector) ? 'reports' : 'adds'}: ${told}.` : '';
  if (transaction) return whyInTransaction(station, connector, transaction) + adds;
  if (connector.evse === 0 && status === 'Available') return 'The station is in service.' + adds;
  const refused = refusedToken(station.identity, connector.since);
  return ({
    Available: 'Free: no car is plugged in.',
    Reserved: 'Reserved for one id token; others are refused.',
    Finishing: 'The charging has ended: the car is to be unplugged before the next one.',
    Charging: 'Charging, says the charger, but it has told of no transaction.',
    SuspendedEV: 'The car takes no power, and the charger has told of no transaction.',
    SuspendedEVSE: 'The charger holds the power back, and has told of no transaction.',
  }[status] || (['Preparing', 'Occupied', 'EVConnected'].includes(status)
    ? refused ? `A car is plugged in, but its id token was refused: ${refused}.`
      : 'A car is plugged in and waits for a card or a remote start.'
    : status ? `The charger says ${status}.`
      : 'The charger has not told its status yet: trigger a StatusNotification.')) + adds;
}

function whyInTransaction(station, connector, {powerW, soc}) {
  const status = statusOf(station, connector), {meter} = connector;
  const limited = chargeAt(station, connector)?.reason;
  if (powerW > 0) {
    const held = meter?.offeredA && highest(Object.values(meter.currentA)) > meter.offeredA * .93;
    return `Charging at ${power(powerW)}${soc != null ? `, the car is at ${percent(soc)}` : ''}`
      + (status === 'SuspendedEV' ? ', says the meter; the charger says that the car takes none'
        : status === 'SuspendedEVSE' ? ', says the meter; the charger says that it holds it back'
          : held ? `, as much as the charger offers (${amperes(meter.offeredA)})`
            : soc >= 80 ? ', and cars take less from 80 % on' : '')
      + `.${limited ? ' ' + limited : ''}`;
  }
  if (status === 'SuspendedEV') return soc >= 99 ? 'The car is full.'
    : 'The car takes no power: it is full, or waits for its own timer, or is too cold.';
  if (limited) return limited;
  if (status === 'SuspendedEVSE') return 'The charger holds the power back: look for a charging '
    + 'profile or limit of 0, or for its own load management.';
  return powerW === 0
    ? 'A transaction runs, but no power flows: the car may be full, or limited to '
    + 'less than 6 A.' : 'A transaction runs; the meter has not told its power yet.';
}

// What the last answer to a card was, if it was no.
const TOKEN_STATUS = /"id(?:Tag|Token)Info":\{[^}]*?"status":"(\w+)"/;
function refusedToken(identity, from) {
  const rows = state.list?.filter.identity === identity ? state.list.rows : [];
  for (let n = rows.length - 1; n >= 0 && rows[n].timestamp >= from; n--) {
    const found = rows[n].type === 'CALLRESULT' && TOKEN_STATUS.exec(rows[n].raw);
    if (found) return found[1] === 'Accepted' ? '' : found[1];
  }
  return '';
}

const PILLS = 8, PILL_ORDER = ['good', 'warn', 'info', 'bad'];
function connectorPills(station) {
  const rank = one => PILL_ORDER.indexOf(TONES[statusOf(station, one)]);
  const shown = station.connectors.filter(one => one.evse > 0 || one.status === 'Faulted')
    .sort((a, b) => rank(b) - rank(a));
  return h('div.cut', shown.slice(0, PILLS).map(one => {
    const status = statusOf(station, one), watts = transactionAt(station, one)?.powerW;
    return h('span', {key: `${one.evse}.${one.connector}`, title: plain(why(station, one)),
      class: 'pill ' + (online(station) && TONES[status] || '')},
    `${one.evse || 'all'} ${status || 'unknown'}${watts > 0 ? ' ' + power(watts) : ''}`);
  }), shown.length > PILLS && ` and ${shown.length - PILLS} more`);
}

// What a clock is off, in words.
const skewOf = seconds => `${duration(Math.abs(seconds))} ${seconds > 0 ? 'ahead' : 'behind'}`;

// What needs attention, the worst first: {rank, tone, where it leads, text}.
const HOUR = 3600e3, DAY = 24 * HOUR;
const sessionsAway = upstream =>
  upstream.sessions.filter(one => one.lastError && one.status !== 'idle');

function attention() {
  const found = [...state.stations.values()].flatMap(attentionTo), wrong = new Map();
  const add = (rank, tone, where, ...text) => found.push({rank, tone, where, text});
  for (const error of state.errors) {
    if (ms(error.timestamp) < now() - HOUR) break;
    wrong.set(error.identity, [...wrong.get(error.identity) || [], error]);
  }
  for (const [identity, errors] of wrong) add(5, 'warn', to('events', null, {identity}), identity,
    `: ${plural(errors.length, 'error')} in the last hour, the newest: ${errors[0].message}`);
  for (const one of state.knocking) if (ms(one.lastAt) > now() - DAY) add(3, 'warn', 'security',
    `${one.ip} wants in and is refused: ${one.reason} (${plural(one.count, 'time')})`);
  for (const one of state.security) {
    const rank = {critical: 0, high: 2}[one.severity];
    if (rank != null && ms(one.timestamp) > now() - DAY) add(rank, 'bad',
      to('security', null, {event: one.id}), `${one.message} (${one.identity}), `,
        ago(one.timestamp));
  }
  for (const one of state.upstreams) {
    const away = sessionsAway(one);
    if (away.length) add(1, 'bad', 'relay', `${plural(away.length, 'station')} without a way to `,
      `${one.url}: ${away[0].lastError}`);
    if (one.lost) add(1, 'bad', 'relay', `${plural(one.lost, 'message')} did not get to `, one.url);
  }
  const {host = {}, loopLagMs, stateFailingSince} = sample();
  if (stateFailingSince) add(0, 'bad', to('events', null, {type: 'STATE_FAILING'}),
    'The state file cannot be written: a restart would forget what came since ',
    clock(stateFailingSince));
  for (const [name, part] of [['disk', host.diskPercent], ['memory', host.memoryPercent]])
    if (part > 95) add(3, 'bad', 'telemetry',
      `The ${name} of the board's host is ${percent(part)} full`);
  if (loopLagMs > 500) add(3, 'warn', 'telemetry', `The board lags ${millis(loopLagMs)} behind`);
  return found.sort((a, b) => a.rank - b.rank);
}

function attentionTo(station) {
  const found = [], {identity, clockSkewSeconds: skew} = station;
  const add = (rank, tone, ...text) => found.push({rank, tone, where: to('stations', identity),
    text: [identity, ...text]});
  if (!online(station)) {
    const busy = station.connectors.some(one => transactionAt(station, one)?.status === 'active');
    add(busy ? 2 : 4, busy ? 'bad' : 'warn',
      station.seenSinceStart ? ` has been offline for ${duration(since(station.disconnectedAt))}`
        : ' is known, but has not been seen since the start of the board',
      busy ? ', and a car was charging' : '');
    return found;
  }
  if (station.registration === 'Pending') add(0, 'warn', ' waits to be approved');
  for (const one of station.connectors) {
    const told = toldWith(one), name = nameOf(station, one).toLowerCase();
    if (one.status === 'Faulted') add(1, 'bad', ` is faulted: ${name}`, told && ` (${told})`);
    else if (hasError(one)) add(3, 'warn', ` reports an error: ${name}`, ` (${told})`);
  }
  if (Math.abs(skew) > 60) add(6, 'warn', `: its clock is ${skewOf(skew)}`);
  return found;
}

// --- Commands -------------------------------------------------------------------------------
// FORMS are the usual commands: the FIELDS that are asked for, and the Action and payload that they
// become in 1.6 (`v16`) and in 2.x (`v2x`). `danger` is what is asked before.

const evsesOf = station => {
  const known = [...new Set(station.connectors.map(one => one.evse))].filter(one => one > 0);
  return known.length ? known : [1];
};
const place = station => is16(station) ? 'Connector' : 'EVSE';

// The connectors as options: "evse.connector".
function spotsOf(station) {
  const known = station.connectors.filter(one => one.evse > 0 && one.connector > 0);
  return (known.length ? known : [{evse: 1, connector: 1}]).map(one =>
    [`${one.evse}.${one.connector}`, nameOf(station, one)]);
}
const evseAt = spot => Number(spot.split('.')[0]);
const connectorAt = spot => Number(spot.split('.')[1]);
const MESSAGES_16 = ['StatusNotification', 'MeterValues', 'Heartbeat', 'BootNotification',
  'DiagnosticsStatusNotification', 'FirmwareStatusNotification'];
const MESSAGES_2X = ['StatusNotification', 'MeterValues', 'TransactionEvent', 'Heartbeat',
  'BootNotification', 'LogStatusNotification', 'FirmwareStatusNotification',
  'SignChargingStationCertificate'];
const TOKEN_TYPES = ['Central', 'ISO14443', 'ISO15693', 'eMAID', 'KeyCode', 'Local', 'MacAddress',
  'NoAuthorization'];
const purposes = station => ['TxDefaultProfile', 'TxProfile',
  is16(station) ? 'ChargePointMaxProfile' : 'ChargingStationMaxProfile'];
const activeAt = station => running().filter(one => one.identity === station.identity);
const runningAt = (station, evse) => activeAt(station).find(one => one.evse === evse);

const FIELDS = {
  evse: station => ({label: place(station), number: true, options: evsesOf(station)}),
  target: station => ({label: place(station), number: true,
    options: [[0, 'whole station'], ...evsesOf(station)]}),
  spot: station => ({label: 'Connector', options: spotsOf(station)}),
  anywhere: station => ({label: 'Connector',
    options: [...spotsOf(station), ['0.0', 'whole station']]}),
  token: () => ({label: 'Id token', value: 'BOARD'}),
  kind: station => is16(station) ? null : {label: 'Type of token', options: TOKEN_TYPES},
  transaction: station => ({label: 'Transaction', none: 'none runs',
    options: activeAt(station).map(one => [String(one.id), `${one.id} at ${one.evse}`])}),
  reset: station => ({label: 'Type',
    options: is16(station) ? ['Soft', 'Hard'] : ['OnIdle', 'Immediate']}),
  operative: () => ({label: 'To be', options: ['Operative', 'Inoperative']}),
  message: station => ({label: 'Message', options: is16(station) ? MESSAGES_16 : MESSAGES_2X}),
  limit: () => ({label: 'Limit', number: true, value: '10', min: 0, step: .1}),
  unit: () => ({label: 'Unit', options: [['A', 'A per phase'], ['W', 'W in all']]}),
  minutes: () => ({label: 'Minutes (empty: for good)', number: true, min: 1, step: 1,
      optional: true}),
  purpose: station => ({label: 'Purpose', options: purposes(station)}),
  purposes: station => ({label: 'Purpose', options: [['', 'every purpose'], ...purposes(station)],
    optional: true}),
  stack: () => ({label: 'Stack level', number: true, value: '0', min: 0, step: 1}),
  seconds: () => ({label: 'Seconds from now', number: true, value: '3600', min: 1, step: 1}),
};
const evseOf = (id, connectorId) => id ? {id, connectorId} : undefined;

const FORMS = [
  {name: 'Remote start', fields: ['evse', 'token', 'kind'],
    v16: one => ['RemoteStartTransaction', {idTag: one.token, connectorId: one.evse}],
    v2x: one => ['RequestStartTransaction', {idToken: {idToken: one.token, type: one.kind},
      evseId: one.evse, remoteStartId: requestId()}]},
  {name: 'Remote stop', fields: ['transaction'],
    v16: one => ['RemoteStopTransaction', {transactionId: Number(one.transaction)}],
    v2x: one => ['RequestStopTransaction', {transactionId: one.transaction}]},
  {name: 'Unlock', fields: ['spot'],
    danger: () => 'The cable is released; a charging there ends.',
    v16: one => ['UnlockConnector', {connectorId: evseAt(one.spot)}],
    v2x: one => ['UnlockConnector', {evseId: evseAt(one.spot),
      connectorId: connectorAt(one.spot)}]},
  {name: 'Reset', fields: ['reset'],
    danger: () => 'The station starts anew; charging ends, unless it waits for it.',
    v16: one => ['Reset', {type: one.reset}],
    v2x: one => ['Reset', {type: one.reset}]},
  {name: 'Trigger', fields: ['message', 'anywhere'],
    v16: one => ['TriggerMessage', {requestedMessage: one.message,
      connectorId: evseAt(one.anywhere) || undefined}],
    v2x: one => ['TriggerMessage', {requestedMessage: one.message,
      evse: evseOf(evseAt(one.anywhere), connectorAt(one.anywhere))}]},
  {name: 'Availability', fields: ['target', 'operative'],
    danger: one => one.operative === 'Inoperative'
      && 'Nobody can charge there until it is made operative again.',
    v16: one => ['ChangeAvailability', {connectorId: one.target, type: one.operative}],
    v2x: one => ['ChangeAvailability', {operationalStatus: one.operative,
        evse: evseOf(one.target)}]},
  {name: 'Set a limit', fields: ['target', 'limit', 'unit', 'purpose', 'minutes', 'stack'],
    danger: one => one.limit < (one.unit === 'A' ? 6 : 1380)
      && 'Below 6 A (1.38 kW on one phase) no car charges: it will pause.',
    wrong: (one, station) => one.purpose === 'TxProfile' ? !one.target ? 'A TxProfile is of one '
      + 'connector.' : !runningAt(station, one.target) && 'No transaction runs there.'
      : one.purpose.endsWith('MaxProfile') && one.target && 'It is of the whole station.',
    v16: (one, station) => ['SetChargingProfile', {connectorId: one.target, csChargingProfiles: {
      chargingProfileId: profileId(one), ...profile(one, station),
      chargingSchedule: schedule(one)}}],
    v2x: (one, station) => ['SetChargingProfile', {evseId: one.target, chargingProfile: {
      id: profileId(one), ...profile(one, station),
      chargingSchedule: [{id: 1, ...schedule(one)}]}}]},
  {name: 'Clear limits', fields: ['target', 'purposes'],
    danger: () => 'What limited the station, also for safety, does so no more.',
    v16: one => ['ClearChargingProfile', {connectorId: one.target || undefined,
      chargingProfilePurpose: one.purposes || undefined}],
    v2x: one => ['ClearChargingProfile', {chargingProfileCriteria: {evseId: one.target || undefined,
      chargingProfilePurpose: one.purposes || undefined}}]},
  {name: 'Limits in force', fields: ['target', 'seconds', 'unit'],
    v16: one => ['GetCompositeSchedule', {connectorId: one.target, duration: one.seconds,
      chargingRateUnit: one.unit}],
    v2x: one => ['GetCompositeSchedule', {evseId: one.target, duration: one.seconds,
      chargingRateUnit: one.unit}]},
  {name: 'Clear cache', fields: [], danger: () => 'The station forgets which cards it knows.',
    v16: () => ['ClearCache', {}], v2x: () => ['ClearCache', {}]},
];
const FREE = 'Any command';
const RISKY = new Set(('CertificateSigned ChangeAvailability ChangeConfiguration ClearCache '
  + 'ClearChargingProfile DeleteCertificate InstallCertificate PublishFirmware Reset SendLocalList '
  + 'SetChargingProfile SetNetworkProfile SetVariables SignedUpdateFirmware UnlockConnector '
  + 'UpdateFirmware').split(' '));

const requestId = () => Math.floor(Math.random() * 2 ** 31);

// The same limit again takes the place of the former one.
const profileId = one => 1000 + one.target * 10
  + ['TxDefaultProfile', 'TxProfile'].indexOf(one.purpose) + 1;

const profile = (one, station) => ({
  stackLevel: one.stack, chargingProfilePurpose: one.purpose, chargingProfileKind: 'Absolute',
  transactionId: one.purpose === 'TxProfile' ? runningAt(station, one.target).id : undefined,
});

// It begins a minute ago: the station's clock may be behind ours.
const schedule = one => ({startSchedule: new Date(now() - 60000).toISOString(),
  duration: one.minutes ? one.minutes * 60 + 60 : undefined, chargingRateUnit: one.unit,
  chargingSchedulePeriod: [{startPeriod: 0, limit: one.limit}]});

// A browser has six connections to a host. A station that does not answer must not take them all:
// of each station one command is under way, of all together a few.
const AT_ONCE_MOST = 3;
const underWay = new Set(), queue = [];
async function turnOf(identity) {
  while (underWay.has(identity) || underWay.size >= AT_ONCE_MOST)
    await new Promise(wake => queue.push(wake));
  underWay.add(identity);
}
function turnOver(identity) {
  underWay.delete(identity);
  for (const wake of queue.splice(0)) wake();
}

// Send a command; what the station really answered, and when, stands on top of its answers.
async function command(identity, action, payload, shown = payload) {
  const at = new Date(now()).toISOString();
  const entry = {key: Math.random(), action, shown, at, queued: true};
  state.answers.set(identity, [entry, ...state.answers.get(identity) || []].slice(0, ANSWERS_KEPT));
  touch('answers');
  await turnOf(identity);
  entry.queued = false;
  touch('answers');
  try {
    const {data, text} = await ask('POST', path('connections', identity, 'call'),
      {action, payload});
    Object.assign(entry, {result: data.result, responseTime: data.responseTime,
      raw: text.slice(text.indexOf('"result":') + 9, text.lastIndexOf(',"responseTime"'))});
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const {errorCode: code, errorDetails = {}} = error.data || {};
    entry.failed = error.message;
    if (code) Object.assign(entry, {code, raw: JSON.stringify(errorDetails)});
  } finally {
    turnOver(identity);
  }
  touch('answers');
  return entry.result;
}

// Ask before what cannot be undone. Resolves to whether to go on.
const confirmed = (title, text, yes) => new Promise(resolve => {
  state.confirm = {title, text, yes, done: value => {
    state.confirm = null;
    touch('ui');
    resolve(value);
  }};
  touch('ui');
});

// A field of a form: {name, its value as the command takes it, whether it is missing, view}.
function fieldOf(form, name, station) {
  const spec = FIELDS[name](station);
  if (!spec) return null;
  const id = `${form.name}.${name}`, values = typedFor(station);
  const options = spec.options?.map(one => Array.isArray(one) ? one : [one, one]);
  let text = String(values[id] ?? spec.value ?? options?.[0]?.[0] ?? '');
  const gone = options?.length && !options.some(([one]) => String(one) === text);
  if (gone) {                                      // not the next best one: it is another's car
    options.unshift(['', 'choose …']);
    text = '';
  }
  const value = spec.number ? text === '' ? undefined : Number(text) : text;
  const props = {value: text, 'aria-label': spec.label,
    oninput: typing(values, id)};
  const input = options
    ? h('select', {...props, disabled: !options.length}, options.length
      ? options.map(([one, shown]) => h('option', {key: one, value: one}, shown))
      : h('option', {value: ''}, spec.none))
    : h('input', {...props, type: spec.number ? 'number' : 'text', min: spec.min, step: spec.step,
      autocomplete: 'off', spellcheck: 'false'});
  return {name, value, missing: !spec.optional && text === '' || value < spec.min,
    view: h('label', {key: name}, spec.label, input)};
}

// What was typed into the forms of a station.
const typedFor = station => state.ui['form ' + station.identity] ||= {};

function commandForm(station) {
  const values = typedFor(station), chosen = values.form || FORMS[0].name;
  const form = FORMS.find(one => one.name === chosen);
  return [h('div.tabs', {role: 'group', 'aria-label': 'Command'},
    [...FORMS.map(one => one.name), FREE].map(name => button(name, () => {
      values.form = name;
      touch('ui');
    }, {key: name, 'aria-pressed': String(name === chosen)}))),
  form ? usualForm(station, form) : freeForm(station)];
}

const sendButton = (station, ready) => [
  h('button.btn.main-act', {disabled: !online(station) || !ready}, 'Send'),
  !online(station) && h('span.dim', 'The station is offline.')];

function usualForm(station, form) {
  const fields = form.fields.map(name => fieldOf(form, name, station)).filter(Boolean);
  const values = Object.fromEntries(fields.map(one => [one.name, one.value]));
  const missing = fields.some(one => one.missing);
  const wrong = !missing && form.wrong?.(values, station);
  const send = async event => {
    event.preventDefault();
    const danger = form.danger?.(values);
    if (danger && !await confirmed(`${form.name}: ${station.identity}`, danger, form.name)) return;
    command(station.identity, ...(is16(station) ? form.v16 : form.v2x)(values, station));
  };
  return h('form.form', {key: form.name, onsubmit: send}, fields.map(one => one.view),
    h('div.bar.whole', sendButton(station, !missing && !wrong),
      wrong && h('span.bad.small', wrong)));
}

function freeForm(station) {
  const values = typedFor(station), {action = '', payload: text = '{}'} = values;
  const {payload, problem} = objectIn(text);
  const send = async event => {
    event.preventDefault();
    if (RISKY.has(action) && !await confirmed(`${action}: ${station.identity}`,
      'This changes what the station does. Send it?', 'Send it')) return;
    command(station.identity, action, payload);
  };
  return h('form.form', {key: FREE, onsubmit: send},
    h('label.whole', 'Action to send', h('input', {value: action, list: 'actions',
      spellcheck: 'false', autocomplete: 'off', oninput: typing(values, 'action')})),
    h('datalist', {id: 'actions'}, (state.about?.commands[station.protocol] || []).map(name =>
      h('option', {key: name, value: name}))),
    h('label.whole', 'Payload, JSON', h('textarea.mono', {value: text, spellcheck: 'false',
      'aria-invalid': String(!!problem), oninput: typing(values, 'payload')})),
    h('div.bar.whole', sendButton(station, action && !problem),
      h('span.bad.small', {role: 'status'}, problem)));
}

// {payload} of a text that is a JSON object, else {problem}.
function objectIn(text) {
  try {
    const payload = JSON.parse(text);
    return payload?.constructor === Object ? {payload, problem: ''}
      : {problem: 'The payload must be an object: {…}'};
  } catch (error) {
    return {problem: String(error.message)};
  }
}

const GOOD = /^(Accepted|Unlocked|Scheduled)$/;
function answersOf(identity) {
  const answers = state.answers.get(identity) || [];
  if (!answers.length)
    return empty('The answers of the station will stand here, with the time that each took.');
  return h('ul.list', {'aria-live': 'polite'}, answers.map(one => h('li', {key: one.key},
    h('div.stack.grow.tight',
      h('div.bar', h('b', one.action), clock(one.at), answerPill(one),
        one.responseTime != null && h('span.dim', millis(one.responseTime))),
      h('code.dim.small', JSON.stringify(one.shown)), one.failed && h('p.bad', one.failed),
      one.raw && one.raw !== '{}' && pretty(one.raw)))));
}

function answerPill({failed, code, result, queued}) {
  if (failed) return pill(code || 'failed', 'bad');
  if (!result) return pill(queued ? 'queued …' : 'waiting …', 'info');
  const {status} = result;
  return pill(status || 'answered', !status || GOOD.test(status) ? 'good' : 'bad');
}

// --- Configuration --------------------------------------------------------------------------
// The configuration of 1.6 and the variables of 2.x, as one table of rows that can be written:
// {id, place, name, value, locked, secret, payload(value), status(answer)}; `before` is its first
// value, where that is known.

const SECRET = new RegExp('password|passwd|passphrase|authorizationkey|secret|(?<!id)token|'
  + 'privatekey|authentication$|pin$|pin.?code|psk$|(shared|wifi|wpa|api).?key', 'i');
const CUTS_OFF = /security|network|csms|centralsystem|url|apn|vpn/i;

async function readConfiguration(station) {
  const {identity} = station;
  if (is16(station)) {
    const result = await command(identity, 'GetConfiguration', {});
    const rows = listOf(result?.configurationKey).map(configurationRow);
    if (result) state.reports.set(identity, {at: now(), rows, done: true});
  } else {
    const report = {at: now(), requestId: requestId(), rows: []};
    state.reports.set(identity, report);
    const result = await command(identity, 'GetBaseReport', {requestId: report.requestId,
      reportBase: 'FullInventory'});
    if (result?.status !== 'Accepted') state.reports.delete(identity);
  }
  touch('answers');
}
const listOf = value =>
  Array.isArray(value) ? value.filter(one => one?.constructor === Object) : [];

const configurationRow = one => ({
  id: String(one.key), name: String(one.key), value: String(one.value ?? ''),
  locked: `${one.readonly}`.toLowerCase() === 'true', secret: SECRET.test(one.key),
  payload: value => ['ChangeConfiguration', {key: one.key, value}],
  status: answer => answer.status,
});

// A NotifyReport came, in answer to what was asked for: one part of several.
function reported(row) {
  const report = state.reports.get(row.identity), payload = JSON.parse(row.raw);
  if (row.type !== 'CALL' || !report || payload.requestId !== report.requestId) return;
  for (const {component, variable, variableAttribute} of listOf(payload.reportData))
    for (const one of listOf(variableAttribute)) {
      const entry = variableRow(component || {}, variable || {}, one);
      const known = report.rows.findIndex(other => other.id === entry.id);
      if (known >= 0) report.rows[known] = entry;
      else if (report.rows.length < EVENTS_KEPT) report.rows.push(entry);
    }
  report.done = !payload.tbc;
  touch('answers');
}

function variableRow(component, variable, {type, value, mutability}) {
  const attributeType = type && type !== 'Actual' ? type : undefined, {evse} = component;
  const at = [component.name, component.instance, evse && `EVSE ${evse.id}`,
    evse?.connectorId && `connector ${evse.connectorId}`].filter(Boolean).join(', ');
  const name = [variable.name, variable.instance && `(${variable.instance})`, attributeType]
    .filter(Boolean).join(' ');
  return {
    id: `${at}: ${name}`, place: at, name, value: String(value ?? ''),
    locked: mutability === 'ReadOnly', secret: mutability === 'WriteOnly' || SECRET.test(name),
    payload: text => ['SetVariables', {setVariableData: [
      {component, variable, attributeType, attributeValue: text}]}],
    status: answer => listOf(answer.setVariableResult)[0]?.attributeStatus,
  };
}

async function writeRow(station, row, value) {
  const risk = (row.secret || CUTS_OFF.test(row.id)) && 'A wrong value here may cut the station '
    + 'off: it could then only be set right at the station itself.';
  if (risk && !await confirmed(`${row.name}: ${station.identity}`, risk, 'Write')) return;
  const [action, payload] = row.payload(value), [, shown] = row.payload(row.secret ? '***' : value);
  const result = await command(station.identity, action, payload, shown);
  row.said = result ? row.status(result) || 'answered' : 'failed';
  if (row.said === 'Accepted' || row.said === 'RebootRequired') {
    if (!row.secret) row.before ??= row.value;
    Object.assign(row, {value, edited: undefined});
  }
  touch('answers');
}

function configuration(station) {
  const report = state.reports.get(station.identity), text = state.ui.configText || '';
  const what = is16(station) ? 'configuration' : 'variables', wanted = text.toLowerCase();
  const rows = (report?.rows || [])
    .filter(one => `${one.id} ${one.value}`.toLowerCase().includes(wanted));
  const head = [h('h2.grow', is16(station) ? 'Configuration' : 'Variables'),
    report && h('span.dim.small', `${plural(report.rows.length, 'row')}, read `,
      clock(new Date(report.at).toISOString())),
    h('input', {type: 'search', placeholder: 'Filter', 'aria-label': `Filter the ${what}`,
      value: text, 'data-search': true, oninput: typing(state.ui, 'configText')}),
    button(`Read the ${what}`, () => readConfiguration(station),
      {disabled: !online(station), class: report ? '' : 'main-act'})];
  const action = is16(station) ? 'GetConfiguration' : 'GetBaseReport';
  return card(head, {key: 'configuration'}, !report
    ? empty(`Read what the station is set to (${action}); then change it here.`)
    : !rows.length ? empty(report.rows.length ? 'Nothing matches.' : report.done
      ? 'The station told of nothing that is set.' : 'The station sends its report …')
      : plainTable(what, ['Name', 'Value', 'Before', 'Answer'],
        rows.slice(0, ROWS_SHOWN).map(row => configurationLine(station, row))),
  rows.length > ROWS_SHOWN && empty(`And ${rows.length - ROWS_SHOWN} more: filter for them.`));
}
const ROWS_SHOWN = 500;

function configurationLine(station, row) {
  const text = row.edited ?? row.value;
  const write = event => { event.preventDefault(); writeRow(station, row, text); };
  const tone = GOOD.test(row.said) ? 'good' : row.said === 'RebootRequired' ? 'warn' : 'bad';
  return h('tr', {key: row.id},
    h('td', row.place && h('span.dim', row.place, ': '), row.name),
    h('td', row.locked ? [row.value, ' ', h('span.dim.small', 'read-only')]
      : h('form.bar.one-line', {onsubmit: write},
        h('input.grow', {value: text, 'aria-label': plain(row.id), spellcheck: 'false',
          type: row.secret ? 'password' : 'text', autocomplete: row.secret ? 'new-password' : 'off',
          oninput: typing(row, 'edited')}),
        h('button.btn', {disabled: !online(station) || text === row.value}, 'Write'))),
    h('td', row.before != null && [row.before, ' ',
      button('Restore', () => writeRow(station, row, row.before),
        {disabled: !online(station) || row.value === row.before})]),
    h('td', row.said && pill(row.said, tone)));
}

// --- Screens --------------------------------------------------------------------------------
// A function for each, made of panels: one is drawn again when one of its topics was touched.

const EVERYTHING = ['all', 'ui', 'scroll'], cache = new Map();
function panel(id, topics, draw) {
  const stale = !cache.has(id) || [...EVERYTHING, ...topics].some(topic => dirty.has(topic));
  if (stale) cache.set(id, guarded(id, draw));
  return cache.get(id);
}
// What a station said must not take the page away: a panel that cannot be drawn says so.
function guarded(id, draw) {
  try {
    return draw();
  } catch (error) {
    console.error(id, error);
    return card('', {key: id}, empty(`This part cannot be shown: ${error.message}`));
  }
}
const heading = (text, ...more) => h('div.title', h('h1.grow', text), more);
const counted = text => h('span.dim.small.grow.nowrap', text);
const searchBox = (name, text) => h('input', {type: 'search', placeholder: text, 'aria-label': text,
  'data-search': true, value: state.route.query[name] || '',
  oninput: event => filter({[name]: event.target.value})});
const choice = (name, label, options) => h('select', {'aria-label': label,
  value: state.route.query[name] || '', onchange: event => filter({[name]: event.target.value})},
options.map(one => Array.isArray(one) ? one : [one, one]).map(([value, text]) =>
  h('option', {key: value, value}, text)));
const downloads = (file, fields) => ['ndjson', 'csv'].map(format => h('a.btn', {key: format,
  download: true, href: `/api/${file}/export?` + query({...fields, format})},
    format.toUpperCase()));
const contains = (words, text = '') =>
  words.join('\n').toLowerCase().includes(text.toLowerCase());
const newestFirst = map => [...map.values()].reverse();

// Overview

const steps = values => values.map((value, n) => n ? Math.max(0, value - values[n - 1]) : 0);

function overview() {
  const address = panel('address', [], () =>
    h('div.bar.wide', h('span.dim.small', 'Chargers connect to'), addressLine()));
  const numbers = panel('tiles', ['telemetry', 'transactions'], tiles);
  const news = h('div.cols', {key: 'news'},
    panel('attention', ['connections', 'errors', 'security', 'knocking', 'transactions',
      'upstreams', 'tick'], attentionCard),
    panel('charging', ['transactions', 'connections', 'tick'], chargingCard));
  const messages = panel('recent', ['recent', 'errors'], () => card([h('h2.grow', 'Last messages'),
    link('messages', 'All messages')], {key: 'recent'}, grid('recent', {rows: state.recent,
    key: row => row.number, label: 'Last messages', columns: MESSAGE_COLUMNS,
    row: row => ({...rowLook(row), open: to('messages', row.id)}),
    blank: empty('No message yet: they stand here as they pass.')})));
  return [heading('Overview', address), ...narrow() ? [news, numbers] : [numbers, news], messages];
}

function tiles() {
  const samples = state.samples.slice(-120), last = sample(), going = running();
  const of = name => samples.map(one => one[name]);
  const tile = (name, where, value, more, values, tone) => h('dl.card.tile', {key: name},
    h('dt', link(where, name)), h('dd', {class: tone}, value), h('dd.dim.cut', more),
    values && spark(values));
  return h('div.tiles', {key: 'tiles'},
    tile('Stations online', 'stations', digits(last.connectionCount),
      `${digits(last.totalConnections)} ever`, of('connectionCount')),
    tile('Charging now', 'transactions?status=active', digits(going.length),
      power(sum(going.map(flow))), of('powerW')),
    tile('Messages', 'messages', digits(last.messagesPerSecond, 1), 'per second',
      of('messagesPerSecond')),
    tile('Time to answer', 'telemetry', last.avgLatencyMs ? millis(last.avgLatencyMs) : DASH,
      'mean', of('avgLatencyMs')),
    tile('Error rate', 'events', last.errorRate == null ? DASH : percent(last.errorRate * 100, 2),
      `${digits(last.errorCount)} errors`, steps(of('errorCount')), last.errorRate > .05 && 'bad'),
    tile('Security events', 'security', digits(last.securityEventCount), 'since the start',
      steps(of('securityEventCount'))),
    tile('Memory', 'telemetry', bytes(last.memoryUsage?.rss),
      `${percent(last.cpuPercent)} of a core`,
      samples.map(one => one.memoryUsage.rss)),
    tile('Uptime', 'telemetry', duration(last.uptimeSeconds).replace(/^(\d+ \S+) .*/, '$1'),
      ['since ', clock(state.about?.startedAt)]));
}

const ATTENTION_SHOWN = 200;
function attentionCard() {
  const found = attention();
  return card([h('h2', 'Needs attention'),
    found.length > 0 && pill(digits(found.length), found[0].tone)],
  {key: 'attention'}, found.length === 0
      ? empty(state.stations.size
        ? 'Nothing: no station is faulted, offline or refused, and no error in the last hour.'
        : 'Nothing yet.')
      : h('ul.list.scrolls', {tabindex: 0, 'aria-label': 'What needs attention'},
        found.slice(0, ATTENTION_SHOWN).map((one, n) => h('li', {key: n},
        h('span', {class: one.tone, 'aria-hidden': 'true'}, one.tone === 'bad' ? '●' : '▲'),
        h('a.grow', {href: '#/' + one.where}, one.text))),
      found.length > ATTENTION_SHOWN && h('li.dim', {key: 'more'},
        `and ${found.length - ATTENTION_SHOWN} more`)));
}

function chargingCard() {
  const going = running().sort((a, b) => flow(b) - flow(a));
  return card([h('h2.grow', 'Charging now'), h('b', power(sum(going.map(flow))))],
    {key: 'charging'}, grid('charging', {rows: going, key: keyOf, label: 'Charging now',
      row: one => ({open: to('transactions', keyOf(one))}),
      blank: empty(state.stations.size ? 'No car is charging.'
        : [h('p', h('b', 'No station has connected yet.')), howToConnect()]),
      columns: [
        {name: 'Station', cell: one => stationLink(one.identity)},
        {name: 'Power', num: true, width: '6.5rem', leads: true,
          cell: one => isOnline(one) ? power(one.powerW) : 'offline'},
        {name: 'Energy', num: true, width: '6.5rem', cell: one => energy(one.energyWh)},
        {name: 'SoC', num: true, width: '4.5rem', wide: true, cell: one => percent(one.soc)},
        {name: 'Since', num: true, width: '7rem', wide: true, cell: one =>
          duration(since(one.startedAt))},
      ]}));
}

// Stations

const SHOWN = {
  online, offline: one => !online(one), charging: one => activeAt(one).length > 0,
  pending: one => one.registration === 'Pending',
  faulted: one => one.connectors.some(connector => connector.status === 'Faulted'),
  errors: one => one.errorCount > 0, quirks: one => one.quirks.length > 0,
};

function stations() {
  return [heading('Stations'), panel('stations', ['connections', 'transactions', 'tick'], () => {
    const {text, show, protocol} = state.route.query, all = [...state.stations.values()];
    const rows = sorted('stations', STATION_COLUMNS, all
      .filter(one => (!protocol || one.protocol === protocol) && (!SHOWN[show] || SHOWN[show](one))
        && contains([one.identity, one.remoteAddress, ...Object.values(one.station)], text))
      .sort((a, b) => a.identity < b.identity ? -1 : 1));
    return card(h('div.bar.grow', searchBox('text', 'Search identity, address, vendor, model …'),
      choice('show', 'Show', [['', 'all stations'], 'online', 'offline', 'charging', 'faulted',
        'pending', ['errors', 'with errors'], ['quirks', 'with quirks']]),
      choice('protocol', 'Protocol', [['', 'every version'], ...state.about?.protocols || []]),
      counted(`${digits(rows.length)} of ${plural(all.length, 'station')}`)), {key: 'stations'},
    grid('stations', {rows, columns: STATION_COLUMNS, key: one => one.identity, tall: true,
      label: 'Stations', row: one => ({open: to('stations', one.identity)}),
        blank: noStations(all)}));
  })];
}

const noStations = all => all.length
  ? empty('No station is so.', button('Show all', () => filter(null)))
  : empty(h('p', h('b', 'No station has connected yet.')), howToConnect(), h('p.small',
    'Nothing appears? ', link('security', 'Knocking'), ' lists who was refused, and why.'));

const stationPill = one => one.registration === 'Pending' && online(one) ? pill('pending', 'warn')
  : one.seenSinceStart ? pill(one.status, online(one) ? 'good' : 'bad')
    : h('span', {title: 'Known, not seen since the start'}, pill('not seen', 'warn'));

const STATION_COLUMNS = [
  {name: 'Station', width: '12%', wide: true, leads: true, sort: one => one.identity,
    cell: one => h('bdi', {title: plain(one.identity)}, one.identity)},
  {name: 'Station and connectors', slim: true, leads: true, cell: one => [
    h('div.cut', h('bdi', one.identity)), h('div.small', connectorPills(one))]},
  {name: 'Status', width: '6.5rem', sort: one => one.status, down: true, cell: stationPill},
  {name: 'Connectors', wide: true, cell: connectorPills},
  {name: 'Protocol', width: '6.6rem', wide: true, sort: one => one.protocol, cell: one =>
    one.protocol},
  {name: 'Address', width: '8.5rem', wide: true, sort: one => one.remoteAddress,
    cell: one => h('span', {title: one.remoteAddress}, one.remoteAddress)},
  {name: 'Profile', width: '4.6rem', num: true, wide: true, sort: one => one.securityProfile,
    cell: one => h('span', {title: 'Security profile'}, digits(one.securityProfile))},
  {name: 'Messages', width: '6.4rem', num: true, wide: true, sort: one => one.messageCount,
    down: true,
    cell: one => digits(one.messageCount)},
  {name: 'Errors', width: '5.2rem', num: true, wide: true, sort: one => one.errorCount, down: true,
    cell: one => h('span', {class: one.errorCount ? 'bad' : 'dim'}, digits(one.errorCount))},
  {name: 'Connected', width: '7.2rem', num: true, wide: true, down: true,
    sort: one => online(one) ? since(one.connectedAt) : -1,
    cell: one => online(one) ? h('span', {title: one.connectedAt}, duration(since(one.connectedAt)))
      : DASH},
  {name: 'Last seen', width: '8.4rem', num: true, wide: true, down: true,
    sort: one => one.lastMessageAt || '', cell: one => ago(one.lastMessageAt
      || one.disconnectedAt)},
];

// One station

const TABS = {
  now: ['Now', stationNow], commands: ['Commands', stationCommands],
  configuration: ['Configuration', stationConfiguration],
  messages: ['Messages', () => messageList('station messages')],
  transactions: ['Transactions', stationTransactions],
};

function station() {
  const {id, tab} = state.route, one = state.stations.get(id);
  if (!one) return [heading(h('bdi', id)), card('', {}, empty(state.loaded
    ? 'This station is not known: it was forgotten, or has not connected since the board was '
      + 'started.' : 'Loading …',
  link('stations', 'All stations')))];
  return [panel('station head', ['connections'], () => stationHead(one)),
    h('nav.tabs', {'aria-label': 'Of this station'}, Object.entries(TABS).map(([name, [text]]) =>
      h('a.btn', {key: name, href: '#/' + to('stations', id) + (name === 'now' ? '' : '/' + name),
        'aria-current': name === tab && 'page'},
      name === 'configuration' && !is16(one) ? 'Variables' : text))),
    ...TABS[tab][1](one)];
}

function stationHead(one) {
  const {identity} = one, act = (method, ...parts) => () =>
    attempt(() => ask(method, path('connections', identity, ...parts)));
  const disconnect = async () => {
    const text = 'Its connection is closed; most stations come back at once.';
    if (await confirmed(`Disconnect ${identity}`, text, 'Disconnect')) act('POST', 'disconnect')();
  };
  const forget = async () => {
    const text = 'It is disconnected and its record removed; its messages and transactions stay.';
    if (!await confirmed(`Forget ${identity}`, text, 'Forget')) return;
    if (await act('DELETE')()) go('stations');
  };
  return h('div.title', h('h1.cut', h('bdi', {title: plain(identity)}, identity)),
    pill(one.status, online(one) ? 'good' : 'bad'), h('span.grow'),
    one.registration === 'Pending' && [pill('pending', 'warn'),
      button('Approve', act('POST', 'approve'), {class: 'main-act'})],
    button('Disconnect …', disconnect, {disabled: !online(one)}),
    button('Forget …', forget, {class: 'danger'}));
}

function stationNow(one) {
  return [h('div.cols.wide-left',
    h('div.stack',
      panel('connectors', ['connections', 'transactions', 'smart-charge', 'messages', 'tick'],
        () => card('Connectors', {key: 'connectors'}, one.connectors.length
          ? one.connectors.map(connector => connectorLine(one, connector))
          : empty('The station has told of no connector yet: trigger a StatusNotification.'))),
      panel('charts', ['transactions', 'connections', 'hover'], () => stationCharts(one))),
    h('div.stack',
      panel('about', ['connections', 'tick'], () => card('About', {key: 'about'},
        h('div.in', facts(stationFacts(one))))),
      panel('quirks', ['connections'], () => card('Quirks', {key: 'quirks'}, one.quirks.length
        ? h('ul.list', one.quirks.map(quirkLine))
          : empty(one.errorCount ? 'None against the standard; but see its errors under Events.'
            : 'None: all it does is as the standard says.')))))];
}

function connectorLine(one, connector) {
  const status = statusOf(one, connector);
  return h('div.why', {key: `${connector.evse}.${connector.connector}`},
    h('div.bar', h('h3', nameOf(one, connector)),
      pill(status || 'unknown', online(one) ? TONES[status] : ''),
      connector.since && h('span.dim.small', 'since ', clock(connector.since))),
    h('p', why(one, connector)), connector.meter && meterLine(connector.meter),
    connector.inlet && meterLine(connector.inlet, 'at the inlet, where the grid comes in'));
}

function meterLine(meter, where) {
  const phases = Object.entries(meter.currentA).map(([phase, a]) =>
    `${phase} ${amperes(a)}`.trim());
  const said = [where,
    meter.powerW != null && power(meter.powerW) + (meter.quality === 'derived' ? ' (worked out)'
      : ''),
    ...phases, meter.derived.includes('currentA') && '(partly worked out from the power)',
    meter.offeredA != null && `${amperes(meter.offeredA)} offered`,
    meter.energyWh != null && `${energy(meter.energyWh)} on the meter`,
    meter.soc != null && `${percent(meter.soc)} charged`,
    meter.temperatureC != null && `${digits(meter.temperatureC, 1)} °C`,
    meter.quality === 'stale' && 'stale: the station has gone since'];
  return h('p.dim.small', said.filter(Boolean).map(text => text + ' · '), clock(meter.timestamp));
}

function stationCharts(one) {
  const going = one.connectors.map(connector => transactionAt(one, connector)).filter(Boolean);
  const last = newestFirst(state.transactions).find(other => other.identity === one.identity);
  const shown = going.length ? going.slice(0, 4) : last ? [last] : [];
  if (!shown.length) return card('Charging', {key: 'none'}, empty('No transaction of this station '
    + 'is known: power and current are drawn here while a car charges.'));
  return shown.map(transaction => card([
    h('h2.grow', (transaction.status === 'active' ? 'Charging at ' : 'Last charging, at ')
      + transaction.evse),
    h('span.cut', link(to('transactions', keyOf(transaction)), `Transaction ${transaction.id}`))],
  {key: 'chart ' + keyOf(transaction)}, h('div.in', meterCharts(transaction))));
}

function stationFacts(one) {
  const {vendor, model, serial, firmware, ...others} = one.station, skew = one.clockSkewSeconds;
  const from = online(one) ? one.connectedAt : one.disconnectedAt;
  return [
    ['Vendor', vendor], ['Model', model], ['Serial number', serial], ['Firmware', firmware],
    ['Protocol', one.protocol], ['Address', one.remoteAddress],
    ['Security profile', digits(one.securityProfile)], ['Registration', one.registration],
    [online(one) ? 'Connected' : 'Offline', [clock(from), ` (${duration(since(from))})`]],
    !one.seenSinceStart && ['Since the start', 'known, not seen'],
    ['Last seen', ago(one.lastMessageAt)], ['Messages', digits(one.messageCount)],
    ['Errors', one.errorCount ? link(to('events', null, {identity: one.identity}),
      digits(one.errorCount)) : '0'],
    ['Evictions', h('span', {class: one.evictedCount && 'warn'}, digits(one.evictedCount))],
    ['Clock', skew == null ? DASH : Math.abs(skew) < 2 ? 'right'
      : h('span', {class: Math.abs(skew) > 60 && 'warn'}, skewOf(skew))],
    ...Object.entries(others),
  ];
}

const quirkLine = ({name, count, lastMessageId}) => h('li', {key: name},
  h('span.grow', name.startsWith('schema:') ? ['against the schema: ', h('code', name.slice(7))]
    : name.replaceAll('_', ' ')), h('span.dim.nowrap', plural(count, 'time')),
  lastMessageId && h('span.nowrap', link(to('messages', lastMessageId), 'show')));

function stationCommands(one) {
  return [h('div.cols',
    panel('form', ['connections', 'transactions'], () => card('Commands', {key: 'form'},
      h('div.in.stack', commandForm(one)))),
    panel('answers', ['answers'], () => card('Answers', {key: 'answers'},
        answersOf(one.identity)))),
  ...messageList('command messages')];
}

function stationConfiguration(one) {
  return [panel('configuration', ['answers', 'connections'], () => h('div.stack',
        configuration(one),
    card('Answers', {key: 'answers'}, answersOf(one.identity))))];
}

function stationTransactions(one) {
  return [panel('its transactions', ['transactions', 'tick'],
      () => card([h('h2.grow', 'Transactions'),
    downloads('transactions', {identity: one.identity})], {key: 'transactions'},
  transactionGrid('its transactions', newestFirst(state.transactions)
    .filter(other => other.identity === one.identity), false)))];
}

// Messages

const KINDS = {CALL: 'CALL', CALLRESULT: 'RESULT', CALLERROR: 'ERROR', SEND: 'SEND',
  CALLRESULTERROR: 'RESULT ERROR'};
const failed = row => row.type === 'CALLERROR' || row.type === 'CALLRESULTERROR';
const rowLook = row => ({class: failed(row) || unanswered(row) ? 'failed'
  : findings(row).length ? 'found' : ''});
const finding = row => findings(row).length > 0
  && h('span.warn', {title: findings(row)[0].message}, '▲ ');
const kindPill = row => pill(KINDS[row.type], failed(row) ? 'bad' : asks(row) ? 'info' : '');
const gist = row => row.errorCode
  ? h('span.bad', `${row.errorCode} ${row.errorDescription || ''}`) : row.raw.slice(0, 200);

const MESSAGE_COLUMNS = [
  {name: 'Time', width: '8.6rem', leads: true, cell: row => clock(row.timestamp, true)},
  {name: 'From', width: '5.2rem', wide: true, spare: true, cell: row => row.direction === 'IN'
    ? h('span.info', 'station') : h('span.dim', 'board')},
  {name: 'Station', width: '14%', wide: true, cell: row => stationLink(row.identity)},
  {name: 'Action', width: '12.5rem', wide: true, cell: row => h('b', row.method || DASH)},
  {name: 'Message', slim: true, cell: row => [
    h('div.cut', row.direction === 'IN' ? '→ ' : '← ', h('b', row.method || KINDS[row.type])),
    h('div.cut.dim.small', row.identity, ' · ', KINDS[row.type],
      row.responseTime != null && ` · ${millis(row.responseTime)}`)]},
  {name: 'Type', width: '7.2rem', wide: true, spare: true, cell: kindPill},
  {name: 'Payload', wide: true, cell: row => [finding(row), h('span.mono.dim', gist(row))]},
  {name: 'Took', width: '5.6rem', num: true, wide: true, cell: row => row.responseTime == null
    ? unanswered(row) && h('span.bad', 'never')
    : h('span', {class: row.responseTime > 2000 && 'warn'}, millis(row.responseTime))},
];

// The columns of a list: of one station, without its name; with pairs, the answer beside the CALL;
// and what a gap shows.
function messageColumns(list) {
  const answer = {name: 'Answer', wide: true, cell: row => row.answer && [finding(row.answer),
    h('span.mono', {class: failed(row.answer) ? 'bad' : 'good'}, gist(row.answer))]};
  const columns = !state.ui.fold ? MESSAGE_COLUMNS : MESSAGE_COLUMNS.flatMap(one =>
    one.name === 'Type' ? [] : one.name === 'Payload' ? [one, answer] : one);
  return columns.filter(one => one.name !== 'Station' || !list.filter.identity).map(one => ({...one,
    cell: row => row.number ? one.cell(row) : GAP[one.name]?.(row)}));
}
const GAP = {Time: row => clock(row.timestamp, true), Payload: row => row.text,
  Message: row => row.text};

function messageList(id) {
  const {list, route} = state, picked = route.message, ofStation = route.screen === 'stations';
  const open = row => ofStation
    ? `${to('stations', route.id)}/${route.tab}?${query({...route.query, message: row.id})}`
    : to('messages', row.id, route.query);
  const table = panel(id, ['messages', 'errors', 'connections', 'live'], () => card([
    messageFilters(list, ofStation), counted(listState(list)),
    button(list.paused ? `Resume · ${digits(list.held.rows.length + list.skipped)} new` : 'Pause',
      () => pause(list),
      {'aria-pressed': String(list.paused), title: 'p'}), downloads('messages', list.filter)],
  {key: id}, messageGrid(id, list, picked, open)));
  const detail = () => panel('message', ['messages', 'errors'], () => messageDetail(picked));
  return [split(table, picked ? detail()
    : route.gone && aside('Message', closeMessage, h('p', route.gone)))];
}

function listState(list) {
  if (list.loading && !list.rows.length) return 'Loading …';
  const shown = list.older ? `${digits(list.rows.length)} of ${plural(list.total, 'message')}`
    : plural(list.rows.filter(row => row.number).length, 'message');
  return `${shown}, ${list.paused ? 'paused' : state.live.status === 'on' ? 'live' : 'not live'}`;
}

function messageFilters(list, ofStation) {
  const {query: wanted} = state.route, given = Object.keys(list.filter).length - (ofStation ? 1
    : 0);
  const typed = (name, label, options) => [
    h('input', {key: name, placeholder: label, 'aria-label': label, list: 'all ' + name,
      value: wanted[name] || '', autocomplete: 'off', class: 'short',
      onchange: event => filter({[name]: event.target.value.trim()})}),
    h('datalist', {key: 'all ' + name, id: 'all ' + name}, options.map(one =>
      h('option', {key: one, value: one})))];
  return h('div.bar.filters', searchBox('text', 'Search in payloads, ids, errors …'),
    !ofStation && typed('identity', 'Station', [...state.stations.keys()].slice(0, 500)),
    typed('method', 'Action', methods()),
    choice('direction', 'Direction', [['', 'both directions'], ['IN', 'from stations'],
      ['OUT', 'to stations']]),
    choice('type', 'Type', [['', 'every type'], ...Object.entries(KINDS)]),
    h('label.inline', h('input', {type: 'checkbox', checked: !!state.ui.fold,
      onchange: event => { state.ui.fold = event.target.checked; touch('ui'); }}),
        'pairs on one line'),
    given > 0 && button('Clear', () => filter(null)));
}

const methods = () => [...new Set([state.about?.actions, state.about?.commands]
  .flatMap(one => Object.values(one || {}).flat()))].sort();

function messageGrid(id, list, picked, open) {
  const {fold} = state.ui, pair = picked ? partners(picked) : {};
  const rows = (fold ? list.rows.filter(row => !row.call) : list.rows.slice()).reverse();
  const look = row => picked?.number === row.number ? {class: 'picked', 'aria-selected': 'true'}
    : [pair.call?.number, pair.answer?.number].includes(row.number) ? {class: 'partner'}
      : rowLook(fold && row.answer || row);
  const filtered = FILTERS.some(name => state.route.query[name]);
  return grid(id, {rows, columns: messageColumns(list), tall: true, label: 'Messages',
    beside: !!picked, key: row => row.number || row.id, end: () => loadOlder(list),
    row: row => row.number ? {...look(row), open: open(row)} : {class: 'lost'},
    blank: list.loading ? empty('Loading …') : filtered
      ? empty('No message matches, of those that are kept.',
        button('Clear the filters', () => filter(null)))
      : empty('No message yet: they stand here as they pass.')});
}

function messageDetail(picked) {
  const listed = state.list.rows.find(row => row.number === picked.number);
  const {call, answer} = {...partners(listed || picked), ...partners(picked)};
  const took = picked.responseTime ?? call?.responseTime;
  return aside(picked.method || KINDS[picked.type], closeMessage,
    facts([['Station', stationLink(picked.identity)], ['Protocol', picked.protocol],
      ['Record', picked.id], ['Took', took != null || answer ? millis(took)
        : unanswered(picked) ? h('span.bad', 'never answered') : 'no answer yet'],
      ['Message id', h('code', picked.messageId)]]), [call, answer].filter(Boolean).map(frame));
}

const frame = row => h('div.pair', {key: row.number},
  h('div.bar', kindPill(row), h('b.grow', row.direction === 'IN' ? 'from the station'
      : 'from the board'),
    h('span.dim.small', clock(row.timestamp, true))),
  row.errorCode && h('p.bad', h('b', row.errorCode), ' ', row.errorDescription),
  findings(row).map(one => h('p.warn', {key: one.id}, '▲ ', h('code', one.details.pointer || '/'),
      ' ',
    one.details.text)),
  state.ui.raw ? rawText(row.raw) : pretty(row.raw),
  h('div.bar', button(state.ui.raw ? 'Pretty' : 'Raw', () => {
    state.ui.raw = !state.ui.raw;
    touch('ui');
  }), copyButton(() => row.raw, 'Copy JSON'), copyButton(() => frameOf(row), 'Copy frame')));

// The frame as OCPP-J writes it (1.6 and 2.0.1, 4.2).
function frameOf({type, messageId, method, errorCode, errorDescription, raw}) {
  const parts = {CALL: [2, messageId, method], SEND: [6, messageId, method],
    CALLRESULT: [3, messageId],
    CALLERROR: [4, messageId, errorCode, errorDescription || ''],
    CALLRESULTERROR: [5, messageId, errorCode, errorDescription || '']}[type];
  return `[${parts.map(part => JSON.stringify(part)).join(',')},${raw}]`;
}

// Transactions

const STATUS_TONES = {active: 'info', stopped: 'good', orphan: 'warn', abandoned: 'bad'};
const lasted = one => ((ms(one.stoppedAt) ?? now()) - ms(one.startedAt)) / 1000;
const ESTIMATED = 'Estimated: its start was not seen, or its meter told of several registers';
const estimate = one => one.estimated && h('span.dim', {title: ESTIMATED}, '≈ ');

const TRANSACTION_COLUMNS = [
  {name: 'Started', width: '9.5rem', short: '6.2rem', leads: true, down: true,
    sort: one => one.startedAt, cell: one => clock(one.startedAt)},
  {name: 'Station', wide: true, sort: one => one.identity,
    cell: one => [stationLink(one.identity), h('span.dim', ` ${one.evse}`)]},
  {name: 'Station and status', slim: true, cell: one => [
    h('div.cut', stationLink(one.identity), h('span.dim', ` ${one.evse}`)),
    h('div.cut.dim.small', `${one.status} · ${duration(lasted(one))}`)]},
  {name: 'Status', width: '6.6rem', wide: true, sort: one => one.status,
    cell: one => pill(one.status, STATUS_TONES[one.status])},
  {name: 'Id token', width: '12%', wide: true, spare: true, sort: one => one.idToken || '',
    cell: one => one.idToken || DASH},
  {name: 'Energy', width: '7rem', short: '6rem', num: true, down: true,
    sort: one => one.energyWh || 0, cell: one => [estimate(one), energy(one.energyWh)]},
  {name: 'Power', width: '6.2rem', num: true, wide: true, spare: true, down: true,
    sort: one => one.powerW || 0, cell: one => one.status === 'active' ? power(one.powerW) : DASH},
  {name: 'SoC', width: '4.4rem', num: true, wide: true, spare: true, down: true,
    sort: one => one.soc || 0, cell: one => percent(one.soc)},
  {name: 'Duration', width: '6.6rem', num: true, wide: true, sort: lasted, down: true,
    cell: one => duration(lasted(one))},
  {name: 'Reason', width: '10%', wide: true, spare: true, sort: one => one.reason || '',
    cell: one => one.reason || DASH},
];

function transactionGrid(id, rows, everywhere) {
  const {id: open, query: wanted} = state.route;
  const columns = TRANSACTION_COLUMNS.filter(one => everywhere || one.name !== 'Station');
  return grid(id, {rows: sorted(id, columns, rows), columns, key: keyOf, tall: everywhere,
    beside: everywhere && state.transactions.has(open),
    label: 'Transactions', row: one => ({
      open: to('transactions', keyOf(one), everywhere ? wanted : {}),
      class: everywhere && open === keyOf(one) && 'picked'}),
    blank: empty(state.transactions.size ? 'No transaction is so.'
      : 'No transaction yet: they stand here from the first charging on.')});
}

function transactions() {
  const {status, identity, text} = state.route.query,
    picked = state.transactions.get(state.route.id);
  return [heading('Transactions'), split(
    panel('transactions', ['transactions', 'tick'], () => {
      const rows = newestFirst(state.transactions).filter(one => (!status || one.status === status)
        && (!identity || one.identity === identity)
        && contains([one.identity, one.id, one.idToken || '', one.reason || ''], text));
      return card([h('div.bar.filters', searchBox('text', 'Search station, id token, id …'),
        choice('status', 'Status', [['', 'every status'], ...Object.keys(STATUS_TONES)])),
      counted(`${plural(rows.length, 'transaction')}, `
        + energy(sum(rows.map(one => one.energyWh)))),
      downloads('transactions', {status, identity, text})], {key: 'transactions'},
      transactionGrid('transactions', rows, true));
    }),
    picked && panel('transaction', ['transactions', 'hover', 'tick'],
      () => transactionDetail(picked)))];
}

function transactionDetail(one) {
  return aside(`Transaction ${one.id}`, () => go('transactions', null, state.route.query),
    facts([['Station', stationLink(one.identity)],
      [place(state.stations.get(one.identity)), digits(one.evse)],
      ['Status', one.status === 'active' ? one.chargingState || 'active' : one.status],
      ['Id token', one.idToken], ['Started', clock(one.startedAt)],
        ['Stopped', clock(one.stoppedAt)],
      ['Duration', duration(lasted(one))], ['Energy', [estimate(one), energy(one.energyWh)]],
      ['Power', one.status === 'active' ? power(one.powerW) : DASH], ['State of charge',
        percent(one.soc)],
      ['Meter at start', energy(one.meterStart)], ['Meter at stop', energy(one.meterStop)],
      ['Reason', one.reason],
      one.missingEvents > 0 && ['Events missing', digits(one.missingEvents)]].filter(Boolean)),
    meterCharts(one), link(to('messages', null, {identity: one.identity}),
      'Messages of this station'));
}

// Power

const SERIES_SHOWN = 50;                           // under SERIES_KEPT
function powerScreen() {
  const picked = state.charges.get(state.route.id);
  return [heading('Power'), panel('power', ['transactions', 'telemetry', 'hover', 'circuits'],
    powerCard),
  panel('circuits', ['circuits', 'ui'], circuitsCard),
  split(panel('charges', ['smart-charge', 'tick'], chargesCard), picked
    && panel('charge', ['smart-charge', 'ui', 'tick'], () => chargeDetail(picked)))];
}

// What circuits carry changes all the time, and goes by no stream.
const POWER_MS = 4000;
let powerAsked = 0;
async function askPower() {
  powerAsked = Date.now();
  try {
    const [power, circuits] = await Promise.all(['config', 'circuits'].map(one =>
      get('/api/smart-charge/' + one)));
    Object.assign(state, {power, circuits});
    if (state.about?.smartCharging) state.about.smartCharging.limitKw = power.limitKw;
    touch('circuits');
  } catch (error) {                                // the stream tells that the board is away
    if (!(error instanceof Failure)) throw error;
  }
}

function powerCard() {
  const from = now() - HOUR, going = running().sort((a, b) => flow(b) - flow(a));
  const past = newestFirst(state.transactions).filter(one => ms(one.stoppedAt) > from);
  const shown = [...going, ...past].slice(0, SERIES_SHOWN), places = new Map();
  for (const one of shown.reverse()) {             // what ended stands before what goes on
    const name = `${one.identity} ${one.evse}`;
    const points = pointsOf(seriesOf(one), point => point.powerW);
    if (points.length && one.stoppedAt) points.push([ms(one.stoppedAt), 0]);
    places.set(name, [...places.get(name) || [], ...points].sort(([a], [b]) => a - b));
  }
  const lines = [...places].map(([name, points]) => ({name, points}))
    .filter(line => line.points.length).sort((a, b) => a.name < b.name ? -1 : 1);
  const first = Math.max(from, Math.min(...lines.map(line => line.points[0][0])) - 1000);
  const {limitKw} = state.about?.smartCharging || {}, left = going.length - SERIES_SHOWN;
  return card([h('h2.grow', 'Charging power by connector, the last hour'),
    left > 0 && h('span.dim.small', `without the ${left} weakest`),
    h('b', power(sum(going.map(flow))))],
  {key: 'power'}, lines.length
    ? h('div.in', chart('site', {label: 'Charging power', areas: true, format: power, least: 1000,
      height: 260, lines, from: first, till: now(), limit: limitKw && limitKw * 1000}))
    : empty('No car has charged in the last hour: what each draws is stacked here.'));
}

function circuitsCard() {
  const {power, circuits} = state;
  if (!power?.enabled) return null;
  const depth = {}, rows = [], under = parent => circuits.filter(one => one.parent === parent);
  const place = (one, deep) => {
    depth[one.name] = deep;
    rows.push(one);
    for (const child of under(one.name)) place(child, deep + 1);
  };
  for (const one of under(null)) place(one, 0);
  const {meter, windowFactor} = power;
  return card([h('h2.grow', 'Circuits'),
    windowFactor < 1 && pill(`window: ${percent(windowFactor * 100)} of the limit`, 'info'),
    meter && pill(`site meter ${meter.status}`, meter.status === 'ok' ? 'good' : 'bad'),
    h('b', power.strategy.replaceAll('_', ' '))], {key: 'circuits'},
  h('div.in.stack', rows.map(one => circuitView(one, depth[one.name])), limitForm(power)));
}

const circuitView = (one, deep) => h('div.circuit', {key: one.name,
    style: {'margin-left': deep * 1.2 + 'rem'}},
  h('div.bar', h('b.grow.cut', one.name === 'site' ? 'The site' : one.name),
    h('span.dim.small', `${amperes(one.limitA)} a phase, ${amperes(one.usableA)} to be used`)),
  Object.keys(one.measuredA).map(phase => phaseView(one, phase)));

function phaseView({name, limitA, usableA, measuredA, allocatedA, worstA}, phase) {
  const [drawn, told, worst] = [measuredA, allocatedA, worstA].map(one => one[phase]);
  const part = amps => Math.min(100, amps / limitA * 100);
  const text = `draws ${amperes(drawn)}, told ${amperes(told)}`
    + (worst > told + 1 ? `, counted ${amperes(worst)}` : '');
  const over = drawn > limitA ? 'bad' : worst > usableA + 0.1 ? 'warn' : '';
  return h('div.phase', {key: phase}, h('span.dim', phase),
    h('div.meter.load', {role: 'img', 'aria-label': `${name} ${phase}: ${text}`},
      h('i.drawn', {class: over, style: {width: part(drawn) + '%'}}),
      h('i.told', {style: {width: Math.max(0, part(told) - part(drawn)) + '%'}}),
      h('i.held', {style: {width: Math.max(0, part(worst) - part(Math.max(told, drawn))) + '%'}})),
    h('span.small', {class: over || 'dim'}, text));
}

/** @type {Record<string, [string, object]>} */
const LIMITS = {limitA: ['Limit, A a phase', {min: 1, step: 'any'}],
  marginPercent: ['Margin, %', {min: 0, max: 50, step: 'any'}]};
const STRATEGIES = ['equal_share', 'priority', 'time_of_use', 'first_come'];
function limitForm(power) {
  const typed = remembered('limits', {});
  const value = name => String(typed[name] ?? power[name]);
  const changes = Object.fromEntries(Object.keys(typed).filter(name => typed[name] !== ''
    && value(name) !== String(power[name])).map(name =>
    [name, name === 'strategy' ? typed[name] : Number(typed[name])]));
  const send = async event => {
    event.preventDefault();
    const text = Object.entries(changes).map(([name, to]) => `${name}: ${power[name]} ⇒ ${to}`);
    if (!await confirmed('Change what the site shares?', text.join(', ')
      + '. It holds until the board starts anew.', 'Change it')) return;
    await attempt(async () => {
      state.power = (await ask('PATCH', '/api/smart-charge/config', changes)).data;
      state.ui.limits = {};
      notice('Changed: less is sent at once, more when there is room');
      askPower();
    });
    touch('ui');
  };
  return h('form.form', {onsubmit: send},
    Object.entries(LIMITS).map(([name, [label, props]]) => h('label', {key: name}, label,
      h('input', {type: 'number', ...props, value: value(name), oninput: typing(typed, name)}))),
    h('label', {key: 'strategy'}, 'Strategy', h('select', {value: value('strategy'),
      oninput: typing(typed, 'strategy')}, STRATEGIES.map(one =>
      h('option', {key: one, value: one}, one.replaceAll('_', ' '))))),
    h('div.bar', h('button.btn.main-act', {disabled: !Object.keys(changes).length}, 'Change'),
      Object.keys(typed).length > 0 && button('Leave it', () => {
        state.ui.limits = {};
        touch('ui');
      })));
}

const SESSION_FIELDS = {priority: 'Priority', minA: 'Least, A', maxA: 'Most, A; 0 pauses'};
function chargeDetail({sessionId}) {
  const one = state.charges.get(sessionId), typed = remembered('charge ' + sessionId, {});
  const value = name => typed[name] ?? String(one[name] ?? '');
  const changed = Object.keys(typed).filter(name => typed[name] !== String(one[name] ?? ''));
  const change = changes => attempt(async () => {
    const {data} = await ask('PATCH', path('smart-charge', sessionId), changes);
    state.charges.set(sessionId, data);
    for (const [name, sent] of Object.entries(changes))      // what was typed since stays
      if (typed[name] === String(sent ?? '')) delete typed[name];
    notice('Changed');
    touch('smart-charge');
  });
  const send = event => {
    event.preventDefault();
    change(Object.fromEntries(changed.map(name =>
      [name, typed[name] === '' ? null : Number(typed[name])])));
  };
  return aside(`Session ${sessionId}`, () => go('power'),
    facts([['Station', stationLink(one.identity)], ['EVSE', digits(one.evse)],
      ['Status', pill(one.status, CHARGE_TONES[one.status] ?? 'bad')],
      ['Circuit', one.circuit], ['Phases', digits(one.phases)],
      ['Told', amperes(one.allocatedA)], ['To get', amperes(one.targetA)],
      ['Draws', amperes(one.measuredA)], ['Since', clock(one.startedAt)]]),
    h('p', one.reason),
    one.status !== 'ended' && h('form.form', {onsubmit: send},
      Object.entries(SESSION_FIELDS).map(([name, label]) => h('label', {key: name}, label,
        h('input', {type: 'number', min: 0, step: 1, placeholder: 'as usual', value: value(name),
          oninput: typing(typed, name)}))),
      h('div.bar.whole', h('button.btn.main-act', {disabled: !changed.length}, 'Change'),
        one.maxA === 0 ? button('Go on', () => change({maxA: null}))
          : button('Pause', () => change({maxA: 0})))),
    link(to('transactions', keyOf({identity: one.identity, id: one.transactionId})),
      'Its transaction'));
}

const CHARGE_TONES = {active: 'good', waiting: 'warn', paused: 'warn', ended: ''};
function chargesCard() {
  const charges = newestFirst(state.charges), on = state.about?.smartCharging;
  if (!charges.length) return card('Smart charging', {key: 'charges'}, empty(on
    ? 'It is on, and no car charges.'
    : 'Smart charging is switched off: nothing limits what the cars draw together. Limits can be '
      + 'set by hand, among the commands of each station.'));
  const going = charges.filter(one => one.status !== 'ended');
  const kilowatts = sum(going.map(one => one.allocatedKw));
  return card([h('h2.grow', 'Smart charging'), !on && pill('switched off', 'warn'),
    h('b', `${power(kilowatts * 1000)} allocated`)], {key: 'charges'},
  h('div.in', h('div.meter.thick', {role: 'img', 'aria-label': 'Allocated: ' + going.map(one =>
    `${one.identity} ${power(one.allocatedKw * 1000)}`).join(', ')}, going.map((one, n) =>
    h('i', {key: one.sessionId, title: `${plain(one.identity)}: ${power(one.allocatedKw * 1000)}`,
      style: {width: one.allocatedKw / (kilowatts || 1) * 100 + '%',
        background: COLOURS[n % 8]}})))),
  grid('charges', {rows: sorted('charges', CHARGE_COLUMNS, charges), columns: CHARGE_COLUMNS,
    key: one => one.sessionId, label: 'Smart charging sessions',
    beside: state.charges.has(state.route.id),
    row: one => ({open: to('power', one.sessionId),
      class: state.route.id === one.sessionId && 'picked'})}));
}

const CHARGE_COLUMNS = [
  {name: 'Station', width: '9rem', short: '6.5rem', sort: one => one.identity,
    cell: one => [stationLink(one.identity), one.evse != null && h('span.dim', ` ${one.evse}`)]},
  {name: 'Status', width: '9.5rem', short: '6.4rem', sort: one => one.status,
    cell: one => pill(one.status, CHARGE_TONES[one.status] ?? 'bad')},
  {name: 'Allocated', width: '9rem', short: '8rem', num: true, sort: one => one.allocatedKw,
    down: true,
    cell: one =>
    (one.allocatedA != null ? `${amperes(one.allocatedA)}, ` : '') + power(one.allocatedKw * 1000)},
  {name: 'Measured', width: '6rem', num: true, wide: true, spare: true,
    cell: one => amperes(one.measuredA)},
  {name: 'Why', wide: true, cell: one => h('span', {title: plain(one.reason || '')}, one.reason
      || DASH)},
  {name: 'Since', width: '6.5rem', num: true, wide: true, spare: true, down: true,
    sort: one => one.startedAt, cell: one => clock(one.startedAt)},
  {name: 'Changed', width: '6.5rem', num: true, wide: true, spare: true, down: true,
    sort: one => one.updatedAt, cell: one => ago(one.updatedAt)},
];

// Relay

const RELAY_TONES = {translation: 'info', delivered: 'good', connected: 'good', buffered: 'warn'};
const relayed = ({method, toMethod}) =>
  toMethod && toMethod !== method ? `${method} ⇒ ${toMethod}` : method;

const versions = (from, to) => [...new Set([from, to])].join(' ⇒ ').replaceAll('ocpp', '');

const RELAY_COLUMNS = [
  {name: 'Time', width: '8.6rem', leads: true, cell: one => clock(one.timestamp, true)},
  {name: 'Station', width: '8rem', short: '5rem', cell: one => stationLink(one.identity)},
  {name: 'What', width: '7rem', short: '6.4rem',
    cell: one => pill(one.type, RELAY_TONES[one.type] ?? 'bad')},
  {name: 'Action', cell: relayed},
  {name: 'Versions', width: '7.5rem', wide: true, spare: true,
    cell: one => versions(one.fromProtocol, one.toProtocol)},
  {name: 'Took', width: '5rem', num: true, wide: true, cell: one => millis(one.latencyMs)},
  {name: 'Error', width: '25%', wide: true, spare: true, cell: one => h('span.bad', one.error)},
];

// How the lines are goes by no stream, but what happens to them does.
const RELAY_MS = 2000;
let relayAsked = 0;
async function askRelay() {
  relayAsked = Date.now();
  try {
    state.upstreams = await get('/api/proxy/upstreams');
    touch('upstreams');
  } catch (error) {                                // the stream tells that the board is away
    if (!(error instanceof Failure)) throw error;
  }
}

const SESSION_TONES = {online: 'good', connecting: 'info', idle: '', booting: 'warn',
  backoff: 'bad'};
const SESSION_COLUMNS = [
  {name: 'Station', width: '9rem', short: '7rem', leads: true,
    cell: one => stationLink(one.identity)},
  {name: 'Upstream', width: '6.5rem', short: '6.5rem',
    cell: one => pill(one.status, SESSION_TONES[one.status] ?? 'bad')},
  {name: 'Versions', width: '6.5rem', wide: true,
    cell: one => versions(one.stationProtocol, one.protocol)},
  {name: 'Since', width: '6rem', num: true, wide: true, cell: one => ago(one.upSince)},
  {name: 'Lag', width: '5rem', num: true, wide: true, cell: one => millis(one.lagMs)},
  {name: 'Waiting', width: '4.8rem', short: '5rem', num: true,
    cell: one => h('span', {class: one.waiting ? 'warn' : '', title: one.waiting > 0
      && `the oldest for ${digits(one.waitingSeconds)} s`}, digits(one.waiting))},
  {name: 'Delivered', width: '5.6rem', num: true, wide: true, cell: one => digits(one.delivered)},
  {name: 'Refused', width: '5rem', num: true, wide: true, cell: one => digits(one.refused)},
  {name: 'Lost', width: '4rem', num: true, wide: true,
    cell: one => h('span', {class: one.lost ? 'bad' : ''}, digits(one.lost))},
  {name: 'Last error', wide: true, cell: one => one.status !== 'idle'
    && h('span.bad.cut', {title: one.lastError}, one.lastError)},
];

const ORDER = ['booting', 'backoff', 'connecting', 'online', 'idle'];
function upstreamCard(one) {
  const name = one.url + one.patterns, [away] = sessionsAway(one), next = away?.nextAttemptSeconds;
  const rows = [...one.sessions].sort((a, b) =>
    ORDER.indexOf(a.status) - ORDER.indexOf(b.status) || b.waiting - a.waiting);
  return card([h('h2.grow.whole', one.url),
    one.stations > 0 && h('span.dim.small',
      `${digits(one.up)} of ${plural(one.stations, 'station')} online`),
    one.waiting > 0 && pill(`${digits(one.waiting)} waiting`, 'warn'),
    one.lost > 0 && pill(`${digits(one.lost)} lost`, 'bad')], {key: name},
  away && h('p.in.bad', `${away.identity}: ${away.lastError}`,
    next > 0 && `; the next attempt is in ${digits(next)} s`),
  rows.length ? grid('lines' + name, {rows, columns: SESSION_COLUMNS,
    key: line => line.identity, label: `Stations that go on to ${one.url}`,
    row: line => ({open: to('stations', line.identity)})})
    : empty(`No station has come yet that fits ${one.patterns.join(', ')}.`));
}

function relay() {
  const {id, query: wanted} = state.route, picked = state.proxied.find(one => one.id === id);
  return [heading('Relay'), !picked && panel('upstreams', ['upstreams', 'tick'], () =>
    state.upstreams.map(upstreamCard)), split(panel('relay', ['proxy'], () => {
    if (!state.proxied.length) return card('', {key: 'relay'}, empty(state.about?.relay
      ? 'What the relay translates, keeps for an upstream that is away, or refuses stands here.'
      : 'The relay is switched off: all stations are served by this board alone. '
        + 'A [[proxy.upstream]] in the configuration passes stations on.'));
    const rows = state.proxied.filter(one => !wanted.type || one.type === wanted.type);
    return card(h('div.bar.grow', choice('type', 'Type', [['', 'every type'],
      ...new Set(state.proxied.map(one => one.type))]), counted(plural(rows.length, 'event'))),
    {key: 'relay'}, grid('relay', {rows, columns: RELAY_COLUMNS, key: one => one.id, tall: true,
      label: 'Relay', row: one => ({open: to('relay', one.id, wanted),
        class: one === picked ? 'picked' : ['error', 'refused'].includes(one.type) && 'failed'}),
      blank: empty('No event is so.')}));
  }), picked && panel('relayed', ['proxy'], () => relayDetail(picked)))];
}

function relayDetail(one) {
  const side = (title, protocol, payload) => h('div.pair', {key: title},
    h('h3', title, h('span.dim', ` · ${protocol || DASH}`)),
    payload == null ? h('p.dim', 'none') : pretty(JSON.stringify(payload)));
  return aside(relayed(one), () => go('relay', null, state.route.query),
    facts([['Station', stationLink(one.identity)], ['What', one.type], ['Direction', one.direction],
      ['Took', millis(one.latencyMs)], ['Message id', one.messageId]]),
    one.error && h('p.bad', one.error),
    h('div.sides', side('Original', one.fromProtocol, one.payload),
      side('Translated', one.toProtocol, one.translated)));
}

// Telemetry

const RANGES = [[5, '5 min'], [15, '15 min'], [60, '1 h'], [0, 'all']];
function telemetry() {
  const range = state.ui.range ?? 15;
  return [heading('Telemetry', h('div.tabs', {role: 'group', 'aria-label': 'Time shown'},
    RANGES.map(([minutes, text]) => button(text, () => { state.ui.range = minutes; touch('ui'); },
      {key: text, 'aria-pressed': String(range === minutes)})))),
  panel('telemetry', ['telemetry', 'hover'], () => {
    const from = range ? now() - range * 60000 : 0;
    const samples = state.samples.filter(one => ms(one.timestamp) >= from);
    return h('div.stack', {key: 'telemetry'},
      card('', {}, h('div.in.top', facts(telemetryFacts(sample())))), samples.length < 2
        ? card('', {}, empty('The first samples are on their way.'))
        : card('', {}, h('div.in.top.cols', telemetryCharts(samples))));
  })];
}

const telemetryFacts = last => [
  ['Messages', digits(last.totalMessages)], ['Connections', digits(last.totalConnections)],
  ['Stations at most', digits(last.peakConnections)], ['Refused', digits(last.refusedConnections)],
  ['Streams', digits(last.streams)], ['Processor', `${percent(last.cpuPercent, 1)} of a core`],
  ['Loop lag', millis(last.loopLagMs)], ['Memory', bytes(last.memoryUsage?.rss)],
  ['Processor of the host', percent(last.host?.cpuPercent)],
  ['Memory of the host', `${percent(last.host?.memoryPercent)} in use`],
  ['Disk of the host', `${percent(last.host?.diskPercent)} in use`],
    ['Uptime', duration(last.uptimeSeconds)],
];

function telemetryCharts(samples) {
  const line = (name, value) => ({name, points: samples.map(one => [ms(one.timestamp),
          value(one)])});
  const part = (title, props, ...lines) => h('div', {key: title}, h('h3', title),
    chart(title, {label: title, height: 150, ...props, lines}));
  const errors = steps(samples.map(one => one.errorCount));
  return [
    part('Messages per second', {format: one => digits(one, 1)},
      line('Messages', one => one.messagesPerSecond)),
    part('Time to answer', {format: millis}, line('Mean', one => one.avgLatencyMs)),
    part('Stations online', {least: 3}, line('Stations', one => one.connectionCount)),
    part('Errors', {least: 3},
      {name: 'Errors', points: samples.map((one, n) => [ms(one.timestamp), errors[n]])}),
    part('Charging power', {format: power, least: 1000}, line('Power', one => one.powerW)),
    part('Memory', {format: bytes, least: 1e6}, line('Resident', one => one.memoryUsage.rss),
      line('Private', one => one.memoryUsage.heapUsed)),
    part('Processor, of one core', {format: percent, least: 10},
      line('Board', one => one.cpuPercent), line('Host', one => one.host?.cpuPercent)),
    part('Loop lag', {format: millis, least: 10}, line('Lag', one => one.loopLagMs)),
  ];
}

// Security, errors and system events: lists of events, with the details of one beside it.

const SEVERITIES = ['low', 'medium', 'high', 'critical'];
const kindOf = one => one.category || one.type;
const EVENT_COLUMNS = [
  {name: 'Time', width: '9rem', short: '6.2rem', leads: true, cell: one => clock(one.timestamp)},
  {name: 'Severity', width: '6rem', wide: true, sort: one => SEVERITIES.indexOf(one.severity),
    down: true,
    cell: one => pill(one.severity, {low: '', medium: 'warn'}[one.severity] ?? 'bad')},
  {name: 'Kind', width: '13rem', wide: true, sort: kindOf, cell: kindOf},
  {name: 'Station', width: '16%', wide: true, sort: one => one.identity, cell: one =>
    one.identity && one.identity !== 'UNKNOWN' ? stationLink(one.identity)
      : h('span.dim', one.details.ip || DASH)},
  {name: 'What happened', cell: one => [h('div.cut', {title: plain(one.message)}, one.message),
    narrow() && h('div.cut.dim.small', one.identity || kindOf(one))]},
];

function eventList(id, all, title, blank) {
  const {query: wanted, screen, id: place} = state.route, severe = all[0]?.severity != null;
  const rows = all.filter(one => (!wanted.kind || kindOf(one) === wanted.kind)
    && (!wanted.severity || one.severity === wanted.severity)
    && (!wanted.identity || one.identity === wanted.identity)
    && contains([one.message, one.identity, kindOf(one)], wanted.text));
  const columns = EVENT_COLUMNS.filter(one => severe || one.name !== 'Severity');
  const picked = all.find(one => one.id === wanted.event);
  const open = one => to(screen, place || null, {...wanted, event: one.id});
  return split(card([title && h('h2', title), h('div.bar.filters', searchBox('text', 'Search …'),
    severe && choice('severity', 'Severity', [['', 'every severity'], ...SEVERITIES]),
    choice('kind', 'Kind', [['', 'every kind'], ...new Set(all.map(kindOf))]),
    wanted.identity && button(['Only ', h('bdi', wanted.identity), ' ✕'],
      () => filter({identity: ''}))),
  counted(plural(rows.length, 'event'))], {key: id}, grid(id, {rows: sorted(id, columns, rows),
    columns,
    key: one => one.id, tall: true, label: 'Events',
    blank: empty(all.length ? 'No event is so.' : blank),
    row: one => ({open: open(one), class: one === picked && 'picked'})})),
  picked && eventDetail(picked));
}

function eventDetail({id, identity, message, severity, timestamp, details, ...one}) {
  const {raw, ...others} = details;
  return aside(kindOf(one), () => filter({event: ''}), h('p', message),
    facts([['Time', clock(timestamp, true)], ['Station', stationLink(identity)],
      severity && ['Severity', severity], ['Record', id]]),
    raw != null && [h('h3', 'Raw'), rawText(raw)],
    Object.keys(others).length > 0 && pretty(JSON.stringify(others)),
    details.messageId && link(to('messages', null, {identity, text: details.messageId}),
      'Show the message'));
}

function security() {
  return [heading('Security'), panel('knocking', ['knocking', 'tick'], knockingCard),
    panel('security', ['security'], () =>
      eventList('security', state.security, 'Security events', 'No security event.'))];
}

const KNOCKS_SHOWN = 50;
function knockingCard() {
  const line = (one, n) => h('tr', {key: n}, h('td.nowrap', one.ip), h('td', h('code', one.path)),
    h('td', h('span.bad', one.status), ' ', one.reason), h('td.num', digits(one.count)),
    h('td.nowrap', ago(one.lastAt)),
    h('td', one.url && h('span.url', h('code', one.url), copyButton(() => one.url))));
  return card([h('h2.grow', 'Knocking'),
    h('span.dim.small', 'who was refused, and what would work')],
    {key: 'knocking'}, state.knocking.length
      ? plainTable('Knocking', ['From', 'Asked for', 'Refused', 'Times', 'Last', 'Would work'],
        state.knocking.slice(0, KNOCKS_SHOWN).map(line))
      : empty(h('p', 'Nobody was refused. A charger that appears neither here nor under Stations '
        + 'has not said a word on this port: look at the address and port that it was given, and '
        + 'at the network between.'), howToConnect()));
}

function events() {
  const system = state.route.id === 'system';
  return [heading('Events', h('nav.tabs', {'aria-label': 'Kind of event'},
    [['', 'Errors'], ['system', 'System']].map(([id, text]) => h('a.btn', {key: id,
      href: '#/' + to('events', id || null),
      'aria-current': (id === 'system') === system && 'page'}, text)))),
  panel('events', ['errors', 'system'], () => system
    ? eventList('system', state.system, '', 'No event yet.')
    : eventList('errors', state.errors, '',
      'No error: stations and board understand each other.'))];
}

// Help and login

const KEYS = [['/', 'search'], ['p', 'pause and resume the messages'],
  ['j  k', 'older and newer message'],
  ['Esc', 'close what is open, leave a field'], ['?', 'this page']];
const ACCEPTED = {any: 'any station', listed: 'the stations of the configuration',
  ask: 'any, once approved here'};

function help() {
  const {about} = state, keys = Object.values(SCREENS).map(([name, , key]) => [`g ${key}`, name]);
  return [heading('Help'), h('div.cols',
    card('Connect a charger', {key: 'connect'}, h('div.in.stack', howToConnect(), facts([
      ['OCPP', (about?.protocols || []).map(one => one.slice(4)).join(', ')],
      ['Who may connect', ACCEPTED[about?.accept]],
      ['Checked against the schemas', about?.validated ? 'yes'
        : 'no: install ocpp and fastjsonschema'],
      ['Version', about?.version]]))),
    card('Keys', {key: 'keys'}, plainTable('Keys', [], [...KEYS, ...keys].map(([key, text]) =>
      h('tr', {key}, h('td', h('kbd', key)), h('td', text)))))),
  panel('api', ['api'], apiCard)];
}

function apiCard() {
  const line = at => ([method, {summary}]) => h('tr', {key: method + at},
    h('td', h('code', `${method.toUpperCase()} ${at}`)), h('td', summary));
  return card([h('h2.grow', 'API'), h('a', {href: '/api/openapi.json'}, 'OpenAPI')], {key: 'api'},
    state.api ? plainTable('API', [], Object.entries(state.api.paths).flatMap(([at, methods]) =>
      Object.entries(methods).map(line(at)))) : empty('Loading …'));
}

function login() {
  const token = state.mode === 'token', focus = node => setTimeout(() => node.focus());
  const send = async event => {
    event.preventDefault();
    const fields = Object.fromEntries(new FormData(event.target));
    Object.assign(state, {problem: '', busy: true});
    touch('all');
    await logIn(fields);
    state.busy = false;
    touch('all');
  };
  const field = (label, props) =>
    h('label', {key: label}, label, h('input', {required: true, ...props}));
  const secret = {type: 'password', autocomplete: 'current-password'};
  return h('main.start', {key: 'login'}, h('h1', 'ocppboard'), h('form.card', {onsubmit: send},
    h('div.in.top.stack',
      token ? field('Token', {name: 'token', ...secret, made: focus})
        : [field('Name', {name: 'username', autocomplete: 'username', made: focus}),
          field('Password', {name: 'password', ...secret})],
      h('p.bad', {role: 'alert'}, state.problem),
      h('button.btn.main-act', {disabled: !!state.busy}, state.busy ? 'One moment …' : 'Log in'),
      token && h('p.dim.small', 'The board prints a link with the token when it starts; a fixed '
        + 'one stands in its configuration, auth.token.'))));
}

// --- Where we are ---------------------------------------------------------------------------
// The part after # names the screen, what is open on it, and its filters; a link can be shared.

// Name, function and key of each screen, and its picture.
const SCREENS = {
  overview: ['Overview', overview, 'o', 'M3 13h8V3H3zM13 21h8V11h-8zM3 21h8v-6H3zM13 3v6h8V3z'],
  stations: ['Stations', () => state.route.id ? station() : stations(), 's',
    'M5 21V5a2 2 0 0 1 2-2h6a2 2 0 0 1 2 2v16M3 21h14M8 8h4M15 11h2a2 2 0 0 1 2 2v3a1.5 1.5 0 0 0 '
    + '3 0V9l-3-3'],
  messages: ['Messages', () => [heading('Messages'), ...messageList('messages')], 'm',
    'M4 7h13l-3-3M20 17H7l3 3'],
  transactions: ['Transactions', transactions, 't', 'M13 2 5 13h6l-1 9 8-12h-6z'],
  power: ['Power', powerScreen, 'p', 'M3 20h18M5 20v-6h4v6M10 20V9h4v11M15 20V4h4v16'],
  relay: ['Relay', relay, 'r', 'M4 12h6m4 0h6M10 8v8l4-4zM4 8v8M20 8v8'],
  telemetry: ['Telemetry', telemetry, 'l', 'M3 12h4l3-8 4 16 3-8h4'],
  security: ['Security', security, 'k', 'M12 3l8 3v6c0 5-3.5 8-8 9-4.5-1-8-4-8-9V6z'],
  events: ['Events', events, 'e', 'M12 3 2 20h20zM12 10v4M12 17v.5'],
  help: ['Help', help, 'h',
    'M9 9a3 3 0 1 1 4.5 2.6c-1 .6-1.5 1.2-1.5 2.4M12 17.5v.5M12 2a10 10 0 1 0 0 20 '
    + '10 10 0 0 0 0-20'],
};

const go = (screen, id, fields) => { location.hash = '#/' + to(screen, id, fields); };

// Change filters of the screen; the address follows, without a step back for each letter.
function filter(changes) {
  const {screen, id, tab, query: before} = state.route;
  const fields = query(changes ? {...before, ...changes} : {});
  const place = to(screen, id || null) + (tab === 'now' ? '' : '/' + tab);
  history.replaceState(null, '', `#/${place}${fields ? '?' + fields : ''}`);
  arrive();
}

function decoded(part) {
  try { return decodeURIComponent(part); } catch { return part; }
}

function arrive() {
  const [place, fields] = location.hash.replace(/^#\/?/, '').split('?'), before = state.route;
  const [name, id = '', tab] = place.split('/').map(decoded);
  const screen = Object.hasOwn(SCREENS, name) ? name : 'overview';
  const ofStation = screen === 'stations' && !!id;
  state.route = {screen, id, tab: ofStation && Object.hasOwn(TABS, tab) ? tab : 'now',
    query: Object.fromEntries(new URLSearchParams(fields)), message: null};
  const other = screen !== before.screen || ofStation && id !== before.id;
  if (other || state.route.tab !== before.tab) enter();
  follows(ofStation);
  const message = ofStation ? state.route.query.message : screen === 'messages' && id;
  if (message) showMessage(message, before.message);
  if (screen === 'help' && !state.api) attempt(async () => {
    state.api = await get('/api/openapi.json');
    touch('api');
  });
  document.title = `${ofStation ? plain(id) : SCREENS[screen][0]} · ocppboard`;
  touch('all');
}

// Another screen: from its top, with the focus there.
function enter() {
  cache.clear();
  state.hover = null;
  scrollTo(0, 0);
  after.push(() => {
    document.querySelector('main')?.focus({preventScroll: true});
    document.querySelector('.nav [aria-current]')?.scrollIntoView({block: 'nearest',
        inline: 'center'});
  });
}

// Open the list of messages that the screen shows; while one types, it waits a moment.
const TYPING_MS = 250;
let opening = 0;
function follows(ofStation) {
  const {screen, id, query: wanted} = state.route;
  clearTimeout(opening);
  if (screen !== 'messages' && !ofStation) { state.list = null; return; }
  const given = ofStation ? {...wanted, identity: id} : wanted;
  const filter = Object.fromEntries(Object.entries(given)
    .filter(([name, value]) => value && FILTERS.includes(name)));
  if (state.list && same(state.list.filter, filter)) return;
  const typing = state.list && state.list.filter.text !== filter.text;
  if (typing) opening = setTimeout(() => { openList(filter); touch('all'); }, TYPING_MS);
  else openList(filter);
}

// Find the message that is to be open: on the list, else on the board; and its partner.
async function showMessage(id, before) {
  const {route} = state, wanted = number({id});
  const known = before?.number === wanted ? before
    : state.list.rows.find(row => row.number === wanted);
  const {call, answer} = known ? partners(known) : {};
  route.message = known;
  if (call && answer) return;
  try {
    const {data, text} = await ask('GET', path('messages', id)), row = rowOf(data, text);
    const {identity, messageId} = row, both = await ask('GET', '/api/messages?'
      + query({identity, messageId}));
    const others = rowsIn(both.text).filter(one => one.direction !== row.direction
      && asks(one) !== asks(row));                 // newest first
    if (asks(row)) row.answer = others.findLast(one => one.number > row.number);
    else row.call = others.find(one => one.number < row.number);
    route.message = row;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (!known) route.gone = error.message;
  }
  touch('all');
}

function closeMessage() {
  const {screen, query: fields} = state.route;
  if (screen === 'messages') go('messages', null, fields); else filter({message: ''});
}

// --- Drawing --------------------------------------------------------------------------------
// Once a frame, what data touched four times a second at most, and nothing while hidden.

const dirty = new Set(), after = [];
const AT_ONCE = new Set(['ui', 'all', 'hover', 'scroll', 'notice', 'live', 'answers', 'api']);
const PAUSE_MS = 250;
let frameAsked = 0, timer = 0, drawnAt = 0;
function touch(topic) {
  dirty.add(topic);
  if (document.hidden || frameAsked) return;
  const pause = AT_ONCE.has(topic) ? 0 : drawnAt + PAUSE_MS - performance.now();
  if (timer && pause > 0) return;
  clearTimeout(timer);
  timer = 0;
  const soon = () => { timer = 0; frameAsked = requestAnimationFrame(draw); };
  if (pause > 0) timer = setTimeout(soon, pause); else soon();
}

function draw() {
  frameAsked = 0;
  drawnAt = performance.now();
  const away = state.live.status === 'off' && 'away';
  const app = () => h('div.app', {key: 'app'}, header(), screenList(),
    h('main.main', {tabindex: -1, class: away}, SCREENS[state.route.screen][1]()));
  if (state.mode) patch(document.getElementById('board'), [state.session ? app() : login(),
      notices(),
    ...state.confirm ? [question(state.confirm)] : []]);
  dirty.clear();
  for (const work of after.splice(0)) work();
}

function header() {
  return panel('header', ['live'], () => {
    const {status, since: from} = state.live;
    const said = {on: 'live', connecting: 'connecting …'}[status];
    return h('header.head', h('a.brand', {href: '#/overview'},
      h('svg', {viewBox: '0 0 16 16', 'aria-hidden': 'true'},
        h('rect', {width: 16, height: 16, rx: 4, fill: '#0b7a75'}),
        h('path', {d: 'M9 2 4 9h3l-1 5 6-8H8.5z', fill: '#fff'})), 'ocppboard'),
    h('span', {class: 'live ' + status, role: 'status'}, said
      || ['reconnecting', h('span.wide', ', no connection'), ' since ',
        clock(new Date(from + state.clockOff).toISOString())]),
    h('span.grow'),
    h('select', {'aria-label': 'Colours', value: theme(),
      onchange: event => setTheme(event.target.value)},
      [['system', 'Auto'], ['light', 'Light'], ['dark', 'Dark']].map(([value, text]) =>
        h('option', {key: value, value}, text))),
    state.mode !== 'none' && button('Log out', logOut,
      {title: `Logged in as ${plain(state.session.user?.name)}`}));
  });
}

function screenList() {
  const stroke = {fill: 'none', stroke: 'currentColor', 'stroke-width': 2,
    'stroke-linejoin': 'round', 'stroke-linecap': 'round'};
  return panel('navigation', ['telemetry', 'transactions'], () => {
    const counts = {stations: sample().connectionCount, transactions: running().length};
    return h('nav.nav', {'aria-label': 'Screens'}, Object.entries(SCREENS).map(
      ([name, [text, , key, picture]]) => h('a', {key: name, href: '#/' + name, title: `g ${key}`,
        'aria-current': state.route.screen === name && 'page'},
      h('svg', {viewBox: '0 0 24 24', ...stroke, 'aria-hidden': 'true'}, h('path', {d: picture})),
      text, counts[name] ? h('span.count', digits(counts[name])) : null)));
  });
}

function notices() {
  return h('div.notices', {role: 'status', key: 'notices'}, state.notices.map(one =>
    h('div', {class: 'notice ' + one.kind, key: one.key}, h('span.grow', one.text),
      button('✕', () => dismiss(one), {class: 'plain', 'aria-label': 'Dismiss'}))));
}

function question({title, text, yes, done}) {
  const close = value => event => event.target.closest('dialog').close(value);
  return h('dialog', {key: 'question ' + title, 'aria-labelledby': 'question',
    made: node => after.push(() => node.showModal()),
    onclose: event => done(event.target.returnValue === 'yes')},
  h('h2', {id: 'question'}, title), h('p', text),
  h('div.bar', button('Cancel', close('')), button(yes, close('yes'), {class: 'danger'})));
}

// --- Colours and keys -----------------------------------------------------------------------

function stored(name, value) {
  try {
    return value === undefined ? localStorage.getItem(name) : localStorage.setItem(name, value);
  } catch {
    return null;                                   // a browser that keeps nothing
  }
}
const theme = () => stored('theme') || 'system';
const darkRule = [...document.styleSheets[0].cssRules].filter(rule => rule instanceof CSSMediaRule)
  .find(rule => rule.media.mediaText.includes('prefers-color-scheme'));
function setTheme(name) {
  stored('theme', name);
  darkRule.media.mediaText = {dark: 'all', light: 'not all'}[name]
    || '(prefers-color-scheme: dark)';
  touch('all');
}

const PREFIX_MS = 1500;
let prefixAt = 0;
function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !state.session || state.confirm) return;
  const {key, target} = event, typing = target.matches?.('input, textarea, select');
  if (key === 'Escape') return typing ? target.blur() : closeOpen();
  if (typing) return;
  const prefixed = Date.now() - prefixAt < PREFIX_MS;
  const jump = prefixed && Object.keys(SCREENS).find(name => SCREENS[name][2] === key);
  prefixAt = key === 'g' ? Date.now() : 0;
  if (jump) go(jump);
  else if (key === '/') {
    event.preventDefault();
    const search = document.querySelector('[data-search]');
    if (search instanceof HTMLElement) search.focus();
  } else if (key === '?') go('help');
  else if (!document.querySelector('.filters [data-search]') || !state.list) return;
  else if (key === 'p') pause(state.list);
  else if (key === 'j' || key === 'k') step(key === 'j' ? -1 : 1);
}

// Close what is open beside a list.
function closeOpen() {
  const {screen, id, query: fields, message} = state.route;
  if (message) closeMessage();
  else if (fields.event) filter({event: ''});
  else if (id && (screen === 'transactions' || screen === 'relay')) go(screen, null, fields);
}

// Open the message below (older) or above (newer) the one that is open, and bring it into sight.
function step(by) {
  const {list, route} = state, open = route.message?.number, {fold} = state.ui;
  const rows = list.rows.filter(row => row.number && !(fold && row.call));
  const at = by + (open ? rows.findIndex(row => row.number === open) : rows.length);
  const next = rows[at];
  if (!next) return;
  if (route.screen === 'messages') go('messages', next.id, route.query);
  else filter({message: next.id});
  const view = Object.values(state.ui).find(one => one?.node?.ariaLabel === 'Messages'
    && one.node.isConnected), top = (rows.length - 1 - at) * rowHeight();
  if (view && (top < view.top || top > view.top + view.height - 3 * rowHeight()))
    view.node.scrollTop = top - view.height / 3;
}

// --- Logging in, and the start --------------------------------------------------------------

// True with a session, false when one must log in, null when the board does not answer.
async function signIn() {
  let session;
  try {
    session = await get('/api/auth/session');
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    return null;
  }
  state.mode = session.authMode;
  if (session.authenticated) state.session = session; else signedOut();
  touch('all');
  return session.authenticated;
}

async function logIn(fields) {
  try {
    state.session = (await ask('POST', '/api/auth/login', fields)).data;
    state.problem = '';
    begin();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const wrong = state.mode === 'token' ? 'This token is wrong.' : 'Name or password is wrong.';
    state.problem = {401: wrong, 429: 'Too many wrong ones: wait some minutes.'}[error.status]
      || error.message;
  }
}

const ENDED = 'The session has ended: log in again, all is as you left it.';
function signedOut(text = ENDED) {
  if (!state.session) return;
  disconnect();
  Object.assign(state, {session: null, problem: text, confirm: null});
  touch('all');
}

async function logOut() {
  await attempt(() => ask('POST', '/api/auth/logout'));
  lastId = '';
  state.loaded = false;
  signedOut('');
}

function begin() {
  connect();
  arrive();
}

// The token of the link that the board printed, which then leaves the address.
let token = '';
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get('token');
  if (found) history.replaceState(null, '', location.pathname);
  token = found || token;
  return !!found;
}

async function start() {
  const signed = await signIn();
  if (signed === null) setTimeout(start, AGAIN_MS);
  else if (signed) begin();
  else if (token && state.mode === 'token') await logIn({token});
  token = signed === null ? token : '';
  touch('all');
}

takeToken();
addEventListener('hashchange', () => {
  if (takeToken() && !state.session) start();
  else if (state.session) arrive();
});
addEventListener('keydown', pressed);
addEventListener('pointerup', release);
addEventListener('pointercancel', () => { pressedRow = null; });
addEventListener('resize', () => touch('ui'));
document.addEventListener('visibilitychange', look);
setInterval(watch, 1000);
setTheme(theme());
start();
"""


def page_document() -> bytes:
    """PAGE with its style and script."""
    return PAGE.replace("<style>", f"<style>{STYLE}").replace(
        "<script>", f"<script>{SCRIPT}").encode()


def _source(text: str) -> str:
    """How a content security policy names a script or style within the page (CSP 3, 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


DOCUMENT = page_document()
COMPRESSED = gzip.compress(DOCUMENT, 9, mtime=0)
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Vary": "Accept-Encoding",
    "Etag": f'W/"{hashlib.sha256(DOCUMENT).hexdigest()[:32]}"',
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_source(SCRIPT)}; style-src {_source(STYLE)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"),
}


def get_page(api: Api) -> None:
    """The page; it logs in by itself, with the token of its fragment or what is typed in."""
    for name, value in PAGE_HEADERS.items():
        api.set_header(name, value)
    if api.check_etag_header():
        api.set_status(304)
        api.finish()
        return
    document = DOCUMENT
    if "gzip" in api.request.headers.get("Accept-Encoding", ""):
        document = COMPRESSED
        api.set_header("Content-Encoding", "gzip")
    api.finish(document)


PAGE_ROUTE = Route("GET", "/", get_page, "text/html", public=True)


# --- Simulator ----------------------------------------------------------------------------
# Stations for trying out the board, and for the tests: they boot, charge, obey commands. What a
# station does next stands in its `plan`; it does one thing a time, each is one Call.

VOLTAGE_V = 230.0
PILOT_DELAY_S = 4.0                  # until a car follows a lower limit
TAPER_PERCENT = 80                   # of its battery; above it a car takes less and less
SESSION_READINGS, IDLE_HEARTBEATS = 20, 3        # meter values in a charging, Heartbeats before it
HIGHEST_STACK_LEVEL, OUTLET_MAX_A = 9, 32.0
CONFIGURATION_KEYS = {"HeartbeatInterval": "300", "MeterValueSampleInterval": "10",
                      "NumberOfConnectors": "1",
                      "ChargeProfileMaxStackLevel": str(HIGHEST_STACK_LEVEL),
                      "ChargingScheduleAllowedChargingRateUnit": "Current,Power",
                      "MaxChargingProfilesInstalled": "20",
                      "ProfileStackLevel": str(HIGHEST_STACK_LEVEL), "RateUnit": "A,W"}
# What real stations do wrong with limits and links.
FAULTS = {
    "reject": "refuses every charging profile",
    "ignore": "accepts charging profiles and does not obey",
    "late": "answers commands after eight seconds",
    "lose-link": "is without connection for two minutes now and then",
    "reboot": "starts over now and then, and forgets the limits of its transactions",
    "watts": "takes limits in W only",
}
SIMULATED_FRAME_BYTES = 1 << 20
LATE_S, AWAY_S, FAULT_EVERY_S = 8.0, 120.0, (60.0, 180.0)


@dataclass(slots=True)
class Outlet:
    """A connector of a simulated station, and the car at it."""

    number: int
    status: str = "Available"
    operative: bool = True
    id_token: str = ""
    transaction_id: Any = None
    energy_wh: float = 0.0              # the register
    soc: float = 40.0
    phases: int = 3
    car_a: float = 16.0
    battery_wh: float = 60_000.0
    current_a: float = 0.0
    advanced_at: float = 0.0
    offered_a: float = 0.0              # by the pilot, since `offered_at`
    offered_at: float = -math.inf
    followed_a: float = 0.0             # what was offered before
    started_at: float = 0.0
    readings: int = 0
    sequence: int = 0
    remote_start_id: int | None = None

    def arrive(self, id_token: str) -> None:
        """A car is plugged in."""
        self.id_token, self.readings, self.soc = id_token, 0, random.uniform(20, 70)
        self.phases, self.car_a = random.choice((1, 3, 3)), random.choice((13.0, 16.0, 16.0, 32.0))
        self.battery_wh = random.uniform(20_000, 90_000)

    def begin(self, now: float, transaction_id: Any) -> None:
        """Its transaction begins; the car takes what is offered at once."""
        self.transaction_id, self.started_at, self.sequence = transaction_id, now, 0
        self.offered_at = -math.inf
        self.offered_a = -1.0

    def advance(self, now: float, limit_a: float) -> None:
        """Let the car charge until now, at what it and the limit allow.

        It takes more at once, less after a while; under 6 A it pauses (IEC 61851-1).
        """
        hours = (now - self.advanced_at) / 3600 if self.advanced_at else 0.0
        self.energy_wh += self.power_w * hours
        self.soc = min(100.0, self.soc + 100 * self.power_w * hours / self.battery_wh)
        if limit_a != self.offered_a:
            begun = self.offered_a < 0
            more = begun or limit_a > self.offered_a
            self.followed_a = limit_a if more else self.allowed_a(now)
            self.offered_a, self.offered_at = limit_a, now
        taper = max(0.0, min(1.0, (100 - self.soc) / (100 - TAPER_PERCENT)))
        allowed_a = self.allowed_a(now) if self.transaction_id is not None else 0.0
        self.current_a = min(self.car_a * taper, allowed_a) if allowed_a >= 6 else 0.0
        self.advanced_at = now

    def allowed_a(self, now: float) -> float:
        """The limit that the car follows by now."""
        return self.offered_a if now - self.offered_at >= PILOT_DELAY_S else self.followed_a

    @property
    def power_w(self) -> float:
        return self.current_a * VOLTAGE_V * self.phases

    def currents(self) -> list[tuple[str, float]]:
        """What its meter tells of each phase."""
        return [(phase, self.current_a if n < self.phases else 0.0)
                for n, phase in enumerate(PHASES)]


class SimulatedStation:
    """A station of one version. Subclasses hold what versions call things."""

    protocol = ""
    preparing = "Preparing"              # what a connector is with a car that does not charge yet
    reset_reason = list_version_field = ""

    def __init__(self, identity: str, url: str, rate: float = 0.5, outlets: int = 1,
                 password: str = "", latencies: deque | None = None, stay_s: float = 0.0,
                 faults: Iterable[str] = (), clock: Callable[[], float] = time.time):
        self.identity, self.url, self.rate, self.password = identity, url, rate, password
        self.stay_s, self.faults, self.clock = stay_s, set(faults), clock
        self.outlets = [Outlet(n + 1, energy_wh=random.randrange(10**6)) for n in range(outlets)]
        self.configuration = CONFIGURATION_KEYS | {"NumberOfConnectors": str(outlets)}
        if "watts" in self.faults:
            self.configuration |= {"ChargingScheduleAllowedChargingRateUnit": "Power",
                                   "RateUnit": "W"}
        self.profiles: list[Profile] = []
        self.latencies = deque(maxlen=1000) if latencies is None else latencies
        self.calls = self.errors = 0
        self.online = self.accepted = False
        self.plan: deque = deque()
        self.idle = random.randrange(IDLE_HEARTBEATS)
        self._socket: WebSocket | None = None
        self.exchange: Exchange | None = None            # of the connection
        self._restart = False
        self._fault_at = time.monotonic() + random.uniform(*FAULT_EVERY_S)

    # What each version says in its own words

    def boot_payload(self) -> dict:
        raise NotImplementedError

    async def tell_status(self, outlet: Outlet) -> None:
        raise NotImplementedError

    async def authorize(self, outlet: Outlet) -> None:
        raise NotImplementedError

    async def start(self, outlet: Outlet) -> None:
        raise NotImplementedError

    async def meter(self, outlet: Outlet) -> None:
        raise NotImplementedError

    async def stop(self, outlet: Outlet, reason: str = "EVDisconnected") -> None:
        raise NotImplementedError

    # Life

    async def run(self) -> None:
        """Connect, live, connect again when the connection is lost; until cancelled."""
        pause = 1.0
        while True:
            try:
                await self.connect()
                pause = 1.0
                await self.live()
                if "lose-link" in self.faults:
                    self.disconnect()
                    await asyncio.sleep(AWAY_S)
            except (OSError, BoardError) as error:
                level = logging.WARNING if pause == 1.0 else logging.DEBUG
                log.log(level, "%s: %s", self.identity, error)
            finally:
                self.disconnect()
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, 30.0)

    async def connect(self) -> None:
        """Open the connection and start to read it."""
        headers = {}
        if self.password:
            text = f"{self.identity}:{self.password}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(text).decode()
        websocket = await open_websocket(f"{self.url}/{quote(self.identity, safe='')}",
                                         [self.protocol], SIMULATED_FRAME_BYTES, headers)
        self._socket, self.exchange = websocket, Exchange(websocket.write)
        self.online = True
        websocket.start(self._receive, functools.partial(self._closed, self.exchange))

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        self.online = self.accepted = False
        if self._socket:
            self._socket.close()
            self._socket = None

    async def live(self) -> None:
        """Boot, then do what the plan says, at the station's rate."""
        await self.boot()
        self.plan = deque(functools.partial(self.tell_status, outlet) for outlet in self.outlets)
        interval = 1 / self.rate
        due = time.monotonic() + random.uniform(0, interval)
        while self.online and not self._restart:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due = max(due + interval, time.monotonic() - 1)      # does not hurry to catch up
            self.advance()
            if self.faults & {"lose-link", "reboot"} and time.monotonic() > self._fault_at:
                self._fault_at = time.monotonic() + random.uniform(*FAULT_EVERY_S)
                if "reboot" in self.faults:
                    self.forget()
                return
            if not self.plan:
                self.plan_more()
            await self.plan.popleft()()
        self._restart = False

    def advance(self) -> None:
        """Let all cars charge until now."""
        now = self.clock()
        for outlet in self.outlets:
            outlet.advance(now, self.limit_a(outlet))

    def forget(self) -> None:
        """What a station loses when it starts over."""
        self.profiles = [p for p in self.profiles if p.purpose != "TxProfile"]

    async def boot(self) -> None:
        """BootNotification, again until the central system accepts."""
        while not self.accepted:
            answer = await self.call("BootNotification", self.boot_payload())
            self.accepted = answer.get("status") == "Accepted"
            if not self.accepted:
                await asyncio.sleep(min(answer.get("interval", 10), 10))

    def plan_more(self) -> None:
        """What comes next without being told: some idling, then a charging."""
        outlet = random.choice(self.outlets)
        if outlet.transaction_id is not None:
            full = outlet.soc >= 99.9 or (
                self.clock() - outlet.started_at >= self.stay_s if self.stay_s
                else outlet.readings >= SESSION_READINGS)
            self.plan.append(functools.partial(self.stop if full else self.meter, outlet))
        elif self.idle < IDLE_HEARTBEATS or not outlet.operative:
            self.idle += 1
            self.plan.append(self.heartbeat)
        else:
            self.plan_start(outlet, f"{random.randrange(16**8):08X}")

    def plan_start(self, outlet: Outlet, id_token: str) -> None:
        """A car comes and charges."""
        self.idle = 0
        outlet.arrive(id_token)
        outlet.status = self.preparing
        self.plan.extend((functools.partial(self.tell_status, outlet),
                          functools.partial(self.authorize, outlet),
                          functools.partial(self.start, outlet)))

    async def call(self, action: str, payload: dict) -> dict:
        """Send a Call and wait for its answer: the payload, {} of a CALLERROR.

        Raises: Conflict (the connection has ended), NoAnswer.
        """
        if self.exchange is None or not self.online:
            raise Conflict("the connection has ended")
        sent = time.perf_counter()
        call = Call(f'"{uuid.uuid4()}"', action, payload, to_json(payload))
        message = (await self.exchange.call(call)).message
        self.calls += 1
        self.latencies.append((time.perf_counter() - sent) * 1000)
        if type(message) is CallError:
            self.errors += 1
            log.warning("%s: %s was answered %s %s", self.identity, action, message.code,
                        shown(message.description))
            return {}
        return message.payload

    def _receive(self, frame: str | bytes) -> Awaitable | None:
        text = frame if isinstance(frame, str) else frame.decode("utf-8", "replace")
        message = unpack(text)
        if isinstance(message, (CallResult, CallError)) and self.exchange:
            self.exchange.answered(message, text)
        elif isinstance(message, Call) and self._socket:
            if "late" in self.faults:
                return self._obey_late(message, self._socket)
            self._socket.write(pack(self.obey(message)))
        return None

    async def _obey_late(self, call: Call, websocket: WebSocket) -> None:
        await asyncio.sleep(LATE_S)
        websocket.write(pack(self.obey(call)))

    def _closed(self, exchange: Exchange, code: int, reason: str) -> None:
        exchange.close(f"the connection has ended: {reason or code}")
        if exchange is self.exchange:
            self.online = False

    def obey(self, call: Call) -> CallResult | CallError:
        """The answer to a command; what follows from it goes into the plan."""
        name = re.sub("(?<!^)(?=[A-Z])", "_", call.action).lower()       # on_change_availability
        handler = getattr(self, f"on_{name}", None)
        if handler is None:
            return CallError(call.id_text, "NotSupported", "", {}, "{}")
        payload = handler(call.payload)
        return CallResult(call.id_text, payload, to_json(payload))

    # What every version does

    def now(self) -> str | None:
        return iso(self.clock())

    def limit_a(self, outlet: Outlet) -> float:
        """The limit that the profiles set."""
        return min(OUTLET_MAX_A, allowed_a(self.profiles, self.clock(), outlet.number,
                                           outlet.transaction_id, began_at=outlet.started_at))

    def keep_profile(self, profile: dict, schedule: dict, outlet: int, profile_id: int,
                     starting: bool = False) -> dict:
        """Install a charging profile, in place of one with its id or purpose and stack level.

        `starting`: it came with the command that starts its transaction.
        """
        watts, purpose = schedule.get("chargingRateUnit") == "W", profile["chargingProfilePurpose"]
        charging = [o for o in self.outlets if o.number == outlet and o.transaction_id is not None]
        wrong = ((purpose == "TxProfile" and not starting and not charging)  # 1.6 5.16; K01.FR.03
                 or (purpose not in ("TxProfile", "TxDefaultProfile") and outlet != 0)
                 or profile["stackLevel"] > HIGHEST_STACK_LEVEL)
        if "reject" in self.faults or wrong or ("watts" in self.faults and not watts):
            return {"status": "Rejected"}
        if "ignore" in self.faults:
            return {"status": "Accepted"}
        phases = charging[0].phases if charging and watts else 3
        new = Profile.read(profile_id, outlet, profile, schedule, self.clock())
        if watts:                        # the phases are those of now
            new.watts = False
            new.periods = [(at, limit / (VOLTAGE_V * phases)) for at, limit in new.periods]
        self.advance()
        self.profiles = with_profile(self.profiles, new)
        self.advance()
        return {"status": "Accepted"}

    def clear_profiles(self, wanted: dict) -> dict:
        """Remove the profiles whose attributes are all as wanted."""
        left = [p for p in self.profiles
                if any(getattr(p, name) != value for name, value in wanted.items())]
        cleared, self.profiles = len(left) < len(self.profiles), left
        return {"status": "Accepted" if cleared else "Unknown"}

    def outlet(self, number: int | None) -> Outlet | None:
        """The outlet of that number, or a free one."""
        if number:
            return next((o for o in self.outlets if o.number == number), None)
        return next((o for o in self.outlets if o.transaction_id is None), None)

    def start_remotely(self, number: int | None, id_token: str,
                       remote_id: int | None = None) -> dict:
        outlet = self.outlet(number)
        if outlet is None or outlet.transaction_id is not None or not outlet.operative:
            return {"status": "Rejected"}
        outlet.remote_start_id = remote_id
        self.plan.clear()
        self.plan_start(outlet, id_token)
        return {"status": "Accepted"}

    def stop_remotely(self, transaction_id: Any) -> dict:
        for outlet in self.outlets:
            if outlet.transaction_id is not None and outlet.transaction_id == transaction_id:
                self.plan.appendleft(functools.partial(self.stop, outlet, "Remote"))
                return {"status": "Accepted"}
        return {"status": "Rejected"}

    def on_reset(self, payload: dict) -> dict:
        self.plan.clear()
        for outlet in self.outlets:
            if outlet.transaction_id is not None:
                self.plan.append(functools.partial(self.stop, outlet, self.reset_reason))
        self.plan.append(self.restart)
        return {"status": "Accepted"}

    async def restart(self) -> None:
        """Drop the connection; `run` boots again."""
        self._restart = True

    def change_availability(self, number: int, operative: bool) -> dict:
        scheduled = False
        for outlet in self.outlets:
            if number in (0, outlet.number):
                outlet.operative = operative
                if outlet.transaction_id is not None:
                    scheduled = True     # when the transaction ends (1.6 5.2)
                    continue
                outlet.status = "Available" if operative else "Unavailable"
                self.plan.append(functools.partial(self.tell_status, outlet))
        return {"status": "Scheduled" if scheduled else "Accepted"}

    def trigger(self, message: str, number: int | None) -> dict:
        outlet = self.outlet(number) or self.outlets[0]
        sends = {"Heartbeat": self.heartbeat, "BootNotification": self.boot_again,
                 "StatusNotification": functools.partial(self.tell_status, outlet),
                 "MeterValues": functools.partial(self.meter, outlet)}
        if message not in sends:
            return {"status": "NotImplemented"}
        self.plan.appendleft(sends[message])
        return {"status": "Accepted"}

    def composite_schedule(self, number: int, duration: int) -> dict:
        outlet = self.outlet(number) or self.outlets[0]
        unit, factor = ("W", 3 * VOLTAGE_V) if "watts" in self.faults else ("A", 1)
        return {"duration": duration, "chargingRateUnit": unit, "chargingSchedulePeriod": [
            {"startPeriod": 0, "limit": round(self.limit_a(outlet) * factor, 1)}]}

    def on_clear_cache(self, payload: dict) -> dict:
        return {"status": "Accepted"}

    def on_send_local_list(self, payload: dict) -> dict:
        return {"status": "Accepted"}

    def on_data_transfer(self, payload: dict) -> dict:
        return {"status": "UnknownVendorId"}

    def on_get_local_list_version(self, payload: dict) -> dict:
        return {self.list_version_field: 0}

    def on_unlock_connector(self, payload: dict) -> dict:
        return {"status": "Unlocked"}

    async def heartbeat(self) -> None:
        await self.call("Heartbeat", {})

    async def boot_again(self) -> None:
        await self.call("BootNotification", self.boot_payload())

    def after_stop(self, outlet: Outlet) -> None:
        """The car goes; an availability that was to change by then does."""
        outlet.transaction_id, outlet.current_a, outlet.remote_start_id = None, 0.0, None
        outlet.status = "Available" if outlet.operative else "Unavailable"
        self.profiles = [p for p in self.profiles
                         if p.purpose != "TxProfile" or p.evse_id != outlet.number]
        self.plan.append(functools.partial(self.tell_status, outlet))


class SimulatedStation16(SimulatedStation):
    """A Charge Point that speaks 1.6."""

    protocol = "ocpp1.6"
    reset_reason, list_version_field = "SoftReset", "listVersion"

    def boot_payload(self) -> dict:
        return {"chargePointVendor": "ocppboard", "chargePointModel": "Simulator",
                "chargePointSerialNumber": self.identity[:25], "firmwareVersion": VERSION}

    async def tell_status(self, outlet: Outlet) -> None:
        await self.call("StatusNotification", {
            "connectorId": outlet.number, "errorCode": "NoError", "status": outlet.status,
            "timestamp": self.now()})

    async def authorize(self, outlet: Outlet) -> None:
        answer = await self.call("Authorize", {"idTag": outlet.id_token[:20]})
        if answer.get("idTagInfo", {}).get("status") != "Accepted":
            self.plan.clear()
            self.after_stop(outlet)

    async def start(self, outlet: Outlet) -> None:
        answer = await self.call("StartTransaction", {
            "connectorId": outlet.number, "idTag": outlet.id_token[:20],
            "meterStart": int(outlet.energy_wh), "timestamp": self.now()})
        outlet.begin(self.clock(), answer.get("transactionId"))
        outlet.advance(self.clock(), self.limit_a(outlet))
        outlet.status = self.charging_status(outlet)
        self.plan.append(functools.partial(self.tell_status, outlet))

    @staticmethod
    def charging_status(outlet: Outlet) -> str:
        return ("Charging" if outlet.current_a else
                "SuspendedEVSE" if outlet.offered_a < 6 else "SuspendedEV")

    async def meter(self, outlet: Outlet) -> None:
        outlet.advance(self.clock(), self.limit_a(outlet))
        outlet.readings += 1
        if outlet.transaction_id is not None and outlet.status != self.charging_status(outlet):
            outlet.status = self.charging_status(outlet)
            self.plan.append(functools.partial(self.tell_status, outlet))
        payload = {"connectorId": outlet.number, "meterValue": [
            {"timestamp": self.now(), "sampledValue": self.sampled(outlet)}]}
        if outlet.transaction_id is not None:
            payload["transactionId"] = outlet.transaction_id
        await self.call("MeterValues", payload)

    def sampled(self, outlet: Outlet) -> list[dict]:
        values: list[tuple[str, str, str, str | None]] = [
            (REGISTER, f"{outlet.energy_wh:.0f}", "Wh", None),
            ("Power.Active.Import", f"{outlet.power_w:.0f}", "W", None),
            ("SoC", f"{outlet.soc:.0f}", "Percent", None)]
        values += [("Current.Import", f"{amps:.1f}", "A", phase)
                   for phase, amps in outlet.currents()]
        return [{"measurand": measurand, "value": value, "unit": unit,
                 "context": "Sample.Periodic"} | ({"phase": phase} if phase else {})
                for measurand, value, unit, phase in values]

    async def stop(self, outlet: Outlet, reason: str = "EVDisconnected") -> None:
        outlet.advance(self.clock(), self.limit_a(outlet))
        await self.call("StopTransaction", {
            "transactionId": outlet.transaction_id, "meterStop": int(outlet.energy_wh),
            "timestamp": self.now(), "reason": reason})
        self.after_stop(outlet)

    def on_remote_start_transaction(self, payload: dict) -> dict:
        if profile := payload.get("chargingProfile"):
            self.keep_profile(profile, profile["chargingSchedule"], payload.get("connectorId", 0),
                              profile["chargingProfileId"], starting=True)
        return self.start_remotely(payload.get("connectorId"), payload["idTag"])

    def on_remote_stop_transaction(self, payload: dict) -> dict:
        return self.stop_remotely(payload["transactionId"])

    def on_change_availability(self, payload: dict) -> dict:
        return self.change_availability(payload["connectorId"], payload["type"] == "Operative")

    def on_set_charging_profile(self, payload: dict) -> dict:
        profile = payload["csChargingProfiles"]
        return self.keep_profile(profile, profile["chargingSchedule"], payload["connectorId"],
                                 profile["chargingProfileId"])

    def on_clear_charging_profile(self, payload: dict) -> dict:
        names = {"id": "id", "connectorId": "evse_id", "chargingProfilePurpose": "purpose",
                 "stackLevel": "stack_level"}
        return self.clear_profiles({names[k]: v for k, v in payload.items() if k in names})

    def on_get_composite_schedule(self, payload: dict) -> dict:
        return {"status": "Accepted", "connectorId": payload["connectorId"],
                "scheduleStart": self.now(),
                "chargingSchedule": self.composite_schedule(payload["connectorId"],
                                                            payload["duration"])}

    def on_trigger_message(self, payload: dict) -> dict:
        return self.trigger(payload["requestedMessage"], payload.get("connectorId"))

    def on_get_configuration(self, payload: dict) -> dict:
        keys = payload.get("key") or list(self.configuration)
        return {"configurationKey": [{"key": key, "readonly": False,
                                      "value": self.configuration[key]}
                                     for key in keys if key in self.configuration],
                "unknownKey": [key for key in keys if key not in self.configuration]}

    def on_change_configuration(self, payload: dict) -> dict:
        if payload["key"] not in self.configuration:
            return {"status": "NotSupported"}
        self.configuration[payload["key"]] = payload["value"]
        return {"status": "Accepted"}


class SimulatedStation201(SimulatedStation):
    """A Charging Station that speaks 2.0.1."""

    protocol = "ocpp2.0.1"
    preparing = "Occupied"
    reset_reason, list_version_field = "ImmediateReset", "versionNumber"

    def boot_payload(self) -> dict:
        return {"reason": "PowerUp", "chargingStation": {
            "vendorName": "ocppboard", "model": "Simulator", "serialNumber": self.identity[:25],
            "firmwareVersion": VERSION}}

    async def tell_status(self, outlet: Outlet) -> None:
        await self.call("StatusNotification", {
            "timestamp": self.now(), "connectorStatus": outlet.status, "evseId": outlet.number,
            "connectorId": 1})

    async def authorize(self, outlet: Outlet) -> None:
        answer = await self.call("Authorize", {"idToken": self.id_token(outlet)})
        if answer.get("idTokenInfo", {}).get("status") != "Accepted":
            self.plan.clear()
            self.after_stop(outlet)

    def id_token(self, outlet: Outlet) -> dict:
        return {"idToken": outlet.id_token[:36], "type": "ISO14443"}

    async def transaction_event(self, outlet: Outlet, kind: str, trigger: str, **info: Any) -> None:
        outlet.advance(self.clock(), self.limit_a(outlet))
        state = SimulatedStation16.charging_status(outlet)
        state = "EVConnected" if kind == "Ended" else state
        payload = {
            "eventType": kind, "timestamp": self.now(), "triggerReason": trigger,
            "seqNo": outlet.sequence, "evse": {"id": outlet.number, "connectorId": 1},
            "transactionInfo": {"transactionId": outlet.transaction_id,
                                "chargingState": state} | info,
            "meterValue": [{"timestamp": self.now(), "sampledValue": self.sampled(outlet, kind)}]}
        if kind == "Started":
            payload["idToken"] = self.id_token(outlet)
        outlet.sequence += 1
        await self.call("TransactionEvent", payload)

    def sampled(self, outlet: Outlet, kind: str = "Updated") -> list[dict]:
        context = {"Started": "Transaction.Begin", "Ended": "Transaction.End"}.get(
            kind, "Sample.Periodic")
        values: list[tuple[str, float, str, str | None]] = [
            (REGISTER, outlet.energy_wh, "Wh", None),
            ("Power.Active.Import", outlet.power_w, "W", None),
            ("SoC", outlet.soc, "Percent", None)]
        values += [("Current.Import", amps, "A", phase) for phase, amps in outlet.currents()]
        return [{"measurand": measurand, "value": round(value, 2), "context": context,
                 "unitOfMeasure": {"unit": unit}} | ({"phase": phase} if phase else {})
                for measurand, value, unit, phase in values]

    async def start(self, outlet: Outlet) -> None:
        outlet.begin(self.clock(), str(uuid.uuid4()))
        remote = {}
        if outlet.remote_start_id is not None:
            remote["remoteStartId"] = outlet.remote_start_id
        await self.transaction_event(outlet, "Started", "RemoteStart" if remote else "Authorized",
                                     **remote)

    async def meter(self, outlet: Outlet) -> None:
        outlet.readings += 1
        if outlet.transaction_id is not None:
            await self.transaction_event(outlet, "Updated", "MeterValuePeriodic")
            return
        outlet.advance(self.clock(), self.limit_a(outlet))
        await self.call("MeterValues", {"evseId": outlet.number, "meterValue": [
            {"timestamp": self.now(), "sampledValue": self.sampled(outlet)}]})

    async def stop(self, outlet: Outlet, reason: str = "EVDisconnected") -> None:
        triggers = {"EVDisconnected": "EVCommunicationLost", "Remote": "RemoteStop"}
        await self.transaction_event(outlet, "Ended", triggers.get(reason, "ResetCommand"),
                                     stoppedReason=reason)
        self.after_stop(outlet)

    def on_request_start_transaction(self, payload: dict) -> dict:
        if profile := payload.get("chargingProfile"):
            self.keep_profile(profile, profile["chargingSchedule"][0], payload.get("evseId", 0),
                              profile["id"], starting=True)
        return self.start_remotely(payload.get("evseId"), payload["idToken"]["idToken"],
                                   payload["remoteStartId"])

    def on_request_stop_transaction(self, payload: dict) -> dict:
        return self.stop_remotely(payload["transactionId"])

    def on_change_availability(self, payload: dict) -> dict:
        return self.change_availability(payload.get("evse", {}).get("id", 0),
                                        payload["operationalStatus"] == "Operative")

    def on_set_charging_profile(self, payload: dict) -> dict:
        profile = payload["chargingProfile"]
        return self.keep_profile(profile, profile["chargingSchedule"][0], payload["evseId"],
                                 profile["id"])

    def on_clear_charging_profile(self, payload: dict) -> dict:
        criteria = payload.get("chargingProfileCriteria", {})
        names = {"evseId": "evse_id", "chargingProfilePurpose": "purpose",
                 "stackLevel": "stack_level"}
        wanted = {names[k]: v for k, v in criteria.items() if k in names}
        if "chargingProfileId" in payload:
            wanted["id"] = payload["chargingProfileId"]
        return self.clear_profiles(wanted)

    def on_get_composite_schedule(self, payload: dict) -> dict:
        schedule = self.composite_schedule(payload["evseId"], payload["duration"])
        return {"status": "Accepted", "schedule": schedule | {
            "evseId": payload["evseId"], "scheduleStart": self.now()}}

    def on_trigger_message(self, payload: dict) -> dict:
        return self.trigger(payload["requestedMessage"], payload.get("evse", {}).get("id"))

    def on_get_variables(self, payload: dict) -> dict:
        results = []
        for one in payload["getVariableData"]:
            value = self.configuration.get(one["variable"]["name"])
            results.append({
                "component": one["component"], "variable": one["variable"],
                "attributeStatus": "UnknownVariable" if value is None else "Accepted"}
                | ({} if value is None else {"attributeValue": value}))
        return {"getVariableResult": results}

    def on_set_variables(self, payload: dict) -> dict:
        results = []
        for one in payload["setVariableData"]:
            known = one["variable"]["name"] in self.configuration
            if known:
                self.configuration[one["variable"]["name"]] = one["attributeValue"]
            results.append({"component": one["component"], "variable": one["variable"],
                            "attributeStatus": "Accepted" if known else "UnknownVariable"})
        return {"setVariableResult": results}

    def on_get_base_report(self, payload: dict) -> dict:
        self.plan.appendleft(functools.partial(self.call, "NotifyReport", {
            "requestId": payload["requestId"], "generatedAt": self.now(), "seqNo": 0, "tbc": False,
            "reportData": [{"component": {"name": "OCPPCommCtrlr"}, "variable": {"name": name},
                            "variableAttribute": [{"value": value}]}
                           for name, value in self.configuration.items()]}))
        return {"status": "Accepted"}

    def on_get_transaction_status(self, payload: dict) -> dict:
        ongoing = any(o.transaction_id == payload.get("transactionId") for o in self.outlets)
        answer = {"messagesInQueue": False}
        return answer | ({"ongoingIndicator": ongoing} if "transactionId" in payload else {})


class SimulatedStation21(SimulatedStation201):
    """A Charging Station that speaks 2.1: of what it does, all is as in 2.0.1."""

    protocol = "ocpp2.1"


SIMULATED = {kind.protocol: kind
             for kind in (SimulatedStation16, SimulatedStation201, SimulatedStation21)}


async def simulate(url: str, stations: int, protocol: str, duration: float, rate: float,
                   password: str = "", prefix: str = "SIM-", stay: float = 0.0,
                   faults: Sequence[str] = ()) -> int:
    """Run stations, tell how they fare, and sum up. Returns the exit status: 1 if none got through.

    `rate` is Calls per second of all together, 0: one in two seconds from each; `duration` 0: until
    interrupted; `stay` seconds a car stays, 0: for 20 meter values. The first station has the first
    of the faults, the second the second.
    """
    latencies: deque = deque(maxlen=100_000)
    kinds = list(SIMULATED.values()) if protocol == "all" else [SIMULATED[protocol]]
    width = max(3, len(str(stations)))
    fleet: list[SimulatedStation] = [
        kinds[n % len(kinds)](f"{prefix}{n + 1:0{width}}", url.rstrip("/"),
                              (rate or stations / 2) / stations, 1, password, latencies, stay,
                              faults[n:n + 1])
        for n in range(stations)]
    tasks = [asyncio.create_task(station.run()) for station in fleet]
    started = time.monotonic()
    try:
        while not duration or time.monotonic() - started < duration:
            left = duration - (time.monotonic() - started) if duration else math.inf
            await asyncio.sleep(min(2.0, max(0.0, left)))
            _tell_progress(fleet, time.monotonic() - started)
    except asyncio.CancelledError:
        pass                             # Ctrl-C: still sum up
    elapsed = time.monotonic() - started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    calls, errors = sum(s.calls for s in fleet), sum(s.errors for s in fleet)
    print(f"\n{calls} calls in {elapsed:.0f} s: {calls / elapsed:.1f} calls/s, "
          f"{errors} CALLERRORs; latency {_percentiles(latencies)}")
    return 0 if calls else 1


def _tell_progress(fleet: list[SimulatedStation], elapsed: float) -> None:
    calls, errors = sum(s.calls for s in fleet), sum(s.errors for s in fleet)
    charging = sum(o.transaction_id is not None for s in fleet for o in s.outlets)
    line = (f"{elapsed:4.0f} s  {sum(s.online for s in fleet)} online, {charging} charging, "
            f"{calls} calls, {calls / elapsed:.1f}/s, {errors} CALLERRORs")
    print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def _percentiles(latencies: Iterable[float]) -> str:
    ordered = sorted(latencies)
    if not ordered:
        return "unknown"
    return ", ".join(f"p{p:g} {ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]:.2f} ms"
                     for p in (50, 90, 99))


# --- Bench --------------------------------------------------------------------------------
# What a Call costs, beside a bare Tornado handler in the same run: machines differ, and each of
# them from minute to minute. Servers and load are processes of their own, on cores of their own
# where the system can pin them; listeners and poller run in the process that starts the others.

BENCH_HOST, BENCH_TIMEOUT_S = "127.0.0.1", 20            # for a start, and for a single answer
BENCH_STATIONS = 900                 # at most; select() takes files up to 1024
BENCH_MIX = ("MeterValues", "StatusNotification", "MeterValues", "Heartbeat", "MeterValues")
BENCH_FIRST_ID, BENCH_FIRST_WH, BENCH_W = 10_000_000, 1_000_000, 11_040
BENCH_SESSION = 50                   # Calls; the first two stop a transaction and start the next
BENCH_CONFIG = f"""
server = {{ address = "{BENCH_HOST}", port = 0 }}
auth = {{ mode = "none" }}
ocpp = {{ validate = "off", max_calls_per_second = 0 }}
"""
POLLED, POLL_S = ("/api/overview", "/api/messages?limit=100"), 0.2
# A mask of four equal bytes changes a text in the same way wherever it stands. So the frames are
# prepared, and what is new in a Call is written, masked, over these places in them.
MASK = b"\x5a\x5a\x5a\x5a"
MASKED = bytes(byte ^ MASK[0] for byte in range(256))    # for bytes.translate
PLACES = ID_PLACE, TIME_PLACE, WH_PLACE = "<id 8>--", "<ISO 8601 with ms and Z>", "<Wh 7>-"


class BenchError(Exception):
    """A part of the bench failed; the text says why."""


class BenchCase(NamedTuple):
    """A row of the table: a server and the load on it."""

    server: str                          # bare, board or relay
    name: str
    against: str = ""                    # the name of the row that the ratios refer to
    rate: float = 0                      # Calls a second; 0: closed loop
    listeners: int = 0                   # SSE clients of /api/stream
    pollers: int = 0                     # of POLLED
    state: bool = False                  # whether the board has a state file


BARE, BARE_OPEN = "bare handler", "bare handler, 500/s"
BENCH_CASES = (
    BenchCase("bare", BARE),
    BenchCase("board", "board", BARE),
    BenchCase("board", "board, one listener", BARE, listeners=1),
    BenchCase("relay", "board, relayed to a second board", "board"),
    BenchCase("bare", BARE_OPEN, rate=500),
    BenchCase("board", "board, 500/s, 20 listeners, a poller", BARE_OPEN, 500, 20, 1),
    BenchCase("board", "the same with a state file", BARE_OPEN, 500, 20, 1, state=True),
)


def prepared_calls(transaction_id: int) -> list[tuple[bytearray, list[slice]]]:
    """The Calls of BENCH_MIX for a station that charges: frames, and where their PLACES are."""
    sampled = [{"value": WH_PLACE, "context": "Sample.Periodic", "measurand": REGISTER,
                "unit": "Wh"},
               {"value": f"{BENCH_W}", "measurand": "Power.Active.Import", "unit": "W"},
               {"value": "57", "measurand": "SoC", "unit": "Percent"}]
    sampled += [{"value": "16.02", "measurand": "Current.Import", "phase": phase, "unit": "A"}
                for phase in ("L1", "L2", "L3")]
    payloads = {
        "Heartbeat": {},
        "StatusNotification": {"connectorId": 1, "errorCode": "NoError", "status": "Charging",
                               "timestamp": TIME_PLACE},
        "MeterValues": {"connectorId": 1, "transactionId": transaction_id, "meterValue": [
            {"timestamp": TIME_PLACE, "sampledValue": sampled}]}}
    return [_prepared(to_json([2, ID_PLACE, action, payloads[action]])) for action in BENCH_MIX]


def _prepared(text: str) -> tuple[bytearray, list[slice]]:
    size = len(text)
    head = bytes((WHOLE_TEXT, 0x80 | min(size, 126)))
    head += (size.to_bytes(2, "big") if size >= 126 else b"") + MASK
    starts = [(len(head) + text.index(place), len(place)) for place in PLACES if place in text]
    return (bytearray(head + text.encode().translate(MASKED)),
            [slice(start, start + length) for start, length in starts])


class LoadStation:
    """A 1.6 station of the load: once made, it is connected, has booted, and charges.

    With `session`, it ends its transaction and starts another one every so many Calls.
    """

    def __init__(self, port: int, number: int, session: int = 0):
        self.due_mono: deque[float] = deque()    # of the Call under way, and of those that wait
        self._id = BENCH_FIRST_ID + number       # so that not all send the same at a time
        self._session, self._starts = session, False
        self.is_durable = False          # of the Call under way: it stops or starts a transaction
        self._codec, key = Codec(True, 1 << 20), base64.b64encode(os.urandom(16)).decode()
        self.socket = socket.create_connection((BENCH_HOST, port), BENCH_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(http_head(f"GET /ocpp/BENCH-{number:03} HTTP/1.1", {
            "Host": BENCH_HOST, "Upgrade": "websocket", "Connection": "Upgrade",
            "Sec-WebSocket-Key": key, "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Protocol": "ocpp1.6"}))
        read_answer(self.socket.recv(HEAD_BYTES), key, ["ocpp1.6"])
        self._setup("BootNotification", {"chargePointVendor": "-", "chargePointModel": "Bench"})
        started = self._setup("StartTransaction", {
            "connectorId": 1, "idTag": "BENCH", "meterStart": BENCH_FIRST_WH,
            "timestamp": iso(time.time())})
        self._charge(started["transactionId"])
        self.socket.setblocking(False)

    def _charge(self, transaction_id: int) -> None:
        self._transaction_id, self._calls = transaction_id, prepared_calls(transaction_id)

    def _setup(self, action: str, payload: dict) -> dict:
        self._id += 1
        call = to_json([2, str(self._id), action, payload])
        self.socket.sendall(self._codec.frame(TEXT_FRAME, call.encode()))
        while not (answer := self.answer()):
            pass
        return json.loads(answer)[2]

    def call(self, due_mono: float, now_texts: list[bytes]) -> None:
        """A Call falls due: sent now, or, as late, when the one before it is answered."""
        self.due_mono.append(due_mono)
        if len(self.due_mono) == 1:
            self.send(now_texts)

    def send(self, now_texts: list[bytes]) -> None:
        """Send the next Call; `now_texts` are time and register, masked."""
        self._id += 1
        in_session = self._id % self._session if self._session else 2
        self.is_durable, self._starts = in_session < 2, in_session == 1
        if self.is_durable:
            self._send_durable(*(text.translate(MASKED).decode() for text in now_texts))
            return
        frame, places = self._calls[self._id % len(BENCH_MIX)]
        texts = ((b"%d" % self._id).translate(MASKED), *now_texts)
        for place, text in zip(places, texts, strict=False):     # Heartbeat has only the id
            frame[place] = text
        self.socket.send(frame)

    def _send_durable(self, at: str, wh: str) -> None:
        action, payload = "StopTransaction", {
            "transactionId": self._transaction_id, "meterStop": int(wh), "timestamp": at}
        if self._starts:
            action, payload = "StartTransaction", {
                "connectorId": 1, "idTag": "BENCH", "meterStart": int(wh), "timestamp": at}
        call = to_json([2, str(self._id), action, payload])
        self.socket.send(self._codec.frame(TEXT_FRAME, call.encode()))

    def answer(self) -> str:
        """The CallResult to the Call under way; "" while it is not there as a whole."""
        data = self.socket.recv(READ_BYTES)
        text = "".join(f"{content}" for opcode, content in self._codec.feed(data)
                       if opcode != PING_FRAME)
        wrong = text and not (text.startswith(f'[3,"{self._id}",{{') and text.endswith("}]"))
        if wrong or not data:
            raise BenchError(f"a Call was answered {text[:200]}" if data
                             else "the server closed a connection")
        if text and self._starts:
            self._charge(json.loads(text)[2]["transactionId"])
        return text


class Load:
    """Stations that call: each when it has its answer, or all together `rate` times a second."""

    def __init__(self, port: int, stations: int, rate: float = 0):
        self.latencies_s: list[float] = []       # from when a Call fell due to its answer
        self.durable_s: list[float] = []         # those of starts and stops
        session = BENCH_SESSION if rate else 0   # in a closed loop it would be hundreds a second
        self._stations = deque(LoadStation(port, number, session) for number in range(stations))
        # epoll waits for whole milliseconds: too coarse where Calls fall due in between.
        self._selector = selectors.SelectSelector() if rate else selectors.DefaultSelector()
        self._rate, self._began_mono = rate, time.monotonic()
        self._next_mono = self._began_mono if rate else math.inf     # when a Call falls due
        for station in self._stations:
            self._selector.register(station.socket, selectors.EVENT_READ, station)
            if not rate:
                station.call(self._began_mono, self._texts())

    def run(self, seconds: float) -> None:
        """Go on for so long. Raises: BenchError at the first answer that is no CallResult."""
        until_mono = time.monotonic() + seconds
        while (now := time.monotonic()) < until_mono:
            texts = self._texts()
            while self._next_mono <= now:
                self._stations[0].call(self._next_mono, texts)
                self._stations.rotate(-1)
                self._next_mono += 1 / self._rate
            for key, _ in self._selector.select(min(self._next_mono, until_mono) - now):
                if key.data.answer():
                    due_mono, now = key.data.due_mono.popleft(), time.monotonic()
                    self.latencies_s.append(now - due_mono)
                    if key.data.is_durable:
                        self.durable_s.append(now - due_mono)
                    if key.data.due_mono:
                        key.data.send(texts)
                    elif not self._rate:
                        key.data.call(now, texts)

    def _texts(self) -> list[bytes]:
        """Time and register of now, masked."""
        wh = BENCH_FIRST_WH + BENCH_W * (time.monotonic() - self._began_mono) / 3600
        return [f"{text}".encode().translate(MASKED) for text in (iso(time.time()), int(wh))]


def put_load(port: int, pid: int, stations: int, seconds: float, rate: float = 0) -> dict:
    """Put load on the server `pid`, and measure both. Raises: BenchError."""
    server, load = psutil.Process(pid), Load(port, stations, rate)
    load.run(max(0.3, seconds / 4))
    load.latencies_s.clear()
    load.durable_s.clear()
    began_mono, own_s, server_s = time.monotonic(), time.process_time(), _cpu_s(server)
    load.run(seconds)
    elapsed_s, own_s = time.monotonic() - began_mono, time.process_time() - own_s
    server_s, ordered = _cpu_s(server) - server_s, sorted(load.latencies_s)
    if not (calls := len(ordered)):
        raise BenchError("no Call was answered")
    durable = sorted(load.durable_s) or ordered
    return {"calls": calls, "rate": calls / elapsed_s, "cpuUs": server_s / calls * 1e6,
            "loadPercent": own_s / elapsed_s * 100, "p50Ms": ordered[calls // 2] * 1000,
            "p99Ms": ordered[calls * 99 // 100] * 1000, "durable": len(load.durable_s),
            "durableP99Ms": durable[len(durable) * 99 // 100] * 1000}


def _cpu_s(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])                  # user and system


async def serve_bare() -> None:
    """The least that answers: Tornado's own WebSocket handler, JSON in and JSON out."""
    # The daemon has no use for it, and it takes memory.
    from tornado.websocket import WebSocketHandler

    class Bare(WebSocketHandler):
        def select_subprotocol(self, subprotocols: list[str]) -> str | None:
            return subprotocols[0]

        def on_message(self, message: str | bytes) -> None:
            _, id_text, action, _ = json.loads(message)
            answer: dict = {}
            if action == "Heartbeat":
                answer = {"currentTime": iso(time.time())}
            elif action == "StartTransaction":
                answer = {"transactionId": 1, "idTagInfo": {"status": "Accepted"}}
            self.write_message(to_json([3, id_text, answer]))

    sockets = bind_sockets(0, BENCH_HOST)
    HTTPServer(Application([("/.*", Bare)], log_function=lambda _: None)).add_sockets(sockets)
    print(f"http://{BENCH_HOST}:{sockets[0].getsockname()[1]}/", flush=True)
    await asyncio.Event().wait()


def pin(pid: int, core: int | None) -> None:
    """Keep a process on a core; 0 is this process."""
    if core is not None:
        os.sched_setaffinity(pid, {core})


@contextlib.asynccontextmanager
async def part(core: int | None, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """This file as a process of its own, without the user's settings; ended at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *arguments, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT)})
    try:
        pin(process.pid, core)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.communicate(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()


async def started(process: asyncio.subprocess.Process) -> str:
    """The URL that a server prints when it listens. Raises: BenchError."""
    line, stdout = "no word from it", process.stdout or asyncio.StreamReader()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BENCH_TIMEOUT_S):
            while said := await stdout.readline():
                line = said.decode(errors="replace").strip()
                if url := re.search(rf"http://{BENCH_HOST}:\d+", line):
                    return url[0]
            await process.wait()         # a signal to it would take its end from asyncio
    raise BenchError(f"a server did not start: {line}")


async def watch(case: BenchCase, client: Any, url: str) -> None:
    """Listen and poll as the case says, until cancelled. Raises: what ends one of them."""
    async def listen() -> None:
        await client.fetch(f"{url}/api/stream", streaming_callback=lambda data: None,
                           request_timeout=0)
        raise BenchError("a stream ended")

    async def poll() -> None:
        while True:
            for path in POLLED:
                await client.fetch(url + path)
            await asyncio.sleep(POLL_S)

    await asyncio.gather(asyncio.Event().wait(), *(listen() for _ in range(case.listeners)),
                         *(poll() for _ in range(case.pollers)))


def bench_config(folder: str, upstream: str = "", state: bool = False) -> str:
    """Write the configuration of a board: one that relays to `upstream`, or has a state file."""
    name = secrets.token_hex(4)
    path, url = Path(folder, f"{name}.toml"), upstream.replace("http", "ws") + "/ocpp"
    path.write_text(BENCH_CONFIG + (f'[[proxy.upstream]]\nurl = "{url}"\n' if upstream else "")
                    + (f"[state]\npath = '{Path(folder, name)}.db'\n" if state else ""))
    return str(path)


async def run_case(case: BenchCase, cores: list, folder: str, stations: int,
                   seconds: float) -> dict:
    """What `put_load` measures in a case, and the server's memory. Raises: BenchError."""
    # The daemon has no use for it, and it takes memory.
    from tornado.httpclient import AsyncHTTPClient

    client = AsyncHTTPClient(force_instance=True, max_clients=100, max_body_size=1 << 40)
    board, arguments, upstream = ("run", "--log-level", "error", "--config"), [], ""
    async with contextlib.AsyncExitStack() as parts:
        parts.callback(client.close)
        if case.server == "relay":
            second = await parts.enter_async_context(part(cores[-1], *board, bench_config(folder)))
            upstream = await started(second)
        server = await parts.enter_async_context(part(cores[0], *(
            ("bench", "--part", "bare") if case.server == "bare" else
            (*board, bench_config(folder, upstream, case.state)))))
        url, memory = await started(server), psutil.Process(server.pid).memory_info
        start_mb = memory().rss / 1e6
        for name, value in {"part": "load", "url": url, "pid": server.pid, "rate": case.rate,
                            "stations": stations, "seconds": seconds}.items():
            arguments += [f"--{name}", str(value)]
        load = await parts.enter_async_context(part(cores[1 % len(cores)], "bench", *arguments))
        watching = asyncio.create_task(watch(case, client, url))
        parts.callback(watching.cancel)
        output, _ = await load.communicate()
        if load.returncode or watching.done():
            last_line = output.decode(errors="replace").strip().rpartition("\n")[2]
            raise BenchError(f"{case.name}: "
                             f"{last_line if load.returncode else watching.exception()}")
        result = json.loads(output) | {"startMb": start_mb, "endMb": memory().rss / 1e6}
        if upstream:
            answer = await client.fetch(f"{upstream}/api/overview", raise_error=False)
            arrived = json.loads(answer.body or "{}").get("totalMessages", 0)
            if arrived < 2 * result["calls"]:            # each of them with its answer
                raise BenchError(f"{case.name}: only {arrived} messages arrived there")
        return result


async def run_bench(folder: str, stations: int, seconds: float, pairs: int) -> str:
    """All cases in turn, and that `pairs` times: the table in Markdown. Raises: BenchError."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))       # it ends the parts, too
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    pin(0, cores[1 % len(cores)])
    runs: dict[str, list[dict]] = {case.name: [] for case in BENCH_CASES}
    for _ in range(pairs):
        for case in BENCH_CASES:
            run = await run_case(case, cores, folder, stations, seconds)
            runs[case.name].append(run)
            print(f"{case.name}: {run['rate']:,.0f} Calls/s", file=sys.stderr)
    busiest = max(run["loadPercent"] for cases in runs.values() for run in cases)
    return "\n".join([
        *bench_rows(runs), "", f"{_processor()}, {os.cpu_count()} cores; Python "
        f"{sys.version.split()[0]}, Tornado {tornado.version}; {stations} stations, medians of "
        f"{pairs} runs of {seconds:g} s; the load had its core busy {busiest:.0f} % of the time at "
        "most. Ratios: to the bare Tornado handler under the same load; of the relay, to the "
        "board alone."])


def bench_rows(runs: dict[str, list[dict]]) -> list[str]:
    """The table: medians, and medians of the ratios to the runs beside them."""
    def median(values: Iterable[float]) -> float:
        ordered = sorted(values)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def ratio(case: BenchCase, key: str) -> str:
        beside = zip(runs[case.name], runs.get(case.against, ()), strict=False)
        ratios = [run[key] / other[key] for run, other in beside]
        return f"{median(ratios):.2f}" if ratios else ""

    rows = ["| | Calls/s | ratio | CPU per Call, µs | ratio | p50, ms | p99, ms | of starts and "
            "stops | MB at start | at end |", "|---|" + "--:|" * 9]
    for case in BENCH_CASES:
        of = {key: median(run[key] for run in runs[case.name]) for key in runs[case.name][0]}
        # The bare handler runs from this file, too: its memory says nothing.
        memory = f"{of['startMb']:.0f} | {of['endMb']:.0f}" if case.against else " | "
        # In a closed loop the server chooses whom it answers next, and with it the latencies.
        latency = " | ".join(f"{of[key]:.1f}" if case.rate else "" for key in (
            "p50Ms", "p99Ms", "durableP99Ms"))
        rows.append(f"| {case.name} | {of['rate']:,.0f} | {ratio(case, 'rate')} | "
                    f"{of['cpuUs']:.0f} | {ratio(case, 'cpuUs')} | {latency} | {memory} |")
    return rows


POWER_STATIONS, POWER_CARS, POWER_CIRCUITS = 1000, 200, 20


def bench_power(seconds: int) -> str:
    """How long the power controller takes for a second of a large site, and `decide` of that."""
    config = read_config(environ={
        "OCPPBOARD_CONFIG": os.devnull, "OCPPBOARD_SMART_CHARGE_ENABLED": "true",
        "OCPPBOARD_SMART_CHARGE_SITE_LIMIT_A": "2000", "OCPPBOARD_STORE_MAX_CONNECTIONS": "2000",
        "OCPPBOARD_OCPP_ACCEPT": "listed"})
    config.smart_charge.circuit = [SimpleNamespace(
        name=f"C-{n:02}", parent="", limit_a=120.0, stations=[f"BENCH-{n:02}-*"])
        for n in range(POWER_CIRCUITS)]
    now = [time.time()]
    board = Board(config, lambda: now[0])
    controller, links = Controller(board), []
    controller.settled_mono = -math.inf
    for number in range(POWER_STATIONS):
        link = Link(board, None, "ocpp1.6", lambda text: None, lambda code, reason: None)
        link.start(f"BENCH-{number % POWER_CIRCUITS:02}-{number}", "127.0.0.1", 0, ())
        link.receive('[2,"1","StatusNotification",{"connectorId":1,"errorCode":"NoError",'
                     '"status":"Available"}]')
        links.append(link)
    ticks, decisions = [], []
    for second in range(seconds):
        now[0] += 1
        if second == seconds // 3:
            for link in links[::POWER_STATIONS // POWER_CARS]:
                link.receive(f'[2,"2","StartTransaction",{{"connectorId":1,"idTag":"A",'
                             f'"meterStart":0,"timestamp":"{iso(now[0])}"}}]')
        began = time.process_time()
        commands = controller.tick()
        ticks.append(time.process_time() - began)
        for command in commands:
            controller.answered(command, {"status": "Accepted"})
    requests = [request for fact in controller.facts
                if (request := controller.request(fact, board.mono()))]
    for _ in range(20):
        began = time.process_time()
        decide(controller.site.circuits(), requests, {}, "equal_share", now[0])
        decisions.append(time.process_time() - began)
    lasting = sorted(ticks[seconds // 2:])
    return (f"Smart charging with {POWER_STATIONS:,} stations and {len(requests)} cars on "
            f"{POWER_CIRCUITS} circuits: {lasting[len(lasting) // 2] * 1000:.1f} ms a second, of "
            f"which `decide` takes {sorted(decisions)[10] * 1000:.1f} ms.")


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", listed.read_text() if listed.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


def bench(options: argparse.Namespace) -> int:
    """Run the bench, or the part of it that is asked for. Returns the exit status."""
    if options.stations > BENCH_STATIONS:
        raise ConfigError(f"--stations: {BENCH_STATIONS} at most")
    seconds, pairs = (1.0, 1) if options.quick else (options.seconds, options.pairs)
    try:
        if options.part == "bare":
            asyncio.run(serve_bare())
        elif options.part == "load":
            print(to_json(put_load(urlsplit(options.url).port or 0, options.pid, options.stations,
                                   seconds, options.rate)))
        else:
            with tempfile.TemporaryDirectory(prefix="ocppboard-bench-") as folder:
                print(asyncio.run(run_bench(folder, options.stations, seconds, pairs)))
            print(f"\n{bench_power(60 if options.quick else 300)}")
    except (BenchError, OSError, WebSocketError, psutil.Error) as error:
        print(f"ocppboard: bench: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


# --- Daemon -------------------------------------------------------------------------------
# Wires the sections together: routes, periodic work, start and stop, the command line.

HELLO_BYTES = 16                    # by which it is seen who speaks HTTP
TLS_HANDSHAKE = 22                  # the first byte of a ClientHello (RFC 8446 5.1)
TLS_ALERT = bytes.fromhex("15030100020228")              # fatal, handshake_failure (RFC 8446 6)


class BoundedServer(HTTPServer):
    """An HTTP server that closes new connections before the process runs out of files.

    Beyond that no accept works, and the loop would do nothing but fail to. `strangers` is told
    (address, first bytes) of who speaks no HTTP, and gives what they are answered: Tornado would
    wait for the end of a line until it is tired.
    """

    strangers: Callable[[str, bytes], bytes]         # set before it listens

    def handle_stream(self, stream: IOStream, address: tuple) -> None:
        # The lowest free number is given out: it tells how many are open.
        if stream.socket.fileno() >= file_limit() - FILES_SPARE:
            stream.close()
        else:
            self._look(stream, address)

    def _tired(self, stream: IOStream) -> None:
        IOLoop.current().remove_handler(stream.socket)
        stream.close()

    def _looked(self, stream: IOStream, address: tuple, silent: asyncio.TimerHandle) -> None:
        silent.cancel()
        IOLoop.current().remove_handler(stream.socket)
        self._look(stream, address)

    def _look(self, stream: IOStream, address: tuple) -> None:
        """Look at the first bytes, now or when they come; HTTP begins with a method."""
        try:
            first = stream.socket.recv(HELLO_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            silent = asyncio.get_running_loop().call_later(IDLE_HTTP_S, self._tired, stream)
            IOLoop.current().add_handler(
                stream.socket, lambda *_: self._looked(stream, address, silent), IOLoop.READ)
        except OSError:
            stream.close()
        else:
            http = first[:1].isupper() or first[:1] in (b"\r", b"\n")      # RFC 9112 2.2
            if first and not http:
                with contextlib.suppress(OSError):
                    stream.socket.recv(BODY_BYTES)       # unread, it would make the end a reset
                    stream.socket.send(self.strangers(address[0], first))
            if http:
                super().handle_stream(stream, address)
            else:
                stream.close()


def file_limit() -> int:
    """How many files this process may open."""
    if sys.platform == "win32":
        return 1 << 30
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Daemon:
    """The running whole: a Board, its listeners and its periodic work."""

    def __init__(self, config: Config):
        self.config = config
        self.state = State(state_path(config, os.environ))
        self.board = Board(config, state=self.state)
        self.state.tell = self.board.system_event
        self.keeper = Keeper(self.board)
        self.access = Access(self.board)
        wanted = config.ocpp.validate
        self.schemas = Schemas.installed() if wanted != "off" else None
        if self.schemas is None and wanted in ("warn", "strict"):
            raise ConfigError(f'ocpp.validate = "{wanted}" needs the packages ocpp and '
                              "fastjsonschema")
        self.sockets: dict[Link, WebSocket] = {}
        self.streams: set[Api] = set()
        self.board_port = self.ocpp_port = 0             # once they are bound
        self._servers: list[HTTPServer] = []
        self._tasks: set[asyncio.Task] = set()
        self._process = psutil.Process()
        self._lag_s, self._last_turn = 0.0, time.monotonic()
        self._machine: dict = {}
        self.controller = Controller(self.board) if config.smart_charge.enabled else None
        self._periodic = [PeriodicCallback(self._sample, config.telemetry.interval_ms),
                          PeriodicCallback(self._turn, 1000),
                          PeriodicCallback(self.keeper.clean, 3_600_000)]
        if self.controller:
            self._periodic.append(PeriodicCallback(self.steer, 1000))
        self.relay = None
        if config.proxy.upstream:
            self.relay = Relay(self.board, self.schemas, self.spawn, self.controller)
            self._periodic.append(PeriodicCallback(self.relay.tick, 1000 * TICK_S))

    # Start and stop

    def start(self) -> None:
        """Bind the ports and start the periodic work.

        Raises: ConfigError, with the port; StateInUse.
        """
        self.state.open()
        self.keeper.restore()
        if self.controller:
            self.controller.restore()
        self.access.restore()
        for port, application in self._listeners():
            server = BoundedServer(application, xheaders=self.config.server.trust_proxy,
                                idle_connection_timeout=IDLE_HTTP_S, body_timeout=30,
                                max_body_size=16 * BODY_BYTES)
            server.strangers = self._stranger
            try:
                sockets = bind_sockets(port, self.config.server.address or None)
            except (OSError, UnicodeError) as error:     # in use, not allowed, no such address
                raise ConfigError(f"cannot listen on port {port} of "
                                  f"{self.config.server.address or 'all addresses'}: "
                                  f"{getattr(error, 'strerror', '') or 'no address'}") from None
            server.add_sockets(sockets)
            self._servers.append(server)
            self.ocpp_port = sockets[0].getsockname()[1]
            self.board_port = self.board_port or self.ocpp_port
        if self.relay:
            self.relay.start()
        # Tornado's timers go by the wall clock: set back by an hour, all would stand still so long.
        vars(IOLoop.current())["time"] = time.monotonic
        self.spawn("state", self.state.run())
        self.spawn("keeper", self.keeper.run())
        self.spawn("history", self.keeper.history.run())
        self._sample()
        for periodic in self._periodic:
            periodic.start()
        self.board.system_event("STARTED", "", f"ocppboard {VERSION} listens",
                                {"port": self.board_port, "ocppPort": self.ocpp_port})

    def _listeners(self) -> list[tuple[int, Application]]:
        """(port, application) of each listener: the board's first, the stations' last."""
        ocpp, board = self._ocpp_rules(), self._board_rules()
        if not self.config.ocpp.port:
            return [(self.config.server.port, self._application(ocpp + board))]
        strayed = Rule(IsUpgrade(), StationUpgrade, {"daemon": self, "here": False})
        return [(self.config.server.port, self._application([strayed, *board])),
                (self.config.ocpp.port, self._application(ocpp))]

    def _application(self, rules: list) -> Application:
        return Application(rules, default_handler_class=Api,
                           default_handler_args={"daemon": self, "routes": {}},
                           log_function=_log_request)

    def _ocpp_rules(self) -> list:
        arguments = {"daemon": self}
        path = self.config.ocpp.path.rstrip("/")
        looked_at = [Rule(PathMatches(re.escape(path) + "/.*"), StationUpgrade, arguments)]
        return [Rule(IsUpgrade(), StationUpgrade, arguments)] + (looked_at if path else [])

    def _board_rules(self) -> list:
        paths: dict[str, dict] = {}
        for route in (*ROUTES, PAGE_ROUTE):
            paths.setdefault(route.path, {})[route.method] = route
        # A named path with more in it goes before one with a name in that place.
        ordered = sorted(paths.items(), key=lambda item: item[0].count(":"))
        return [Rule(PathMatches(re.sub(r":(\w+)", r"(?P<\1>[^/]+)", re.escape(path)
                                        .replace(r"\:", ":"))), Api,
                     {"daemon": self, "routes": routes}) for path, routes in ordered]

    async def stop(self) -> None:
        """Close everything: stations are told that we go away (1001)."""
        self.board.system_event("STOPPED", "", "ocppboard stops", {})
        for periodic in self._periodic:
            periodic.stop()
        for server in self._servers:
            server.stop()
        if self.relay:
            self.relay.stop()
        for link in list(self.sockets):
            link.end("the central system stops", 1001)
        for stream in self.streams:
            stream.on_connection_close()
        for task in list(self._tasks):
            task.cancel()
        deadline_mono = time.monotonic() + 2
        while self.sockets or self.streams:
            if time.monotonic() > deadline_mono:
                break
            await asyncio.sleep(0.02)
        for server in self._servers:
            await server.close_all_connections()
        await self.keeper.put_changed()
        await self.keeper.history.put_last()
        await self.state.stop()

    def station_urls(self) -> list[str]:
        """What stations connect to, but for their identity at the end."""
        path = self.config.ocpp.path.rstrip("/")
        return [f"ws://{address}:{self.ocpp_port}{path}/"
                for address in _addresses(self.config.server.address)]

    def spawn(self, name: str, coroutine: Any) -> asyncio.Task:
        """Run a task in the background; its failure is logged under its name."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("The task %s failed", task.get_name(), exc_info=task.exception())

    # Periodic work

    def sample(self) -> dict:
        """The telemetry now; of process and host as last measured."""
        return self.board.sample(self._machine | {"streams": len(self.streams)})

    def _sample(self) -> None:
        """Measure process and host, and keep a telemetry sample."""
        memory = self._process.memory_info()
        shared = getattr(memory, "shared", 0)
        self._machine = {
            "memoryUsage": {"rss": memory.rss, "heapUsed": memory.rss - shared,
                            "heapTotal": getattr(memory, "data", memory.rss)},
            "cpuPercent": self._process.cpu_percent(),
            "loopLagMs": round(self._lag_s * 1000, 1),
            "stateFailingSince": iso(self.state.failing_since),
            "host": {"cpuPercent": psutil.cpu_percent(),
                     "memoryPercent": psutil.virtual_memory().percent,
                     "diskPercent": psutil.disk_usage(os.sep).percent},
            "timestamp": iso(self.board.clock()),
        }
        self._lag_s = 0.0
        self.board.sampled(self.sample())

    def _turn(self) -> None:
        """Each second: how late the loop is, whether the clock was set, and who is to be pinged."""
        self.board.watch_clock()
        now = time.monotonic()
        self._lag_s = max(self._lag_s, now - self._last_turn - 1)
        self._last_turn = now
        interval = self.config.ocpp.ping_interval_seconds
        for link, websocket in list(self.sockets.items()):
            if link.station.introduce_mono != math.inf and not link.ended:
                self._introduce(link, now)
            if interval:
                self._keep_alive(link, websocket, now, interval)

    def _introduce(self, link: Link, now: float) -> None:
        """Ask a station once, INTRODUCE_S after its first message, unless it has booted by then.

        One that was accepted before our restart does not boot again (1.6 4.2; 2.0.1 B01).
        """
        station = link.station
        if station.booted_since_start:
            station.introduce_mono = math.inf
        elif station.introduce_mono is None:
            if station.has_spoken:
                station.introduce_mono = now + INTRODUCE_S
        elif now >= station.introduce_mono:
            station.introduce_mono = math.inf
            self.spawn("introduction", introduce(link))

    def _keep_alive(self, link: Link, websocket: WebSocket, now: float, interval: float) -> None:
        """Ping a station; one without any sign for two intervals is gone.

        Some never answer a ping, though they are there: those are judged by their Heartbeats.
        """
        station, silent_s = link.station, now - websocket.last_sign
        if websocket.last_pong is not None and not station.pongs[0]:
            station.pongs = True, station.pongs[1]
        patience_s = 2 * interval
        if not any(station.pongs):
            heartbeat_s = station.heartbeat_s or self.config.ocpp.heartbeat_interval_seconds
            patience_s = max(patience_s, 2 * heartbeat_s)
            if silent_s > 2 * interval and "no_pong" not in station.quirks:
                self.board.quirk(station, "no_pong", in_message=False)
        if silent_s > patience_s:
            self.board.system_event("PONG_TIMEOUT", station.identity,
                                    f"No sign of life for {silent_s:.0f} s",
                                    {"ip": station.remote_address})
            link.end("no answer to pings", 1001)
        else:
            websocket.ping_if_due(now, interval)

    # Stations at the door

    def socket_closed(self, link: Link, code: int, reason: str) -> None:
        """A station's WebSocket has ended: by it, by us, or because it broke the protocol."""
        websocket = self.sockets.pop(link)
        station = link.station
        if link.ended:
            return
        if code == NO_CLOSE:
            link.end("connection lost")
        elif not websocket.closed_by_us:
            link.end(f"closed by the station ({code})")
        else:
            self.board.error("BAD_MESSAGE", station, f"{reason}: its connection was closed",
                             {"closeCode": code})
            self.board.security_event("PROTOCOL_VIOLATION", station.identity,
                                      f"WebSocket: {reason}", "low",
                                      {"ip": station.remote_address, "closeCode": code})
            link.end(f"{reason} ({code})")

    def make_room(self, identity: str) -> None:
        """See that one more station can be connected. Raises: Refused.

        A station with a name in the configuration takes the place of one without.
        """
        most, config = self.config.store.max_connections, self.config
        known = self.board.stations.get(identity)
        if len(self.sockets) < most or (known and known.link):
            return
        strangers = (link for link in reversed(self.sockets)
                     if not link.ended and config.station(link.station.identity) is None)
        stranger = next(strangers, None) if config.station(identity) else None
        if stranger is None:
            raise Refused(503, f"{most} stations are connected (store.max_connections)")
        stranger.end("makes room for a station that the configuration names", 1013)

    def _stranger(self, address: str, first: bytes) -> bytes:
        """Keep that somebody spoke no HTTP on a plain port. Returns what it is answered."""
        advice = f"{self.station_urls()[0]}<identity>"
        if first[0] == TLS_HANDSHAKE:
            reason = f"speaks TLS: use wss, or give it ws://; this port is plain: {advice}"
            self.knocked(address, "", {}, Refused(400, reason), advice)
            return TLS_ALERT
        self.knocked(address, "", {}, Refused(
            400, f"speaks no HTTP: {first.hex()}; a station connects by WebSocket"), advice)
        return b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def knocked(self, address: str, path: str, headers: dict, error: BoardError, advice: str,
                identity: str = "") -> None:
        """Keep that a station was not let in, and why; `advice` is the URL that would work."""
        address, path = kept(address, 64), _SECRET_IN_URL.sub(f"//{HIDDEN}@", kept(path, 500))
        news = self.board.knocked(address, path, headers, error.http_status, str(error), advice)
        if news:
            log.info("Refused an upgrade from %s to %s: %s", address, shown(path),
                     shown(error, 200))
        category = getattr(error, "category", "")        # "": on record already
        if news and category:
            self.board.security_event(
                category, kept(identity, IDENTITY_LENGTH) or "UNKNOWN",
                f"Upgrade refused: {error}", "low", {"ip": address, "path": path})

    def steer(self) -> None:
        """Let the power controller decide, and send what it wants sent."""
        if controller := self.controller:
            for command in controller.tick():
                self.spawn("smart charging", controller.carry_out(command))


def _log_request(handler: RequestHandler) -> None:
    """Requests are noise but for our own failures; the query may hold a token."""
    status = handler.get_status()
    log.log(logging.WARNING if status == 500 else logging.DEBUG, "%s %s: %d from %s",
            shown(handler.request.method), shown(handler.request.path), status,
            handler.request.remote_ip)


def state_path(config: Config, environ: Mapping[str, str]) -> str:
    """The state file: as configured, else where systemd has a folder for it, else none."""
    folder = environ.get("STATE_DIRECTORY", "").partition(":")[0] or (
        config.proxy.journal and (os.path.dirname(config.proxy.journal) or "."))     # before
    return config.state.path or (folder and os.path.join(folder, "ocppboard.db"))


async def run(config: Config) -> Daemon:
    """The daemon's life: start, tell where, wait for a signal, stop."""
    daemon = Daemon(config)
    daemon.start()
    let_memory_go()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    tell_start(daemon)
    await stop.wait()
    log.info("Stopping")
    await daemon.stop()
    return daemon


def tell_check(config: Config) -> None:
    """Say what the configuration changes. Raises: ConfigError, as the start would."""
    Daemon(config)
    print(f"{config.source or 'defaults'}: the configuration is good")
    for setting in SETTINGS:
        value = config.__dict__[setting.section].__dict__[setting.key]
        if value != setting.default:
            shown_value = HIDDEN if setting.key in ("password", "token") else repr(value)
            print(f"  {setting.section}.{setting.key} = {shown_value}")
    for circuit in config.smart_charge.circuit:
        print(f'  circuit "{circuit.name}" at "{circuit.parent or SITE}": {circuit.limit_a:g} A, '
              f"{len(circuit.stations)} stations or patterns")
    for window in config.smart_charge.window:
        print(f"  window {window.__dict__['from']} to {window.to}: {window.factor:g} of the limit")
    for upstream in config.proxy.upstream:
        print(f"  upstream {upstream.url} for {', '.join(upstream.stations)}")
    for pattern in config.stations:
        print(f'  stations."{pattern}"')
    for name in config.ignored:
        print(f"  {name} is of no section and ignored")


def tell_start(daemon: Daemon) -> None:
    """Say what runs and where. The token that was made is printed once, and never logged."""
    config, access = daemon.config, daemon.access
    log.info("ocppboard %s on Python %s, Tornado %s; configuration: %s", VERSION,
             sys.version.split()[0], tornado.version, config.source or "defaults")
    if daemon.schemas:
        log.info("Messages are checked against the official schemas (packages ocpp, "
                 "fastjsonschema)")
    elif config.ocpp.validate != "off":
        log.info("Messages are not checked: install ocpp and fastjsonschema for it")
    for url in daemon.station_urls():
        log.info("Stations connect to %s<identity>", url)
    for upstream in config.proxy.upstream:
        log.info("Stations %s go on to %s/<identity>", ", ".join(upstream.stations),
                 upstream.url.rstrip("/"))
    if daemon.state:
        log.info("What outlives a restart is kept in %s", daemon.state.path)
    else:
        log.info("A restart forgets everything: state.path would keep it")
    if config.ocpp.accept == "any" and any(u.password for u in config.proxy.upstream):
        log.warning("Whoever connects as a station that goes on gets upstream by "
                    "proxy.upstream.password: list the stations, with passwords of their own")
    if config.ocpp.accept == "any":
        log.info('Any station may connect (ocpp.accept = "any")')
    if config.auth.mode == "none":
        log.warning('Anyone who reaches the board may use it (auth.mode = "none")')
    address = config.server.address
    host = "localhost" if _is_every_address(address) else _in_url(address)
    token = f"#token={access.made_token}" if access.made_token else ""
    for name in config.ignored:
        log.warning("%s is of no section and ignored", name)
    with contextlib.suppress(OSError):                   # nobody reads it, or the disk is full
        print(f"The board: http://{host}:{daemon.board_port}/{token}", flush=True)


def _addresses(address: str) -> list[str]:
    """What a station may put into its URL to reach us."""
    if not _is_every_address(address):
        return [_in_url(address)]
    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses
             if a.family == socket.AF_INET and not a.address.startswith("127.")]
    return found[:5] or ["localhost"]


def _is_every_address(address: str) -> bool:
    """Whether a server that listens on it is reached by every address of this machine."""
    try:
        return not address or ip_address(address).is_unspecified
    except ValueError:                   # the name of a host
        return False


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def raise_file_limit() -> None:
    """Allow as many open files as the system lets us: each station is one, and 1024 is usual."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def command_line() -> argparse.ArgumentParser:
    """The commands; `run` is meant where none is named."""
    parser = argparse.ArgumentParser(prog="ocppboard.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"ocppboard {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("run", help="run the daemon (the default)")
    start.add_argument("--config", metavar="FILE")
    start.add_argument("--address", help="instead of server.address")
    start.add_argument("--port", type=int, help="instead of server.port")
    start.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    start.add_argument("--check", action="store_true", help="read the configuration, then exit")
    simulator = commands.add_parser("simulate", help="run simulated stations against a daemon")
    simulator.add_argument("--url", default="ws://127.0.0.1:9000/ocpp")
    simulator.add_argument("--stations", type=_at_least(1, int), default=5)
    simulator.add_argument("--protocol", default="ocpp1.6", choices=(*SIMULATED, "all"))
    simulator.add_argument("--duration", type=_at_least(0, float), default=0.0, metavar="S",
                           help="seconds; 0, the default: until interrupted")
    simulator.add_argument("--rate", type=_at_least(0, float), default=0.0, metavar="R",
                           help="calls per second of all together; 0: half the number of stations")
    simulator.add_argument("--password", default="", help="HTTP Basic password of the stations")
    simulator.add_argument("--prefix", default="SIM-", help="of the identities")
    simulator.add_argument("--stay", type=_at_least(0, float), default=0.0, metavar="S",
                           help="seconds that a car stays; 0, the default: for 20 meter values")
    simulator.add_argument("--fault", action="append", default=[], choices=FAULTS,
                           help="of one more station, the first one first: " + "; ".join(
                               f"{name}: {text}" for name, text in FAULTS.items()))
    measuring = commands.add_parser("bench", help="measure the board beside a bare Tornado handler")
    measuring.add_argument("--seconds", type=_at_least(0.2, float), default=4.0, help="of each run")
    measuring.add_argument("--pairs", type=_at_least(1, int), default=3, help="runs of each case")
    measuring.add_argument("--stations", type=_at_least(1, int), default=100)
    measuring.add_argument("--quick", action="store_true", help="one run of 1 s each")
    for name, kind in (("part", str), ("url", str), ("pid", int), ("rate", float)):
        measuring.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)   # of its processes
    commands.add_parser("hash-password", help="print what stands for a password in the config")
    return parser


def _at_least(least: float, kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        number = kind(text)
        if not least <= number < 1e9:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return number
    read.__name__ = "number"             # argparse names it in its message
    return read


def ask_password() -> str:
    """A password from the terminal, asked twice, or the first line of a pipe."""
    try:
        if not sys.stdin.isatty():
            return sys.stdin.readline().rstrip("\r\n")
        password = getpass.getpass("Password: ")
        if getpass.getpass("Again: ") == password:
            return password
    except (EOFError, UnicodeError):
        raise ConfigError("no password was given, or one that is not UTF-8") from None
    raise ConfigError("the two passwords differ")


def configure_log(level: str) -> None:
    """To stdout, for the journal or the terminal; Tornado's only where something is wrong."""
    logging.raiseExceptions = False      # a full disk must not make us write more
    logging.basicConfig(stream=sys.stdout, level=level.upper(), force=True,
                        format="%(asctime)s %(levelname)s %(message)s")
    for name in ("tornado.access", "tornado.application", "tornado.general", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.ERROR, logging.getLogger().level))


def let_memory_go() -> None:
    """Give back what compiling took, some 30 MB, where Python could not keep the bytecode.

    Most of it lies free between what is in use, and there glibc gives it back only when asked.
    """
    if __spec__ is None or not Path(__spec__.cached or "").is_file():
        with contextlib.suppress(ImportError, OSError, AttributeError):      # another C library
            # It takes a megabyte itself.
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)


def let_output_go() -> None:
    """Drop what a full disk or a closed pipe did not take: it is no failure of the daemon."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and do it. Returns the exit status: 2 for what the caller must mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    words = ("run", "simulate", "bench", "hash-password", "-h", "--help", "--version")
    if not arguments or arguments[0] not in words:
        arguments = ["run", *arguments]
    options = command_line().parse_args(arguments)
    try:
        if options.command == "hash-password":
            if not (password := ask_password()):
                raise ConfigError("the password is empty")
            print(hash_password(password))
        elif options.command == "simulate":
            configure_log("warning")
            return asyncio.run(simulate(options.url, options.stations, options.protocol,
                                        options.duration, options.rate, options.password,
                                        options.prefix, options.stay, options.fault))
        elif options.command == "bench":
            return bench(options)
        else:
            config = read_config(options.config, address=options.address, port=options.port)
            if options.check:
                tell_check(config)
                return 0
            configure_log(options.log_level)
            raise_file_limit()
            daemon = asyncio.run(run(config))
            let_output_go()
            if daemon.state.stuck:       # Python would wait for the thread, and that for the disk
                os._exit(0)
    except (ConfigError, StateInUse) as error:
        print(f"ocppboard: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def become_a_module() -> None:
    """Start over as `python -m`: the same process, half as large.

    Python keeps the syntax tree of a script as long as it runs, and what compiling takes is never
    given back, some 30 MB here. So it is compiled before, where Python may keep the result.
    """
    path = Path(__file__).resolve()
    interpreter = sys.orig_argv[:len(sys.orig_argv) - len(sys.argv)]     # with its own options
    hindered = (sys.flags.ignore_environment or os.pathsep in str(path) or path.suffix != ".py"
                or not path.stem.isidentifier() or {"-m", "--"} & set(interpreter))
    if os.name != "posix" or hindered or not sys.executable:
        return
    importlib.machinery.SourceFileLoader(path.stem, str(path)).get_code(path.stem)
    folders = [str(path.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.execv(sys.executable, [*interpreter, "-P", "-m", path.stem, *sys.argv[1:]])


if __name__ == "__main__":
    if __spec__ is None:                 # run as a script
        become_a_module()
    sys.exit(main())
