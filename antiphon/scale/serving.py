"""`antiphon serve --ray`: replicas of the whole server on a Ray cluster, behind Ray Serve's proxy.

    client ──> proxy ──(Router: who has most room)──> Replica: the application of `antiphon.serve`, with an engine
                                                          └── shelves: an actor that every replica reaches

A WebSocket is one request, so a conversation stays where it began. What replicas share lies in an actor: uploaded
voices, texts of replies, and Realtime sessions as they were after their last turn, so a session whose replica died is
taken up by the next that its client reaches. A new version of the deployment takes the place of the old one replica by
replica; an old one ends when nobody speaks with it any more.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    HTTPOptions,
    RequestRouterConfig,
)
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette

from antiphon.serve.app import create_app
from antiphon.serve.engines import Load
from antiphon.serve.kept import Shelves
from antiphon.serve.logs import to_standard_error
from antiphon.serve.room import Room
from antiphon.serve.settings import Settings

APP = "antiphon"
REPORTS = 0.2  # seconds between two words of a replica about its room
LAG = 3.0  # after which whoever was sent to a replica is in its word
COUNTS = 1.0  # and between what it has counted
OPEN = 10_000  # requests that a replica takes at once: its own gate says how many conversations
SPARE = 0.25  # of all places, that should be free: with fewer the autoscaler adds a replica
Key = TypeVar("Key")
Value = TypeVar("Value")


# ------------------------------------------------------------------------------------------- what is shared


class Keeper:
    """Shelves, as an actor: methods of dictionaries by the name of the shelf."""

    def __init__(self) -> None:
        self.shelves: dict[str, dict[Any, Any]] = {}

    def do(self, shelf: str, method: str, *arguments: Any) -> Any:
        """Call a method of a shelf; what it gives, as a value of its own."""
        found = getattr(self.shelves.setdefault(shelf, {}), method)(*arguments)
        return list(found) if method in ("keys", "items", "values") else found


class Shelf(MutableMapping[Key, Value]):
    """One shelf of a keeper's."""

    def __init__(self, keeper: Any, name: str) -> None:
        self.keeper, self.name = keeper, name

    def _do(self, method: str, *arguments: Any) -> Any:
        return ray.get(self.keeper.do.remote(self.name, method, *arguments))

    def __getitem__(self, key: Key) -> Value:
        return self._do("__getitem__", key)

    def __setitem__(self, key: Key, value: Value) -> None:
        self._do("__setitem__", key, value)

    def __delitem__(self, key: Key) -> None:
        self._do("__delitem__", key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._do("keys"))

    def __len__(self) -> int:
        return self._do("__len__")

    def get(self, key: Key, default: Any = None) -> Any:
        """In one call."""
        return self._do("get", key, default)

    def pop(self, key: Key, *default: Any) -> Any:
        """In one call."""
        return self._do("pop", key, *default)

    def items(self) -> Any:
        """In one call."""
        return self._do("items")

    def values(self) -> Any:
        """In one call."""
        return self._do("values")


def shelves_of(keeper: Any) -> Shelves:
    """The shelves of a server."""
    return Shelves(*(Shelf(keeper, name) for name in ("voices", "replies", "sessions", "said", "metrics")))


# ------------------------------------------------------------------------------------------------ replicas


@serve.ingress()
class Replica:
    """One engine and the server's application over it."""

    def __init__(self, settings: Settings, load: Load, most: int, keeper: Any) -> None:
        to_standard_error()
        name = serve.get_replica_context().replica_id.unique_id
        self.settings = replace(settings, worker=name)
        engine = load()(self.settings, most)  # before anybody is sent here
        self.application = create_app(self.settings, lambda: engine, shelves_of(keeper))
        self.refused = 0.0  # requests that its gate had refused when it was asked last
        self.counting: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray Serve calls for the application."""
        return self.application

    async def record_routing_stats(self) -> dict[str, Any]:
        """How much room there is, for the router."""
        if self.counting is None:
            self.counting = asyncio.create_task(self._tell())
        return {"free": self.application.state.house.free}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaler looks at: places, those that are taken, and who was refused since."""
        house = self.application.state.house
        total = sum(m.value for f in house.meters.refusals.collect() for m in f.samples if m.name.endswith("_total"))
        new, self.refused = total - self.refused, total
        places = float(house.engine.capacity or 0)
        return {"places": places, "taken": places - max(0, house.free), "refused": new}

    async def _tell(self) -> None:
        house = self.application.state.house
        while True:
            await asyncio.to_thread(house.shelves.metrics.__setitem__, self.settings.worker, house.meters.text())
            await asyncio.to_thread(house.shelves.sweep, self.settings.idle_seconds + self.settings.resume_seconds)
            await asyncio.sleep(COUNTS)


class Router(FIFOMixin, RequestRouter):
    """Sends callers to who has most room."""

    def initialize_state(self, **how: Any) -> None:
        """Nobody has been sent anywhere."""
        self.rooms = defaultdict[str, Room](lambda: Room(LAG))  # of each replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One after another, the one with most room first."""
        ranked = sorted(candidate_replicas, key=self.rank, reverse=True)
        return [[replica] for replica in ranked]

    def rank(self, replica: RunningReplica) -> tuple[int, int]:
        """The higher, the more room a replica has for the next caller, as far as is known."""
        return self.rooms[replica.replica_id.unique_id].rank(replica.routing_stats.get("free", 0))

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """One more has been sent there."""
        self.rooms[replica_id.unique_id].take()


def wanted_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as leave a share of all places free, and one more where somebody was refused."""
    figures = context.aggregated_metrics or {}
    places, taken, refused = (sum(figures.get(name, {}).values()) for name in ("places", "taken", "refused"))
    count = context.current_num_replicas
    if places <= 0 or count <= 0:
        return count, {}
    needed = math.ceil(taken / (1 - SPARE) / (places / count)) if taken else 0
    needed = max(needed, count + 1) if refused else needed
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(needed, most)), {}


@dataclass(frozen=True)
class Cluster:
    """Where replicas run, and how many."""

    address: str  # "local": one on this machine alone
    replicas: int
    most: int  # up to which they become more as they are needed
    cpus: float  # of each
    gpus: float = 0.0


def deployment(settings: Settings, load: Load, conversations: int, keeper: Any, cluster: Cluster) -> Any:
    """The application for `serve.run`, each replica with so many conversations; 0 measures them."""
    options: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.most > cluster.replicas:
        policy = AutoscalingPolicy(policy_function=wanted_replicas)
        scaling = AutoscalingConfig(min_replicas=cluster.replicas, max_replicas=cluster.most, policy=policy)
        options = {"autoscaling_config": scaling}
    options |= {
        "name": APP,
        "ray_actor_options": {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        "max_ongoing_requests": OPEN,
        "max_surge_percent": 100,  # new replicas come before old ones go, which may take as long as a conversation
        "graceful_shutdown_timeout_s": settings.renew_seconds,
        "request_router_config": RequestRouterConfig.model_validate(
            {"request_router_class": Router, "request_routing_stats_period_s": REPORTS}
        ),
    }
    made: Any = serve.deployment(Replica, **options)
    return made.bind(settings, load, conversations, keeper)


def run_ray(settings: Settings, port: int, load: Load, conversations: int, cluster: Cluster) -> None:
    """Serve from a cluster: from one of this machine's own until told to stop, from another until `serve shutdown`.

    Where the cluster serves already, what it serves is replaced, replica by replica, while conversations go on.
    """
    is_local = cluster.address == "local"
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 gives way to everybody, and sound has to come in time
    ray.init(cluster.address, include_dashboard=False, namespace=APP)
    lasting = {} if is_local else {"name": "shelves", "get_if_exists": True, "lifetime": "detached"}
    try:
        keeper = ray.remote(Keeper).options(num_cpus=0, **lasting).remote()
        serve.start(http_options=HTTPOptions(host=settings.host, port=port))
        serve.run(deployment(settings, load, conversations, keeper, cluster), name=APP, blocking=is_local)
    finally:
        if is_local:
            serve.shutdown()
        ray.shutdown()
