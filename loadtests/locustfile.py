"""Users that learn, for locust. `run_load.py` starts the server, runs this, and writes the report; by hand, against a server:

locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 --shape soak --seconds 60 --result run.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import requests
from load.hosts import check_host
from load.owners import OwnerUser
from load.person import Person
from load.shapes import SHAPES, users
from load.statistics import Statistics
from load.users import BaseUser, ChatUser, DocumentUser, HostileUser, RepeatingUser
from load.world import World
from locust import LoadTestShape, events
from locust.env import Environment

__all__ = ["BaseUser", "ChatUser", "DocumentUser", "HostileUser", "OwnerUser", "RepeatingUser"]

USERS: list[type[Person]] = [BaseUser, DocumentUser, RepeatingUser, ChatUser, OwnerUser, HostileUser]

#: name: (whether sessions learn, who is there)
ARMS = {"alone": (False, [BaseUser]), "unlearned": (False, USERS), "learning": (True, USERS)}


class Shape(LoadTestShape):
    def tick(self) -> Any:
        assert self.runner is not None
        options: Any = self.runner.environment.parsed_options
        at = self.get_run_time() / options.seconds
        if at >= 1:
            return None
        classes = ARMS[options.arm][1]
        share = sum(user.weight for user in classes) / sum(user.weight for user in USERS)
        return max(1, round(share * users(options.shape, options.peak, at))), 10, classes


@events.init_command_line_parser.add_listener
def _options(parser: Any) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="soak")
    parser.add_argument("--arm", choices=tuple(ARMS), default="learning", help="what the users do about learning")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--peak", type=int, default=8, help="users at most")
    parser.add_argument("--result", default="", help="write the figures here as JSON")
    parser.add_argument("--key", default="", help="API key of the users", is_secret=True)
    parser.add_argument("--hostile-key", default="", help="another one, for other people's sessions", is_secret=True)
    parser.add_argument("--allow-host", action="store_true", help="load a server that is not on this machine")


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    state, options = _state(environment), environment.parsed_options
    assert options is not None
    try:
        check_host(options.host or "", options.allow_host)
        name, learn = f"load-{time.time_ns() // 10**6}", ARMS[options.arm][0]
        state.world = World(options.host.rstrip("/"), name, learn, options.key or None, options.hostile_key or None)
    except (ValueError, requests.RequestException) as error:
        raise SystemExit(f"--host: {error}") from None  # an Exception would be logged, and the run go on
    state.stop_timeout = 120  # users end what they have begun: what is cut off could not be counted
    state.statistics, state.began = Statistics(), time.perf_counter()
    environment.events.request.add_listener(state.statistics.note)


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    state = _state(environment)
    figures = state.statistics.figures(time.perf_counter() - state.began)
    figures["audit"] = state.world.audit()
    problems = figures["audit"]["problems"]
    if environment.parsed_options and environment.parsed_options.result:
        Path(environment.parsed_options.result).write_text(json.dumps(figures, indent=1) + "\n")
    for problem in [*figures["errors"], *problems]:
        print(f"NOT ASKED FOR: {problem}")
    environment.process_exit_code = 1 if figures["errors"] or problems else 0


def _state(environment: Environment) -> Any:
    """The environment, to which we add ``world``, ``statistics`` and ``began``."""
    return environment
