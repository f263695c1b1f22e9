"""What a client asks for, checked: from input tensors to the engine's requests. Pure functions, no Triton in here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from roundhouse.engine import checks
from roundhouse.engine.base import RequestError
from roundhouse.engine.protocol import EngineInfo, ErrorCode, Feature, Guide, Request, Retention, Sampling
from roundhouse.text.stop_words import decode_word_list, embedding_bias, word_ids
from roundhouse.text.tokenizer import Tokenizer
from roundhouse.triton import extras
from roundhouse.triton.fields import Fields, refuse, refuse_feature

# Field name -> tensor name of the `tensorrt_llm` model, where that differs from the ensemble's.
TENSORRT_LLM_NAMES = {
    "max_tokens": "request_output_len",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    "stream": "streaming",
    "stop_words": "stop_words_list",
    "bad_words": "bad_words_list",
}
GUIDE_KINDS = ("json", "json_schema", "regex", "ebnf_grammar")
MAX_SEQUENCES = 128  # samples of one prompt
MAX_WORDS = 1024  # stop words or bad words of one prompt
MAX_WORD_TOKENS = 16384  # tokens of all of them, where they come as ids
MAX_WORD_CHARACTERS = 65536  # characters of all of them, where they come as text


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One prompt and how it is to be answered.

    Attributes:
        request: what the engine gets; its `id` is 0, `engine_requests` numbers it.
        sequences: samples that are asked for (`num_return_sequences`).
        stop_words: token ids of each stop word.
        stream: answer in pieces. echo: put the prompt before an answer that is not streamed.
        perf_metrics, count_input, count_output: which optional outputs are asked for.
    """

    request: Request
    sequences: int = 1
    stop_words: tuple[tuple[int, ...], ...] = ()
    stream: bool = False
    echo: bool = False
    perf_metrics: bool = False
    count_input: bool = False
    count_output: bool = False

    def engine_requests(self) -> Iterator[Request]:
        """One engine request for each sample. Their ids are 0 still."""
        return self.request.samples(self.sequences)


def from_text(
    fields: Fields, tokenizer: Tokenizer, info: EngineInfo, *, special_tokens: bool, echo: bool
) -> Generation:
    """Of one prompt of `tensorrt_llm_bls`. `special_tokens`: add BOS; `echo`: the default.

    Raises RequestError.
    """
    text = prompt_text(fields, "text_input", tokenizer, info.max_seq_len)
    if fields.string("decoder_text_input"):
        refuse_feature(fields.label("decoder_text_input"), "the model is decoder-only: put the text into text_input")
    if fields.integer("num_draft_tokens"):
        reason = "the server drafts by itself where its deployment has `speculative`; leave it out"
        refuse_feature(fields.label("num_draft_tokens"), info.lacks.get(Feature.DRAFT_TOKENS, reason))
    if Feature.LOGIT_BIAS in info.lacks and any(fields.strings("embedding_bias_words")):
        extras.refuse_lacking(fields, "embedding_bias_words", Feature.LOGIT_BIAS, info)
    prompt = tokenizer.encode(text, add_special_tokens=special_tokens)
    bias = biased_words(fields, tokenizer, info.vocab_size)
    return _generation(
        fields,
        info,
        prompt=prompt,
        end_ids=_end_ids(fields, tokenizer, info, absent=tokenizer.end_ids),
        stop_words=[list(ids) for ids in words_of(fields, "stop_words", tokenizer)],
        bad_words=[list(ids) for ids in words_of(fields, "bad_words", tokenizer)],
        bias=_nonzero(bias),
        echo=echo,
    )


def from_tokens(fields: Fields, tokenizer: Tokenizer, info: EngineInfo, *, ensemble: bool, echo: bool) -> Generation:
    """Of one prompt of `tensorrt_llm`. `ensemble`: the prompt comes from preprocessing, not from a client.

    Raises RequestError.
    """
    for name in ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size"):
        if fields.array(name) is not None:
            extras.refuse_lacking(fields, name, Feature.LOOKAHEAD, info)
    for name in ("runtime_top_p_min", "runtime_top_p_decay", "runtime_top_p_reset_ids"):
        if fields.array(name) is not None:
            refuse_feature(fields.label(name), "top_p decay is not offered; leave it out")
    decoder_ids = fields.array("decoder_input_ids")
    if not ensemble and decoder_ids is not None and decoder_ids.size > 1:
        refuse_feature("decoder_input_ids", "the model is decoder-only: put the ids into input_ids")
    bias = fields.array("embedding_bias")
    if bias is not None and bias.size != info.vocab_size:
        refuse(f"embedding_bias: has {bias.size} values; it must have one for each of {info.vocab_size} token ids")
    return _generation(
        fields,
        info,
        prompt=_prompt_ids(fields, info.max_seq_len, sent="text_input" if ensemble else "input_lengths"),
        end_ids=_end_ids(fields, tokenizer if ensemble else None, info, absent=()),
        stop_words=_word_list(fields, "stop_words"),
        bad_words=_word_list(fields, "bad_words"),
        bias=_nonzero(bias),
        echo=echo,
        draft_tokens=extras.draft_tokens(fields, info),
        retention=extras.retention(fields, info),
    )


def prompt_text(fields: Fields, name: str, tokenizer: Tokenizer, max_seq_len: int | None) -> str:
    """The prompt. One that can never fit is refused before any time is spent on tokenising it.

    Raises RequestError.
    """
    text = fields.string(name)
    label = fields.label(name)
    if text is None:
        refuse(f"{label}: missing; send the prompt as one string")
    if not text:
        refuse(f"{label}: is empty; send a prompt of at least one character")
    if max_seq_len is not None and len(text) > max_seq_len * tokenizer.longest_token:
        refuse(f"{label}: {len(text)} characters cannot fit into max_seq_len {max_seq_len} tokens; shorten the prompt")
    return text


def words_of(fields: Fields, name: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token ids of each word of a list of strings; empty words are skipped. Raises RequestError."""
    return [ids for word in _words(fields, name) if (ids := word_ids(word, tokenizer))]


def biased_words(fields: Fields, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Logit bias FP32 `[vocab_size]` of embedding_bias_words and _weights, `[0]` without. Raises RequestError."""
    words = _words(fields, "embedding_bias_words")
    array = fields.array("embedding_bias_weights")
    weights = [] if array is None else array.reshape(-1).tolist()
    if words == [""] and not weights:
        words = []
    if not np.isfinite(weights).all():
        refuse(f"{fields.label('embedding_bias_weights')}: has a value that is not finite; send finite numbers")
    try:
        return embedding_bias(words, weights, tokenizer, vocab_size)
    except ValueError as error:
        refuse(str(error))


def _words(fields: Fields, name: str) -> list[str]:
    """A list of words, no longer than takes a moment to tokenise. Raises RequestError."""
    words = fields.strings(name)
    if len(words) > MAX_WORDS:
        refuse(f"{fields.label(name)}: has {len(words)} words; at most {MAX_WORDS} are allowed")
    if (characters := sum(map(len, words))) > MAX_WORD_CHARACTERS:
        refuse(f"{fields.label(name)}: has {characters} characters; at most {MAX_WORD_CHARACTERS} are allowed")
    return words


def check_room(generations: Sequence[Generation | None], info: EngineInfo) -> None:
    """Raises RequestError if one client request has more sequences than the engine can hold.

    Before they are opened: that many take the front's time from all others, only to be refused by the engine.
    """
    sequences = sum(generation.sequences for generation in generations if generation is not None)
    if sequences > info.max_batch_size + info.max_queue:
        raise RequestError(
            ErrorCode.QUEUE_FULL,
            f"Exceeds maximum queue size of {info.max_queue} waiting requests: it asks for {sequences} sequences, and "
            f"{info.max_batch_size} can run; ask for fewer, or raise limits.queue of the deployment",
        )


def _generation(
    fields: Fields,
    info: EngineInfo,
    *,
    prompt: Sequence[int],
    end_ids: tuple[int, ...],
    stop_words: list[list[int]],
    bad_words: list[list[int]],
    bias: dict[int, float],
    echo: bool,
    draft_tokens: tuple[int, ...] = (),
    retention: Retention | None = None,
) -> Generation:
    _refuse_unsupported(fields, info)
    max_tokens = fields.integer("max_tokens")
    if max_tokens is None:
        refuse(f"{fields.label('max_tokens')}: missing; say how many tokens may be generated")
    if max_tokens < 1:
        refuse(f"{fields.label('max_tokens')}: {max_tokens} is not allowed; it must be at least 1")
    sequences = fields.integer("num_return_sequences")
    sequences = 1 if sequences is None else sequences
    if not 1 <= sequences <= MAX_SEQUENCES:
        refuse(f"num_return_sequences: {sequences} is not allowed; it must be 1 to {MAX_SEQUENCES}")
    excluded = fields.flag("exclude_input_in_output")
    stream = bool(fields.flag("stream"))
    request = Request(
        id=0,
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        end_ids=end_ids,
        sampling=_sampling(fields, bad_words, bias),
        log_probs=bool(fields.flag("return_log_probs")),
        priority=fields.integer("priority") or 0,
        cache_salt=fields.string("cache_salt") or "",
        guide=_guide(fields),
        lora_id=extras.lora_id(fields, info),
        lora_weights=extras.lora_weights(fields, info),
        draft_tokens=draft_tokens,
        retention=retention,
    )
    checks.check(request, info)
    return Generation(
        request=request,
        sequences=sequences,
        stop_words=tuple(map(tuple, stop_words)),
        stream=stream,
        echo=not stream and (echo if excluded is None else not excluded),
        perf_metrics=bool(fields.flag("return_perf_metrics") or fields.flag("return_kv_cache_reuse_stats")),
        count_input=bool(fields.flag("return_num_input_tokens")),
        count_output=bool(fields.flag("return_num_output_tokens")),
    )


def _sampling(fields: Fields, bad_words: list[list[int]], bias: dict[int, float]) -> Sampling:
    temperature = fields.number("temperature")
    top_k = fields.integer("top_k") or 0
    top_p = fields.number("top_p")
    if top_p is not None and top_p <= 0:
        top_p = None  # the contract's: it counts as unset, as a top_k of 0 does
    if temperature is None and not top_k and top_p is None:
        temperature = 0.0  # TensorRT-LLM's default: who asks for no sampling gets none
    repetition = fields.number("repetition_penalty")
    fields.number("length_penalty")  # beams only; checked so that nonsense is not swallowed
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=1.0 if repetition is None else repetition,
        presence_penalty=fields.number("presence_penalty") or 0.0,
        frequency_penalty=fields.number("frequency_penalty") or 0.0,
        min_tokens=fields.one_of("min_tokens", "min_length") or 0,
        seed=fields.one_of("seed", "random_seed"),
        bad_words=tuple(map(tuple, bad_words)),
        logit_bias=bias,
    )


def _guide(fields: Fields) -> Guide | None:
    kind = fields.string("guided_decoding_guide_type")
    text = fields.string("guided_decoding_guide") or ""
    if kind is None:
        if text:
            refuse(f"guided_decoding_guide_type: missing; it says what the guide is: {', '.join(GUIDE_KINDS)}")
        return None
    if kind not in GUIDE_KINDS:
        refuse(f"guided_decoding_guide_type: {kind!r} is not allowed; it must be one of {', '.join(GUIDE_KINDS)}")
    if kind != "json" and not text:
        refuse(f"guided_decoding_guide: missing; the type {kind!r} needs it")
    return Guide(kind, text)


def _refuse_unsupported(fields: Fields, info: EngineInfo) -> None:
    beams = fields.integer("beam_width")
    if beams is not None and beams < 1:
        refuse(f"beam_width: {beams} is not allowed; it must be 1")
    if beams is not None and beams > 1:
        extras.refuse_lacking(fields, "beam_width", Feature.BEAM_SEARCH, info)
    if fields.flag("return_context_logits"):
        extras.refuse_lacking(fields, "return_context_logits", Feature.CONTEXT_LOGITS, info)
    if fields.flag("return_generation_logits"):
        extras.refuse_lacking(fields, "return_generation_logits", Feature.GENERATION_LOGITS, info)


def _end_ids(
    fields: Fields, tokenizer: Tokenizer | None, info: EngineInfo, *, absent: tuple[int, ...]
) -> tuple[int, ...]:
    """The ids that end an answer.

    An id outside the vocabulary means "never" (clients send 1048576). The tokenizer's EOS stands for all end ids of
    the model: the contract has room for one only, and Llama 3 has several.
    """
    end_id = fields.integer("end_id")
    if end_id is None:
        return absent
    if tokenizer is not None and end_id == tokenizer.eos_token_id:
        return tokenizer.end_ids
    return (end_id,) if 0 <= end_id < info.vocab_size else ()


def _prompt_ids(fields: Fields, max_seq_len: int, *, sent: str) -> list[int]:
    """`sent`: the input by which the client has sent a prompt that is too long."""
    array = fields.array("input_ids")
    if array is None:
        refuse("input_ids: missing or empty; send the token ids of the prompt, at least one")
    length = fields.integer("input_lengths")
    if length is None:
        refuse("input_lengths: missing; it says how many of input_ids are the prompt")
    if not 1 <= length <= array.size:
        refuse(
            f"input_lengths: {length} is not allowed; input_ids has {array.size} ids, so it must be 1 to {array.size}"
        )
    if length > max_seq_len:  # before it takes the memory of so many Python integers
        refuse(f"{sent}: the prompt's {length} tokens do not fit into max_seq_len {max_seq_len}; shorten the prompt")
    ids: list[int] = array.reshape(-1)[:length].tolist()
    return ids


def _word_list(fields: Fields, name: str) -> list[list[int]]:
    array = fields.array(name)
    if array is None:
        return []
    label = fields.label(name)
    if array.shape[-1] > MAX_WORD_TOKENS:
        refuse(f"{label}: has {array.shape[-1]} token ids; at most {MAX_WORD_TOKENS} are allowed")
    try:
        words = decode_word_list(array, label)
    except ValueError as error:
        refuse(str(error))
    if len(words) > MAX_WORDS:
        refuse(f"{label}: has {len(words)} words; at most {MAX_WORDS} are allowed")
    return words


def _nonzero(bias: np.ndarray[tuple[int], np.dtype[np.float32]] | None) -> dict[int, float]:
    if bias is None:
        return {}
    flat = bias.reshape(-1)
    return {int(token): float(flat[token]) for token in np.flatnonzero(flat)}
