"""Text to token ids and back: one tokenizer per process, on Rust libraries alone where the model folder allows it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from roundhouse.text.fast_encoder import FastEncoder, fast_encoder
from roundhouse.text.tokenizer_files import NAMED_TOKENS, TokenizerSettings, load_backend, read_settings

NOT_HASTENED = "fastokens cannot stand in for this tokenizer: tokenising takes ten times as long"


class Tokenizer:
    """A model's tokenizer. Safe to share between threads; what it gives never changes.

    Attributes:
        backend: the `tokenizers.Tokenizer` underneath. vocab_size: number of ids, added tokens included.
        eos_token_id: the tokenizer's EOS, or else the first of the model's end ids, or None. pad_token_id: the
        padding id; EOS where there is none, as upstream has it; 0 where there is no EOS either. end_ids: every id
        that ends an answer: EOS first, then those of `generation_config.json` (or of `config.json`). longest_token:
        characters of the longest token; no text has fewer tokens than its length divided by this.
    """

    def __init__(self, backend: RustTokenizer, settings: TokenizerSettings) -> None:
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        # Here, and not when it is asked for: the first request would wait for it.
        self.longest_token: int = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        eos = self._named_id(settings, "eos_token")
        pad = self._named_id(settings, "pad_token")
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((*(() if eos is None else (eos,)), *settings.end_ids)))
        self.eos_token_id: int | None = self.end_ids[0] if self.end_ids else None
        self.pad_token_id: int = pad if pad is not None else self.eos_token_id or 0
        self._settings = settings
        self._fast: FastEncoder | None = None

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> "Tokenizer":
        """Load the tokenizer of a model folder; nothing is downloaded.

        A `tokenizer.json` is used as it is, with the settings of the files beside it. Only a folder without one goes
        through `transformers`, which can convert the older formats; `trust_remote_code` matters only there.

        Raises:
            FileNotFoundError: `folder` is not a folder.
            ValueError: no tokenizer, a broken file, or a tokenizer that has no Rust implementation.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"tokenizer folder {folder} does not exist")
        settings = read_settings(folder)
        if (folder / "tokenizer.json").is_file():
            return cls(load_backend(folder / "tokenizer.json", settings), settings)
        return cls._convert(folder, settings, trust_remote_code)

    @classmethod
    def _convert(cls, folder: Path, settings: TokenizerSettings, trust_remote_code: bool) -> "Tokenizer":
        from transformers import AutoTokenizer  # takes seconds: only for those who need it

        try:
            converted = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # whatever a converter of an old format may raise
            raise ValueError(f"no tokenizer.json in {folder}, and transformers cannot load it: {error}") from error
        backend = getattr(converted, "backend_tokenizer", None)
        if not isinstance(backend, RustTokenizer):
            raise ValueError(
                f"the tokenizer in {folder} ({type(converted).__name__}) is Python code without a Rust implementation; "
                "convert it to a tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        names = {name: str(token) for name in NAMED_TOKENS if (token := getattr(converted, name, None))}
        return cls(backend, replace(settings, named_tokens=names))

    def _named_id(self, settings: TokenizerSettings, name: str) -> int | None:
        token = settings.named_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """The tokens that leave no text in an answer, with their ids."""
        return {token.content: id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._settings.chat_templates

    def hasten(self) -> bool:
        """Spend a moment and some memory now so that `encode` takes a fraction of its time; it gives the same.

        Returns whether that is possible for this tokenizer: see `fast_encoder`.
        """
        self._fast = fast_encoder(self.backend)
        return self._fast is not None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text are parsed as such, as upstream does.

        `add_special_tokens`: whether to add what the tokenizer puts around a prompt (BOS, mostly).
        """
        if self._fast is not None:
            with suppress(ValueError):  # fastokens ends a search that goes on and on, which few texts can bring about
                return self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        # "fast" leaves out the character offsets, which nobody asks for here.
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`: the truth that streamed chunks add up to. Ids outside the vocabulary add nothing.

        Raises:
            OverflowError: a negative id.
        """
        text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Prompt text of a chat, by the model's own Jinja template in `transformers`' sandbox.

        The text already has its BOS: encode it without special tokens. `variables` go to the template
        (`enable_thinking=False`).

        Raises:
            ValueError: the model has no chat template, or its template refuses these messages.
        """
        templates = self._settings.chat_templates
        template = templates.get("tool_use") if tools else None
        template = template or templates.get("default")
        if template is None:
            raise ValueError("the model has no chat template: send a finished prompt, or add a chat_template.jinja")
        # Half a second to import: only where chats are served.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **{**self._settings.named_tokens, **variables},
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return str(rendered[0][0])
