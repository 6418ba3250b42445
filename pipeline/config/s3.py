"""The section `s3` of the job file."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.config.section import Section, example


class S3Config(Section):
    """How to reach `s3://` paths.

    Credentials never stand in a job file: they come from the AWS environment or profile of each
    machine.
    """

    model_config = example({"endpoint": "https://s3.example.com", "profile": "batch"})

    endpoint: str | None = Field(
        default=None, description="URL of an S3-compatible server. `null`: AWS."
    )
    region: str | None = Field(
        default=None,
        description="Region of the buckets. `null`: the one of the profile or environment.",
    )
    profile: str | None = Field(
        default=None,
        description="Name of a profile in `~/.aws` on every machine. "
        "`null`: AWS's usual chain of credentials.",
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
