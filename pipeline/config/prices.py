"""What resources cost per hour: by instance type, GPU type and core, on demand and as spot.

A table is a YAML file; `prices.yaml` beside this module is used unless the job brings its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from pipeline.config.section import Section, example

Market = Literal["on_demand", "spot"]


class Rate(Section):
    """A price per hour."""

    on_demand: float = Field(ge=0, description="Price per hour on demand.")
    spot: float | None = Field(
        default=None, ge=0, description="Price per hour as a spot instance. `null`: not known."
    )

    def of(self, market: str) -> float | None:
        """The price in this market; None if it is not known."""
        return self.spot if market == "spot" else self.on_demand


def _as_rate(value: object) -> object:
    return {"on_demand": value} if isinstance(value, int | float) else value


AnyRate = Annotated[Rate, BeforeValidator(_as_rate, json_schema_input_type=float | Rate)]
"""A price per hour; a single number is the price on demand."""


class Prices(Section):
    """A price table. All prices are per hour."""

    model_config = example(
        {
            "currency": "USD",
            "source": "our contract",
            "date": "2026-11-01",
            "instances": {"g6.xlarge": {"on_demand": 0.80, "spot": 0.35}},
            "gpus": {"L4": {"on_demand": 0.80, "spot": 0.35}},
            "cpu_hour": 0.04,
        }
    )

    currency: str = Field(
        default="USD", pattern=r"^[A-Z]{3}$", description="Three capitals, such as `USD`."
    )
    source: str = Field(min_length=1, description="Where the prices are from. Reports name it.")
    date: datetime.date = Field(description="Day on which they were looked up, `YYYY-MM-DD`.")
    market: Market = Field(
        default="on_demand",
        description="Market of nodes that do not say. Others say so by Ray's label "
        "`ray.io/market-type`.",
    )
    instances: dict[str, AnyRate] = Field(
        default_factory=dict,
        description="Prices of whole machines, by instance type. An actor pays its share of "
        "cores or GPUs.",
    )
    gpus: dict[str, AnyRate] = Field(
        default_factory=dict,
        description="Prices of one GPU with its share of the machine, by Ray's accelerator type, "
        "such as `L4`.",
    )
    cpu_hour: AnyRate | None = Field(
        default=None, description="Price of one core, for actors without a GPU."
    )

    @property
    def described(self) -> str:
        """The source and its date, for people."""
        return f"{self.source} ({self.date.isoformat()})"


@dataclass(frozen=True)
class Hardware:
    """What a process holds, and of what.

    Attributes:
        resources: what it holds, such as {"CPU": 2.0, "GPU": 1.0}.
        node_resources: the same of its whole node.
        instance_type, gpu_type: of the node, where it says so.
        market: "on_demand" or "spot", where it says so.
    """

    resources: Mapping[str, float]
    node_resources: Mapping[str, float]
    instance_type: str | None = None
    gpu_type: str | None = None
    market: str | None = None


@dataclass(frozen=True)
class Priced:
    """What a process costs.

    Attributes:
        hardware: what is priced: an instance type, a GPU type, or "CPU".
        market: on which market.
        per_hour: None if the table does not know it.
    """

    hardware: str
    market: str
    per_hour: float | None


def price(hardware: Hardware, prices: Prices) -> Priced:
    """The price of what a process holds.

    A share of the instance's price if its type is in the table, the largest that it holds of the
    node's cores or GPUs; or else its GPUs; or else its cores.
    """
    market = hardware.market or prices.market
    instance = prices.instances.get(hardware.instance_type or "")
    amounts = {name: hardware.resources.get(name, 0.0) for name in ("CPU", "GPU")}
    if instance is not None and hardware.instance_type:
        share = max(
            amount / hardware.node_resources[name] if hardware.node_resources.get(name) else 0.0
            for name, amount in amounts.items()
        )
        return Priced(hardware.instance_type, market, _times(instance.of(market), share))
    if amounts["GPU"]:
        name = hardware.gpu_type or "unknown GPU"
        rate = prices.gpus.get(name)
        return Priced(name, market, _times(rate.of(market) if rate else None, amounts["GPU"]))
    rate = prices.cpu_hour
    return Priced("CPU", market, _times(rate.of(market) if rate else None, amounts["CPU"]))


def _times(rate: float | None, amount: float) -> float | None:
    return None if rate is None else rate * amount


def prices_text() -> str:
    """The packaged price table as YAML."""
    return resources.files("pipeline.config").joinpath("prices.yaml").read_text(encoding="utf-8")


@cache
def default_prices() -> Prices:
    """The packaged price table."""
    values: Any = yaml.safe_load(prices_text())
    return Prices.model_validate(values)
