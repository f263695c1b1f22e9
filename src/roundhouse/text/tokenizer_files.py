"""What a model folder says about its tokenizer, read without importing `transformers`.

`import transformers` takes about two seconds in every process, and its tokenizer classes rebuild some tokenizers from
their vocabulary instead of using `tokenizer.json`; the file itself is both faster and the better truth. What
`transformers` adds to it from the neighbouring files (special tokens, BOS and EOS rules, end ids, chat templates) is
read here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer

# The tokenizer classes that put BOS and EOS around a prompt by the flags of tokenizer_config.json, whatever
# tokenizer.json says; DeepSeek's models rely on it. Others ignore the flags. (transformers 5 ignores them for all.)
_CLASSES_WITH_BOS_FLAGS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The tokenizer's settings that stand beside `tokenizer.json`.

    `named_tokens`: `bos_token` and so on -> the token's text. `add_bos_token` / `add_eos_token`: None when it is for
    `tokenizer.json` to say. `end_ids`: the model's own end ids, without the tokenizer's EOS.
    `chat_templates`: name -> Jinja source; the usual one is called `default`.
    """

    named_tokens: Mapping[str, str]
    extra_special_tokens: tuple[str, ...]
    added_tokens: tuple[AddedToken, ...]
    add_bos_token: bool | None
    add_eos_token: bool | None
    end_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the settings of the tokenizer in `folder`; every file is optional.

    Raises:
        ValueError: a file is not a JSON object; the message names it.
    """
    config = _read_json(folder / "tokenizer_config.json")
    flags_count = str(config.get("tokenizer_class")).removesuffix("Fast") in _CLASSES_WITH_BOS_FLAGS
    # The older file only fills in what tokenizer_config.json does not say.
    tokens = _read_json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
    return TokenizerSettings(
        named_tokens={name: _content(tokens[name]) for name in NAMED_TOKENS if tokens.get(name)},
        extra_special_tokens=tuple(
            _content(token)
            for key in ("additional_special_tokens", "extra_special_tokens")
            for token in _values(tokens.get(key))
        ),
        added_tokens=tuple(_added_token(spec) for _, spec in _in_id_order(config.get("added_tokens_decoder"))),
        add_bos_token=config.get("add_bos_token") if flags_count else None,
        add_eos_token=config.get("add_eos_token") if flags_count else None,
        end_ids=_end_ids(folder),
        chat_templates=_chat_templates(folder, config.get("chat_template")),
    )


def load_backend(file: Path, settings: TokenizerSettings) -> RustTokenizer:
    """Load `tokenizer.json` and give it the settings that stand beside it.

    Raises:
        ValueError: the file cannot be parsed, or BOS/EOS are to be added but not named.
    """
    try:
        backend = RustTokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"{file} is not a tokenizer that `tokenizers` can read: {error}") from error
    # Left-overs of training: they would cut or pad prompts in silence.
    backend.no_truncation()
    backend.no_padding()
    _add_missing_tokens(backend, settings)
    if settings.add_bos_token is not None or settings.add_eos_token is not None:
        backend.post_processor = _bos_eos_processor(backend, settings)
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _values(tokens: Any) -> Iterable[Any]:
    return tokens.values() if isinstance(tokens, dict) else tokens or ()


def _in_id_order(added_tokens_decoder: Any) -> list[tuple[int, Any]]:
    return sorted((int(token_id), spec) for token_id, spec in (added_tokens_decoder or {}).items())


def _added_token(spec: Mapping[str, Any]) -> AddedToken:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(spec["content"], **{flag: spec[flag] for flag in flags if flag in spec})


def _end_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        ids = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def _chat_templates(folder: Path, inline: Any) -> dict[str, str]:
    templates = {"default": inline} if isinstance(inline, str) else {t["name"]: t["template"] for t in inline or ()}
    files = [("default", folder / "chat_template.jinja")]
    files += [(file.stem, file) for file in sorted(folder.glob("additional_chat_templates/*.jinja"))]
    return templates | {name: file.read_text(encoding="utf-8") for name, file in files if file.is_file()}


def _add_missing_tokens(backend: RustTokenizer, settings: TokenizerSettings) -> None:
    present = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    for token in settings.added_tokens:
        if token.content not in present:
            backend.add_tokens([token])
            present[token.content] = token.special
    for content in (*settings.named_tokens.values(), *settings.extra_special_tokens):
        if not present.get(content):
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _bos_eos_processor(backend: RustTokenizer, settings: TokenizerSettings) -> processors.TemplateProcessing:
    added = []
    for wanted, name in ((settings.add_bos_token, "bos_token"), (settings.add_eos_token, "eos_token")):
        if wanted and name not in settings.named_tokens:
            raise ValueError(f"tokenizer_config.json sets add_{name} to true, but names no {name}")
        added.append(settings.named_tokens[name] if wanted else None)
    bos, eos = added
    return processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in added if token],
    )
