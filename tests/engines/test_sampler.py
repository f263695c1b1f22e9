"""The embedded engine's sampler against a plain reference: the same distribution, the same tokens left over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from roundhouse.engine.embedded.sampler import Sampler
from roundhouse.engine.protocol import Sampling
from roundhouse.engine.scheduler import Sequence
from tests.engines.conftest import GREEDY, request

VOCAB_SIZE = 50
DRAWS = 20_000


def sequences(count: int, sampling: Sampling, generated: tuple[int, ...] = (), **fields: object) -> list[Sequence]:
    """`count` sequences of one kind, each in a slot of its own; seeds differ."""
    made = []
    for slot in range(count):
        one = request(slot, prompt=(3, 4, 5, 4), sampling=sampling, **fields)
        made.append(Sequence(one, [*one.prompt], slot=slot))
    return made


def new_sampler(rows: int, vocab_size: int = VOCAB_SIZE) -> Sampler:
    return Sampler(rows, 64, vocab_size)


def row(seed: int = 0, vocab_size: int = VOCAB_SIZE, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab_size) * spread).astype(np.float32)


def repeated(logits: np.ndarray, rows: int) -> np.ndarray:
    return np.repeat(logits[None], rows, axis=0)


def choose_once(logits: np.ndarray, sampling: Sampling, **fields: object) -> int:
    tokens, _ = new_sampler(1, len(logits)).choose(logits[None].copy(), sequences(1, sampling, **fields))
    return tokens[0]


def generate(sampler: Sampler, sequence: Sequence, rows: list[np.ndarray]) -> list[int]:
    for logits in rows:
        (token,), _ = sampler.choose(logits[None].copy(), [sequence])
        sequence.tokens.append(token)
    return sequence.tokens[sequence.prompt_len :]


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(), []),
        (Sampling(temperature=0.5), []),
        (Sampling(temperature=3.0), []),
        (Sampling(top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
        (Sampling(temperature=1.7, top_k=20, top_p=0.8), [TopKLogitsWarper(20), TopPLogitsWarper(0.8)]),
        (Sampling(top_k=1000, top_p=0.999), [TopPLogitsWarper(0.999)]),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_reference(sampling: Sampling, warpers: list[object]) -> None:
    logits = row()
    scores = torch.tensor(logits)[None] / sampling.temperature
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)[0].numpy()
    tokens, _ = new_sampler(DRAWS).choose(repeated(logits, DRAWS), sequences(DRAWS, sampling))
    counts = np.bincount(tokens, minlength=VOCAB_SIZE)
    assert not counts[expected == 0].any()
    wanted = DRAWS * expected
    rare = wanted < 5  # one draw of a very rare token would outweigh all others: they count as one
    drawn, wanted = (np.append(values[~rare], values[rare].sum()) for values in (counts, wanted))
    drawn, wanted = drawn[wanted > 1], wanted[wanted > 1]
    chi_squared = ((drawn - wanted) ** 2 / wanted).sum()
    assert chi_squared < 2.5 * len(wanted) + 15  # the mean is the number of classes; this is many sigmas above


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("vocab_size", [7, 1000, 30_000])
def test_top_k_and_top_p_keep_the_same_tokens_as_the_reference(seed: int, vocab_size: int) -> None:
    chance = np.random.default_rng(seed)
    logits = row(seed, vocab_size, spread=float(chance.choice([0.01, 1.0, 10.0])))
    k, p = int(chance.integers(2, vocab_size)), float(chance.uniform(0.05, 0.98))
    warpers = LogitsProcessorList([TopKLogitsWarper(k), TopPLogitsWarper(p)])
    kept = warpers(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None])[0].isfinite().numpy()
    # the least likely token that is kept must be reachable, the most likely one that is dropped must not be
    sampler = new_sampler(1, vocab_size)
    ours = np.flatnonzero(_kept(sampler, logits, Sampling(top_k=k, top_p=p)))
    assert abs(len(ours) - kept.sum()) <= 1 + vocab_size // 5000  # float32 sums differ in their last digits
    order = np.argsort(-logits, kind="stable")
    assert set(ours) == set(order[: len(ours)])


def _kept(sampler: Sampler, logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    from roundhouse.engine.embedded import sampler as module

    sampler.choose(logits[None].copy(), sequences(1, sampling))
    shifted = logits - logits.max()
    weights = np.ones_like(shifted)
    border = module._border(shifted, weights, np.float32(sampling.top_k), np.float32(-80))
    mass = module._probabilities(shifted, border, weights)
    border = module._border(shifted, weights, np.float32(sampling.top_p * mass), border)
    return shifted >= border


def test_tiny_top_p_is_greedy() -> None:
    for seed in range(20):
        logits = row(seed)
        assert choose_once(logits, Sampling(top_p=1e-6)) == logits.argmax()


def test_tiny_and_huge_temperature() -> None:
    logits = row()
    assert choose_once(logits, Sampling(temperature=1e-30)) == logits.argmax()
    tokens, _ = new_sampler(DRAWS).choose(repeated(logits, DRAWS), sequences(DRAWS, Sampling(temperature=1e30)))
    assert np.bincount(tokens, minlength=VOCAB_SIZE).min() > DRAWS / VOCAB_SIZE / 2


def test_equal_logits_are_equally_likely() -> None:
    logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
    tokens, _ = new_sampler(DRAWS).choose(repeated(logits, DRAWS), sequences(DRAWS, Sampling(top_k=3, top_p=0.5)))
    assert np.bincount(tokens, minlength=VOCAB_SIZE).min() > DRAWS / VOCAB_SIZE / 2  # ties at the border are kept


def test_draws_of_one_request_are_independent() -> None:
    sequence = sequences(1, Sampling(seed=5))[0]
    sampler = new_sampler(1)
    logits = np.zeros(2, dtype=np.float32)
    bits = np.array(generate(sampler, sequence, [logits] * 2000))
    assert 900 < bits.sum() < 1100
    assert 430 < (bits[1:] & bits[:-1]).sum() < 570


def test_seeds_next_to_each_other_are_independent() -> None:
    logits = np.zeros(2, dtype=np.float32)
    bits = np.array([choose_once(logits, Sampling(seed=seed)) for seed in range(2000)])
    assert 900 < bits.sum() < 1100
    assert 430 < (bits[1:] & bits[:-1]).sum() < 570


def test_noise_does_not_depend_on_the_slot_or_the_other_rows() -> None:
    logits = [row(seed) for seed in range(30)]
    alone = generate(new_sampler(1), sequences(1, Sampling(seed=9))[0], logits)
    sampler, others = new_sampler(4), sequences(4, Sampling())
    mine = Sequence(request(0, prompt=(8,), sampling=Sampling(seed=9)), [8], slot=2)
    others[2] = mine
    for each in logits:
        tokens, _ = sampler.choose(repeated(each, 4), others)
        for sequence, token in zip(others, tokens, strict=True):
            sequence.tokens.append(token)
    assert mine.tokens[1:] == alone


def test_repetition_penalty_counts_the_prompt() -> None:
    logits = [row(seed, spread=0.5) for seed in range(40)]
    ours = generate(new_sampler(1), sequences(1, Sampling(temperature=0.0, repetition_penalty=1.8))[0], logits)
    reference, processor = [3, 4, 5, 4], RepetitionPenaltyLogitsProcessor(1.8)
    for each in logits:
        reference.append(int(processor(torch.tensor([reference]), torch.tensor(each)[None]).argmax()))
    assert ours == reference[4:]
    assert ours != [int(each.argmax()) for each in logits]


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (0.5, 0.3), (-0.5, -0.1)])
def test_presence_and_frequency_penalty_count_only_generated_tokens(presence: float, frequency: float) -> None:
    logits = [row(seed, vocab_size=8, spread=0.5) for seed in range(40)]
    sampling = Sampling(temperature=0.0, presence_penalty=presence, frequency_penalty=frequency)
    ours = generate(new_sampler(1, 8), sequences(1, sampling)[0], logits)
    counts, reference = np.zeros(8), []
    for each in logits:
        reference.append(int((each - presence * (counts > 0) - frequency * counts).argmax()))
        counts[reference[-1]] += 1
    assert ours == reference
    assert ours != [int(each.argmax()) for each in logits]


def test_log_probs_are_those_of_the_raw_logits() -> None:
    logits = row()
    expected = torch.tensor(logits).double().log_softmax(-1).numpy()
    for sampling in (GREEDY, Sampling(temperature=0.3, top_k=4, frequency_penalty=1.0, logit_bias={7: 3.0}, seed=1)):
        made = sequences(8, sampling, log_probs=True)
        tokens, log_probs = new_sampler(8).choose(repeated(logits, 8), made)
        assert log_probs is not None
        assert np.allclose(log_probs, expected[tokens], atol=1e-6)


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = repeated(row(), 6)
    logits[1, 3] = np.nan
    logits[2] = -np.inf
    logits[4, 0] = np.inf
    for sampling in (GREEDY, Sampling(), Sampling(top_k=3, top_p=0.5, repetition_penalty=1.1)):
        tokens, _ = new_sampler(6).choose(logits.copy(), sequences(6, sampling))
        assert [token == -1 for token in tokens] == [False, True, True, False, True, False]


def test_forbidden_tokens_are_never_drawn() -> None:
    allowed = {1, 30}
    bad_words = tuple((token,) for token in range(VOCAB_SIZE) if token not in allowed)
    for sampling in (Sampling(bad_words=bad_words), Sampling(bad_words=bad_words, temperature=1e30, top_p=0.99999)):
        tokens, _ = new_sampler(2000).choose(repeated(row(), 2000), sequences(2000, sampling))
        assert set(tokens) == allowed


def test_a_phrase_may_begin_in_the_prompt() -> None:
    logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
    logits[9] = 5
    banned = Sampling(temperature=0.0, bad_words=((5, 4, 9),))  # the prompt ends with 5, 4
    assert choose_once(logits, banned) != 9
    assert choose_once(logits, Sampling(temperature=0.0, bad_words=((4, 5, 9),))) == 9
