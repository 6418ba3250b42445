from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.job_file import JobFileError, load_job, load_prices
from pipeline.config.prices import Hardware, Prices, default_prices, price

TABLE = {
    "currency": "EUR",
    "source": "our contract",
    "date": "2026-11-01",
    "instances": {"big": {"on_demand": 8.0, "spot": 2.0}},
    "gpus": {"A100": {"on_demand": 3.0, "spot": 1.0}, "L4": 0.5},
    "cpu_hour": 0.04,
}


def table(**changes: Any) -> Prices:
    return Prices.model_validate({**TABLE, **changes})


def hardware(resources: dict[str, float], **known: Any) -> Hardware:
    return Hardware(resources, {"CPU": 16.0, "GPU": 4.0}, **known)


@pytest.mark.parametrize(
    ("held", "known", "name", "per_hour"),
    [
        ({"CPU": 2.0}, {}, "CPU", 0.08),
        ({"CPU": 2.0, "GPU": 1.0}, {"gpu_type": "A100"}, "A100", 3.0),
        ({"CPU": 2.0, "GPU": 0.5}, {"gpu_type": "L4"}, "L4", 0.25),
        ({"CPU": 2.0, "GPU": 1.0}, {"gpu_type": "A100", "market": "spot"}, "A100", 1.0),
        # A quarter of the GPUs, however few cores; and half of the cores, however few GPUs.
        ({"CPU": 2.0, "GPU": 1.0}, {"gpu_type": "A100", "instance_type": "big"}, "big", 2.0),
        ({"CPU": 8.0, "GPU": 1.0}, {"instance_type": "big", "market": "spot"}, "big", 1.0),
        # An instance that the table lacks is priced by what is held of it.
        ({"CPU": 2.0}, {"instance_type": "small"}, "CPU", 0.08),
        # What has no price has none, whatever else is known.
        ({"CPU": 2.0, "GPU": 1.0}, {"gpu_type": "H100"}, "H100", None),
        ({"CPU": 2.0, "GPU": 1.0}, {}, "unknown GPU", None),
        ({"CPU": 2.0, "GPU": 1.0}, {"gpu_type": "L4", "market": "spot"}, "L4", None),
    ],
)
def test_what_is_held_is_priced(
    held: dict[str, float], known: dict[str, Any], name: str, per_hour: float | None
) -> None:
    found = price(hardware(held, **known), table())
    assert (found.hardware, found.per_hour) == (name, pytest.approx(per_hour))


def test_the_tables_market_is_that_of_nodes_that_do_not_say() -> None:
    one = {"CPU": 2.0, "GPU": 1.0}
    spot = table(market="spot")
    assert price(hardware(one, gpu_type="A100"), spot).per_hour == 1.0
    assert price(hardware(one, gpu_type="A100", market="on_demand"), spot).per_hour == 3.0


def test_the_packaged_table_says_where_it_is_from() -> None:
    prices = default_prices()
    assert prices.cpu_hour is not None and prices.cpu_hour.on_demand > 0
    assert {"T4", "A10G", "L4", "L40S", "A100", "H100"} <= prices.gpus.keys()
    assert prices.source in prices.described and str(prices.date) in prices.described
    for rate in [*prices.instances.values(), *prices.gpus.values()]:
        assert rate.spot is None or rate.spot < rate.on_demand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_hour": -1}, "cpu_hour.on_demand: input should be greater than or equal to 0"),
        ({"gpu": {}}, "gpu: unknown key; did you mean 'gpus'?"),
        ({"gpus": {"A100": {"spot": 1.0}}}, "gpus.A100.on_demand: required, but not given"),
        ({"currency": "dollars"}, "currency: "),
        ({"market": "cheap"}, "market: "),
        ({"date": "soon"}, "date: "),
        ({"source": None}, "source: "),
    ],
)
def test_a_wrong_table_is_one_line_that_names_the_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump({**TABLE, **change}))
    with pytest.raises(JobFileError) as error:
        load_prices(file)
    assert f"{file}: {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="no such price table"):
        load_prices(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(JobFileError, match=r"list\.yaml: "):
        load_prices(tmp_path / "list.yaml")


def test_a_job_file_names_its_table_or_holds_it(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(TABLE))
    job = {
        "input": {"paths": "in.parquet", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": "org/target"},
        "speculation": {"policy": "none"},
        "budget": {"dollars": 5},
    }
    for number, prices in enumerate(["prices.yaml", TABLE]):
        file = tmp_path / f"job{number}.yaml"
        file.write_text(yaml.safe_dump({**job, "prices": prices}))
        loaded = load_job(file)
        assert loaded.prices == table()
        assert loaded.budget is not None
        assert (loaded.budget.dollars, loaded.budget.hours) == (5, None)
    file.write_text(yaml.safe_dump({**job, "budget": {"dollar": 5, "hours": 0}}))
    with pytest.raises(JobFileError) as error:
        load_job(file)
    assert "budget.dollar: unknown key; did you mean 'dollars'?" in str(error.value)
    assert "budget.hours: input should be greater than 0" in str(error.value)
