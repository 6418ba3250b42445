"""The section `sampling` of the job file."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config.settings import Settings, StringList

MAX_SAMPLES = 10_000
"""Most samples of one prompt. A unit holds all samples of its rows: lower unit_rows with many."""


class SamplingConfig(Settings):
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
