"""The model `tensorrt_llm_bls`: text in, text out, the three stages of the ensemble fused into one hop."""

from __future__ import annotations

from collections.abc import Mapping

from roundhouse.triton.fields import Array, Fields
from roundhouse.triton.generation import Generation, from_text
from roundhouse.triton.model import Settings, StreamingModel
from roundhouse.triton.stream import Form


class TritonPythonModel(StreamingModel):
    encodes = True

    def configure(self, settings: Settings) -> None:
        self._special_tokens = settings.flag("add_special_tokens")
        self.skip_special_tokens = settings.flag("skip_special_tokens")

    def form_of(self, tensors: Mapping[str, Array]) -> Form:
        return Form.TEXT

    def parse(self, fields: Fields, form: Form) -> Generation:
        return from_text(fields, self.tokenizer, self.info, special_tokens=self._special_tokens, echo=self.echo)
