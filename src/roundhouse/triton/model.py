"""What the two models have in common that stream answers: `tensorrt_llm` and `tensorrt_llm_bls`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from roundhouse import deployment
from roundhouse.bugs import described
from roundhouse.engine.base import RequestError
from roundhouse.engine.client import EngineClient
from roundhouse.engine.protocol import Error, ErrorCode
from roundhouse.engine.runtime import DRAINING, OUTLIVE_SECONDS, runtime_dir, server_of, when_gone
from roundhouse.text.detokenize import Detokenizer
from roundhouse.text.tokenizer import NOT_HASTENED, Tokenizer
from roundhouse.triton import backend
from roundhouse.triton.fields import Array, Fields, batch_of, deadline_of, refuse, timeout_of
from roundhouse.triton.front import Front
from roundhouse.triton.generation import Generation, check_room
from roundhouse.triton.metrics import Metrics
from roundhouse.triton.stream import Form, Job

STOPPING = "the server is stopping and takes no new requests; send it to another server, or again in a while"
DECOUPLE = "Set serving.decoupled of the deployment to true."
NOT_DECOUPLED = f"Streaming is only supported if model is deployed using decoupled mode. {DECOUPLE}"  # upstream's words


class Settings:
    """What `initialize` gets: the model's config.pbtxt, its name, its instance."""

    def __init__(self, args: Mapping[str, str]) -> None:
        command = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
        self.server_pid = server_of(command, os.getppid())
        # Triton's stub may wait for ever for a server that was killed.
        when_gone(self.server_pid, OUTLIVE_SECONDS, lambda: os._exit(1))
        config = json.loads(args["model_config"])
        self.name: str = args["model_name"]
        self.version: str = args["model_version"]
        self.instance: str = args["model_instance_name"]
        self.decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        repository = Path(args["model_repository"]).parent  # Triton names the model's own folder
        self.deployment_path: Path = (repository / self._parameters["deployment"]).resolve()
        self.deployment = deployment.load(self.deployment_path)

    def flag(self, name: str) -> bool:
        """A parameter that says true or false. Raises ValueError if it says anything else."""
        value = self._parameters[name].lower()
        if value not in ("true", "false"):
            raise ValueError(f"parameter {name} of model {self.name}: {value!r} is not allowed; say true or false")
        return bool(value == "true")

    def tokenizer(self, *, encodes: bool) -> Tokenizer:
        """`encodes`: this model encodes prompts."""
        model = self.deployment.model
        tokenizer = Tokenizer.load(model.tokenizer or model.path, trust_remote_code=model.trust_remote_code)
        if encodes and not tokenizer.hasten():
            backend.log_warning(NOT_HASTENED)
        return tokenizer


class StreamingModel:
    """A Python model in front of the engine: requests become jobs, the front answers them."""

    def initialize(self, args: Mapping[str, str]) -> None:
        settings = Settings(args)
        self.decoupled = settings.decoupled
        self.echo = settings.flag("exclude_input_in_output") is False
        self.tokenizer = settings.tokenizer(encodes=self.encodes)
        self.configure(settings)
        client = EngineClient(settings.deployment_path, settings.instance, settings.server_pid, log=backend.log_info)
        self.info = client.start()
        folder = runtime_dir(settings.server_pid)
        self._draining = folder / DRAINING
        detokenizer = Detokenizer(self.tokenizer, self.skip_special_tokens)
        if not detokenizer.incremental:
            backend.log_warning("the tokenizer's decoder is of an unknown kind: all text comes with the last chunk")
        self.metrics = Metrics(
            pb_utils,
            settings.name,
            settings.version,
            gauges=settings.name == "tensorrt_llm" and settings.instance.endswith("_0"),
        )
        self.front = Front(
            client,
            detokenizer,
            self.metrics,
            folder=folder,
            number=os.getpid(),
            fronts=settings.deployment.fronts.tensorrt_llm,
            responses_per_second=settings.deployment.fronts.responses_per_second,
            log=backend.log_warning,
        )

    skip_special_tokens = True
    encodes = False  # prompts come as text

    def configure(self, settings: Settings) -> None:
        """Read parameters that only this model has."""

    def form_of(self, tensors: Mapping[str, Array]) -> Form:
        raise NotImplementedError

    def labels(self, form: Form) -> Mapping[str, str]:
        """What the client calls a field, where it differs."""
        return {}

    def fields_of(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        """The tensors by field name."""
        return tensors

    def parse(self, fields: Fields, form: Form) -> Generation:
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = backend.TritonSender(request)
            try:
                self._accept(request, sender)
            except RequestError as error:
                self.metrics.rejected()
                sender.fail(error.as_error(), final=True)
            except Exception as error:
                backend.log_warning(f"unexpected error with a request: {described(error)}")
                sender.fail(Error(ErrorCode.INTERNAL, f"unexpected error: {error}"), final=True)

    def finalize(self) -> None:
        self.front.close()
        self.metrics.close()

    def _accept(self, request: Any, sender: backend.TritonSender) -> None:
        arrival_ns = time.monotonic_ns()
        tensors = backend.inputs(request)
        if self.handle_stop(tensors, request, sender):
            return
        if self._draining.exists():
            raise RequestError(ErrorCode.UNAVAILABLE, STOPPING)
        timeout = timeout_of(*backend.timeouts(request))
        form = self.form_of(tensors)
        batch = batch_of(self.fields_of(tensors), labels=self.labels(form))
        if len(batch) > 1 and not self.decoupled:
            refuse("Batch size > 1 requires the model to be deployed using decoupled mode; send one prompt a request")
        generations: list[Generation | None] = []
        errors: list[Error] = []
        for index, fields in enumerate(batch):
            try:
                generations.append(self._checked(fields, form))
            except RequestError as error:
                if len(batch) == 1:
                    raise
                generations.append(None)
                errors.append(Error(error.code, f"prompt {index} of the batch: {error.message}"))
        check_room(generations, self.info)
        for number, refused in enumerate(errors, start=1):
            self.metrics.rejected()
            sender.fail(refused, final=number == len(batch))
        if len(errors) < len(batch):
            deadline_ns = deadline_of(arrival_ns, timeout)
            self.front.submit(Job(generations, sender, form, arrival_ns, request.request_id(), deadline_ns))

    def _checked(self, fields: Fields, form: Form) -> Generation:
        if not self.decoupled:
            if fields.flag("stream"):
                refuse(f"{fields.label('stream')}: {NOT_DECOUPLED}")
            if (fields.integer("num_return_sequences") or 1) > 1:
                refuse(f"num_return_sequences: more than 1 needs a model deployed using decoupled mode. {DECOUPLE}")
        return self.parse(fields, form)

    def handle_stop(self, tensors: Mapping[str, Array], request: Any, sender: backend.TritonSender) -> bool:
        """Whether the request was an order to stop another one, and is answered."""
        return False
