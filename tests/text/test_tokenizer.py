"""Loading a model folder's tokenizer, and what it says about itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from roundhouse.text.tokenizer import Tokenizer

from .families import byte_level, tokenizer_of


def write(folder: Path, **files: Any) -> Path:
    """Write JSON files (`generation_config={...}`) into `folder`."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with a byte-level tokenizer.json and nothing else."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_lone_tokenizer_json_works(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.end_ids) == (None, 0, ())
    assert tokenizer.decode(tokenizer.encode("naïve 🦖", True)) == "naïve 🦖"


def test_special_tokens_in_a_prompt_are_parsed(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    ids = tokenizer.encode("<|im_start|>a", False)
    assert ids[0] == tokenizer.backend.token_to_id("<|im_start|>")
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a"


def test_a_batch_is_its_texts_one_by_one(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    texts = ["", "a b", "longer text 🦖"]
    assert tokenizer.encode_batch(texts, True) == [tokenizer.encode(text, True) for text in texts]
    assert tokenizer.encode_batch([], True) == []


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_pad_falls_back_to_eos(model: Path, eos: Any) -> None:
    tokenizer = Tokenizer.load(write(model, tokenizer_config={"eos_token": eos, "pad_token": None}))
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert tokenizer.end_ids == (1,)


def test_special_tokens_map_fills_in(model: Path) -> None:
    write(model, special_tokens_map={"eos_token": "<s>", "pad_token": "<s>"}, tokenizer_config={"eos_token": "</s>"})
    tokenizer = Tokenizer.load(model)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)


@pytest.mark.parametrize(
    ("files", "end_ids"),
    [
        ({"generation_config": {"eos_token_id": [2, 1, 7]}}, (1, 2, 7)),
        ({"generation_config": {"eos_token_id": 7}, "config": {"eos_token_id": 9}}, (1, 7)),
        ({"generation_config": {"temperature": 1.0}, "config": {"eos_token_id": 9}}, (1, 9)),
        ({"config": {"text_config": {"eos_token_id": [9]}}}, (1, 9)),
    ],
)
def test_every_end_id_of_the_model_counts(model: Path, files: dict[str, Any], end_ids: tuple[int, ...]) -> None:
    tokenizer = Tokenizer.load(write(model, tokenizer_config={"eos_token": "</s>"}, **files))
    assert tokenizer.end_ids == end_ids
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["<s>", "a"]),
        ({"add_bos_token": True}, ["<s>", "a"]),
        ({"add_bos_token": False}, ["a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
        ({"add_eos_token": True}, ["a", "</s>"]),
    ],
)
def test_flags_decide_on_bos_and_eos(
    tmp_path: Path, tokenizer_class: str, flags: dict[str, bool], expected: list[str]
) -> None:
    tokenizer = Tokenizer.load(with_bos(tmp_path, tokenizer_class=tokenizer_class, **flags))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a", True)] == expected
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a", False)] == ["a"]


def test_other_classes_leave_bos_to_tokenizer_json(tmp_path: Path) -> None:
    folder = with_bos(tmp_path, tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False)
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("a", True)] == ["<s>", "a"]


def with_bos(folder: Path, **config: Any) -> Path:
    """A model whose tokenizer.json puts a BOS before the prompt."""
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **config})


def test_a_missing_bos_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="sets add_bos_token to true, but names no bos_token"):
        Tokenizer.load(write(model, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))


def test_truncation_and_padding_of_training_are_dropped(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("X-Y", False)) == 3


def test_tokens_of_tokenizer_config_are_added(model: Path) -> None:
    size = byte_level().get_vocab_size()
    added = {str(size): {"content": "<|end|>", "special": True}, str(size + 1): {"content": "<call>", "special": False}}
    config = {"added_tokens_decoder": added, "eos_token": "<|end|>", "additional_special_tokens": ["<|tool|>"]}
    tokenizer = Tokenizer.load(write(model, tokenizer_config=config))
    assert tokenizer.eos_token_id == size
    assert tokenizer.encode("<|end|><call><|tool|>", False) == [size, size + 1, size + 2]
    assert tokenizer.decode([size, size + 1, size + 2]) == "<call>"


def test_loads_without_transformers(model: Path) -> None:
    """It takes seconds to import, in each process."""
    code = (
        "import sys; from roundhouse.text.tokenizer import Tokenizer;"
        f"Tokenizer.load({str(model)!r}); sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"LC_ALL": "C"})


def test_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = with_bos(tmp_path, tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>")
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello  world", " ça va 🦖", "<|im_start|>x<pad>"):
        assert ours.encode(text, True) == theirs(text)["input_ids"]
        assert ours.encode(text, False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.vocab_size, ours.eos_token_id, ours.pad_token_id) == (
        len(theirs),
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


def test_older_formats_are_converted(tmp_path: Path) -> None:
    word_piece = tokenizer_of("word_piece")
    vocabulary = sorted(word_piece.backend.get_vocab().items(), key=lambda item: item[1])
    extra = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*(token for token, _ in vocabulary), *extra]), encoding="utf-8")
    write(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": False})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("lazy dog", False) == word_piece.encode("lazy dog", False)
    assert tokenizer.pad_token_id == len(vocabulary)


def test_a_tokenizer_in_python_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})
    with pytest.raises(ValueError, match=r"ByT5Tokenizer.* is Python code without a Rust implementation"):
        Tokenizer.load(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no tokenizer\.json in .* transformers cannot load it"):
        Tokenizer.load(tmp_path)
    write(tmp_path, tokenizer={"version": "1.0"})
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "holds a JSON list")])
def test_a_broken_file_is_named(model: Path, content: str, message: str) -> None:
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"generation_config\.json {message}"):
        Tokenizer.load(model)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' ~ m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}[{{ tools | length }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)
CHAT = [{"role": "user", "content": "hé"}]


def test_chat_template(model: Path) -> None:
    tokenizer = Tokenizer.load(write(model, tokenizer_config={"bos_token": "<s>", "chat_template": TEMPLATE}))
    assert tokenizer.apply_chat_template(CHAT) == "<s><user>hé<assistant>"
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=False, mood="!") == "<s><user>hé!"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.apply_chat_template(CHAT, tools=tools) == "<s><user>hé[1]<assistant>"
    with pytest.raises(ValueError, match="refuses these messages: no role robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}])


def test_chat_template_files_win(model: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old tools"}]
    write(model, tokenizer_config={"chat_template": named})
    assert Tokenizer.load(model).apply_chat_template(CHAT, tools=[{}]) == "old tools"
    (model / "chat_template.jinja").write_text("né", encoding="utf-8")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("new tools", encoding="utf-8")
    assert Tokenizer.load(model).apply_chat_template(CHAT) == "né"
    assert Tokenizer.load(model).apply_chat_template(CHAT, tools=[{}]) == "new tools"


def test_no_chat_template_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.load(model).apply_chat_template(CHAT)


def test_a_chat_template_stays_in_its_sandbox(model: Path) -> None:
    template = "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}"
    tokenizer = Tokenizer.load(write(model, tokenizer_config={"chat_template": template}))
    with pytest.raises(ValueError, match="refuses these messages"):
        tokenizer.apply_chat_template(CHAT)
