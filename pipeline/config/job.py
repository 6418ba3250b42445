"""The job as data: what a job file may say, checked as far as it can be without reading input.

Everything here is frozen and plain, so a job can be validated, hashed, sent to workers and
recorded. The names are an interface: add to them, do not rename them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from pipeline.config.prices import Prices
from pipeline.config.templates import PromptTemplate
from specdec.policies.estimators import ESTIMATORS
from specdec.policies.registry import POLICIES, meaning, takers

if TYPE_CHECKING:
    Policy = Estimator = str
else:  # the registry's names: an unknown one is refused, and the schema lists them
    Policy, Estimator = Literal[(*POLICIES,)], Literal[ESTIMATORS]

MAX_SAMPLES = 10_000
"""Most samples of one prompt. A unit holds all samples of its rows: lower unit_rows with many."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _no_null_byte(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a null byte, which no path or name can have")
    return text


PlainString = Annotated[str, AfterValidator(_no_null_byte)]
"""A string that can be a path or a name."""

StringList = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""A list of strings; a single string is a list of one."""


class S3Config(_Settings):
    """How to reach s3:// paths. Credentials come from the AWS environment or profile."""

    endpoint: str | None = Field(
        default=None, description="URL of an S3-compatible server; null: AWS"
    )
    region: str | None = Field(
        default=None, description="null: the profile's or environment's region"
    )
    profile: str | None = Field(
        default=None,
        description="name of a profile in ~/.aws on every machine; null: default chain",
    )

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError("must be a URL such as https://s3.example.com")
            if "@" in endpoint:
                raise ValueError("must not hold a user name or password; use the AWS environment")
        return endpoint


class InputConfig(_Settings):
    """Where the rows are, and which column, or template over columns, is the prompt."""

    paths: StringList = Field(
        min_length=1, description="files, folders and globs of .parquet, .jsonl or .ndjson"
    )
    format: Literal["openai"] | None = Field(
        default=None,
        description="openai: lines of OpenAI's batch API, which bring prompt and sampling; null: "
        "columns",
    )
    messages_column: str | None = Field(
        default=None, description="column of chat messages; goes through the target's chat template"
    )
    prompt_column: str | None = Field(
        default=None, description="column of plain prompts; completed as they are, no chat template"
    )
    template: str | None = Field(
        default=None, description="jinja2 over the columns; its text is completed as it is"
    )

    @field_validator("paths")
    @classmethod
    def _paths_can_be(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if not all(paths):
            raise ValueError("holds an empty path")
        return tuple(map(_no_null_byte, paths))

    @field_validator("template")
    @classmethod
    def _template_compiles(cls, template: str | None) -> str | None:
        if template is not None:
            PromptTemplate(template)
        return template

    @model_validator(mode="after")
    def _one_prompt_source(self) -> InputConfig:
        given = [
            name
            for name in ("messages_column", "prompt_column", "template")
            if getattr(self, name) is not None
        ]
        if self.format is not None:
            if given:
                raise ValueError(f"{given[0]} does not go with format {self.format}; remove it")
            return self
        if len(given) != 1:
            what = f"{' and '.join(given)} are all given" if given else "none is given"
            raise ValueError(
                f"give exactly one of messages_column, prompt_column, template; {what}"
            )
        return self


class ModelsConfig(_Settings):
    """The target whose distribution the output has, and the draft that proposes."""

    target: PlainString = Field(
        min_length=1, description="hub name, folder, *.gguf file, or pkg:PACKAGE/FILE.gguf"
    )
    draft: PlainString | None = Field(
        default=None, min_length=1, description="same forms; not needed with policy none"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: as the target's weights are stored, where the device is fast in that",
    )
    quantization: Literal["int8wo", "int8"] | None = Field(default=None, description="CPU only")
    draft_quantization: Literal["int8wo", "int8", "none"] | None = Field(
        default=None,
        description="of the draft alone; null: int8 on a CPU, since it only proposes",
    )
    deterministic: bool = Field(
        default=False, description="batch-invariant kernels: bit-exact results under any batching"
    )
    device: str | None = Field(
        default=None, description="null: cuda if the actor has one, else cpu"
    )
    device_map: str | dict[str, int | str] | None = Field(
        default=None, description="passed to transformers: a target over several GPUs of one actor"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model"
    )

    @model_validator(mode="after")
    def _kernels_exist(self) -> ModelsConfig:
        if (self.deterministic or self.quantization) and self.dtype not in ("auto", "float32"):
            what = "deterministic" if self.deterministic else f"quantization {self.quantization}"
            raise ValueError(f"{what} goes with dtype float32, not {self.dtype}")
        return self


class SamplingConfig(_Settings):
    """How each row is sampled; a row's own `sampling_params` column overrides these."""

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    stop: StringList = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = Field(
        default=0, description="with the row id, the key of all random numbers of a row"
    )
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="samples per prompt")

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if not all(stop):
            raise ValueError("holds an empty string, which would stop every row at once")
        return stop

    @field_validator("temperature")
    @classmethod
    def _hot_or_greedy(cls, temperature: float) -> float:
        if 0 < temperature < 1e-5:
            raise ValueError("must be 0 (greedy) or at least 1e-5")
        return temperature


def _length(setting: str) -> Any:
    """A number of candidates that stop policies take: its bounds and default are theirs."""
    first = next(iter(takers(setting).values()))
    return Field(default=first.default, ge=first.least, le=first.most, description=meaning(setting))


_LENGTHS = ("k", "k_min", "k_max")
_ESTIMATING = [name for name, policy in POLICIES.items() if policy.estimates]


def _names(policies: Sequence[str]) -> str:
    return (" and " if len(policies) == 2 else ", ").join(policies)


class SpeculationConfig(_Settings):
    """When to stop drafting, and how candidates are verified."""

    policy: Policy = Field(
        default="goodput",
        description="when to stop drafting; "
        + "; ".join(f"{name} {policy.summary}" for name, policy in POLICIES.items()),
    )
    verification: Literal["rejection", "coupled"] = Field(
        default="rejection",
        description="coupled: same tokens for any draft, policy and batch; rejection: accepts more",
    )
    k: int = _length("k")
    k_min: int = _length("k_min")
    k_max: int = _length("k_max")
    threshold: float | None = Field(
        default=None, gt=0, lt=1, description=f"null: the policy's own; {meaning('threshold')}"
    )
    head: str | None = Field(
        default=None, description="folder of a trained acceptance head (specbatch train-head)"
    )
    estimator: Estimator | None = Field(
        default=None,
        description=f"what {_names(_ESTIMATING)} predict acceptance with; null: the head if there "
        "is one, else confidence",
    )
    control_share: float = Field(
        default=0.02,
        ge=0,
        le=0.5,
        description="share of rounds without speculation, by which speedup is measured",
    )
    trace: bool = Field(
        default=False, description="keep every round of every row for `specbatch explain`"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_policy(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("policy"), str):
            return values
        own = POLICIES[name].settings() if name in POLICIES else {}
        differing = {
            key: each.default
            for key, each in own.items()
            if key in _LENGTHS and each.default != cls.model_fields[key].default
        }
        return {**differing, **values}

    @model_validator(mode="after")
    def _settings_of_the_policy(self) -> SpeculationConfig:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min ({self.k_min}) is more than k_max ({self.k_max})")
        policy = POLICIES[self.policy]
        for name in ("threshold", "head", "estimator"):
            owners = [*takers(name)] if name == "threshold" else _ESTIMATING
            if getattr(self, name) is not None and self.policy not in owners:
                raise ValueError(
                    f"{name} belongs to the policies {_names(owners)}, not to {self.policy}"
                )
        if self.head is not None and self.estimator not in (None, "head"):
            raise ValueError(
                f"head is not used with estimator {self.estimator}; remove one of them"
            )
        needs_head = self.estimator == "head" or (policy.needs_head and not self.estimator)
        if needs_head and self.head is None:
            raise ValueError(
                "head: give the folder of a trained head (make one with specbatch train-head), "
                "or set estimator to confidence"
            )
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the policy takes of these, for `make_policy`; not the head, which is to be loaded.

        Their order is part of fingerprints.
        """
        policy = POLICIES[self.policy]
        names = [*policy.settings(), *(["estimator"] if policy.estimates else [])]
        return {name: getattr(self, name) for name in names if name in type(self).model_fields}


GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class ActorsConfig(_Settings):
    """The pool: each actor holds one draft and target pair and runs one engine.

    With `groups` the pool has actors of several kinds, which take units as they get free. A group
    has all of these settings for itself; what it does not set, it takes from beside `groups`.
    """

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1, description="null: the same as min")
    num_cpus: float | None = Field(
        default=None,
        gt=0,
        description="cores of an actor, and threads of torch; null: one beside a GPU, or else all "
        "that the cluster has for each",
    )
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = Field(default=None, description="Ray's name of it, such as A100")
    slots: int = Field(
        default=64,
        ge=1,
        description="rows that an engine works on at once, if their keys and values fit",
    )
    kv_memory_gb: float | None = Field(
        default=None, gt=0, description="memory for keys and values; null: the engine decides"
    )
    units_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="units handed to an actor at once; null: enough to keep slots full",
    )
    hang_seconds: float | None = Field(
        default=900,
        gt=0,
        description="an engine whose round takes longer than this is restarted; null: never",
    )
    autoscaling_cluster: bool = Field(
        default=False,
        description="true: wait for nodes that the cluster adds instead of refusing to start",
    )
    groups: dict[GroupName, ActorsConfig] = Field(
        default_factory=dict,
        description="kinds of actors by name, such as A100 and L4, each with its own settings",
    )

    @model_validator(mode="before")
    @classmethod
    def _groups_inherit(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(groups := values.get("groups"), dict):
            return values
        shared = {key: value for key, value in values.items() if key != "groups"}
        inherited = {
            name: {**shared, **(group or {})} if isinstance(group, dict | None) else group
            for name, group in groups.items()
        }
        return {**values, "groups": inherited}

    @model_validator(mode="after")
    def _ordered(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min})")
        for name, group in self.groups.items():
            if group.groups:
                raise ValueError(f"groups.{name}: a group cannot have groups of its own")
        return self

    @property
    def cores(self) -> float:
        """`num_cpus`, or the least that null may stand for."""
        return self.num_cpus or 1.0

    def on(self, nodes: Sequence[float]) -> ActorsConfig:
        """These settings with `num_cpus` filled in, for nodes of so many cores."""
        groups = {name: group.on(nodes) for name, group in self.groups.items()}
        share = sum(nodes) // self.max_actors
        most = min((cores for cores in nodes if cores), default=1.0)
        cores = 1.0 if self.num_gpus else max(1.0, min(share, most))
        return self.model_copy(update={"groups": groups, "num_cpus": self.num_cpus or cores})

    @property
    def pools(self) -> dict[str, ActorsConfig]:
        """The groups by name; a pool of one kind is a single group without a name."""
        return dict(self.groups) or {"": self}

    @property
    def min_actors(self) -> int:
        """Least actors, of all groups together."""
        return sum(group.min for group in self.pools.values())

    @property
    def max_actors(self) -> int:
        """Most actors, of all groups together."""
        return sum(group.max or group.min for group in self.pools.values())


class BudgetConfig(_Settings):
    """What a job may spend, all its runs together; it stops before it spends more."""

    dollars: float | None = Field(
        default=None, gt=0, description="money in the price table's currency"
    )
    hours: float | None = Field(default=None, gt=0, description="hours of running")


class JobConfig(_Settings):
    """One job: everything in a job file, with defaults filled in."""

    name: str = Field(default="job", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    input: InputConfig
    output: PlainString = Field(min_length=1, description="folder, local or s3://")
    s3: S3Config = Field(default_factory=S3Config)
    models: ModelsConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    actors: ActorsConfig = Field(default_factory=ActorsConfig)
    unit_rows: int = Field(default=256, ge=1, description="rows committed together, about")
    budget: BudgetConfig | None = Field(default=None, description="null: none")
    prices: Prices | None = Field(
        default=None, description="a price table, or the file that holds it; null: the packaged one"
    )

    @model_validator(mode="after")
    def _draft_if_speculating(self) -> JobConfig:
        if self.models.draft is None and self.speculation.policy != "none":
            raise ValueError(
                f"speculation.policy {self.speculation.policy} needs models.draft; "
                "give a draft, or set speculation.policy to none"
            )
        return self

    @property
    def units_in_flight(self) -> int:
        """Units that an actor holds at once: at least one more than its slots work on.

        It is the same for all groups: what the one with the most slots needs.
        """
        return max(
            group.units_in_flight or 2 + -(-group.slots // self.unit_rows)
            for group in self.actors.pools.values()
        )

    def in_group(self, name: str) -> JobConfig:
        """The job as an actor of this group sees it: `actors` are the group's settings."""
        return self.model_copy(update={"actors": self.actors.pools[name]})
