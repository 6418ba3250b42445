"""The section `s3` of the job file."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section, example

_HOST = re.compile(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./-]*)?")
"""What comes after the scheme in the URL of a server."""


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

    anonymous: bool = Field(
        default=False,
        description="Ask without credentials, as public buckets allow. `profile` then says "
        "nothing.",
    )
    requester_pays: bool = Field(
        default=False,
        description="Agree to pay for requests and traffic, as some buckets of others ask for.",
    )

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError("must be a URL such as https://s3.example.com")
            if "@" in endpoint:
                raise ValueError("must not hold a user name or password; use the AWS environment")
            if not _HOST.fullmatch(endpoint.partition("://")[2]):
                raise ValueError(
                    "is no URL of a server; write it as https://HOST or http://HOST:PORT"
                )
        return endpoint

    @model_validator(mode="after")
    def _somebody_pays(self) -> S3Config:
        if self.anonymous and self.requester_pays:
            raise ValueError("requester_pays needs credentials, and anonymous has none; drop one")
        return self
