"""Request files of OpenAI's batch API, answered by a tiny model and read with its own client."""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError
from openai.types import Completion as TextCompletion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.conftest import AWS_ENV, S3Server, TinyModels
from tests.jobs.command_line import call

pytestmark = pytest.mark.ray

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ITEMS = {
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
    "max_output_tokens": 4,
    "text": {"format": {"type": "json_object"}},
    "top_logprobs": 1,
}
NOTHING = {"min_tokens": 0, "bad_words": [], "skip_special_tokens": True, "priority": 3}
ROOT = str(Path(__file__).parents[2])


def request(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    prompt = {"messages": [{"role": "user", "content": f"tell me about {name}"}]}
    if url == COMPLETIONS:
        prompt = {"prompt": f"about {name}"}  # type: ignore[dict-item]
    body = {"model": "gpt-4o-mini", "max_tokens": 4, **prompt, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def malformed() -> list[bytes]:
    """Thirty lines, each wrong in its own way; two of them only together with what came before."""

    def text(message: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": message}]

    def line(value: Any) -> bytes:
        return json.dumps(value).encode()

    def but(**fields: Any) -> bytes:
        return line({**request("bad"), **fields})

    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    bad: list[bytes] = [
        b"{",
        b"nonsense",
        b"[1, 2]",
        b"null",
        b"\xff\xfe not text",
        line(request("x"))[:-9],
        b"[" * 50_000,
        but(custom_id=None),
        but(custom_id=5),
        but(custom_id=""),
        but(url=None),
        but(url="/v1/embeddings"),
        but(method="GET"),
        but(body=None),
        but(body="text"),
    ]
    bodies: list[dict[str, Any]] = [
        {"stream": True},
        {"messages": []},
        {"messages": "hi"},
        {"messages": text(7)},
        {"messages": text(image)},
        {"messages": text("long " * 200)},
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"max_tokens": 0},
        {"stop": ["a", 3]},
        {"top_logprobs": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    bad += [line(request(f"bad{i}", **body)) for i, body in enumerate(bodies)]
    bad.append(line(request("bad-completion", COMPLETIONS, prompt=["a", "b"])))
    bad.append(line(request("good-0")))  # a custom_id for the second time
    assert len(bad) == len(set(bad)) == 30
    return bad


def requests_file(path: Path, good: int) -> list[dict[str, Any]]:
    """Writes good requests of many shapes, and the bad ones between them."""
    requests = []
    for i in range(good):
        url = COMPLETIONS if i % 5 == 4 else CHAT
        told = {"logprobs": True, "top_logprobs": 2} if url == CHAT else {"logprobs": 1}
        body: list[dict[str, Any]] = [
            {},
            {"n": 3, **told},
            {"temperature": 0, "return_token_ids": True, "prompt_logprobs": 1},
            {"seed": 5, "top_p": 0.9, "response_format": {"type": "json_object"}},
        ]
        requests.append(request(f"good-{i}", url, **body[i % 4], **NOTHING))
    requests[3] |= {"url": RESPONSES, "body": ITEMS}
    requests[0]["url"] = f"https://api.openai.com{CHAT}"
    # As some programs on Windows begin a file.
    lines = [json.dumps(each).encode() for each in requests]
    lines[0] = codecs.BOM_UTF8 + lines[0]
    bad = malformed()
    for number, line in enumerate(bad):
        at = (number + 1) * len(lines) // len(bad)
        lines.insert(at, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return requests


def command(models: TinyModels, source: object, target: object, *more: object) -> list[str]:
    options = ["-i", source, "-o", target, "--model", models.target, "--draft", models.draft]
    small = ["--set", "actors.num_cpus=2", "--set", "speculation.policy=heuristic"]
    return ["run-batch", *map(str, [*options, *small, "--quiet", *more])]


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(
    requests: list[dict[str, Any]], responses: list[dict[str, Any]], errors: list[dict[str, Any]]
) -> None:
    """Every good request is answered, in order, in a form that the official client reads."""
    assert [line["custom_id"] for line in responses] == [each["custom_id"] for each in requests]
    assert len({line["id"] for line in responses + errors}) == len(responses) + len(errors)
    for asked, line in zip(requests, responses, strict=True):
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        if asked["url"] == RESPONSES:
            (item,) = Response.model_validate(line["response"]["body"], strict=True).output
            assert item.type == "message" and item.content[0].type == "output_text"
            assert item.content[0].text.startswith("{")
            assert item.content[0].logprobs
            continue
        chat = asked["url"].endswith(CHAT)
        kind = ChatCompletion if chat else TextCompletion
        body: Any = kind.model_validate(line["response"]["body"], strict=True)
        assert [choice.index for choice in body.choices] == list(range(asked["body"].get("n", 1)))
        for choice in body.choices:
            text = choice.message.content if chat else choice.text
            assert isinstance(text, str)
            assert choice.finish_reason in {"stop", "length"}
            assert text.startswith("{") or "response_format" not in asked["body"]
            told = choice.logprobs
            assert (told is not None) == bool(asked["body"].get("logprobs"))
            if told is not None and chat:
                assert all(len(each.top_logprobs) == 2 for each in told.content)
            elif told is not None:
                assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)
        usage = body.usage
        told = line["response"]["body"].get("prompt_logprobs")
        assert (told is not None) == ("prompt_logprobs" in asked["body"])
        assert told is None or (len(told) == usage.prompt_tokens and told[0] is None)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert len(body.choices) <= usage.completion_tokens <= 4 * len(body.choices)
    for line in errors:
        assert line["response"] is None
        error = BatchError.model_validate(line["error"], strict=True)
        assert error.code
        assert error.message
        assert error.line


def test_good_requests_are_answered_and_bad_ones_explained(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = requests_file(source, good=20)
    arguments = command(tiny_models, source, target)
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    responses, errors = lines_of(target), lines_of(tmp_path / "out.errors.jsonl")
    check(requests, responses, errors)
    assert len(errors) == 30
    lines = source.read_bytes().splitlines()
    for error in errors:
        bad = lines[error["error"]["line"] - 1]
        assert bad in malformed()
    codes = [error["error"]["code"] for error in errors]
    assert codes[:7] == ["MalformedLine"] * 7
    assert codes[-1] == "DuplicateCustomId"
    first = 1 + lines.index(codecs.BOM_UTF8 + json.dumps(requests[0]).encode())
    assert f"request {first} has the same custom_id" in errors[-1]["error"]["message"]
    assert {"PromptTooLong", "UnsupportedParameter", "InvalidSampling"} < set(codes)

    # The same command does nothing but write the same files.
    before = target.read_bytes()
    target.unlink()
    assert call(*arguments).exit_code == 0
    assert target.read_bytes() == before
    # Other requests need another output.
    source.write_bytes(source.read_bytes() + json.dumps(request("more")).encode())
    assert "holds a job on other" in call(*arguments).output


@pytest.mark.slow
def test_a_thousand_lines_with_thirty_bad_ones(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = requests_file(source, good=970)
    assert len(source.read_bytes().splitlines()) == 1000
    result = call(*command(tiny_models, source, target))
    assert result.exit_code == 0, result.output
    responses, errors = lines_of(target), lines_of(tmp_path / "out.errors.jsonl")
    assert (len(responses), len(errors)) == (970, 30)
    check(requests, responses, errors)


@pytest.mark.slow
def test_a_killed_batch_is_resumed_and_nothing_is_answered_twice(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = requests_file(source, good=300)
    options = ["--set", "unit_rows=8", "--set", "speculation.verification=coupled"]
    arguments = command(tiny_models, source, target, *options)
    run = [sys.executable, "-m", "jobs.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    process = subprocess.Popen(run, env=environment, start_new_session=True)
    folder = tmp_path / "out.jsonl.specbatch" / "completions"
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file: file.read_bytes() for file in folder.glob("*.parquet")}
    assert not target.exists()
    subprocess.run(run, env=environment, check=True)
    assert all(file.read_bytes() == content for file, content in kept.items())
    check(requests, lines_of(target), lines_of(tmp_path / "out.errors.jsonl"))


@pytest.mark.slow
@pytest.mark.s3
def test_requests_and_responses_on_s3(
    local_ray: None, tiny_models: TinyModels, s3_env: S3Server, tmp_path: Path
) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="batches")
    requests = [request("a", n=2), request("b", COMPLETIONS)]
    body = "".join(json.dumps(each) + "\n" for each in requests).encode()
    client.put_object(Bucket="batches", Key="in.jsonl", Body=body)
    url = "s3://batches/out.jsonl"
    arguments = command(tiny_models, "s3://batches/in.jsonl", url, "--endpoint", s3_env.endpoint)
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    written = client.get_object(Bucket="batches", Key="out.jsonl")["Body"].read()
    check(requests, [json.loads(line) for line in written.splitlines()], [])
    names = {o["Key"] for o in client.list_objects_v2(Bucket="batches")["Contents"]}
    assert "out.errors.jsonl" not in names
    assert AWS_ENV["AWS_SECRET_ACCESS_KEY"] not in result.output


def test_mistakes_stop_before_anything_starts(tiny_models: TinyModels, tmp_path: Path) -> None:
    missing = call(*command(tiny_models, tmp_path / "no.jsonl", tmp_path / "out.jsonl"))
    assert missing.exit_code == 2
    assert "no such file or folder" in missing.output
    (tmp_path / "in.jsonl").write_text("{}")
    for place in (tmp_path, f"file://{tmp_path}", "file:///nowhere/"):
        folder = call(*command(tiny_models, tmp_path / "in.jsonl", place))
        assert folder.exit_code == 2
        assert "is a folder; give a file" in folder.output
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    for place in ("in.jsonl", "sub/../in.jsonl", "link.jsonl"):
        over = call(*command(tiny_models, tmp_path / "in.jsonl", tmp_path / place))
        assert over.exit_code == 2
        assert "written over" in over.output
    assert (tmp_path / "in.jsonl").read_text() == "{}"
    unknown = call(
        *command(tiny_models, tmp_path / "in.jsonl", tmp_path / "o", "--set", "sampling.x=1")
    )
    assert unknown.exit_code == 2
    assert "run-batch: sampling.x: unknown key" in " ".join(unknown.output.split())
