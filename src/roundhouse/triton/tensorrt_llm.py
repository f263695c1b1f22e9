"""The model `tensorrt_llm`: token ids in, token ids out. Called by clients, or as a step of the ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roundhouse.triton import backend
from roundhouse.triton.fields import Array, Fields, batch_of, refuse
from roundhouse.triton.generation import TENSORRT_LLM_NAMES, Generation, from_tokens
from roundhouse.triton.model import StreamingModel
from roundhouse.triton.stream import Form

_FIELDS = {tensor: field for field, tensor in TENSORRT_LLM_NAMES.items()}


class TritonPythonModel(StreamingModel):
    def form_of(self, tensors: Mapping[str, Array]) -> Form:
        return Form.STEP if "acknowledge" in tensors else Form.TOKENS

    def labels(self, form: Form) -> Mapping[str, str]:
        return TENSORRT_LLM_NAMES if form is Form.TOKENS else {}

    def fields_of(self, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        return {_FIELDS.get(name, name): array for name, array in tensors.items()}

    def parse(self, fields: Fields, form: Form) -> Generation:
        return from_tokens(fields, self.tokenizer, self.info, ensemble=form is Form.STEP, echo=self.echo)

    def handle_stop(self, tensors: Mapping[str, Array], request: Any, sender: backend.TritonSender) -> bool:
        if "stop" not in tensors or not batch_of({"stop": tensors["stop"]})[0].flag("stop"):
            return False
        request_id = request.request_id()
        if not request_id:
            refuse("stop: Trying to stop a request but request ID is not provided; send the id of that request")
        self.front.stop(request_id)
        sender.send({}, final=True)
        return True
